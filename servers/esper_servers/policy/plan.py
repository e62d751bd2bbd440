"""The served form of PolicyNetwork: the same weights, one GEMM per node type, one scatter over all edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import schema
from .edge_scores import EdgeScores, score_weight
from .graph import GraphInputs, offsets_of
from .network import Heads, PolicyNetwork
from .union import UnionPlan


class FusedPlan:
    """Computes what PolicyNetwork computes, equal to 1e-5, with far fewer dispatches."""

    def __init__(self, network: PolicyNetwork) -> None:
        self._network = network
        self._layouts: WeakKeyDictionary[GraphInputs, Layout] = WeakKeyDictionary()
        with torch.no_grad():
            self._sage = [SageLayer(layer) for layer in network.sage]
            self._gat = [GatLayer(layer, network.config.heads) for layer in network.gat]
            self.edge_scores = EdgeScores(network)
            self._union = UnionPlan(network, self._sage, self._gat)

    def __call__(self, inputs: GraphInputs) -> Heads:
        """Compute the heads of one graph, which is laid out once."""
        return self._compute(inputs, self.lay_out(inputs))

    def lay_out(self, inputs: GraphInputs) -> Layout:
        """Find out once for each graph what its edges come to."""
        layout = self._layouts.get(inputs)
        if layout is None:
            layout = self._layouts[inputs] = self._new_layout(inputs)
        return layout

    def can_share(self, inputs: GraphInputs) -> bool:
        """Whether a graph that is laid out gains by a pass with others: a large one is bound by its own arithmetic."""
        layout = self._layouts.get(inputs)
        return layout is not None and layout.mean_matrix is not None

    def compute_many(self, graphs: Sequence[GraphInputs]) -> list[Heads]:
        """Compute the heads of different graphs in one pass; each must be one that `can_share`."""
        return self._union(graphs, [self._layouts[inputs] for inputs in graphs])

    def compute_once(self, inputs: GraphInputs) -> Heads:
        """Compute the heads of a graph that will not come again; safe beside the thread of the steps."""
        return self._compute(inputs, self._new_layout(inputs))

    def _new_layout(self, inputs: GraphInputs) -> Layout:
        return Layout(inputs, _counts(inputs), self.edge_scores(inputs))

    def _compute(self, inputs: GraphInputs, layout: Layout) -> Heads:
        counts = _counts(inputs)
        sizes = [counts[kind] for kind in schema.NODE_TYPES]
        encoders = self._network.encoders
        h = torch.relu(torch.cat([encoders[kind](inputs.features[kind]) for kind in schema.NODE_TYPES]))
        for sage in self._sage:
            h = torch.relu(sage(h, sizes, layout)) + h
        first, second = layout.edge_scores
        h = nn.functional.gelu(self._gat[0](h, sizes, layout, first))
        h = self._gat[1](h, sizes, layout, second)
        return self._network.read_out(dict(zip(schema.NODE_TYPES, torch.split(h, sizes), strict=True)))


def _counts(inputs: GraphInputs) -> dict[str, int]:
    return {kind: x.shape[0] for kind, x in inputs.features.items()}


class Layout:
    """What the layers need of the edges, computed once per graph."""

    def __init__(
        self, inputs: GraphInputs, counts: dict[str, int], scores: Sequence[Mapping[Relation, Tensor]]
    ) -> None:
        self.source, self.target = inputs.edge_index
        offsets, relations = offsets_of(counts), schema.ORDERED_RELATIONS
        self.nodes = sum(counts.values())
        segment, base, targets = [], 0, []
        for relation in relations:
            pair = inputs.edges[relation]
            segment.append(pair[1] + base)
            targets.append(torch.full((pair.shape[1],), offsets[relation[2]]))
            base += counts[relation[2]]
        self.segment = torch.cat(segment)
        self.segments = base
        degree = torch.zeros(base).index_add_(0, self.segment, torch.ones(len(self.segment)))
        self.mean_weight = (1 / degree)[self.segment].unsqueeze(1)
        self.messages = sum(counts[source] for source, _, _ in relations)
        self.mean_matrix = self.scatter(self.mean_weight.T)[0] if self.is_small else None
        self.target_message = self._target_messages(inputs, counts)
        self.edge_scores = [_of_all_edges(inputs, each) for each in scores]
        """(E, H) for each GAT layer: what is told of the edges."""

    @property
    def is_small(self) -> bool:
        """Whether a dense matrix of nodes by messages is cheaper than a gather and a scatter of all edges."""
        return self.nodes * self.messages <= DENSE_LIMIT

    def scatter(self, weights_HE: Tensor) -> Tensor:
        """Lay weights per edge out as (H, nodes, messages); edges that occur twice add up."""
        flat = weights_HE.new_zeros((weights_HE.shape[0], self.nodes * self.messages))
        return flat.index_add_(1, self.target * self.messages + self.source, weights_HE).view(
            -1, self.nodes, self.messages
        )

    @staticmethod
    def _target_messages(inputs: GraphInputs, counts: dict[str, int]) -> Tensor:
        """For each edge the row of its target in the table of scores laid out by target type and relation."""
        start, rows = {}, 0
        for kind in schema.NODE_TYPES:
            for relation in [r for r in schema.ORDERED_RELATIONS if r[2] == kind]:
                start[relation] = rows
                rows += counts[kind]
        return torch.cat([inputs.edges[r][1] + start[r] for r in schema.ORDERED_RELATIONS])


DENSE_LIMIT = 500_000
"""Cells, 2 MB a head. A host of 256 layers has 320 000, and takes 9 ms by the matrix, 19 by the scatter."""
Relation = tuple[str, str, str]


def _of_all_edges(inputs: GraphInputs, scores: Mapping[Relation, Tensor]) -> Tensor:
    heads = next(iter(scores.values())).shape[1]
    nothing = {r: torch.zeros(inputs.edges[r].shape[1], heads) for r in schema.RELATIONS if r not in scores}
    told = {**nothing, **scores}
    return torch.cat([told[relation] for relation in schema.ORDERED_RELATIONS])


class SageLayer:
    """Sum over relations of W_l mean(neighbours) + b + W_r self, with W_r summed per target type beforehand."""

    def __init__(self, layer: Any) -> None:
        convs = {r: layer.convs[r] for r in schema.RELATIONS}
        self.weights, self.biases = [], []
        for kind in schema.NODE_TYPES:
            own = [convs[r].lin_r.weight for r in schema.RELATIONS if r[2] == kind]
            bias = [convs[r].lin_l.bias for r in schema.RELATIONS if r[2] == kind]
            outgoing = [convs[r].lin_l.weight for r in schema.ORDERED_RELATIONS if r[0] == kind]
            self.weights.append(torch.cat([sum(own), *outgoing]).T.contiguous())
            self.biases.append(sum(bias))
        self.width = convs[schema.RELATIONS[0]].lin_l.weight.shape[0]

    def __call__(self, h: Tensor, sizes: list[int], layout: Layout) -> Tensor:
        own, messages = [], []
        for x, weight, bias in zip(torch.split(h, sizes), self.weights, self.biases, strict=True):
            y = x @ weight
            own.append(y[:, : self.width] + bias)
            messages.append(_by_relation(y[:, self.width :], self.width))
        out = torch.cat(own)
        if layout.mean_matrix is not None:
            return out.addmm_(layout.mean_matrix, torch.cat(messages))
        gathered = torch.cat(messages)[layout.source] * layout.mean_weight
        return out.index_add_(0, layout.target, gathered)


class GatLayer:
    """Attention per relation, summed over relations; heads are averaged (Velickovic et al. 2018, arXiv 1710.10903)."""

    def __init__(self, layer: Any, heads: int) -> None:
        convs = {r: layer.convs[r] for r in schema.RELATIONS}
        self.heads, self.width = heads, convs[schema.RELATIONS[0]].out_channels
        self.weights, self.target_scores = [], []
        for kind in schema.NODE_TYPES:
            outgoing = [convs[r] for r in schema.ORDERED_RELATIONS if r[0] == kind]
            incoming = [convs[r] for r in schema.ORDERED_RELATIONS if r[2] == kind]
            self.weights.append(torch.cat([self._source_weight(c) for c in outgoing]).T.contiguous())
            self.target_scores.append(
                torch.cat([score_weight(c.lin_dst.weight, c.att_dst) for c in incoming]).T.contiguous()
            )
        self.biases = [
            torch.as_tensor(sum(convs[r].bias for r in schema.RELATIONS if r[2] == kind)) for kind in schema.NODE_TYPES
        ]

    @staticmethod
    def _source_weight(conv: Any) -> Tensor:
        """The projection and, below it, the rows that give the source's attention score straight from the input."""
        return torch.cat([conv.lin_src.weight, score_weight(conv.lin_src.weight, conv.att_src)])

    def __call__(self, h: Tensor, sizes: list[int], layout: Layout, edge_score: Tensor) -> Tensor:
        block = self.heads * self.width + self.heads
        messages, scores = [], []
        for x, weight, target in zip(torch.split(h, sizes), self.weights, self.target_scores, strict=True):
            messages.append(_by_relation(x @ weight, block))
            scores.append(_by_relation(x @ target, self.heads))
        table = torch.cat(messages)
        projected, source_score = torch.split(table, [self.heads * self.width, self.heads], dim=1)
        target_score = torch.cat(scores)[layout.target_message]
        score = nn.functional.leaky_relu(source_score[layout.source] + target_score + edge_score, 0.2)
        attention = _segment_softmax(score, layout) / self.heads
        bias = torch.cat([b.expand(n, -1) for b, n in zip(self.biases, sizes, strict=True)])
        if layout.is_small:
            matrix = layout.scatter(attention.T)
            by_head = projected.view(-1, self.heads, self.width).transpose(0, 1)
            return bias + torch.bmm(matrix, by_head).sum(dim=0)
        projected = projected[layout.source]
        weighted = (projected.view(-1, self.heads, self.width) * attention.unsqueeze(2)).sum(dim=1)
        return bias.index_add(0, layout.target, weighted)


def _by_relation(y: Tensor, width: int) -> Tensor:
    """(N, R * width) to (R * N, width): the rows of one relation stand together."""
    n = y.shape[0]
    return y.view(n, -1, width).transpose(0, 1).reshape(-1, width) if n else y.new_zeros((0, width))


def _segment_softmax(score: Tensor, layout: Layout) -> Tensor:
    index = layout.segment.unsqueeze(1).expand_as(score)
    peak = score.new_full((layout.segments, score.shape[1]), -torch.inf)
    peak.scatter_reduce_(0, index, score, "amax", include_self=True)
    exponent = (score - peak[layout.segment]).exp()
    total = torch.zeros_like(peak).index_add_(0, layout.segment, exponent)
    return exponent / (total[layout.segment] + 1e-16)
