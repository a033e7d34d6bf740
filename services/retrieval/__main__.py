"""`python -m services.retrieval [serve|migrate]`."""

from services.kernel.command import main
from services.retrieval.app import build, migrate_schema
from services.retrieval.settings import RetrievalSettings

if __name__ == "__main__":
    main(RetrievalSettings, build, migrate_schema)
