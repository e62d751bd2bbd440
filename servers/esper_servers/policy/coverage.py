"""How much of what the network reads is known, and how much merely stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schema

_NAMES = {kind: tuple(f"{kind}.{feature}" for feature in schema.FEATURES[kind]) for kind in schema.NODE_TYPES}


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """Shares from 0 to 1; equal only to itself."""

    overall: float
    """Of the features of all nodes."""
    types: Mapping[str, float]
    """Of the features of the nodes of a type, `node.<type>`; of the edges of a relation, `edges.<source>_<name>`; and
    of the edges whose attribute is known, `attributes.<source>_<name>`. A type without nodes or edges is absent."""
    features: Mapping[str, float]
    """Of the nodes that a feature is known of, `<type>.<feature>`, least known first; known of all nodes is absent."""


class Known(NamedTuple):
    """What is known of the nodes of one type."""

    values: float
    of: int
    ratio: float
    gaps: tuple[tuple[float, str], ...]
    """The share of nodes and the name of each feature that is not known of all."""


def known_of(array: NDArray[np.float32], kind: str) -> Known:
    """Count the masks in an array of features."""
    rows, names = len(array), _NAMES[kind]
    if not rows:
        return Known(0.0, 0, 0.0, ())
    counts = array[:, 1 : 2 * len(names) : 2].sum(axis=0).tolist()
    values, total = sum(counts), rows * len(names)
    gaps = tuple((round(n / rows, 4), name) for n, name in zip(counts, names, strict=True) if n < rows)
    return Known(values, total, round(values / total, 4), gaps)


def coverage_of(known: Mapping[str, Known], edges: Mapping[str, float]) -> Coverage:
    """Put together what is known of each type of node and of each relation."""
    nodes = {f"node.{kind}": known[kind].ratio for kind in schema.NODE_TYPES if known[kind].of}
    gaps = sorted(gap for each in known.values() for gap in each.gaps)
    total = sum(each.of for each in known.values())
    return Coverage(
        overall=round(sum(each.values for each in known.values()) / max(1, total), 4),
        types={**nodes, **edges},
        features={name: ratio for ratio, name in gaps},
    )
