"""The one way out of a service: a channel per peer that adds deadline, identity, tenant and trace to every call, and raises MeshErrors."""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from services.kernel.errors import DeadlineExceeded, MeshError, Unavailable
from services.kernel.request_context import scope
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.certificates import CertificateFiles, Certificates
from services.kernel.rpc.reloading_channel import ReloadingChannel
from services.kernel.rpc.trace import client_span
from services.kernel.rpc.wire_status import decode_rpc_error
from services.kernel.settings import ServiceSettings, is_loopback
from services.kernel.tenant_context import TenantContext

Request = TypeVar("Request")
Response = TypeVar("Response")

_MAX_ATTEMPTS = 3
_FIRST_BACKOFF_SECONDS = 0.02
_CLOCKS_DIFFER_SECONDS = 0.02
_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

Metadata = tuple[tuple[str, str], ...]


class MeshChannel:
    """Calls to one peer. Build stubs on `channel`; make their calls through `unary` and `stream`."""

    def __init__(self, address: str, *, settings: ServiceSettings, target_service: str) -> None:
        self._target = target_service
        self._identity: Metadata = _identity(settings)
        options = _channel_options(settings)
        # `Any`: grpc's own channel, or one that follows its certificates; stubs take both.
        self.channel: Any
        if settings.tls_enabled:

            def secure(found: Certificates) -> grpc.aio.Channel:
                return grpc.aio.secure_channel(_target(address), _credentials(found), options)  # noqa: TID251 - the one place

            self.channel = ReloadingChannel(CertificateFiles.of(settings), secure)
        elif is_loopback(address):
            self.channel = grpc.aio.insecure_channel(_target(address), options)  # noqa: TID251 - the one place
        else:
            msg = f"{target_service} at {address} is not on loopback: calling it needs TLS"
            raise ValueError(msg)

    async def close(self) -> None:
        """Closes the channel; calls under way fail."""
        await self.channel.close()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_seconds: float,
        tenant: TenantContext | None = None,
        idempotent: bool = False,
    ) -> Response:
        """Makes one call within `timeout_seconds` and within what is left of the call in hand.

        An idempotent call that finds the peer UNAVAILABLE is made up to two more times. Raises: MeshError, as the peer raised it.
        """
        give_up_at = _give_up_at(timeout_seconds)
        attempt = 1
        while True:
            try:
                response: Response = await self._once(method, request, give_up_at, tenant)
                return response
            except MeshError as error:
                if not idempotent or error.code is not grpc.StatusCode.UNAVAILABLE or attempt >= _MAX_ATTEMPTS:
                    raise
                pause = _pause(attempt, error)
                if time.monotonic() + pause >= give_up_at:
                    raise
            attempt += 1
            await asyncio.sleep(pause)

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response] | grpc.aio.StreamStreamMultiCallable[Any, Response],
        request: Request | AsyncIterator[Any],
        *,
        timeout_seconds: float,
        tenant: TenantContext | None = None,
    ) -> ResponseStream[Response]:
        """Returns the responses of a streaming call; use it with `async with`, which cancels the call however the block ends."""
        return ResponseStream(self, method, request, timeout_seconds, tenant)

    def metadata(self, tenant: TenantContext | None, traceparent: str) -> Metadata:
        """Returns what every call to this peer carries."""
        pairs = [*self._identity, (keys.TRACEPARENT, traceparent)]
        if tenant is not None:
            pairs.append((keys.TENANT_CONTEXT, tenant.token))
            if tenant.tenant_id is not None:
                pairs.append((keys.TENANT_ID, str(tenant.tenant_id)))
        call = scope()
        if call is not None:
            call_id = call.call_id or call.client_call_id
            if call_id is not None:
                pairs.append((keys.REQUEST_ID, str(call_id)))
            reason = call.metadata.get(keys.OPERATOR_REASON)
            if reason is not None:
                pairs.append((keys.OPERATOR_REASON, reason))
        return tuple(pairs)

    async def _once(self, method: Any, request: Any, give_up_at: float, tenant: TenantContext | None) -> Any:
        remaining = give_up_at - time.monotonic()
        if remaining <= 0.0:
            raise DeadlineExceeded(self._target)
        try:
            with client_span(_path(method), self._target) as traceparent:
                return await method(request, timeout=remaining, metadata=self.metadata(tenant, traceparent))
        except grpc.aio.AioRpcError as error:
            failure = decode_rpc_error(error, self._target)
            if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and _only_the_hop_is_late(give_up_at):
                # Our own limit for this hop has passed, not the caller's: the peer hangs.
                raise Unavailable(self._target) from None
            raise failure from None


class ResponseStream(Generic[Response]):
    """The responses of one streaming call, cancelled when the block or the iteration ends."""

    def __init__(self, channel: MeshChannel, method: Any, request: Any, timeout_seconds: float, tenant: TenantContext | None) -> None:
        self._channel = channel
        self._method = method
        self._request = request
        self._give_up_at = _give_up_at(timeout_seconds)
        self._tenant = tenant
        self._responses: AsyncIterator[Response] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Response]:
        if self._responses is None:
            self._responses = self._read()
        return self._responses

    async def aclose(self) -> None:
        """Ends the call, telling the peer when it is not over."""
        if self._responses is not None:
            await self._responses.aclose()  # type: ignore[attr-defined] # _read is a generator

    async def _read(self) -> AsyncIterator[Response]:
        target = self._channel._target
        remaining = self._give_up_at - time.monotonic()
        if remaining <= 0.0:
            raise DeadlineExceeded(target)
        try:
            with client_span(_path(self._method), target) as traceparent:
                call = self._method(self._request, timeout=remaining, metadata=self._channel.metadata(self._tenant, traceparent))
                try:
                    async for response in call:
                        yield response
                finally:
                    # Without it an abandoned stream keeps running at the peer and leaks here.
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            raise decode_rpc_error(error, target) from None


def _give_up_at(timeout_seconds: float) -> float:
    own = time.monotonic() + timeout_seconds
    call = scope()
    return own if call is None or call.deadline is None else min(own, call.deadline)


def _only_the_hop_is_late(give_up_at: float) -> bool:
    call, now = scope(), time.monotonic()
    # The peer counts the same limit down and may answer that it is over a moment before our clock says so.
    return now >= give_up_at - _CLOCKS_DIFFER_SECONDS and (
        call is None or call.deadline is None or now < call.deadline - _CLOCKS_DIFFER_SECONDS
    )


def _pause(attempt: int, error: MeshError) -> float:
    # A peer's RetryInfo of a whole second is for callers outside; inside, the wait is bounded by our own schedule.
    ceiling = min(_FIRST_BACKOFF_SECONDS * 2.0**attempt, error.retry_after_seconds or 1.0)
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def _path(method: Any) -> str:
    # The only place that says which rpc a stub's attribute calls.
    path: bytes = method._method
    return path.decode()


def _target(address: str) -> str:
    return address if ":///" in address or address.startswith("unix:") else f"dns:///{address}"


def _identity(settings: ServiceSettings) -> Metadata:
    token = settings.service_token.get_secret_value()
    # On TLS the certificate says who calls; a bearer beside it would only be a secret to lose.
    if settings.tls_enabled or not token:
        return ()
    return ((keys.MESH_SERVICE, settings.service_name), (keys.MESH_SERVICE_TOKEN, token))


def _credentials(found: Certificates) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(root_certificates=found.authorities, private_key=found.key, certificate_chain=found.chain)


def _channel_options(settings: ServiceSettings) -> list[tuple[str, str | int]]:
    return [
        ("grpc.service_config", _SERVICE_CONFIG),
        # Retries are made here, where the deadline and idempotency are known.
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A reused connection may belong to another identity in tests and in processes with several roles.
        ("grpc.use_local_subchannel_pool", 1),
    ]
