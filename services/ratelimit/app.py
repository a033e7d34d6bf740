"""Composition root of the ratelimit service: builds everything by constructor and closes it in reverse order."""

from contextlib import AsyncExitStack
from dataclasses import dataclass

from envoy.service.ratelimit.v3.rls_pb2_grpc import add_RateLimitServiceServicer_to_server as add_EnvoyRateLimitServicer_to_server
from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import add_RateLimitServiceServicer_to_server
from services.kernel.audit_client import AuditClient
from services.kernel.background import BackgroundTasks
from services.kernel.cell import cell_of
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.tenant_config import TenantConfigCache
from services.ratelimit.abuse_guard import AbuseGuard
from services.ratelimit.adapters.cluster_link import ClusterLink
from services.ratelimit.adapters.metering_client import MeteringClient
from services.ratelimit.adapters.redis_guard import RedisGuards
from services.ratelimit.adapters.redis_link import Link, PipelinedLink
from services.ratelimit.adapters.redis_records import RedisRecords
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.redis_slices import RedisSlices
from services.ratelimit.adapters.redis_snapshots import RedisSnapshots
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.adapters.redis_tickets import RedisTickets, WakeListener
from services.ratelimit.adapters.tenant_rules import TenantRules
from services.ratelimit.adapters.tenant_scripts import TenantScripts
from services.ratelimit.circuit_breaker import CircuitBreaker
from services.ratelimit.consumption import Consumptions
from services.ratelimit.extension import Extensions
from services.ratelimit.fencing import Fencing
from services.ratelimit.gathered import GatheredReservations
from services.ratelimit.look import Looks
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.provider_share import AccountUse, ProviderShares
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.reservation import Reservations
from services.ratelimit.servicers.envoy import EnvoyServicer
from services.ratelimit.servicers.guarding import Guarding
from services.ratelimit.servicers.lifecycle import LifecycleServicer
from services.ratelimit.servicers.rate_limit import RateLimitServicer
from services.ratelimit.servicers.reserve_batch import ReserveBatches
from services.ratelimit.servicers.reserve_requests import OWN_CHECKS
from services.ratelimit.settings import RatelimitSettings
from services.ratelimit.slice import Slices
from services.ratelimit.waiting_room import WaitingRoom

# What may take longer than a decision: batches of commits, snapshots, sweeps. Few at a time, so that decisions get between them.
_BULK_TIMEOUT_SECONDS = 0.5
_BULK_BATCH = 8


@dataclass(frozen=True, slots=True)
class RatelimitApp:
    """The running parts."""

    server: MeshServer
    closing: AsyncExitStack

    async def close(self) -> None:
        """Stops the sweep and rebuilds, then closes the connections; one that fails does not keep the rest open."""
        await self.closing.aclose()


async def build(settings: RatelimitSettings) -> RatelimitApp:
    """Builds the service; neither Redis nor a peer needs to be up."""
    async with AsyncExitStack() as stack:
        to_tenant = _channel(stack, settings, settings.tenant_address, "tenant")
        ledger = MeteringClient(_channel(stack, settings, settings.metering_address, "metering"))
        decisions, bulk = _links(stack, settings)
        scripts = TenantScripts(decisions, bulk)
        store = RedisStore(scripts, lease_seconds=settings.lease_seconds)
        fencing = Fencing(store, ledger, lease_seconds=settings.lease_seconds)
        rebuilder = Rebuilder(RedisSnapshots(scripts, lease_seconds=settings.lease_seconds), ledger)
        stack.push_async_callback(rebuilder.close)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        background.start("ratelimit.lease_sweep", fencing.run)
        feed = ChangeFeed(to_tenant)
        background.start("change_feed", feed.run)
        resolver, verifier = remote_trust(to_tenant, feed=feed, outage_seconds=settings.credential_outage_seconds)
        allowance = OpenAllowance(store)
        background.start("ratelimit.open_allowance", allowance.run)
        rules = TenantRules(TenantConfigCache(to_tenant, feed=feed), feed=feed)
        counters = ReadyCounters(rules, rebuilder, fencing, allowance)
        share_store = RedisShares(decisions, bulk)
        room = _waiting_room(stack, background, settings, RedisTickets(scripts, share_store))
        guard = AbuseGuard(RedisGuards(scripts))
        background.start("ratelimit.refusals", guard.run)
        shares = ProviderShares(share_store, _accounts(settings))
        reservations = Reservations(store, counters, fencing, guard=guard, shares=shares, room=room)
        gathered = GatheredReservations(reservations, store, allowance, rules.known, guard=guard)
        consumptions = Consumptions(store, ledger, counters, fencing, guard=guard, room=room)
        limits = RateLimitServicer(
            reservations,
            gathered,
            Extensions(store, counters, fencing),
            consumptions,
            Looks(store, counters),
            ReserveBatches(gathered, reservations, verifier),
            Guarding(guard, counters, AuditClient(to_tenant)),
            Slices(RedisSlices(scripts), counters, fencing, guard=guard),
            lease_seconds=settings.lease_seconds,
        )
        lifecycle = LifecycleServicer(RedisRecords(scripts, share_store, tuple(settings.provider_accounts)))
        envoy = EnvoyServicer(consumptions, resolver, verifier, cell_of(settings))
        servicers = _registrations(limits, envoy, lifecycle)
        server = MeshServer(settings, servicers=servicers, resolver=resolver, verifier=verifier, own_checks=OWN_CHECKS)
        return RatelimitApp(server, stack.pop_all())


def _registrations(limits: RateLimitServicer, envoy: EnvoyServicer, lifecycle: LifecycleServicer) -> list[Registration]:
    return [
        (add_RateLimitServiceServicer_to_server, limits, "mesh.ratelimit.v1.RateLimitService"),
        (add_EnvoyRateLimitServicer_to_server, envoy, "envoy.service.ratelimit.v3.RateLimitService"),
        (add_TenantLifecycleServiceServicer_to_server, lifecycle, "mesh.common.v1.TenantLifecycleService"),
    ]


def _waiting_room(stack: AsyncExitStack, background: BackgroundTasks, settings: RatelimitSettings, tickets: RedisTickets) -> WaitingRoom:
    room = WaitingRoom(tickets)
    stack.push_async_callback(room.close)
    background.start("ratelimit.tickets", room.run)
    listener = WakeListener(settings.redis_url.get_secret_value(), room, cluster=settings.redis_cluster)
    background.start("ratelimit.wakes", listener.run)
    return room


def _accounts(settings: RatelimitSettings) -> dict[str, AccountUse]:
    return {
        name: AccountUse(account.requests_per_minute, account.input_tokens_per_minute, account.output_tokens_per_minute)
        for name, account in settings.provider_accounts.items()
    }


def _channel(stack: AsyncExitStack, settings: RatelimitSettings, address: str, service: str) -> MeshChannel:
    channel = MeshChannel(address, settings=settings, target_service=service)
    stack.push_async_callback(channel.close)
    return channel


def _links(stack: AsyncExitStack, settings: RatelimitSettings) -> tuple[Link, Link]:
    url, seconds = settings.redis_url.get_secret_value(), settings.redis_timeout_seconds
    decisions: Link
    bulk: Link
    # What the background found away is there again as soon as a decision was answered, which may need its counters made in bulk.
    if settings.redis_cluster:
        decisions = of_cluster = ClusterLink(url, timeout_seconds=seconds)
        bulk = ClusterLink(url, timeout_seconds=_BULK_TIMEOUT_SECONDS, beside=of_cluster)
    else:
        decisions = pipelined = PipelinedLink(url, connections=settings.redis_connections, timeout_seconds=seconds)
        breaker = CircuitBreaker(beside=pipelined.breaker)
        bulk = PipelinedLink(url, connections=1, timeout_seconds=_BULK_TIMEOUT_SECONDS, max_batch=_BULK_BATCH, breaker=breaker)
    stack.push_async_callback(bulk.close)
    stack.push_async_callback(decisions.close)
    return decisions, bulk
