"""`python -m services.tenant [serve|migrate]`, and `verify-receipt FILE PUBLIC_KEY`, which needs neither settings nor stores."""

import sys

from services.kernel.command import main
from services.tenant.app import build, migrate_schema
from services.tenant.receipt import check_file
from services.tenant.settings import TenantSettings

if __name__ == "__main__":
    if sys.argv[1:2] == ["verify-receipt"]:
        sys.exit(check_file(sys.argv[2:]))
    main(TenantSettings, build, migrate_schema)
