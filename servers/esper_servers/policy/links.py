"""Reading from a topology which nodes are joined: pairs of names or numbers, or triples with a number that weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_LINKS = 4096


class Link(NamedTuple):
    """A pair of nodes by number, and the number that was told of it, if one was."""

    source: int
    target: int
    weight: float | None = None


class Nodes:
    """The nodes of a type, which a topology calls by number or by name."""

    def __init__(self, names: Sequence[str], count: int | None = None) -> None:
        self.names = names
        self.count = len(names) if count is None else count
        self._numbers = {name: number for number, name in reversed(list(enumerate(names)))}

    def find(self, called: Any) -> int | None:
        """Return the number of a node, None where there is no such node."""
        if isinstance(called, str):
            return self._numbers.get(called)
        return called if type(called) is int and 0 <= called < self.count else None

    def find_site(self, site_id: str) -> int | None:
        """The layer that a site is, or that is the first within it."""
        within = f"{site_id}."
        return next((i for i, name in enumerate(self.names) if name == site_id or name.startswith(within)), None)


def read_links(raw: Any, sources: Nodes, targets: Nodes) -> list[Link]:
    """Read a list of pairs or triples; what is bad is left out, and of a pair that is told twice the first stands."""
    found: dict[tuple[int, int], Link] = {}
    for item in raw[:MOST_LINKS] if isinstance(raw, list) else ():
        if isinstance(item, list) and len(item) >= 2:
            source, target = sources.find(item[0]), targets.find(item[1])
            if source is not None and target is not None:
                found.setdefault((source, target), Link(source, target, _weight(item[2:])))
    return list(found.values())


def _weight(rest: list[Any]) -> float | None:
    usable = bool(rest) and type(rest[0]) in (int, float) and math.isfinite(rest[0])
    return rest[0] if usable else None
