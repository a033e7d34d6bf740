"""`python -m services.tenant [serve|migrate|new-context-key|context-public-key]`.

`verify-receipt FILE PUBLIC_KEY` needs neither settings nor stores.
"""

import sys

from services.kernel.command import main
from services.tenant.app import build, context_public_key, migrate_schema, new_context_key
from services.tenant.receipt import check_file
from services.tenant.settings import TenantSettings

if __name__ == "__main__":
    if sys.argv[1:2] == ["verify-receipt"]:
        sys.exit(check_file(sys.argv[2:]))
    main(TenantSettings, build, migrate_schema, {"new-context-key": new_context_key, "context-public-key": context_public_key})
