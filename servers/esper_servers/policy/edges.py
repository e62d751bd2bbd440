"""Which nodes of a run are joined, what is told of each edge, and which are joined because nobody said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite

from . import features, schema
from .allowances import Methods, allowed_methods, capabilities_of
from .growth import Growable, Growth
from .links import Link, Nodes, read_links
from .vocabularies import SCHEDULES

Relation = tuple[str, str, str]
BY_NATURE = frozenset({"influences", "operates", "reports", "summarises"})
"""They join all nodes because there is one global node, not because nobody said which."""
GERMINATED = Stage.SEED_LIFECYCLE_STAGE_GERMINATED


class Joined(NamedTuple):
    """The edges of a relation (2, E), source above target, and how much of them was told."""

    edges: Tensor
    told: int
    of: int
    """What `told` is a share of."""
    attributes: Sequence[Sequence[float | None]] = ()
    """What is told of each edge, by `schema.EDGE_ATTRIBUTES`; for the relations that have some."""


class Edges(NamedTuple):
    """Edges by relation, and how much of them was told, by `coverage.Coverage.types`."""

    by_relation: dict[Relation, Tensor]
    attributes: dict[Relation, Tensor]
    """(E, 2A): pairs of a value and its mask."""
    coverage: dict[str, float]


class Scene(NamedTuple):
    """What the edges of a run are read from."""

    topology: Mapping[str, Any]
    sites: Sequence[RunSite]
    seeds: Sequence[RunSeed]
    blueprints: Sequence[Growable]
    growths: Sequence[Growth]
    host: Nodes
    """The layers of the host, which come first."""
    layers: Sequence[Mapping[str, Any]]
    activations: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int]


def build_edges(scene: Scene) -> Edges:
    """Join the nodes of a graph. What is absent or bad in the topology is ignored, and a fallback stands for it."""
    connects, feeds = _connects(scene), _feeds(scene)
    joined = {
        "connects": connects,
        "feedback": connects._replace(edges=connects.edges.flip(0)),
        "monitors": _monitors(scene),
        "feeds": feeds,
        "activates": feeds and feeds._replace(edges=feeds.edges.flip(0)),
        "allowed": _allowed(scene),
        "composes": _composes(scene),
        "suits": _suits(scene),
    }
    found = {relation: joined.get(relation[1]) or _all_pairs(relation, scene.counts) for relation in schema.RELATIONS}
    attributes = {relation: _attributes(found[relation], relation) for relation in schema.EDGE_ATTRIBUTES}
    return Edges(
        {relation: each.edges for relation, each in found.items()},
        {relation: torch.from_numpy(array) for relation, array in attributes.items()},
        _coverage(found, attributes),
    )


def _coverage(found: Mapping[Relation, Joined], attributes: Mapping[Relation, NDArray[np.float32]]) -> dict[str, float]:
    ratios = {f"edges.{source}_{name}": round(j.told / j.of, 4) for (source, name, _), j in found.items() if j.of}
    for (source, name, _), array in attributes.items():
        if len(array):
            ratios[f"attributes.{source}_{name}"] = round(float(array[:, 1::2].mean()), 4)
    return ratios


def _attributes(joined: Joined, relation: Relation) -> NDArray[np.float32]:
    array = np.zeros((joined.edges.shape[1], 2 * len(schema.EDGE_ATTRIBUTES[relation])), dtype=np.float32)
    for row, values in zip(array, joined.attributes, strict=True):
        features.write(row, values)
    return array


def _connects(scene: Scene) -> Joined:
    """What `adjacency.layer` says of the host, else a chain, and the blueprints that grow beside it."""
    given = scene.topology.get("adjacency")
    host = read_links(given.get("layer") if isinstance(given, Mapping) else None, scene.host, scene.host)
    told = len(host)
    if not host:
        host = [Link(number, number + 1) for number in range(scene.host.count - 1)]
    links = {link[:2]: link for link in host}
    for growth in scene.growths:
        grown = _grown_links(growth, host)
        links |= {link[:2]: link for link in grown}
        told += len(grown) if growth.structure.is_told else len(grown) - len(growth.structure.links)
    latencies = _relative_latencies(scene.layers)
    attributes = [(features.squashed(link.weight), latencies.get(link.source)) for link in links.values()]
    return Joined(_tensor(links), told, len(links), attributes)


def _grown_links(growth: Growth, host: Sequence[Link]) -> list[Link]:
    """Its own, from the layer of its site into it, and from it to where that layer leads: there both are blended."""
    first, structure, site = growth.first_layer, growth.structure, growth.site_layer
    inner = [Link(link.source + first, link.target + first, link.weight) for link in structure.links]
    if site is None:
        return inner
    into = [Link(site, entry + first) for entry in structure.entries]
    onward = [link.target for link in host if link.source == site]
    return inner + into + [Link(leaf + first, target) for leaf in structure.exits for target in onward]


def _relative_latencies(layers: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Of each layer that tells one, as a share of the slowest."""
    told = ((number, features.finite(layer.get("latency_ms"))) for number, layer in enumerate(layers))
    known = {number: latency for number, latency in told if latency is not None and latency >= 0}
    slowest = max(known.values(), default=0.0)
    return {number: latency / slowest for number, latency in known.items()} if slowest else known


def _monitors(scene: Scene) -> Joined:
    """What the topology says of a seed, else the layer of its site, a guess where none has its name; and its own."""
    links = {link[:2]: link for link in _told_monitors(scene)}
    known, seeds_told = len(links), {source for source, _ in links}
    position = {site.site_id: number for number, site in enumerate(scene.sites)}
    layer_of = {site_id: scene.host.find_site(site_id) for site_id in {seed.site_id for seed in scene.seeds}}
    for number, seed in enumerate(scene.seeds):
        if number not in seeds_told:
            layer = layer_of[seed.site_id]
            guess = min(position.get(seed.site_id, 0), scene.host.count - 1)
            links[number, guess if layer is None else layer] = Link(number, guess if layer is None else layer)
            known += layer is not None
    for growth in scene.growths:
        links |= {(growth.seed, layer): Link(growth.seed, layer) for layer in growth.layers}
        known += len(growth.layers)
    return Joined(_tensor(links), known, len(links), [(features.squashed(link.weight),) for link in links.values()])


def _told_monitors(scene: Scene) -> list[Link]:
    """What `monitored_layers` and `monitors` say, as far as the thresholds there leave it."""
    seeds, given = Nodes([seed.seed_id for seed in scene.seeds]), scene.topology.get("monitors")
    links = read_links(scene.topology.get("monitored_layers"), seeds, scene.host)
    if not isinstance(given, Mapping):
        return links
    pairs = [[seed.seed_id, *layer] for n, seed in enumerate(scene.seeds) for layer in _monitored(given, seed, n)]
    links += read_links(pairs, seeds, scene.host)
    return [link for link in links if _may_monitor(scene, link.source, given.get("thresholds"))]


def _monitored(given: Mapping[str, Any], seed: RunSeed, number: int) -> list[list[Any]]:
    """The layers of a seed, each with its weight if one is told."""
    lists = (
        told.get(called)
        for key, called in (("by_seed_id", seed.seed_id), ("by_seed_index", str(number)))
        if isinstance(told := given.get(key), Mapping)
    )
    found = next((each for each in lists if isinstance(each, list)), [])
    return [layer if isinstance(layer, list) else [layer] for layer in found]


def _may_monitor(scene: Scene, seed: int, thresholds: Any) -> bool:
    """Whether a seed is far enough by `stage_min`, and what it grows safe enough by `risk_max`."""
    if not isinstance(thresholds, Mapping):
        return True
    grown = [scene.blueprints[growth.blueprint].risk for growth in scene.growths if growth.seed == seed]
    most, least = features.finite(thresholds.get("risk_max")), _stage(thresholds.get("stage_min"))
    stage = max(scene.seeds[seed].stage, GERMINATED if grown else 0)
    return stage >= least and (most is None or all(risk <= most for risk in grown))


def _stage(told: Any) -> int:
    """A stage by number or name, the first one for what is neither."""
    if isinstance(told, str):
        return dict(Stage.items()).get(f"SEED_LIFECYCLE_STAGE_{told.upper()}", 0)
    return told if type(told) is int else 0


def _feeds(scene: Scene) -> Joined | None:
    """What layers say of their `activation`, by its name or else by its type; None if none does."""
    named, typed = _activations_by(scene, "activation_id"), _activations_by(scene, "type")
    called = [(n, name) for n, layer in enumerate(scene.layers) if isinstance(name := layer.get("activation"), str)]
    pairs = [(number, found) for number, name in called for found in named.get(name) or typed.get(name, [])]
    return Joined(_tensor(pairs), len(pairs), len(pairs)) if pairs else None


def _activations_by(scene: Scene, key: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, activation in enumerate(scene.activations):
        if isinstance(name := activation.get(key), str):
            found.setdefault(name, []).append(number)
    return found


def _allowed(scene: Scene) -> Joined:
    """A seed that may blend, and every parameter. There is no fallback: without an allowance there is no edge."""
    parameters = scene.counts["parameter"]
    methods = methods_of(scene)
    pairs = [(seed, parameter) for seed in methods for parameter in range(parameters)]
    attributes = [_multi_hot(methods[seed]) for seed, _ in pairs]
    return Joined(_tensor(pairs), len(pairs), len(scene.seeds) * parameters, attributes)


def methods_of(scene: Scene) -> dict[int, Methods]:
    """How each seed that may blend may be blended, by the host and by what fits where it grows."""
    of_host = capabilities_of(scene.topology)
    of_blueprints = [(b.fits, told) for b in scene.blueprints for told in capabilities_of(b.extras)]
    found = {}
    for number, seed in enumerate(scene.seeds):
        capabilities = of_host + [told for fits, told in of_blueprints if seed.site_id in fits]
        methods = allowed_methods(seed, number, capabilities)
        if methods is not None:
            found[number] = methods
    return found


def _multi_hot(methods: Methods) -> list[float | None]:
    """Unknown where none of the methods that a policy chooses from is named."""
    named = [float(name in methods) for name in SCHEDULES]
    return list(named) if any(named) else [None] * len(SCHEDULES)


def _composes(scene: Scene) -> Joined:
    """A blueprint, with the layers that it grows and those of sites that it fits; a guess where none has the name."""
    pairs = {(growth.blueprint, layer): True for growth in scene.growths for layer in growth.layers}
    for position, site in enumerate(scene.sites):
        layer = scene.host.find_site(site.site_id)
        at = min(position, scene.host.count - 1) if layer is None else layer
        for number, blueprint in enumerate(scene.blueprints):
            if site.site_id in blueprint.fits:
                pairs[number, at] = layer is not None or pairs.get((number, at), False)
    return Joined(_tensor(pairs), sum(pairs.values()), len(pairs))


def _suits(scene: Scene) -> Joined:
    pairs = [
        (b, s)
        for b, blueprint in enumerate(scene.blueprints)
        for s, seed in enumerate(scene.seeds)
        if seed.site_id in blueprint.fits
    ]
    return Joined(_tensor(pairs), len(pairs), len(pairs))


def _all_pairs(relation: Relation, counts: Mapping[str, int]) -> Joined:
    sources, targets = counts[relation[0]], counts[relation[2]]
    index, total = torch.arange(sources * targets), sources * targets
    edges = torch.stack([index // max(1, targets), index % max(1, targets)])
    return Joined(edges, total if relation[1] in BY_NATURE else 0, total)


def _tensor(pairs: Any) -> Tensor:
    return torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2).T.contiguous()
