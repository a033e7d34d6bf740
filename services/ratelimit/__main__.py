"""`python -m services.ratelimit [serve]`. Redis has no schema: there is nothing to migrate."""

from services.kernel.command import main
from services.ratelimit.app import build
from services.ratelimit.settings import RatelimitSettings

if __name__ == "__main__":
    main(RatelimitSettings, build)
