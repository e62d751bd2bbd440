"""The policy network: two GraphSAGE layers, then two GAT layers, then heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import schema
from .layers import GatWeights, HeteroLayer, SageWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Widths (C-22)."""

    sage_width: int = 128
    gat_width: int = 64
    heads: int = 2


class Heads(NamedTuple):
    """What the network says. S seeds, B blueprints."""

    kind: Tensor
    """(4,)"""
    operation: Tensor
    """(S, 10), by number of the SeedOperation."""
    blueprint: Tensor
    """(B,)"""
    schedule: Tensor
    """(4,)"""
    value: Tensor
    """()"""
    risk: Tensor
    """(5,)"""
    parameters: Tensor
    """(3,), logits in the order of `schema.PARAMETER_NAMES`."""


class PolicyNetwork(nn.Module):
    """The weights: encoders per node type, four rounds of messages, heads. Plans compute with them, see FusedPlan."""

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        sage, gat, heads = self.config.sage_width, self.config.gat_width, self.config.heads
        self.encoders = nn.ModuleDict({kind: nn.Linear(schema.width_of(kind), sage) for kind in schema.NODE_TYPES})
        self.sage = nn.ModuleList(self._sage_layer(sage) for _ in range(2))
        self.gat = nn.ModuleList(self._gat_layer(width, gat, heads) for width in (sage, gat))
        self.kind_head = nn.Linear(2 * gat, schema.KIND_COUNT)
        self.operation_head = nn.Linear(2 * gat, schema.OPERATION_COUNT)
        self.blueprint_head = nn.Linear(2 * gat, 1)
        self.schedule_head = nn.Linear(2 * gat, schema.SCHEDULE_COUNT)
        self.value_head = nn.Linear(2 * gat, 1)
        self.risk_head = nn.Linear(2 * gat, schema.RISK_COUNT)
        self.parameter_head = nn.Linear(2 * gat, schema.PARAMETER_COUNT)

    def read_out(self, h: dict[str, Tensor]) -> Heads:
        """Turn node embeddings into heads; the context is the mean over layers."""
        context, overall = h["layer"].mean(dim=0), h["global"][0]
        joint = torch.cat([context, overall])
        seeds = torch.cat([h["seed"], overall.expand(len(h["seed"]), -1)], dim=1)
        blueprints = torch.cat([h["blueprint"], overall.expand(len(h["blueprint"]), -1)], dim=1)
        return Heads(
            self.kind_head(joint),
            self.operation_head(seeds),
            self.blueprint_head(blueprints).squeeze(1),
            self.schedule_head(joint),
            self.value_head(joint).squeeze(0),
            torch.sigmoid(self.risk_head(joint)),
            self.parameter_head(joint),
        )

    @staticmethod
    def _sage_layer(width: int) -> nn.Module:
        return HeteroLayer({relation: SageWeights(width) for relation in schema.RELATIONS})

    @staticmethod
    def _gat_layer(in_width: int, out_width: int, heads: int) -> nn.Module:
        return HeteroLayer({
            relation: GatWeights(in_width, out_width, heads, schema.attribute_width_of(relation))
            for relation in schema.RELATIONS
        })  # fmt: skip
