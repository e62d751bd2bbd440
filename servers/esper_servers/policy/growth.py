"""Blueprints where they grow: their layers stand in the graph behind those of the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from esper_rpc.proto.tamiyo.v1 import RunSeed

from .links import Link, Nodes, read_links

MOST_STRUCTURES = 256
Document = Mapping[str, Any]


class Growable(Protocol):
    """What a graph needs of a blueprint."""

    @property
    def blueprint_id(self) -> str: ...
    @property
    def extras(self) -> Document: ...
    @property
    def extras_digest(self) -> bytes: ...
    @property
    def fits(self) -> frozenset[str]: ...
    @property
    def risk(self) -> float: ...


class BlueprintStructure(NamedTuple):
    """What the extras of a blueprint tell of its module."""

    layers: tuple[Document, ...]
    activations: tuple[Document, ...]
    links: tuple[Link, ...]
    """Between its layers; a chain where the extras tell none."""
    is_told: bool

    @property
    def entries(self) -> list[int]:
        """Layers that no other feeds."""
        fed = {link.target for link in self.links}
        return [number for number in range(len(self.layers)) if number not in fed]

    @property
    def exits(self) -> list[int]:
        """Layers that feed no other."""
        feeding = {link.source for link in self.links}
        return [number for number in range(len(self.layers)) if number not in feeding]


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """A blueprint in a seed. Seed, blueprint and layers are numbers of nodes."""

    seed: int
    blueprint: int
    site_layer: int | None
    """Where it grows; None where no layer has the name of the site."""
    first_layer: int
    structure: BlueprintStructure

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.first_layer, self.first_layer + len(self.structure.layers))


def place(
    seeds: Sequence[RunSeed],
    blueprints: Sequence[Growable],
    attached: Mapping[str, str],
    host: Nodes,
    *,
    most_layers: int,
) -> list[Growth]:
    """Put the blueprint `attached` to each seed behind the layers of the host, as long as there is room."""
    found, first = [], host.count
    numbers = {blueprint.blueprint_id: number for number, blueprint in enumerate(blueprints)}
    for number, seed in enumerate(seeds):
        blueprint = numbers.get(attached.get(seed.seed_id, ""))
        if blueprint is None:
            continue
        structure = structure_of(blueprints[blueprint])
        if first + len(structure.layers) <= most_layers:
            site = host.find_site(seed.site_id)
            found.append(
                Growth(seed=number, blueprint=blueprint, site_layer=site, first_layer=first, structure=structure)
            )
            first += len(structure.layers)
    return found


_structures: OrderedDict[bytes, BlueprintStructure] = OrderedDict()


def structure_of(blueprint: Growable) -> BlueprintStructure:
    """Read the structure of a blueprint, once for each digest of extras."""
    digest = blueprint.extras_digest
    known = _structures.get(digest)
    if known is not None:
        return known
    structure = _read(blueprint.extras)
    if digest:
        _structures[digest] = structure
        while len(_structures) > MOST_STRUCTURES:
            _structures.popitem(last=False)
    return structure


def _read(extras: Document) -> BlueprintStructure:
    layers = documents(extras.get("layers"))
    nodes = Nodes([str(layer.get("layer_id", "")) for layer in layers])
    given = extras.get("adjacency")
    told = read_links(given.get("layer") if isinstance(given, Mapping) else None, nodes, nodes)
    links = told or [Link(number, number + 1) for number in range(len(layers) - 1)]
    activations = documents(extras.get("activations"))
    # A module of one layer has no pair to tell of.
    return BlueprintStructure(tuple(layers), tuple(activations), tuple(links), bool(told) or len(layers) == 1)


def documents(value: Any) -> list[dict[str, Any]]:
    """What is a list of objects, without what is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
