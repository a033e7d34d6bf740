"""`python -m services.tenant [serve|migrate|new-context-key|context-public-key]`."""

from services.kernel.command import main
from services.tenant.app import build, context_public_key, migrate_schema, new_context_key
from services.tenant.settings import TenantSettings

if __name__ == "__main__":
    main(TenantSettings, build, migrate_schema, {"new-context-key": new_context_key, "context-public-key": context_public_key})
