"""`tenantctl`: usage, invoices and the ledger from a command line, over the same contracts that product code calls."""
