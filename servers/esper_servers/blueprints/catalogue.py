from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import orjson
from torch import nn

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, BlueprintParameterBounds, BlueprintTier
from esper_rpc.proto.urza.v1 import KernelManifest

from .binding import bind

GROUP = "esper.blueprints"


class BlueprintFactory(Protocol):
    """What an entry point in `esper.blueprints` must name."""

    name: str
    tags: tuple[str, ...]

    def descriptor(self) -> BlueprintDescriptor:
        """Describe the blueprint for operators and the controller."""
        ...

    def manifest(self) -> KernelManifest:
        """Say how the module is built, with the default configuration."""
        ...

    def build(self, config: Mapping[str, Any], feature_shape: tuple[int, ...]) -> nn.Module:
        """Build the module for a site whose output has this shape without the batch; raises ShapeMismatch."""
        ...

    def example_shape(self) -> tuple[int, ...]:
        """A shape that fits, to compute the extras from."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModuleFactory:
    """A blueprint made of one module class that takes the feature shape and keyword settings."""

    name: str
    description: str
    module: Callable[..., nn.Module]
    shape: tuple[str, ...]
    example: tuple[int, ...]
    settings: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    risk: float = 0.1
    tags: tuple[str, ...] = ()

    def descriptor(self) -> BlueprintDescriptor:
        """Describe the blueprint."""
        bounds = {k: BlueprintParameterBounds(min_value=lo, max_value=hi) for k, (lo, hi) in self.bounds.items()}
        return BlueprintDescriptor(
            blueprint_id=self.name,
            name=self.name.replace("_", " "),
            tier=BlueprintTier.BLUEPRINT_TIER_SAFE,
            allowed_parameters=bounds,
            risk=self.risk,
            description=self.description,
        )

    def manifest(self) -> KernelManifest:
        """Say how it is built."""
        return KernelManifest(
            factory=self.name,
            config_json=orjson.dumps(dict(self.settings), option=orjson.OPT_SORT_KEYS).decode(),
            input_shape=self.shape,
            output_shape=self.shape,
            dtypes=["F32", "BF16", "F16"],
        )

    def build(self, config: Mapping[str, Any], feature_shape: tuple[int, ...]) -> nn.Module:
        """Build the module; raises ShapeMismatch."""
        bind(self.shape, feature_shape)
        return self.module(feature_shape, **{**self.settings, **config})

    def example_shape(self) -> tuple[int, ...]:
        """A shape that fits."""
        return self.example


def load_factories() -> dict[str, BlueprintFactory]:
    """Load every installed blueprint by name."""
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}
