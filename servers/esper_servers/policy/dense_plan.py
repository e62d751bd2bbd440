"""PolicyNetwork as one module of dense tensors, which torch.export can take: a small matrix per relation.

In these graphs most relations join every node of one type with every node of another, so that the matrices hold about
as many cells as there are edges, and every product is a GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from . import schema
from .edge_scores import score_weight
from .network import PolicyNetwork

# Shapes: N nodes of a type, T targets and S sources of a relation, H heads, D width.
LEAST_SCORE = -1e30
NEGATIVE_SLOPE = 0.2
_JOINT_WIDTHS = [schema.KIND_COUNT, schema.SCHEDULE_COUNT, 1, schema.RISK_COUNT, schema.PARAMETER_COUNT]


class DensePlan(nn.Module):
    """The same heads as PolicyNetwork, from the same weights. Eagerly it is slow; it is made to be compiled."""

    def __init__(self, network: PolicyNetwork) -> None:
        super().__init__()
        # By number: `global` cannot be a name in the code that torch.export writes.
        self.encoders = nn.ModuleList(network.encoders[kind] for kind in schema.NODE_TYPES)
        self.sage = nn.ModuleList(_DenseSage(layer) for layer in network.sage)
        self.gat = nn.ModuleList(_DenseGat(layer) for layer in network.gat)
        self._register_heads(network)

    def _register_heads(self, network: PolicyNetwork) -> None:
        # AOTInductor writes constants of a few elements into the code, where no update reaches them: the heads that
        # read the same share a bias, and that of the blueprints stands below its weights.
        joint = [
            network.kind_head, network.schedule_head, network.value_head, network.risk_head, network.parameter_head,
        ]  # fmt: skip
        self.register_buffer("joint_weight", torch.cat([head.weight for head in joint]).T.contiguous().detach())
        self.register_buffer("joint_bias", torch.cat([head.bias for head in joint]).detach())
        self.operation_head = network.operation_head
        blueprint = network.blueprint_head
        self.register_buffer("blueprint", torch.cat([blueprint.weight[0], blueprint.bias]).detach())

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Compute the heads of what `plan_inputs` laid out."""
        features_ND, edges_TS, means_TS, first_HTS, second_HTS, (context_1N,) = _parts(tensors)
        encoded = (torch.relu(encoder(x)) for encoder, x in zip(self.encoders, features_ND, strict=True))
        h = dict(zip(schema.NODE_TYPES, encoded, strict=True))
        for layer in self.sage:
            h = {kind: torch.relu(out) + h[kind] for kind, out in layer(h, means_TS).items()}
        h = {kind: nn.functional.gelu(out) for kind, out in self.gat[0](h, edges_TS, first_HTS).items()}
        return self._read_out(self.gat[1](h, edges_TS, second_HTS), context_1N)

    def _read_out(self, h: dict[str, Tensor], context_1N: Tensor) -> tuple[Tensor, ...]:
        overall = h["global"][0]
        joint = torch.cat([(context_1N @ h["layer"])[0], overall])
        seeds = torch.cat([h["seed"], overall.expand(h["seed"].shape[0], -1)], dim=1)
        blueprints = torch.cat([h["blueprint"], overall.expand(h["blueprint"].shape[0], -1)], dim=1)
        weight, bias = self.get_buffer("blueprint")[:-1], self.get_buffer("blueprint")[-1]
        kind, schedule, value, risk, parameters = torch.split(
            joint @ self.get_buffer("joint_weight") + self.get_buffer("joint_bias"), _JOINT_WIDTHS
        )
        return (
            kind, self.operation_head(seeds), (blueprints * weight).sum(dim=1) + bias, schedule, value[0],
            torch.sigmoid(risk), parameters,
        )  # fmt: skip


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    relations, told = len(schema.RELATIONS), len(schema.EDGE_ATTRIBUTES)
    rest = iter(tensors)
    return (list(islice(rest, n)) for n in (len(schema.NODE_TYPES), relations, relations, told, told, 1))


class _DenseSage(nn.Module):
    """One product per node type for itself and all its outgoing relations, then one per relation."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        convs = {relation: layer.convs[relation] for relation in schema.RELATIONS}
        self.width = convs[schema.RELATIONS[0]].lin_l.weight.shape[0]
        for kind in schema.NODE_TYPES:
            own = torch.stack([convs[r].lin_r.weight for r in schema.RELATIONS if r[2] == kind]).sum(dim=0)
            outgoing = [convs[r].lin_l.weight for r in schema.ORDERED_RELATIONS if r[0] == kind]
            bias = torch.stack([convs[r].lin_l.bias for r in schema.RELATIONS if r[2] == kind]).sum(dim=0)
            self.register_buffer(f"weight_{kind}", torch.cat([own, *outgoing]).T.contiguous().detach())
            self.register_buffer(f"bias_{kind}", bias.detach())

    def forward(self, h: dict[str, Tensor], means_TS: Sequence[Tensor]) -> dict[str, Tensor]:
        out, messages = {}, []
        for kind in schema.NODE_TYPES:
            y = h[kind] @ self.get_buffer(f"weight_{kind}")
            own, *outgoing = torch.split(y, self.width, dim=1)
            out[kind] = own + self.get_buffer(f"bias_{kind}")
            messages += outgoing
        for (_, _, target), mean_TS, message in zip(schema.ORDERED_RELATIONS, means_TS, messages, strict=True):
            out[target] = out[target] + mean_TS @ message
        return out


class _DenseGat(nn.Module):
    """Attention per relation as a masked softmax (Velickovic et al. 2018, arXiv 1710.10903); heads are averaged."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        convs = {relation: layer.convs[relation] for relation in schema.RELATIONS}
        first = convs[schema.RELATIONS[0]]
        self.heads, self.width = first.heads, first.out_channels
        for kind in schema.NODE_TYPES:
            outgoing = [convs[r] for r in schema.ORDERED_RELATIONS if r[0] == kind]
            incoming = [convs[r] for r in schema.ORDERED_RELATIONS if r[2] == kind]
            rows = [c.lin_src.weight for c in outgoing]
            rows += [score_weight(c.lin_src.weight, c.att_src) for c in outgoing]
            rows += [score_weight(c.lin_dst.weight, c.att_dst) for c in incoming]
            self.register_buffer(f"weight_{kind}", torch.cat(rows).T.contiguous().detach())
            bias = torch.stack([c.bias for c in incoming]).sum(dim=0)
            self.register_buffer(f"bias_{kind}", bias.detach())

    def forward(
        self, h: dict[str, Tensor], edges_TS: Sequence[Tensor], scores_HTS: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        told = dict(zip(schema.EDGE_ATTRIBUTES, scores_HTS, strict=True))
        projected, source_score, target_score = self._project(h)
        out = {kind: self.get_buffer(f"bias_{kind}").expand(x.shape[0], -1) for kind, x in h.items()}
        for relation, edge_TS in zip(schema.ORDERED_RELATIONS, edges_TS, strict=True):
            attention_HTS = self._attend(source_score[relation], target_score[relation], edge_TS, told.get(relation))
            values_HSD = projected[relation].view(-1, self.heads, self.width).transpose(0, 1)
            out[relation[2]] = out[relation[2]] + torch.bmm(attention_HTS, values_HSD).sum(dim=0)
        return out

    def _project(self, h: dict[str, Tensor]) -> tuple[dict[Any, Tensor], dict[Any, Tensor], dict[Any, Tensor]]:
        projected: dict[Any, Tensor] = {}
        source_score: dict[Any, Tensor] = {}
        target_score: dict[Any, Tensor] = {}
        for kind in schema.NODE_TYPES:
            outgoing = [r for r in schema.ORDERED_RELATIONS if r[0] == kind]
            incoming = [r for r in schema.ORDERED_RELATIONS if r[2] == kind]
            widths = [self.heads * self.width] * len(outgoing) + [self.heads] * (len(outgoing) + len(incoming))
            parts = torch.split(h[kind] @ self.get_buffer(f"weight_{kind}"), widths, dim=1)
            projected |= dict(zip(outgoing, parts, strict=False))
            source_score |= dict(zip(outgoing, parts[len(outgoing) :], strict=False))
            target_score |= dict(zip(incoming, parts[2 * len(outgoing) :], strict=False))
        return projected, source_score, target_score

    def _attend(self, source_SH: Tensor, target_TH: Tensor, edge_TS: Tensor, told_HTS: Tensor | None) -> Tensor:
        score = target_TH.T.unsqueeze(2) + source_SH.T.unsqueeze(1)
        score = nn.functional.leaky_relu(score if told_HTS is None else score + told_HTS, NEGATIVE_SLOPE)
        score = torch.where(edge_TS > 0, score, -torch.inf)
        # A target without a source has no greatest score; its row comes out as 0.
        peak = score.amax(dim=2, keepdim=True).clamp_min(LEAST_SCORE)
        weight = (score - peak).exp() * edge_TS
        return torch.div(weight, (weight.sum(dim=2, keepdim=True) + 1e-16) * self.heads)
