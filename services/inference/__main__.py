"""`python -m services.inference [serve|migrate]`."""

from services.inference.app import build, migrate_schema
from services.inference.settings import InferenceSettings
from services.kernel.command import main

if __name__ == "__main__":
    main(InferenceSettings, build, migrate_schema)
