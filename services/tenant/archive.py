"""One archive of everything the mesh keeps of a tenant, made while it is sent. Holds a few hundred kilobytes, whatever the tenant's size.

A tar of JSON-lines files of about 256 KB, named by kind and number. The manifest stands last: only then are the sums known.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.tenant_remains import ExportedRecord

CHUNK_BYTES = 65_536
PART_BYTES = 262_144
_BLOCK = 512


class ExportingPeer(Protocol):
    """A service that keeps something of tenants."""

    def export(self, context: TenantContext) -> AsyncIterator[ExportedRecord]:
        """Streams everything. Raises: MeshError."""
        ...


@dataclass(slots=True)
class _Kind:
    waiting: bytearray = field(default_factory=bytearray)
    record_count: int = 0
    parts: list[dict[str, object]] = field(default_factory=list)


class TenantArchive:
    """Writes archives."""

    def __init__(
        self,
        own: Callable[[TenantId], AsyncIterator[ExportedRecord]],
        peers: Mapping[str, ExportingPeer],
        minter: ContextMinter,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._own = own
        self._peers = peers
        self._minter = minter
        self._clock = clock

    async def chunks(self, tenant_id: TenantId) -> AsyncIterator[bytes]:
        """Yields the archive's bytes, at most 65,536 at a time. Raises: MeshError when a service cannot be read."""
        kinds: dict[str, _Kind] = {}
        async for name, content in self._parts(tenant_id, kinds):
            for piece in _entry(name, content, self._clock()):
                yield piece
        for piece in _entry("manifest.json", self._manifest(tenant_id, kinds), self._clock()):
            yield piece
        yield bytes(2 * _BLOCK)

    async def _parts(self, tenant_id: TenantId, kinds: dict[str, _Kind]) -> AsyncIterator[tuple[str, bytes]]:
        for source in self._sources(tenant_id):
            async with aclosing(source) as records:  # type: ignore[type-var] # every source is a generator
                async for record in records:
                    kind = kinds.setdefault(record.kind, _Kind())
                    kind.waiting += record.record_json.encode() + b"\n"
                    kind.record_count += 1
                    if len(kind.waiting) >= PART_BYTES:
                        yield _cut(record.kind, kind)
            # Between services, so that few kinds wait at a time.
            for name, kind in kinds.items():
                if kind.waiting:
                    yield _cut(name, kind)

    def _sources(self, tenant_id: TenantId) -> Sequence[AsyncIterator[ExportedRecord]]:
        context = self._minter.mint(Grant(tenant_id, None, PROVISIONING_SUBJECT, frozenset()))
        return [self._own(tenant_id), *(peer.export(context) for peer in self._peers.values())]

    def _manifest(self, tenant_id: TenantId, kinds: Mapping[str, _Kind]) -> bytes:
        manifest = {
            "tenant_id": str(tenant_id),
            "create_time": self._clock().astimezone(UTC).isoformat(),
            "kinds": {name: {"record_count": kind.record_count, "files": kind.parts} for name, kind in sorted(kinds.items())},
        }
        return json.dumps(manifest, indent=1).encode()


def _cut(name: str, kind: _Kind) -> tuple[str, bytes]:
    content, kind.waiting = bytes(kind.waiting), bytearray()
    store, _, table = name.partition(":")
    path = f"{store}/{table}-{len(kind.parts) + 1:05}.jsonl"
    kind.parts.append({"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return path, content


def _entry(name: str, content: bytes, now: datetime) -> list[bytes]:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = len(content), int(now.timestamp()), 0o600
    whole = io.BytesIO(header.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % _BLOCK))
    return list(iter(lambda: whole.read(CHUNK_BYTES), b""))
