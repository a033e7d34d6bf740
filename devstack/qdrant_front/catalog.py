"""The names: which collections exist, how they were defined, and which aliases point at them. One JSON file, replaced atomically.

The file is the truth: a directory it does not name is a leftover of a crash, to be removed.
Every change is synchronous, so no cancelled call can leave the file and the memory apart.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Self

from google.protobuf import json_format
from qdrant_client.grpc import AliasOperations, CreateCollection

from .failure import already_exists, no_collection, not_found, unimplemented, wrong_input

FORMAT_VERSION = 1
LONGEST_NAME_CHARACTERS = 255
_INVALID_NAME_CHARACTERS = '<>:"/\\|?*\0\x1f'


@dataclass(frozen=True, slots=True)
class Definition:
    """A collection as it was asked for, and when."""

    request: CreateCollection
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Names:
    """One consistent view of all names; aliases map to collections of the same view."""

    collections: Mapping[str, Definition] = field(default_factory=lambda: MappingProxyType({}))
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def resolve(self, name: str) -> str:
        """Return the collection a collection's name or an alias means.

        Raises:
            Failure: NOT_FOUND.
        """
        real_name = self.aliases.get(name, name)
        if real_name not in self.collections:
            raise no_collection(name)
        return real_name


def check_name(name: str) -> None:
    """Refuse a name Qdrant refuses, and the two that would leave the data directory."""
    if not 1 <= len(name) <= LONGEST_NAME_CHARACTERS or len(name.encode()) > LONGEST_NAME_CHARACTERS:
        raise wrong_input(f"name must be 1 to {LONGEST_NAME_CHARACTERS} characters long")
    for character in _INVALID_NAME_CHARACTERS:
        if character in name:
            raise wrong_input(f'collection name cannot contain "{character}" char')
    if name in (".", ".."):
        raise wrong_input(f'collection name cannot be "{name}"')


class Catalog:
    """The current names and their file."""

    def __init__(self, path: Path, names: Names) -> None:
        self._path = path
        self._names = names

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file, or starts empty when there is none."""
        if not path.exists():
            return cls(path, Names())
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {document['format_version']}, this server reads {FORMAT_VERSION}")
        collections = {
            name: Definition(
                json_format.ParseDict(entry["definition"], CreateCollection()),
                datetime.fromisoformat(entry["create_time"]),
            )
            for name, entry in document["collections"].items()
        }
        return cls(path, Names(collections, document["aliases"]))

    @property
    def names(self) -> Names:
        """The view of this moment; it never changes under its reader."""
        return self._names

    def add(self, request: CreateCollection) -> None:
        """Make the collection exist, durably."""
        name = request.collection_name
        if name in self._names.collections:
            raise already_exists(f"Collection `{name}` already exists!")
        if name in self._names.aliases:
            raise wrong_input(f"Can't create collection with name {name}. Alias with the same name already exists")
        definition = Definition(request, datetime.now(UTC))
        self._commit(replace(self._names, collections={**self._names.collections, name: definition}))

    def remove(self, name: str) -> None:
        """Make the collection and the aliases that point at it cease to exist, durably."""
        collections = {known: definition for known, definition in self._names.collections.items() if known != name}
        aliases = {alias: target for alias, target in self._names.aliases.items() if target != name}
        self._commit(Names(collections, aliases))

    def change_aliases(self, actions: Iterable[AliasOperations]) -> None:
        """Apply the actions in order, all of them or none."""
        names = self._names
        for action in actions:
            names = replace(names, aliases=_after(names, action))
        self._commit(names)

    def _commit(self, names: Names) -> None:
        document = {
            "format_version": FORMAT_VERSION,
            "collections": {name: _entry(definition) for name, definition in names.collections.items()},
            "aliases": dict(names.aliases),
        }
        _replace_durably(self._path, json.dumps(document, indent=1, sort_keys=True))
        self._names = names


def _entry(definition: Definition) -> dict[str, object]:
    return {
        "create_time": definition.create_time.isoformat(),
        "definition": json_format.MessageToDict(definition.request, preserving_proto_field_name=True),
    }


def _after(names: Names, action: AliasOperations) -> dict[str, str]:
    aliases = dict(names.aliases)
    match action.WhichOneof("action"):
        case "create_alias":
            target, alias = action.create_alias.collection_name, action.create_alias.alias_name
            if target not in names.collections:
                raise no_collection(target)
            _check_free(names, alias)
            aliases[alias] = target
        case "rename_alias":
            old, new = action.rename_alias.old_alias_name, action.rename_alias.new_alias_name
            if old not in aliases:
                raise not_found(f"Alias {old} does not exists!")
            _check_free(names, new)
            aliases[new] = aliases.pop(old)
        case "delete_alias":
            aliases.pop(action.delete_alias.alias_name, None)
        case _:
            raise unimplemented("AliasOperations without an action")
    return aliases


def _check_free(names: Names, alias: str) -> None:
    check_name(alias)
    if alias in names.collections:
        raise already_exists(f"Collection `{alias}` already exists!")


def _replace_durably(path: Path, text: str) -> None:
    staged = path.with_suffix(".next")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
