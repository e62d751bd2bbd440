"""What is known of nodes as the numbers that the network reads: pairs of a value and its mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, SeedState

from . import schema
from .registries import Registries, Registry

Floats = NDArray[np.float32]
FEATURE_LIMIT = 1e6
"""Beyond it a value says nothing more, and the network's sums could leave float32."""
# Only the vocabularies that are the same everywhere: what a record holds must give the same graph again.
_VOCABULARIES = Registries()
_UNKNOWN = (0.0, 0.0)


def write(row: Floats, values: Sequence[Any]) -> None:
    """Write pairs of value and mask; what is no finite number is unknown."""
    pairs: list[float] = []
    for value in values:
        if value is None or not isinstance(value, (int, float)):
            pairs += _UNKNOWN
        elif -FEATURE_LIMIT <= value <= FEATURE_LIMIT:
            pairs += (value, 1.0)
        else:
            pairs += (math.copysign(FEATURE_LIMIT, value), 1.0) if math.isfinite(value) else _UNKNOWN
    row[: len(pairs)] = pairs


def write_seed(row: Floats, state: SeedState) -> None:
    """Write what a host tells of a seed, and its stage once more as a one-hot vector."""
    metrics = state.metrics
    offset = 2 * len(schema.FEATURES["seed"])
    stage = state.stage if 0 <= state.stage < schema.STAGES else 0
    values = [
        stage / 11 if stage else None, metrics.get("alpha"),
        logarithm(state.gradient_norm) if state.HasField("gradient_norm") else None,
        logarithm(state.learning_rate * 1000) if state.HasField("learning_rate") else None,
        state.layer_depth / 100 if state.HasField("layer_depth") else None,
        logarithm(state.age_epochs) if state.HasField("age_epochs") else None,
        state.risk_score if state.HasField("risk_score") else None,
        metrics.get("risk_tolerance"), metrics.get("blend_allowed"), logarithm(metrics.get("steps_in_stage")),
        squashed(metrics.get("loss_since_graft")), logarithm(metrics.get("alpha_steps")),
    ]  # fmt: skip
    write(row, values)
    row[offset + stage] = 1.0


def write_layer(row: Floats, layer: Mapping[str, Any], depth: float | None) -> None:
    """Write what a topology tells of a layer, `depth` from 0 to 1 in the host."""
    values = [
        _place(_VOCABULARIES.layer_type, layer.get("type")), depth, logarithm(layer.get("parameter_count")),
        logarithm(layer.get("weight_norm")), layer.get("gradient_norm"), layer.get("dropout_rate"),
        logarithm(layer.get("latency_ms")),
    ]  # fmt: skip
    write(row, values)


def write_activation(row: Floats, activation: Mapping[str, Any]) -> None:
    """Write what a topology tells of an activation."""
    kind = _place(_VOCABULARIES.activation_type, activation.get("type"))
    write(row, [kind, *map(activation.get, schema.FEATURES["activation"][1:])])


def write_parameter(row: Floats, parameter: Mapping[str, Any]) -> None:
    """Write the bounds of a parameter."""
    write(row, [squashed(parameter.get(name)) for name in schema.FEATURES["parameter"]])


def write_blueprint(row: Floats, descriptor: BlueprintDescriptor, risk: float, counts: Sequence[Any]) -> None:
    """Write what the library tells of a blueprint, `counts` by its layers."""
    told = [count for count in counts if isinstance(count, int | float)]
    size = logarithm(sum(told)) if told else None
    write(row, [risk, descriptor.tier / 3, descriptor.stage / 10, float(descriptor.quarantine_only), size])


def finite(value: Any) -> float | None:
    """Take a number as it is, and nothing else."""
    usable = type(value) in (int, float) and math.isfinite(value)
    return float(value) if usable else None


def logarithm(value: Any) -> float | None:
    """Bring a number of any size near 1, with its sign."""
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return math.copysign(math.log1p(abs(value)), value) / 4 if usable else None


def squashed(value: Any) -> float | None:
    """Bring a number between -1 and 1."""
    return math.tanh(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _place(registry: Registry, name: Any) -> float | None:
    """Where a name stands in a vocabulary, up to 1; unknown outside it."""
    number = registry.find(name) if isinstance(name, str) else None
    return None if number is None else number / len(registry)
