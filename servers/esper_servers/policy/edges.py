"""Which nodes a run's topology joins, and which are joined because nobody said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite

from . import schema

Relation = tuple[str, str, str]
MAX_ADJACENCY = 4096
BY_NATURE = frozenset({"influences", "operates", "reports", "summarises"})
"""They join all nodes because there is one global node, not because nobody said which."""
GROWN = frozenset({
    Stage.SEED_LIFECYCLE_STAGE_BLENDING, Stage.SEED_LIFECYCLE_STAGE_SHADOWING, Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY,
    Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED,
})  # fmt: skip
"""Where a seed is blended, or has been: it was allowed to."""


class Growable(Protocol):
    """What the edges need of a blueprint."""

    @property
    def extras(self) -> Mapping[str, Any]: ...
    @property
    def fits(self) -> frozenset[str]: ...


class Joined(NamedTuple):
    """The edges of a relation (2, E), source above target, and how much of them was told."""

    edges: Tensor
    told: int
    of: int
    """What `told` is a share of."""
    attributes: int | None = None
    """Edges whose attribute was told; None for a relation that has none."""


class Edges(NamedTuple):
    """Edges by relation, and how much of them was told, by `coverage.Coverage.types`."""

    by_relation: dict[Relation, Tensor]
    coverage: dict[str, float]


def build_edges(
    topology: Mapping[str, Any],
    layer_ids: Sequence[str],
    sites: Sequence[RunSite],
    seeds: Sequence[RunSeed],
    blueprints: Sequence[Growable],
    counts: Mapping[str, int],
) -> Edges:
    """Join the nodes of a graph. What is absent or bad in the topology is ignored, and a fallback stands for it."""
    layers = _Nodes(layer_ids, counts["layer"])
    connects = _connects(topology, layers)
    joined = {
        "connects": connects,
        "feedback": connects._replace(edges=connects.edges.flip(0), attributes=None),
        "monitors": _monitors(topology, layers, sites, seeds),
        "allowed": _allowed(topology, seeds, blueprints, counts["parameter"]),
        "suits": _suits(seeds, blueprints),
    }
    found = {
        relation: joined.get(relation[1]) or _all_pairs(relation[1], counts[relation[0]], counts[relation[2]])
        for relation in schema.RELATIONS
    }
    return Edges({relation: each.edges for relation, each in found.items()}, _coverage(found))


def _coverage(found: Mapping[Relation, Joined]) -> dict[str, float]:
    ratios = {f"edges.{source}_{name}": round(j.told / j.of, 4) for (source, name, _), j in found.items() if j.of}
    for (source, name, _), each in found.items():
        if each.attributes is not None and each.edges.shape[1]:
            ratios[f"attributes.{source}_{name}"] = round(each.attributes / each.edges.shape[1], 4)
    return ratios


class _Nodes:
    """The nodes of a type, which a topology calls by number or by name."""

    def __init__(self, names: Sequence[str], count: int) -> None:
        self.names = names
        self.count = count
        self._numbers = {name: number for number, name in reversed(list(enumerate(names)))}

    def find(self, called: Any) -> int | None:
        if isinstance(called, str):
            return self._numbers.get(called)
        return called if type(called) is int and 0 <= called < self.count else None

    def find_site(self, site_id: str) -> int | None:
        """The layer that a site is, or that is the first within it."""
        within = f"{site_id}."
        return next((i for i, name in enumerate(self.names) if name == site_id or name.startswith(within)), None)


class _Link(NamedTuple):
    source: int
    target: int
    has_attribute: bool


def _links(raw: Any, sources: _Nodes, targets: _Nodes) -> list[_Link]:
    """Read pairs, or triples with an attribute."""
    found = []
    for item in raw[:MAX_ADJACENCY] if isinstance(raw, list) else ():
        if isinstance(item, list) and len(item) >= 2:
            source, target = sources.find(item[0]), targets.find(item[1])
            if source is not None and target is not None:
                found.append(_Link(source, target, _is_number(item[2:])))
    return found


def _is_number(rest: list[Any]) -> bool:
    return bool(rest) and type(rest[0]) in (int, float) and math.isfinite(rest[0])


def _connects(topology: Mapping[str, Any], layers: _Nodes) -> Joined:
    """What `adjacency.layer` says, else a chain."""
    given = topology.get("adjacency")
    links = _links(given.get("layer") if isinstance(given, Mapping) else None, layers, layers)
    if links:
        return Joined(_tensor([link[:2] for link in links]), len(links), len(links), _with_attribute(links))
    chain = [(i, i + 1) for i in range(layers.count - 1)]
    return Joined(_tensor(chain), 0, len(chain), 0)


def _monitors(
    topology: Mapping[str, Any], layers: _Nodes, sites: Sequence[RunSite], seeds: Sequence[RunSeed]
) -> Joined:
    """What `monitored_layers` says of a seed, else the layer of its site; a guess where no layer has its name."""
    links = _links(topology.get("monitored_layers"), _Nodes([seed.seed_id for seed in seeds], len(seeds)), layers)
    told = {link.source for link in links}
    pairs, known = [link[:2] for link in links], len(links)
    position = {site.site_id: number for number, site in enumerate(sites)}
    layer_of = {site_id: layers.find_site(site_id) for site_id in {seed.site_id for seed in seeds}}
    for number, seed in enumerate(seeds):
        if number not in told:
            layer = layer_of[seed.site_id]
            guess = min(position.get(seed.site_id, 0), layers.count - 1)
            pairs.append((number, guess if layer is None else layer))
            known += layer is not None
    return Joined(_tensor(pairs), known, len(pairs), _with_attribute(links))


def _with_attribute(links: Sequence[_Link]) -> int:
    return sum(link.has_attribute for link in links)


def _allowed(
    topology: Mapping[str, Any], seeds: Sequence[RunSeed], blueprints: Sequence[Growable], parameters: int
) -> Joined:
    """A seed that may blend, and every parameter. There is no fallback: without an allowance there is no edge."""
    of_host = _capabilities(topology)
    of_blueprints = [(b.fits, told) for b in blueprints for told in _capabilities(b.extras)]
    allowed = [
        number
        for number, seed in enumerate(seeds)
        if _may_blend(seed, number, of_host + [told for fits, told in of_blueprints if seed.site_id in fits])
    ]
    edges = torch.cartesian_prod(torch.tensor(allowed, dtype=torch.long), torch.arange(parameters)).reshape(-1, 2).T
    return Joined(edges.contiguous(), edges.shape[1], len(seeds) * parameters)


def _capabilities(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    told = document.get("capabilities")
    return [told] if isinstance(told, Mapping) else []


def _may_blend(seed: RunSeed, number: int, capabilities: Sequence[Mapping[str, Any]]) -> bool:
    """By a list of this very seed, else by its stage, else by what holds for all (requirements 2.5)."""
    lists = (_list_of(told, seed.seed_id, number) for told in capabilities)
    own = next((methods for methods in lists if methods is not None), None)
    if own is not None:
        return bool(own)
    methods = (told.get("allowed_blending_methods") for told in capabilities)
    return seed.stage in GROWN or any(isinstance(each, list) and each for each in methods)


def _list_of(capabilities: Mapping[str, Any], seed_id: str, number: int) -> list[Any] | None:
    for key, called in (("by_seed_id", seed_id), ("by_seed_index", str(number))):
        lists = capabilities.get(key)
        methods = lists.get(called) if isinstance(lists, Mapping) else None
        if isinstance(methods, list):
            return methods
    return None


def _suits(seeds: Sequence[RunSeed], blueprints: Sequence[Growable]) -> Joined:
    pairs = [
        (b, s)
        for b, blueprint in enumerate(blueprints)
        for s, seed in enumerate(seeds)
        if seed.site_id in blueprint.fits
    ]
    return Joined(_tensor(pairs), len(pairs), len(pairs))


def _all_pairs(name: str, sources: int, targets: int) -> Joined:
    index, total = torch.arange(sources * targets), sources * targets
    edges = torch.stack([index // max(1, targets), index % max(1, targets)])
    return Joined(edges, total if name in BY_NATURE else 0, total)


def _tensor(pairs: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()
