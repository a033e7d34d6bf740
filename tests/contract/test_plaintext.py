"""No service serves plaintext where another machine could hear it."""

import asyncio
import os
import sys

import pytest
from pydantic import ValidationError

from devstack.state import SERVICES
from services.inference.settings import InferenceSettings
from services.kernel.settings import ServiceSettings
from services.metering.settings import MeteringSettings
from services.ratelimit.settings import RatelimitSettings
from services.retrieval.settings import RetrievalSettings
from services.tenant.settings import TenantSettings

SETTINGS: tuple[type[ServiceSettings], ...] = (TenantSettings, RatelimitSettings, InferenceSettings, RetrievalSettings, MeteringSettings)
BEYOND_LOOPBACK = ("0.0.0.0:7401", "[::]:7401", "10.0.0.1:7401", "tenant.internal:7401", ":7401")
FILES = {"tls_cert_file": "/c/tls.crt", "tls_key_file": "/c/tls.key", "tls_ca_file": "/c/ca.crt"}


def test_all_five_are_here() -> None:
    """The services whose settings are tried are all there are."""
    assert {settings.service_name for settings in SETTINGS} == set(SERVICES)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.service_name)
def test_beyond_loopback_only_with_tls(settings: type[ServiceSettings]) -> None:
    """Without all three files an address that others reach is refused, with words that name the way out; with them it is taken."""
    for address in BEYOND_LOOPBACK:
        with pytest.raises(ValidationError, match="TENANTRY_TLS_CERT_FILE"):
            settings(listen_address=address)
        for missing in FILES:
            with pytest.raises(ValidationError, match="TENANTRY_TLS_CERT_FILE"):
                settings(listen_address=address, **{name: path for name, path in FILES.items() if name != missing})
        assert settings(listen_address=address, **FILES).tls_enabled
    for address in ("127.0.0.1:0", "[::1]:0", "localhost:0"):
        assert not settings(listen_address=address).tls_enabled


@pytest.mark.parametrize("service", SERVICES)
async def test_the_process_ends_at_once_with_a_sentence(service: str) -> None:
    """Started in plaintext on every address, it exits with 2, names the settings and prints no traceback."""
    code, err = await _serve(service, TENANTRY_LISTEN_ADDRESS="0.0.0.0:0")
    assert (code, "TENANTRY_TLS_CERT_FILE" in err, "Traceback" in err) == (2, True, False), err


async def test_files_that_are_not_there_are_a_sentence_too() -> None:
    """Certificate files that cannot be read end the start with 2 and the name of the file."""
    gone = {f"TENANTRY_{name.upper()}": path for name, path in FILES.items()}
    code, err = await _serve("ratelimit", **gone)
    assert (code, "/c/tls." in err, "Traceback" in err) == (2, True, False), err


async def _serve(service: str, **settings: str) -> tuple[int | None, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")} | settings
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"services.{service}",
        "serve",
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, err.decode()
