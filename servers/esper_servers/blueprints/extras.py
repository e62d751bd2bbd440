"""Extras of a blueprint, computed from its module."""

from __future__ import annotations

import math
from typing import Any

import orjson
import torch
from torch import nn

from esper_rpc.blending import BLENDING_METHODS

from .catalogue import BlueprintFactory

SCHEMA_VERSION = "v1"
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softmax,
)  # fmt: skip


def compute_extras(factory: BlueprintFactory) -> bytes:
    """Build the module at its example shape and describe it as a JSON document."""
    config = orjson.loads(factory.manifest().config_json or "{}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = factory.build(config, factory.example_shape())
    topology = describe_module(module)
    bounds = factory.descriptor().allowed_parameters
    topology["parameters"] = [
        {"name": name, "min": b.min_value, "max": b.max_value, "span": b.max_value - b.min_value,
         "default": float(config.get(name, (b.min_value + b.max_value) / 2))}
        for name, b in sorted(bounds.items())
    ]  # fmt: skip
    topology["capabilities"] = {"allowed_blending_methods": list(BLENDING_METHODS)}
    return orjson.dumps(topology, option=orjson.OPT_SORT_KEYS)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Describe the layers and activations of a module in the extras schema, in order of registration."""
    leaves = [(name, leaf) for name, leaf in module.named_modules() if not any(leaf.children())]
    layers = [(n, m) for n, m in leaves if any(True for _ in m.parameters(recurse=False))]
    activations = [(n, m) for n, m in leaves if isinstance(m, _ACTIVATIONS)]
    return {
        "schema_version": SCHEMA_VERSION,
        "layers": [_layer(name, layer, depth) for depth, (name, layer) in enumerate(layers)],
        "activations": [{"activation_id": n or "0", "type": type(m).__name__} for n, m in activations],
        "adjacency": {"layer": [[i, i + 1] for i in range(len(layers) - 1)]},
        "parameters": [],
    }


def _layer(name: str, layer: nn.Module, depth: int) -> dict[str, Any]:
    parameters = list(layer.parameters(recurse=False))
    return {
        "layer_id": name or "0",
        "type": type(layer).__name__,
        "depth": depth,
        "parameter_count": sum(p.numel() for p in parameters),
        "weight_norm": math.sqrt(sum(float(p.detach().float().square().sum()) for p in parameters)),
    }
