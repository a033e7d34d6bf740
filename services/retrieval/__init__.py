"""A tenant's knowledge: its documents in Postgres, their vectors in a Qdrant collection of its own."""
