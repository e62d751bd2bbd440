from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from esper_rpc.disk import write_whole

log = structlog.get_logger(__name__)

MOST_KEPT = 8
"""Policies that a rollback can go back through; the one that is shipped is always the first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy that is or was live."""

    version: str
    file: str = ""
    """Its name in the directory; empty for the policy that is shipped."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The policies that were live, oldest first; the last one is live now."""

    entries: tuple[Entry, ...]
    highest: int = 0
    """The highest number of a version that was ever accepted; rollbacks leave it."""

    @property
    def live(self) -> Entry:
        """The policy in force."""
        return self.entries[-1]

    def grown(self, entry: Entry, number: int) -> Lineage:
        """Return what it is with a new live policy."""
        first, *rest = (*self.entries, entry)
        return Lineage((first, *rest[-(MOST_KEPT - 1) :]), max(self.highest, number))

    def shortened(self) -> Lineage:
        """Return what it is without the live policy; the shipped one stays."""
        return Lineage(self.entries[:-1] or self.entries, self.highest)


class PolicyStore:
    """Keeps the files of policies, and which one is live, through a crash at any moment.

    A file is written and synced before the lineage names it, and removed after the lineage no longer does.
    """

    def __init__(self, directory: Path, start: Lineage) -> None:
        """`start` is what is in force before anything was written."""
        self._directory = directory
        self.start = start

    @property
    def _lineage(self) -> Path:
        return self._directory / "lineage.json"

    def path_of(self, entry: Entry) -> Path:
        """Where the weights of a policy lie."""
        return self._directory / entry.file

    def read(self) -> Lineage:
        """Return what was written last; a file that cannot be read is told and taken for an empty one."""
        try:
            return _lineage_of(orjson.loads(self._lineage.read_bytes()), self.start)
        except FileNotFoundError:
            return self.start
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            log.error("policy_lineage_unreadable", path=str(self._lineage), error=str(error)[:200], priority="HIGH")
            return self.start

    def keep(self, version: str, content: bytes) -> Entry:
        """Write the file of a policy that is not live yet; raises OSError."""
        entry = Entry(version, f"{hashlib.sha256(content).hexdigest()}.safetensors")
        write_whole(self.path_of(entry), content)
        return entry

    def write(self, lineage: Lineage) -> None:
        """Make a lineage the one in force; raises OSError, and then the old one is in force."""
        document = {"highest": lineage.highest, "entries": [dataclasses.asdict(entry) for entry in lineage.entries[1:]]}
        write_whole(self._lineage, orjson.dumps(document))

    def sweep(self, used: Sequence[Entry]) -> None:
        """Remove the files of all other policies."""
        names = {entry.file for entry in used}
        for path in self._directory.glob("*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def _lineage_of(document: Any, start: Lineage) -> Lineage:
    entries = [Entry(str(entry["version"]), str(entry["file"])) for entry in document["entries"]]
    if any(not entry.file or "/" in entry.file for entry in entries):
        raise ValueError("an entry without a file")
    return Lineage((*start.entries, *entries), max(start.highest, int(document["highest"])))
