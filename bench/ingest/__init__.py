"""How fast the ledger takes what is used: events and calls, beside bare Postgres."""
