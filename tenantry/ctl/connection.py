"""Where the mesh is, who calls it, and what its errors mean for whoever typed the command. Credentials come from the environment alone."""

import argparse
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import grpc

from tenantry.answers import failure_of
from tenantry.ctl.wrong_use import WrongUse

DEFAULT_ADDRESS = "127.0.0.1:7405"
API_KEY, OPERATOR_KEY = "TENANTRY_API_KEY", "TENANTRY_OPERATOR_KEY"
_LONGEST_SECONDS = 86_400.0
_LARGEST_MESSAGE = 64 * 1024 * 1024
_ADVICE: Mapping[str, str] = {
    "CREDENTIAL_INVALID": f"check {API_KEY} or {OPERATOR_KEY}",
    "CREDENTIAL_EXPIRED": "use a key that has not ended",
    "OPERATOR_REASON_MISSING": "say why with --reason",
    "SCOPE_MISSING": f"use a key with that scope, or {OPERATOR_KEY} with --tenant and --reason",
    "CALLER_NOT_ALLOWED": f"the command is for operators: set {OPERATOR_KEY}",
    "DEPENDENCY_UNAVAILABLE": "repeat the command in a moment",
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """A channel to the metering service, and the metadata that proves who calls."""

    channel: grpc.aio.Channel
    metadata: Sequence[tuple[str, str]]
    timeout_seconds: float
    is_operator: bool
    tenant_id: str

    def require_tenant(self) -> None:
        """Refuses an operator who names no tenant. Raises: WrongUse."""
        if self.is_operator and not self.tenant_id:
            msg = "an operator's command about one tenant names it: --tenant ID --reason TEXT, before the command"
            raise WrongUse(msg)

    def require_operator(self) -> None:
        """Refuses a tenant's key. Raises: WrongUse."""
        if not self.is_operator:
            msg = f"the command is for operators: set {OPERATOR_KEY}, and say why with --reason"
            raise WrongUse(msg)


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="the metering service (default: %(default)s)")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="call with TLS and trust this authority, PEM")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="this client's certificate chain, PEM; the mesh asks for one")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's private key, PEM")
    parser.add_argument("--tenant", default="", metavar="ID", help="operators: the tenant that the command is about")
    parser.add_argument("--reason", default="", metavar="TEXT", help="operators: why, for the audit log")
    parser.add_argument("--timeout", type=_seconds, default=90.0, metavar="SECONDS", help="for each call (default: %(default)s)")


@asynccontextmanager
async def connect(options: argparse.Namespace) -> AsyncIterator[Mesh]:
    """Opens a channel; the first call finds out whether anybody is there. Raises: WrongUse."""
    metadata, is_operator = _proof(options)
    channel_options = (("grpc.max_receive_message_length", _LARGEST_MESSAGE), ("grpc.max_reconnect_backoff_ms", 1_000))
    trust = _trust(options)
    # The command line is outside of the mesh: no service's channel with its identity and budgets is meant here.
    if trust is None:
        channel = grpc.aio.insecure_channel(options.address, options=channel_options)
    else:
        channel = grpc.aio.secure_channel(options.address, trust, options=channel_options)
    async with channel:
        yield Mesh(channel, metadata, options.timeout, is_operator, options.tenant)


def explain(error: grpc.aio.AioRpcError, options: argparse.Namespace) -> str:
    """Says what a failed call means and what to do next."""
    reason, details = failure_of(error).reason, error.details() or ""
    if not reason and error.code() is grpc.StatusCode.UNAVAILABLE:
        how = "without TLS; a mesh on TLS wants --tls-ca, --tls-cert and --tls-key" if options.tls_ca is None else "with TLS"
        return f"nobody answers at {options.address} ({how}): check --address"
    if not reason and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {options.timeout:g} s: give it more time with --timeout"
    if not reason and error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"{options.address} does not serve this: --address is that of the metering service, of this release or a later one"
    advice = f" ({_ADVICE[reason]})" if reason in _ADVICE else ""
    return f"{reason or error.code().name}: {details}{advice}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_SECONDS:
        msg = f"{text!r} is no time: seconds, above 0 and at most {_LONGEST_SECONDS:.0f}"
        raise argparse.ArgumentTypeError(msg)
    return seconds


def _proof(options: argparse.Namespace) -> tuple[Sequence[tuple[str, str]], bool]:
    operator_key, api_key = os.environ.get(OPERATOR_KEY, ""), os.environ.get(API_KEY, "")
    for name, text in ((OPERATOR_KEY, operator_key), (API_KEY, api_key), ("--tenant", options.tenant)):
        if not (text.isascii() and text.isprintable()):
            msg = f"{name} holds what no such text has: a line break, or a letter beyond ASCII"
            raise WrongUse(msg)
    if operator_key and api_key:
        msg = f"{API_KEY} and {OPERATOR_KEY} are both set: unset the one that is not meant"
        raise WrongUse(msg)
    if operator_key:
        if not options.reason:
            msg = "an operator's command says why: --reason TEXT, before the command"
            raise WrongUse(msg)
        named = (("x-tenant-id", options.tenant),) if options.tenant else ()
        # Metadata is printable ASCII; what is beyond it is kept readable.
        reason = options.reason if options.reason.isascii() and options.reason.isprintable() else quote(options.reason, safe=" ")
        return (("authorization", f"Bearer {operator_key}"), ("x-operator-reason", reason), *named), True
    if not api_key:
        msg = f"no credential: set {API_KEY} to a key of the tenant, or {OPERATOR_KEY}"
        raise WrongUse(msg)
    if options.tenant or options.reason:
        msg = f"--tenant and --reason are for operators, and {OPERATOR_KEY} is not set"
        raise WrongUse(msg)
    return (("authorization", f"Bearer {api_key}"),), False


def _trust(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    pair = (options.tls_cert, options.tls_key)
    if options.tls_ca is None:
        if any(pair):
            msg = "--tls-cert and --tls-key go with --tls-ca"
            raise WrongUse(msg)
        return None
    if any(pair) and not all(pair):
        msg = "--tls-cert and --tls-key go together"
        raise WrongUse(msg)
    certificate, key = (path.read_bytes() if path else None for path in pair)
    return grpc.ssl_channel_credentials(options.tls_ca.read_bytes(), key, certificate)
