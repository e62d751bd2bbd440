"""The policy network with PyTorch Geometric: what every plan is held against, and what is trained."""

from __future__ import annotations

import torch
from torch import nn
from torch_geometric.nn import GATConv, HeteroConv, SAGEConv

from . import schema
from .graph import GraphInputs
from .network import Heads, PolicyNetwork


class ReferenceNetwork(PolicyNetwork):
    """The same weights in layers of PyTorch Geometric. A controller does without: they take seconds to import."""

    @staticmethod
    def _sage_layer(width: int) -> nn.Module:
        layer: nn.Module = HeteroConv({r: SAGEConv((width, width), width, aggr="mean") for r in schema.RELATIONS})
        return layer

    @staticmethod
    def _gat_layer(in_width: int, out_width: int, heads: int) -> nn.Module:
        layer: nn.Module = HeteroConv({
            relation: GATConv(
                (in_width, in_width), out_width, heads=heads, concat=False, add_self_loops=False,
                edge_dim=schema.attribute_width_of(relation),
            )
            for relation in schema.RELATIONS
        })  # fmt: skip
        return layer

    def forward(self, inputs: GraphInputs) -> Heads:
        """Compute the heads of one graph."""
        h = {kind: torch.relu(self.encoders[kind](x)) for kind, x in inputs.features.items()}
        for layer in self.sage:
            h = {kind: torch.relu(out) + h[kind] for kind, out in layer(h, inputs.edges).items()}
        for round_, layer in enumerate(self.gat):
            out = layer(h, inputs.edges, edge_attr_dict=inputs.attributes)
            h = {kind: nn.functional.gelu(x) for kind, x in out.items()} if round_ == 0 else out
        return self.read_out(h)
