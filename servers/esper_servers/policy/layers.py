"""The weights of the layers of messages, named and drawn as PyTorch Geometric names and draws its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

Relation: TypeAlias = tuple[str, str, str]


class ByRelation(nn.ModuleDict):
    """Modules by relation, which is a tuple."""

    def __init__(self, modules: Mapping[Relation, nn.Module]) -> None:
        super().__init__({_name_of(relation): module for relation, module in modules.items()})

    def __getitem__(self, relation: Relation) -> nn.Module:  # type: ignore[override]  # The names are of no interest.
        return super().__getitem__(_name_of(relation))


class HeteroLayer(nn.Module):
    """The weights of one layer, for each relation its own."""

    def __init__(self, convs: Mapping[Relation, nn.Module]) -> None:
        super().__init__()
        self.convs = ByRelation(convs)


class SageWeights(nn.Module):
    """Of SAGEConv: `lin_l` for the mean of the neighbours, `lin_r` for the node itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin_l, self.lin_r = _Projection(width, width, bias=True), _Projection(width, width)
        self.lin_l.draw()
        self.lin_r.draw()


class GatWeights(nn.Module):
    """Of GATConv with averaged heads: projections and attention of source, target, and of what is told of an edge."""

    def __init__(self, in_width: int, out_width: int, heads: int, edge_width: int | None) -> None:
        super().__init__()
        self.heads, self.out_channels = heads, out_width
        self.lin_src = _Projection(in_width, heads * out_width, glorot=True)
        self.lin_dst = _Projection(in_width, heads * out_width, glorot=True)
        self.att_src, self.att_dst = _attention(heads, out_width), _attention(heads, out_width)
        self.lin_edge = _Projection(edge_width, heads * out_width, glorot=True) if edge_width is not None else None
        self.att_edge = _attention(heads, out_width) if edge_width is not None else None
        self.bias = nn.Parameter(torch.zeros(out_width))
        self._draw()

    def _draw(self) -> None:
        for projection in (self.lin_src, self.lin_dst, self.lin_edge):
            if projection is not None:
                projection.draw()
        for attention in (self.att_src, self.att_dst, self.att_edge):
            if attention is not None:
                _glorot(attention)


class _Projection(nn.Module):
    """A linear map. It is drawn when it is made, and by its layer once more."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, glorot: bool = False) -> None:
        super().__init__()
        self._is_glorot = glorot
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.draw()

    def draw(self) -> None:
        inputs = self.weight.shape[1]
        if self._is_glorot:
            _glorot(self.weight)
        else:
            _uniform(self.weight, math.sqrt(6 / ((1 + math.sqrt(5) ** 2) * inputs)))
        if self.bias is not None:
            _uniform(self.bias, 1.0 / math.sqrt(inputs))


def _attention(heads: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, heads, width))


def _glorot(tensor: Tensor) -> None:
    _uniform(tensor, math.sqrt(6.0 / (tensor.size(-2) + tensor.size(-1))))


def _uniform(tensor: Tensor, bound: float) -> None:
    tensor.data.uniform_(-bound, bound)


def _name_of(relation: Relation) -> str:
    return f"<{'___'.join(relation)}>"
