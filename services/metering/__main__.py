"""`python -m services.metering [serve|migrate]`."""

from services.kernel.command import main
from services.metering.app import build, migrate_schema
from services.metering.settings import MeteringSettings

if __name__ == "__main__":
    main(MeteringSettings, build, migrate_schema)
