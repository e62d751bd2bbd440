"""Numbers for names, the same after every start: what embeddings and policies refer to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from esper_rpc import disk

from . import vocabularies

UNKNOWN = 0
OPEN_CAPACITY = 4096
LONGEST_NAME = 256
_SHOWN_HEX = 12


class Registry:
    """Names numbered from 1 on. A number is never taken back or given to another name; 0 is the unknown.

    Let one thread register; any may look up.
    """

    def __init__(self, name: str, names: tuple[str, ...] = (), *, capacity: int | None = None) -> None:
        self.name = name
        self._capacity = len(names) if capacity is None else capacity
        self._indices = {key: index for index, key in enumerate(names, start=1)}

    def __len__(self) -> int:
        return len(self._indices)

    def index(self, key: str) -> int:
        """Return the number of a name, which gets the next one if it is new; 0 when there is no room for it."""
        known = self._indices.get(key)
        if known is not None:
            return known
        if len(self._indices) >= self._capacity or not _is_name(key):
            return UNKNOWN
        self._indices[key] = len(self._indices) + 1
        return len(self._indices)

    def find(self, key: str) -> int | None:
        """Return the number of a name that has one."""
        return self._indices.get(key)

    def digest(self) -> str:
        """Return the SHA-256 over the names and numbers, sorted by name, in hexadecimal."""
        return hashlib.sha256(orjson.dumps(sorted(self._indices.copy().items()))).hexdigest()

    def write(self) -> bytes:
        """Return the content of its file: names and numbers, by number."""
        return orjson.dumps(self._indices.copy(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def read(self, content: bytes) -> int:
        """Take over what `write` wrote, and return how many names that are; raises ValueError, and nothing changes."""
        names, own = _names_of(orjson.loads(content)), list(self._indices)
        if len(names) > self._capacity:
            raise ValueError(f"{len(names)} names are more than the {self._capacity} that there may be")
        if any(theirs != ours for theirs, ours in zip(names, own, strict=False)):
            raise ValueError("names that every installation has stand elsewhere")
        for key in names[len(own) :]:
            self.index(key)
        return len(names)


class Registries:
    """All registries of a controller."""

    def __init__(self, directory: Path | None = None) -> None:
        self.seed = Registry("seed", capacity=OPEN_CAPACITY)
        self.blueprint = Registry("blueprint", capacity=OPEN_CAPACITY)
        self.schedule = Registry("schedule", vocabularies.SCHEDULES)
        self.layer_type = Registry("layer_type", vocabularies.LAYER_TYPES)
        self.activation_type = Registry("activation_type", vocabularies.ACTIVATION_TYPES)
        self.optimizer_family = Registry("optimizer_family", vocabularies.OPTIMIZER_FAMILIES)
        self.hazard_class = Registry("hazard_class", vocabularies.HAZARD_CLASSES)
        self._closed = (
            self.layer_type, self.activation_type, self.optimizer_family, self.hazard_class, self.schedule,
        )  # fmt: skip
        self._all = (self.seed, self.blueprint, *self._closed)
        self._directory = directory
        self._saved: dict[str, int] = {}
        self._one_save_at_a_time = threading.Lock()

    @classmethod
    def load(cls, directory: Path | None) -> Registries:
        """Read what is in a directory; a file that cannot be used is set aside. Without a directory nothing is kept."""
        registries = cls(directory)
        if directory is not None:
            for registry in registries._all:
                found = disk.read_whole(_path(directory, registry), registry.read)
                registries._saved[registry.name] = found or 0
        return registries

    def save(self) -> None:
        """Write what has changed; waits for the disk, and raises OSError. Any thread may call it."""
        if self._directory is None:
            return
        with self._one_save_at_a_time:
            for registry in self._all:
                size = len(registry)
                if size != self._saved.get(registry.name):
                    disk.write_whole(_path(self._directory, registry), registry.write())
                    self._saved[registry.name] = size

    def digests(self) -> dict[str, str]:
        """Return the digest of every registry by its name."""
        return {registry.name: registry.digest() for registry in self._all}

    def policy_digests(self) -> dict[str, str]:
        """Return the digests of the registries that a policy's weights depend on."""
        return {registry.name: registry.digest() for registry in self._closed}


def mismatches(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Say of each registry that differs how it does."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [
        f"The registry {name} was expected to have {_shown(expected.get(name))}; it has {_shown(found.get(name))}."
        for name in names
    ]


def _shown(digest: str | None) -> str:
    return "no digest" if digest is None else f"the digest {digest[:_SHOWN_HEX]}"


def _path(directory: Path, registry: Registry) -> Path:
    return directory / f"{registry.name}_registry.json"


def _names_of(document: Any) -> list[str]:
    """The names by number; raises ValueError unless they are numbered from 1 on."""
    if not isinstance(document, dict) or not all(type(number) is int for number in document.values()):
        raise ValueError("it is no object of numbers by name")
    names = sorted(document, key=document.__getitem__)
    if [document[name] for name in names] != list(range(1, len(names) + 1)):
        raise ValueError("the numbers are not those from 1 on")
    if not all(map(_is_name, names)):
        raise ValueError("there is a name that cannot be one")
    return names


def _is_name(key: str) -> bool:
    return 0 < len(key) <= LONGEST_NAME and key.isprintable()
