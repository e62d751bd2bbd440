"""Nodes, features and relations of the graph that the policy sees."""

from __future__ import annotations

from .vocabularies import SCHEDULES

NODE_TYPES: tuple[str, ...] = ("layer", "seed", "activation", "parameter", "blueprint", "global")

# Every feature has a mask channel beside it: (value, 1) when it is known, (0, 0) when it is not.
FEATURES: dict[str, tuple[str, ...]] = {
    "layer": ("type", "depth", "parameter_count", "weight_norm", "gradient_norm", "dropout_rate", "latency_ms", "loss"),
    "seed": (
        "stage", "alpha", "gradient_norm", "learning_rate", "layer_depth", "age_epochs", "risk_score",
        "risk_tolerance", "blend_allowed", "steps_in_stage", "loss_since_graft", "alpha_steps",
    ),
    "activation": ("type", "saturation_rate", "gradient_flow", "computational_cost"),
    "parameter": ("min", "max", "span", "default"),
    "blueprint": ("risk", "tier", "stage", "quarantine", "parameter_count"),
    "global": (
        "loss", "gradient_norm", "samples_per_s", "hook_latency_ms", "loss_delta", "loss_volatility",
        "validation_loss", "validation_accuracy",
    ),
}  # fmt: skip

RELATIONS: tuple[tuple[str, str, str], ...] = (
    ("layer", "connects", "layer"),
    ("layer", "feedback", "layer"),
    ("seed", "monitors", "layer"),
    ("layer", "feeds", "activation"),
    ("activation", "activates", "layer"),
    ("activation", "configures", "parameter"),
    ("parameter", "modulates", "activation"),
    ("parameter", "tunes", "layer"),
    ("seed", "allowed", "parameter"),
    ("parameter", "targets", "blueprint"),
    ("blueprint", "composes", "layer"),
    ("blueprint", "suits", "seed"),
    ("global", "influences", "layer"),
    ("global", "operates", "seed"),
    ("seed", "reports", "global"),
    ("layer", "summarises", "global"),
)

# What is told of an edge, a value and a mask each, as of nodes. It weighs in the attention of the GAT layers.
EDGE_ATTRIBUTES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("layer", "connects", "layer"): ("strength", "latency"),
    ("layer", "feedback", "layer"): ("strength", "latency"),
    ("seed", "monitors", "layer"): ("weight",),
    ("seed", "allowed", "parameter"): SCHEDULES,
}

ORDERED_RELATIONS: tuple[tuple[str, str, str], ...] = tuple(
    relation for kind in NODE_TYPES for relation in RELATIONS if relation[0] == kind
)
"""Grouped by source type: the order in which the plans lay out messages."""

STAGES = 12
SCHEDULE_COUNT = len(SCHEDULES)
OPERATION_COUNT = 10
RISK_COUNT = 5
# Kinds of action, by index of the head.
KIND_NONE, KIND_SEED, KIND_OPTIMIZER, KIND_PAUSE = range(4)
KIND_COUNT = 4
KIND_NAMES = ("none", "seed", "optimizer", "pause")
PARAMETER_BOUNDS: dict[str, tuple[float, float]] = {
    "learning_rate_multiplier": (0.5, 2.0),
    "blending_schedule_start": (0.0, 1.0),
    "blending_schedule_end": (0.0, 1.0),
}
"""What the continuous head says of an action, in its order. Each is one that a host carries out."""
PARAMETER_NAMES = tuple(PARAMETER_BOUNDS)
PARAMETER_COUNT = len(PARAMETER_BOUNDS)
MULTIPLIERS = frozenset({"learning_rate_multiplier"})
"""Read on a logarithmic scale."""


def width_of(node_type: str) -> int:
    """Input width: a value and a mask per feature, and the one-hot stage of a seed."""
    return 2 * len(FEATURES[node_type]) + (STAGES if node_type == "seed" else 0)


def attribute_width_of(relation: tuple[str, str, str]) -> int | None:
    """Width of what is told of an edge, None where nothing ever is."""
    names = EDGE_ATTRIBUTES.get(relation)
    return 2 * len(names) if names else None
