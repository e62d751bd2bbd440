"""Serving the package that plan_package built: the same heads in half the time of the eager plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import schema
from .edge_scores import EdgeScores
from .graph import LEAST_ROWS, GraphInputs
from .native_package import NativePackage
from .network import Heads

CELL_LIMIT = 250_000
"""Cells of all matrices of a graph; beyond it the eager plan is faster, and does not take their memory."""

Package = Callable[[list[Tensor]], Sequence[Tensor]]
"""From what `plan_inputs` lays out to the heads in their order."""


class CompiledPlan:
    """Runs the package, and the eager plan for graphs that are too large for it."""

    def __init__(self, package: Package, eager: Callable[[GraphInputs], Heads], edge_scores: EdgeScores) -> None:
        self.package = package
        self._beside = package.compute_beside if isinstance(package, NativePackage) else package
        self._eager = eager
        self._edge_scores = edge_scores
        self._laid_out: WeakKeyDictionary[GraphInputs, list[Tensor]] = WeakKeyDictionary()

    def __call__(self, inputs: GraphInputs, *, beside: bool = False) -> Heads:
        """Compute the heads of one graph, `beside` other threads or keeping them from the interpreter meanwhile."""
        tensors = self._tensors(inputs)
        if not tensors:
            return self._eager(inputs)
        heads = Heads(*(self._beside if beside else self.package)(tensors))
        seeds, blueprints = inputs.features["seed"].shape[0], inputs.features["blueprint"].shape[0]
        return heads._replace(operation=heads.operation[:seeds], blueprint=heads.blueprint[:blueprints])

    def covers(self, inputs: GraphInputs) -> bool:
        """Whether a graph is small enough for the package."""
        return bool(self._tensors(inputs))

    def _tensors(self, inputs: GraphInputs) -> list[Tensor]:
        tensors = self._laid_out.get(inputs)
        if tensors is None:
            is_covered = cells(inputs) <= CELL_LIMIT
            tensors = self._laid_out[inputs] = plan_inputs(inputs, self._edge_scores) if is_covered else []
        return tensors


def plan_inputs(inputs: GraphInputs, edge_scores: EdgeScores) -> list[Tensor]:
    """Lay a graph out in the order of DensePlan; features stay in the memory that a step fills.

    Features (N, D) by `schema.NODE_TYPES`; per relation of `schema.ORDERED_RELATIONS` how many edges there are from a
    source to a target (T, S), and the same with rows that sum to 1 or 0; per GAT layer and relation of
    `schema.EDGE_ATTRIBUTES` what is told of its edges (H, T, S); the weight of each layer in the context (1, N).
    """
    edges = [_edge_matrix(inputs, relation) for relation in schema.ORDERED_RELATIONS]
    means = [edge / edge.sum(dim=1, keepdim=True).clamp_min(1) for edge in edges]
    layers = inputs.features["layer"].shape[0]
    context = torch.zeros(1, _rows(inputs, "layer"))
    context[0, :layers] = 1 / layers
    told = [_score_matrix(inputs, r, score) for layer in edge_scores(inputs) for r, score in layer.items()]
    return [*inputs.padded, *edges, *means, *told, context]


def cells(inputs: GraphInputs) -> int:
    """Count the cells of the matrices that a graph would need."""
    return sum(_rows(inputs, source) * _rows(inputs, target) for source, _, target in schema.RELATIONS)


def _rows(inputs: GraphInputs, kind: str) -> int:
    nodes = inputs.features[kind].shape[0]
    return nodes if kind == "global" else max(LEAST_ROWS, nodes)


def _edge_matrix(inputs: GraphInputs, relation: tuple[str, str, str]) -> Tensor:
    edges = inputs.edges[relation]
    matrix = torch.zeros(_rows(inputs, relation[2]), _rows(inputs, relation[0]))
    return matrix.index_put_((edges[1], edges[0]), torch.ones(edges.shape[1]), accumulate=True)


def _score_matrix(inputs: GraphInputs, relation: tuple[str, str, str], score_EH: Tensor) -> Tensor:
    edges = inputs.edges[relation]
    matrix = torch.zeros(score_EH.shape[1], _rows(inputs, relation[2]), _rows(inputs, relation[0]))
    matrix[:, edges[1], edges[0]] = score_EH.T
    return matrix
