"""Several graphs in one pass of the eager plan, as one graph whose parts have no edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import schema
from .graph import GraphInputs
from .network import Heads, PolicyNetwork

if TYPE_CHECKING:
    from .plan import GatLayer, Layout, SageLayer

Integers = NDArray[np.int64]

_TYPES = {kind: number for number, kind in enumerate(schema.NODE_TYPES)}
_SOURCE = np.array([_TYPES[source] for source, _, _ in schema.ORDERED_RELATIONS])
_TARGET = np.array([_TYPES[target] for _, _, target in schema.ORDERED_RELATIONS])
_OUTGOING = np.bincount(_SOURCE, minlength=len(_TYPES))
_INCOMING = np.bincount(_TARGET, minlength=len(_TYPES))
_OUTGOING_SLOT = np.array([np.count_nonzero(_SOURCE[:n] == _SOURCE[n]) for n in range(len(_SOURCE))])
_INCOMING_SLOT = np.array([np.count_nonzero(_TARGET[:n] == _TARGET[n]) for n in range(len(_TARGET))])
_LAYER, _SEED, _BLUEPRINT = (_TYPES[kind] for kind in ("layer", "seed", "blueprint"))


class UnionPlan:
    """Computes what the eager plan computes of each graph, equal to 1e-5, with hardly more dispatches than for one.

    Nodes of all graphs are multiplied together, type by type; only the exchange of messages is a product per graph. So
    no graph pays for the size of another, and a number that is not finite stays in its own.
    """

    def __init__(self, network: PolicyNetwork, sage: Sequence[SageLayer], gat: Sequence[GatLayer]) -> None:
        self._network = network
        self._sage = [_SageRound(layer) for layer in sage]
        self._gat = [_GatRound(layer) for layer in gat]
        self._heads = gat[0].heads
        self._parts: WeakKeyDictionary[GraphInputs, _Part] = WeakKeyDictionary()

    def __call__(self, graphs: Sequence[GraphInputs], layouts: Sequence[Layout]) -> list[Heads]:
        """Compute the heads of different graphs, each of which has a matrix of the weights of its messages."""
        union = _Union([self._part(inputs) for inputs in graphs], layouts)
        h = torch.cat([self._encode(kind, graphs) for kind in schema.NODE_TYPES])
        for sage in self._sage:
            h = torch.relu(sage(h, union)) + h
        first, second = union.edge_scores
        h = nn.functional.gelu(self._gat[0](h, union, first))
        return self._read_out(torch.split(self._gat[1](h, union, second), union.sizes), union)

    def _part(self, inputs: GraphInputs) -> _Part:
        part = self._parts.get(inputs)
        if part is None:
            part = self._parts[inputs] = _Part(inputs, self._heads)
        return part

    def _encode(self, kind: str, graphs: Sequence[GraphInputs]) -> Tensor:
        rows = torch.cat([inputs.features[kind] for inputs in graphs])
        return torch.relu(self._network.encoders[kind](rows))

    def _read_out(self, h: Sequence[Tensor], union: _Union) -> list[Heads]:
        network, overall = self._network, h[_TYPES["global"]]
        context = torch.zeros_like(overall).index_add_(0, union.graph_of_layer, h[_LAYER]) / union.layers_B1
        joint = torch.cat([context, overall], dim=1)
        seeds = torch.cat([h[_SEED], overall[union.graph_of_seed]], dim=1)
        blueprints = torch.cat([h[_BLUEPRINT], overall[union.graph_of_blueprint]], dim=1)
        columns = (
            network.kind_head(joint),
            torch.split(network.operation_head(seeds), union.counts_BT[:, _SEED].tolist()),
            torch.split(network.blueprint_head(blueprints).squeeze(1), union.counts_BT[:, _BLUEPRINT].tolist()),
            network.schedule_head(joint),
            network.value_head(joint).squeeze(1),
            torch.sigmoid(network.risk_head(joint)),
            network.parameter_head(joint),
        )
        return [Heads(*row) for row in zip(*columns, strict=True)]


class _Part:
    """Where the nodes, messages and edges of one graph stand among its own; a union only shifts them."""

    def __init__(self, inputs: GraphInputs, heads: int) -> None:
        counts = {kind: x.shape[0] for kind, x in inputs.features.items()}
        self.counts_T = np.array([counts[kind] for kind in schema.NODE_TYPES])
        self.messages = int(self.counts_T[_SOURCE].sum())
        pairs = [inputs.edges[relation].numpy() for relation in schema.ORDERED_RELATIONS]
        self.edges_R = np.array([pair.shape[1] for pair in pairs])
        self.node = _rows([(n, 1) for n in self.counts_T])
        self.own = _rows(list(zip(self.counts_T, 1 + _OUTGOING, strict=True)))
        sources = list(zip(self.counts_T[_SOURCE], _OUTGOING[_SOURCE], strict=True))
        self.sage_message = _rows([(n, 1 + slots) for n, slots in sources])
        self.gat_message = _rows(sources)
        self.edge_source = np.concatenate([p[0] * n for p, n in zip(pairs, _OUTGOING[_SOURCE], strict=True)])
        self.edge_target = np.concatenate([p[1] * n for p, n in zip(pairs, _INCOMING[_TARGET], strict=True)])
        message, node = inputs.edge_index.numpy()
        self.cell = ((node * self.messages + message)[:, None] * heads + np.arange(heads)).ravel()
        self.cells = int(self.counts_T.sum()) * self.messages * heads


class _Union:
    """Where everything of several graphs stands in tables of rows by type, then graph, then node. B graphs, T types."""

    def __init__(self, parts: Sequence[_Part], layouts: Sequence[Layout]) -> None:
        self.mean_matrices = [each.mean_matrix for each in layouts if each.mean_matrix is not None]
        self.edge_scores = [torch.cat(scores) for scores in zip(*(each.edge_scores for each in layouts), strict=True)]
        self.counts_BT = np.stack([part.counts_T for part in parts])
        self.sizes: list[int] = self.counts_BT.sum(axis=0).tolist()
        before = self.counts_BT.cumsum(axis=0) - self.counts_BT
        """(B, T): nodes of the type in the graphs before."""
        self._place_nodes(parts, before)
        self._place_messages(parts, before)
        self._place_edges(parts, before)
        self.nodes_of = _slices(self.counts_BT.sum(axis=1))
        self.messages_of = _slices([part.messages for part in parts])
        self.cells_of = _slices([part.cells for part in parts])
        self.graph_of_seed = self._graph_of(_SEED)
        self.graph_of_blueprint = self._graph_of(_BLUEPRINT)
        self.graph_of_layer = self._graph_of(_LAYER)
        self.layers_B1 = torch.from_numpy(self.counts_BT[:, _LAYER]).unsqueeze(1)
        self.segments = int((self.counts_BT * _INCOMING).sum())

    def _place_nodes(self, parts: Sequence[_Part], before: Integers) -> None:
        counts = self.counts_BT
        row = _bases(counts, 1 + _OUTGOING) + before * (1 + _OUTGOING)
        self.own = _placed([part.own for part in parts], row, counts)
        position = _placed([part.node for part in parts], before + _bases(counts, 1), counts)
        self.by_type = torch.empty_like(position).index_put_((position,), torch.arange(len(position)))
        """For each row by type where it stands graph by graph."""
        self.type_of_node = torch.from_numpy(np.repeat(np.tile(np.arange(len(_TYPES)), len(parts)), counts.ravel()))

    def _place_messages(self, parts: Sequence[_Part], before: Integers) -> None:
        counts = self.counts_BT
        lengths = counts[:, _SOURCE]
        with_own = (_bases(counts, 1 + _OUTGOING) + before * (1 + _OUTGOING))[:, _SOURCE] + 1 + _OUTGOING_SLOT
        self.sage_message = _placed([part.sage_message for part in parts], with_own, lengths)
        self._outgoing = (_bases(counts, _OUTGOING) + before * _OUTGOING)[:, _SOURCE] + _OUTGOING_SLOT
        self.gat_message = _placed([part.gat_message for part in parts], self._outgoing, lengths)

    def _place_edges(self, parts: Sequence[_Part], before: Integers) -> None:
        counts = self.counts_BT
        lengths = np.stack([part.edges_R for part in parts])
        self.edge_source = _placed([part.edge_source for part in parts], self._outgoing, lengths)
        incoming = (_bases(counts, _INCOMING) + before * _INCOMING)[:, _TARGET] + _INCOMING_SLOT
        self.edge_target = _placed([part.edge_target for part in parts], incoming, lengths)
        cells = _starts(np.array([part.cells for part in parts]))
        self.cell = _placed([part.cell for part in parts], cells, np.array([len(part.cell) for part in parts]))

    def _graph_of(self, kind: int) -> Tensor:
        return torch.from_numpy(np.repeat(np.arange(len(self.counts_BT)), self.counts_BT[:, kind]))


class _SageRound:
    """As SageLayer, over a union."""

    def __init__(self, layer: SageLayer) -> None:
        self._weights, self._width = layer.weights, layer.width
        # What a node keeps stands before what it sends.
        self._biases = [
            torch.cat([bias, bias.new_zeros(weight.shape[1] - len(bias))])
            for weight, bias in zip(layer.weights, layer.biases, strict=True)
        ]

    def __call__(self, h: Tensor, union: _Union) -> Tensor:
        each = zip(torch.split(h, union.sizes), self._weights, self._biases, strict=True)
        table = torch.cat([torch.addmm(bias, x, weight).view(-1, self._width) for x, weight, bias in each])
        out, messages = table.index_select(0, union.own), table.index_select(0, union.sage_message)
        for nodes, sent, matrix in zip(union.nodes_of, union.messages_of, union.mean_matrices, strict=True):
            out[nodes].addmm_(matrix, messages[sent])
        return out.index_select(0, union.by_type)


class _GatRound:
    """As GatLayer, over a union; the sum over heads is part of each graph's product."""

    def __init__(self, layer: GatLayer) -> None:
        self._layer = layer
        self._biases = torch.stack(layer.biases)

    def __call__(self, h: Tensor, union: _Union, edge_score: Tensor) -> Tensor:
        layer, values = self._layer, self._layer.heads * self._layer.width
        tables, scores = [], []
        for x, weight, target in zip(torch.split(h, union.sizes), layer.weights, layer.target_scores, strict=True):
            tables.append((x @ weight).view(-1, values + layer.heads))
            scores.append((x @ target).view(-1, layer.heads))
        table = torch.cat(tables)
        attention = self._attention(table[:, values:], torch.cat(scores), union, edge_score)
        matrices = attention.new_zeros(union.cells_of[-1].stop).index_add_(0, union.cell, attention.view(-1))
        projected = table[:, :values].index_select(0, union.gat_message)
        out = self._biases.index_select(0, union.type_of_node)
        for nodes, sent, cells in zip(union.nodes_of, union.messages_of, union.cells_of, strict=True):
            block = out[nodes]
            block.addmm_(matrices[cells].view(len(block), -1), projected[sent].view(-1, layer.width))
        return out.index_select(0, union.by_type)

    def _attention(self, sources: Tensor, targets: Tensor, union: _Union, told: Tensor) -> Tensor:
        """(E, H), summing to 1 over heads and the edges of a relation into a node."""
        score = sources.index_select(0, union.edge_source) + targets.index_select(0, union.edge_target) + told
        return segment_softmax(nn.functional.leaky_relu(score, 0.2), union.edge_target, union.segments) / score.shape[1]


def segment_softmax(score: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax of each column over the rows of one segment."""
    peak = score.new_full((segments, score.shape[1]), -torch.inf)
    peak.scatter_reduce_(0, segment.unsqueeze(1).expand_as(score), score, "amax", include_self=True)
    exponent = (score - peak.index_select(0, segment)).exp()
    total = torch.zeros_like(peak).index_add_(0, segment, exponent)
    return exponent / (total.index_select(0, segment) + 1e-16)


def _rows(groups: Sequence[tuple[int, int]]) -> Integers:
    """For groups of so many rows, a step apart: where the rows of each stand from its first on."""
    return np.concatenate([np.arange(count) * step for count, step in groups])


def _bases(counts_BT: Integers, rows_T: Integers | int) -> Integers:
    """Where the rows of each type begin when a node of it has so many."""
    return _starts(counts_BT.sum(axis=0) * rows_T)


def _starts(lengths: Integers) -> Integers:
    return lengths.cumsum() - lengths


def _placed(local: Sequence[Integers], shift: Integers, lengths: Integers) -> Tensor:
    """Shift what stands in groups of these lengths."""
    return torch.from_numpy(np.concatenate(local) + np.repeat(shift.ravel(), lengths.ravel()))


def _slices(lengths: Any) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, np.asarray(lengths).tolist(), strict=True)]
