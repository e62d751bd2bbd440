from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_rpc.proto.leyline.v1 import (
    BlueprintDescriptor,
    BlueprintTier,
    HandlingClass,
    HazardBand,
    SeedState,
    SystemStatePacket,
)
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite

from . import features, schema
from .coverage import Coverage, Known, coverage_of, known_of
from .edges import Scene, build_edges, methods_of
from .features import Floats
from .growth import Growth, documents, place
from .links import Nodes
from .norms import Norms
from .vocabularies import SCHEDULES

LEAST_ROWS = 2
"""What is compiled for any number of nodes takes 0 and 1 as special."""
MAX_SEEDS = 256
# Some relations join every node of one type with every node of another, and every run shares one process: 256 nodes of
# each type take 1.7 s a step, 1024 half a minute. What a topology says beyond these counts is left out.
MAX_LAYERS, MAX_ACTIVATIONS, MAX_PARAMETERS = 256, 64, 64
_FILLED_BY_STEP = ("layer", "seed", "global")
_LAYER_LOSS = 2 * schema.FEATURES["layer"].index("loss")


@dataclass(frozen=True, kw_only=True)
class BlueprintCandidate:
    """A blueprint that the controller may choose."""

    blueprint_id: str
    descriptor: BlueprintDescriptor
    extras: Mapping[str, Any] = field(default_factory=dict)
    extras_digest: bytes = b""
    fits: frozenset[str] = frozenset()
    """Sites whose shape binds."""
    hazard_band: HazardBand.ValueType = HazardBand.HAZARD_BAND_UNSPECIFIED
    handling_class: HandlingClass.ValueType = HandlingClass.HANDLING_CLASS_UNSPECIFIED
    bsds_risk: float | None = None

    @property
    def risk(self) -> float:
        """From 0 to 1, by the safety data sheet where there is one."""
        return self.descriptor.risk if self.bsds_risk is None else self.bsds_risk

    @cached_property
    def is_free(self) -> bool:
        """Whether it may be planted at all: safe, approved, and with no safety data sheet against it."""
        held = self.descriptor.quarantine_only or self.handling_class == HandlingClass.HANDLING_CLASS_QUARANTINE
        dangerous = self.hazard_band >= HazardBand.HAZARD_BAND_HIGH
        safe = self.descriptor.tier == BlueprintTier.BLUEPRINT_TIER_SAFE
        return safe and not (held or dangerous or self.descriptor.approval_required)


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphInputs:
    """What the network reads: features x_ND per node type, and edges (2, E) per relation, source above target."""

    features: dict[str, Tensor]
    edges: dict[tuple[str, str, str], Tensor]
    attributes: dict[tuple[str, str, str], Tensor]
    """What is told of each edge (E, 2A), for the relations of `schema.EDGE_ATTRIBUTES`."""
    edge_index: Tensor
    """All edges in one pair of rows: source node within all nodes of all relations' messages, target node overall."""
    padded: list[Tensor]
    """The features by `schema.NODE_TYPES`, in the same memory, with rows of zeros up to `LEAST_ROWS`."""


class RunGraph:
    """The graph of one run. Structure is built once; a step only fills features into arrays that are kept."""

    def __init__(
        self,
        topology: Mapping[str, Any],
        sites: Sequence[RunSite],
        seeds: Sequence[RunSeed],
        blueprints: Sequence[BlueprintCandidate],
        norms: Norms | None = None,
        attached: Mapping[str, str] | None = None,
    ) -> None:
        """Lay out nodes and edges; `attached` are the blueprints that grow in seeds, by seed."""
        self.norms = norms or Norms()
        seeds = seeds[:MAX_SEEDS]
        self.seed_ids = [seed.seed_id for seed in seeds]
        self.site_of = {seed.seed_id: seed.site_id for seed in seeds}
        self.blueprints = list(blueprints)
        self.blueprint_of = {blueprint.blueprint_id: blueprint for blueprint in self.blueprints}
        self.attached = dict(attached or {})
        self._seed_index = {seed_id: i for i, seed_id in enumerate(self.seed_ids)}
        host_layers = documents(topology.get("layers"))[:MAX_LAYERS]
        host = Nodes([str(layer.get("layer_id", "")) for layer in host_layers], max(1, len(host_layers)))
        growths = place(seeds, self.blueprints, self.attached, host, most_layers=MAX_LAYERS)
        grown = [layer for growth in growths for layer in growth.structure.layers]
        self._layers = (host_layers or [{}]) + grown
        self._depths = _depths(len(host_layers), growths)
        grown_activations = [activation for growth in growths for activation in growth.structure.activations]
        self._activations = (documents(topology.get("activations")) + grown_activations)[:MAX_ACTIVATIONS]
        self._parameters = documents(topology.get("parameters"))[:MAX_PARAMETERS] or _blueprint_parameters(blueprints)
        sizes = self._sizes()
        rooms = {kind: self._empty(kind, sizes[kind]) for kind in schema.NODE_TYPES}
        self._arrays = {kind: room[: sizes[kind]] for kind, room in rooms.items()}
        self._tensors = {kind: torch.from_numpy(array) for kind, array in self._arrays.items()}
        self._fill_static()
        self._layers_known: dict[bool, Known] = {}
        self._last_known: dict[str, Known] = {}
        self._coverage: Coverage
        self.plantable = self._find_plantable()
        """(S, B): which blueprint may grow in which seed."""
        scene = Scene(
            topology, sites, seeds, self.blueprints, growths, host, self._layers, self._activations, self.counts
        )
        self.edges, attributes, self._edge_coverage = build_edges(scene)
        self.blendable = _blendable(scene)
        """(S, 4): by which of `SCHEDULES` a seed may be blended."""
        self._inputs = GraphInputs(
            features=self._tensors,
            edges=self.edges,
            attributes=attributes,
            edge_index=_flatten(self.edges, self.counts),
            padded=[torch.from_numpy(rooms[kind]) for kind in schema.NODE_TYPES],
        )

    @property
    def counts(self) -> dict[str, int]:
        """Nodes of each type."""
        return {kind: len(array) for kind, array in self._arrays.items()}

    @property
    def node_count(self) -> int:
        """Nodes of all types."""
        return sum(self.counts.values())

    @property
    def edge_count(self) -> int:
        """Edges of all relations."""
        return sum(edges.shape[1] for edges in self.edges.values())

    @property
    def inputs(self) -> GraphInputs:
        """The tensors, which share memory with what `fill` writes."""
        return self._inputs

    def fill(self, packet: SystemStatePacket) -> GraphInputs:
        """Write the features of one step. Values that are missing or not finite are masked; unknown seeds ignored."""
        metrics = packet.training_metrics
        loss = metrics.get("loss", packet.training_loss if packet.HasField("training_loss") else math.nan)
        self._fill_global(packet, loss)
        self._fill_seeds(packet.seed_states)
        layer = self._arrays["layer"]
        known = math.isfinite(loss)
        layer[:, _LAYER_LOSS] = self.norms.scale("loss", loss) if known else 0.0
        layer[:, _LAYER_LOSS + 1] = known
        return self._inputs

    def copy_features(self) -> dict[str, Floats]:
        """Copy what the last `fill` wrote, by type of node."""
        return {kind: array.copy() for kind, array in self._arrays.items()}

    def restore_features(self, features: Mapping[str, Floats]) -> None:
        """Write back what `copy_features` returned, of a graph with the same structure."""
        for kind, array in features.items():
            self._arrays[kind][:] = array

    def coverage(self) -> Coverage:
        """Return how much is known of what the last `fill` wrote and of the structure; the same object while it is."""
        known = {kind: known_of(self._arrays[kind], kind) for kind in ("seed", "global")}
        known["layer"] = self._known_layers()
        if known != self._last_known:
            self._last_known = known
            self._coverage = coverage_of(self._known_structure | known, self._edge_coverage)
        return self._coverage

    def _known_layers(self) -> Known:
        """Of layers a step tells nothing but the loss."""
        layers = self._arrays["layer"]
        has_loss = bool(layers[0, _LAYER_LOSS + 1])
        if has_loss not in self._layers_known:
            self._layers_known[has_loss] = known_of(layers, "layer")
        return self._layers_known[has_loss]

    @cached_property
    def _known_structure(self) -> dict[str, Known]:
        return {kind: known_of(array, kind) for kind, array in self._arrays.items() if kind not in _FILLED_BY_STEP}

    def _find_plantable(self) -> NDArray[np.bool_]:
        sites = [self.site_of[seed_id] for seed_id in self.seed_ids]
        fitting = [[b.is_free and site in b.fits for b in self.blueprints] for site in sites]
        return np.array(fitting, dtype=bool).reshape(len(sites), len(self.blueprints))

    def _sizes(self) -> dict[str, int]:
        return {
            "layer": len(self._layers), "seed": len(self.seed_ids), "activation": len(self._activations),
            "parameter": len(self._parameters), "blueprint": len(self.blueprints), "global": 1,
        }  # fmt: skip

    @staticmethod
    def _empty(kind: str, size: int) -> Floats:
        rows = size if kind == "global" else max(LEAST_ROWS, size)
        return np.zeros((rows, schema.width_of(kind)), dtype=np.float32)

    def _fill_static(self) -> None:
        arrays = self._arrays
        for row, layer, depth in zip(arrays["layer"], self._layers, self._depths, strict=True):
            features.write_layer(row, layer, depth)
        for row, activation in zip(arrays["activation"], self._activations, strict=True):
            features.write_activation(row, activation)
        for row, parameter in zip(arrays["parameter"], self._parameters, strict=True):
            features.write_parameter(row, parameter)
        for row, each in zip(arrays["blueprint"], self.blueprints, strict=True):
            counts = [layer.get("parameter_count") for layer in documents(each.extras.get("layers"))]
            features.write_blueprint(row, each.descriptor, each.risk, counts)

    def _fill_global(self, packet: SystemStatePacket, loss: float) -> None:
        row, metrics, norms = self._arrays["global"][0], packet.training_metrics, self.norms
        values: list[float | None] = [norms.update("loss", loss)]
        values += [norms.update(n, metrics.get(n, math.nan)) for n in schema.FEATURES["global"][1:4]]
        values += [metrics.get("loss_delta"), metrics.get("loss_volatility")]
        values += [
            features.squashed(packet.validation_loss) if packet.HasField("validation_loss") else None,
            packet.validation_accuracy if packet.HasField("validation_accuracy") else None,
        ]
        features.write(row, values)

    def _fill_seeds(self, states: Iterable[SeedState]) -> None:
        array = self._arrays["seed"]
        array.fill(0.0)
        for state in states:
            index = self._seed_index.get(state.seed_id)
            if index is not None:
                features.write_seed(array[index], state)


def _flatten(edges: Mapping[tuple[str, str, str], Tensor], counts: Mapping[str, int]) -> Tensor:
    """Number the messages of all relations through, and the nodes of all types, so that one scatter serves all."""
    node_offset, message_offset, rows = offsets_of(counts), 0, []
    for source, name, target in schema.ORDERED_RELATIONS:
        pair = edges[source, name, target]
        rows.append(torch.stack([pair[0] + message_offset, pair[1] + node_offset[target]]))
        message_offset += counts[source]
    return torch.cat(rows, dim=1)


def offsets_of(counts: Mapping[str, int]) -> dict[str, int]:
    """Number the nodes of all types through: the first of each type."""
    offsets, total = {}, 0
    for kind in schema.NODE_TYPES:
        offsets[kind] = total
        total += counts[kind]
    return offsets


def _depths(host: int, growths: Sequence[Growth]) -> list[float | None]:
    """Where each layer stands in the host, from 0 to 1; what grows stands where its site does. Unknown without one."""
    last = max(1, host - 1)
    depths: list[float | None] = [number / last for number in range(host)] or [None]
    for growth in growths:
        depths += [None if growth.site_layer is None else growth.site_layer / last] * len(growth.layers)
    return depths


def _blendable(scene: Scene) -> NDArray[np.bool_]:
    """By what is allowed; where nobody names a method that a policy can choose, by all."""
    methods = methods_of(scene)
    named = [[name in methods.get(number, ()) for name in SCHEDULES] for number in range(len(scene.seeds))]
    told = np.array(named, dtype=bool).reshape(len(scene.seeds), len(SCHEDULES))
    return np.asarray(told | ~told.any(axis=1, keepdims=True))


def _blueprint_parameters(blueprints: Sequence[BlueprintCandidate]) -> list[dict[str, Any]]:
    return [p for each in blueprints for p in documents(each.extras.get("parameters"))][:MAX_PARAMETERS]
