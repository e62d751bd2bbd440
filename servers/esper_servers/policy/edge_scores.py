"""What is told of edges as their part of the attention: by structure and weights alone, so found once a graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import schema
from .graph import GraphInputs
from .network import PolicyNetwork

Relation = tuple[str, str, str]


class EdgeScores:
    """Of the GAT layers of a network."""

    def __init__(self, network: PolicyNetwork) -> None:
        self._weights = [
            {r: score_weight(conv.lin_edge.weight, conv.att_edge).T for r, conv in _attributed(layer).items()}
            for layer in network.gat
        ]

    def __call__(self, inputs: GraphInputs) -> list[dict[Relation, Tensor]]:
        """Return (E, H) for each GAT layer and each relation of `schema.EDGE_ATTRIBUTES`."""
        return [{r: inputs.attributes[r] @ weight for r, weight in layer.items()} for layer in self._weights]


def score_weight(weight: Tensor, attention: Tensor) -> Tensor:
    """Fold the attention vector into the projection: (heads, in)."""
    heads, width = attention.shape[1:]
    return (weight.view(heads, width, -1) * attention.view(heads, width, 1)).sum(dim=1)


def _attributed(layer: Any) -> dict[Relation, Any]:
    return {relation: layer.convs[relation] for relation in schema.EDGE_ATTRIBUTES}
