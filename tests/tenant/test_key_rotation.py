"""The signing key of context tokens is changed on a running mesh, and nobody is refused for it."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pydantic import SecretStr

from devstack.ports import free_port
from mesh.tenant.v1 import authentication_service_pb2_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import RemoteContextKeySource, RemoteCredentialResolver
from services.kernel.errors import MeshError
from services.kernel.rpc.channel import MeshChannel
from services.tenant.app import TenantApp, build
from services.tenant.context_minting import new_signing_seed, public_key_text, read_signing_key
from services.tenant.settings import TenantSettings
from tests.support.waiting import eventually
from tests.tenant.harness import SERVICE_TOKENS, Harness

SECONDS = 30.0
MIN_CALLS = 50


class RetrievalSettings(TenantSettings):
    """Another service that calls the tenant service."""

    service_name = "retrieval"


@dataclass
class Restartable:
    """A tenant service at one address, begun again with other keys."""

    harness: Harness
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    app: TenantApp | None = None

    async def runs_with(self, signing: str, *also_published: str) -> None:
        """Stops what runs and starts the service with these keys."""
        await self.stop()
        changes = {
            "listen_address": self.address,
            "context_signing_key": SecretStr(signing),
            "context_additional_public_keys": ",".join(public_key_text(seed) for seed in also_published),
        }
        self.app = await build(TenantSettings(**{**self.harness.settings.model_dump(), **changes}))
        await self.app.server.start()

    async def stop(self) -> None:
        """Stops it."""
        if self.app is not None:
            await self.app.server.stop()
            await self.app.close()
            self.app = None


@dataclass
class Verifiers:
    """Two services beside each other: one turns credentials into tokens, the other one verifies every token it is handed."""

    resolver: RemoteCredentialResolver
    other: ContextTokenVerifier
    skipped_seconds: list[float]
    # Tokens of calls that began earlier and still go from service to service.
    on_their_way: list[str] = field(default_factory=list)
    calls: int = 0
    refusals: list[str] = field(default_factory=list)

    async def one_call(self, api_key: str) -> None:
        """Authenticates at one service and passes the token on to the other."""
        try:
            context = await self.resolver.resolve(api_key, None)
            for token in (context.token, *self.on_their_way):
                await self.other.verify(token)
        except MeshError as error:
            self.refusals.append(f"call {self.calls}: {error.reason_name}: {error.message}")
        self.calls += 1

    async def time_passes(self, seconds: float, *, until_known: str) -> None:
        """Moves the verifiers' time on, and waits until the one that verifies all the time knows of a key."""
        self.skipped_seconds[0] += seconds
        key_id = read_signing_key(until_known).key_id

        async def is_known() -> bool:
            return key_id in self.other._keys

        await eventually(is_known, within_seconds=SECONDS)

    async def some_more(self, count: int = MIN_CALLS) -> None:
        """Waits for as many calls again."""
        goal = self.calls + count

        async def were_made() -> bool:
            return self.calls >= goal

        await eventually(were_made, within_seconds=SECONDS)


@asynccontextmanager
async def under_load(service: Restartable, api_keys: list[str]) -> AsyncIterator[Verifiers]:
    """Calls without a pause, each with another credential, some of which nobody remembers yet."""
    settings = RetrievalSettings(**{**service.harness.settings.model_dump(), "service_token": SecretStr(SERVICE_TOKENS["retrieval"])})
    channels = [MeshChannel(service.address, settings=settings, target_service="tenant") for _ in range(2)]
    feed, background = ChangeFeed(channels[0]), BackgroundTasks()
    background.start("feed", feed.run)
    skipped = [0.0]
    stubs = [authentication_service_pb2_grpc.AuthenticationServiceStub(channel.channel) for channel in channels]
    entrance, other = (
        ContextTokenVerifier(RemoteContextKeySource(stub, channel=channel), monotonic=lambda: time.monotonic() + skipped[0])
        for stub, channel in zip(stubs, channels, strict=True)
    )
    resolver = RemoteCredentialResolver(stubs[0], entrance, channel=channels[0], feed=feed)
    made = Verifiers(resolver, other, skipped)

    async def call_on_and_on() -> None:
        while True:
            for api_key in api_keys:
                await made.one_call(api_key)
                await asyncio.sleep(0.002)

    try:
        for api_key in api_keys:
            await made.one_call(api_key)
        async with asyncio.TaskGroup() as group:
            loads = [group.create_task(call_on_and_on()) for _ in range(2)]
            try:
                yield made
            finally:
                for load in loads:
                    load.cancel()
    finally:
        await background.close()
        for channel in channels:
            await channel.close()


async def test_a_rotation_in_three_steps_refuses_nobody_and_ends_the_old_key(harness: Harness) -> None:
    """Publish the next key, sign with it, drop the old one: no call is refused on the way, and afterwards the old key proves nothing."""
    old, new = new_signing_seed(), new_signing_seed()
    service, api_keys = Restartable(harness), [(await harness.create()).api_key for _ in range(3)]
    await service.runs_with(old)
    try:
        async with under_load(service, api_keys) as verifiers:
            signed_with_old = (await verifiers.resolver.resolve(api_keys[0], None)).token
            verifiers.on_their_way.append(signed_with_old)
            await verifiers.some_more()
            await service.runs_with(old, new)
            # Not a call of the new key is needed for it: the keys are looked at again beside the calls.
            await verifiers.time_passes(31.0, until_known=new)
            await verifiers.some_more()
            await service.runs_with(new, old)
            await verifiers.some_more()
            verifiers.on_their_way.clear()
            # What was remembered from before ends as its tokens do: everybody gets one of the new key now.
            verifiers.resolver._answers.forget(None, "PLANS")
            await verifiers.some_more()
            await service.runs_with(new)
            await verifiers.time_passes(300.0, until_known=new)
            await verifiers.some_more()
            assert verifiers.refusals == []

            async def the_old_key_is_refused() -> bool:
                try:
                    await verifiers.other.verify(signed_with_old)
                except MeshError as refused:
                    return refused.reason_name == "CONTEXT_INVALID"
                return False

            # The new key was known before: that the old one is gone is heard beside the calls.
            await eventually(the_old_key_is_refused, within_seconds=SECONDS)
    finally:
        await service.stop()


async def test_a_key_dropped_too_early_is_what_refuses(harness: Harness) -> None:
    """Without the overlap the same load is refused: the test above would notice."""
    service, api_keys = Restartable(harness), [(await harness.create()).api_key]
    await service.runs_with(new_signing_seed())
    try:
        async with under_load(service, api_keys) as verifiers:
            # What callers remember may be forgotten before the keys are looked at again; a call on its way is not.
            verifiers.on_their_way.append((await verifiers.resolver.resolve(api_keys[0], None)).token)
            await verifiers.some_more()
            await service.runs_with(new_signing_seed())
            verifiers.skipped_seconds[0] += 300.0

            async def are_refused() -> bool:
                return any("CONTEXT_INVALID" in refusal for refusal in verifiers.refusals)

            await eventually(are_refused, within_seconds=SECONDS)
    finally:
        await service.stop()


def _command(*arguments: str, **environment: str) -> str:
    made = subprocess.run(
        [sys.executable, "-m", "services.tenant", *arguments], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return made.stdout


def test_the_command_makes_a_pair_that_fits() -> None:
    """`new-context-key` prints a signing key and its public half, and `context-public-key` finds the public half of the one in use."""
    setting, public = _command("new-context-key").strip().splitlines()
    name, _, seed = setting.partition("=")
    assert name == "TENANTRY_CONTEXT_SIGNING_KEY"
    assert public.endswith(f" {public_key_text(seed)}")
    assert _command("context-public-key", TENANTRY_CONTEXT_SIGNING_KEY=seed).strip() == public_key_text(seed)
