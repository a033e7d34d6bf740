"""`python -m services.tenant [serve|migrate]`."""

from services.kernel.command import main
from services.tenant.app import build, migrate_schema
from services.tenant.settings import TenantSettings

if __name__ == "__main__":
    main(TenantSettings, build, migrate_schema)
