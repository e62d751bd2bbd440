"""From a manifest and safetensors to a module. Nothing that arrives is unpickled or executed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import orjson
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from esper_rpc.proto.urza.v1 import KernelManifest

from .binding import ShapeMismatch
from .catalogue import BlueprintFactory
from .out_of_memory import is_out_of_memory
from .seeded_draws import SeededDraws

UNKNOWN_FACTORY = "unknown_factory"
BAD_CONFIG = "bad_config"
SHAPE_MISMATCH = "shape_mismatch"
DTYPE_MISMATCH = "dtype_mismatch"
CHECKSUM_MISMATCH = "checksum_mismatch"
NON_FINITE_WEIGHTS = "non_finite_weights"

_DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


class KernelRejected(Exception):  # It names a verdict.
    """A kernel cannot be used here; `reason` is stable."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def dtype_name(dtype: torch.dtype) -> str:
    """Spell a dtype as safetensors does, empty when it has no floating kernel."""
    return _DTYPE_NAMES.get(dtype, "")


def instantiate(
    manifest: KernelManifest,
    factories: Mapping[str, BlueprintFactory],
    *,
    feature_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: bytes | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build the module of a manifest for a site; raises KernelRejected, and what torch raises when memory runs out.

    Without weights the initialisation is drawn from `seed`, leaving the global generator untouched. May be called from
    any thread.
    """
    factory = factories.get(manifest.factory)
    if factory is None:
        raise KernelRejected(UNKNOWN_FACTORY, manifest.factory)
    if manifest.dtypes and dtype_name(dtype) not in manifest.dtypes:
        raise KernelRejected(DTYPE_MISMATCH, f"{dtype} is not one of {list(manifest.dtypes)}")
    tensors = _read_weights(manifest, weights)
    config = _read_config(manifest, factory)
    try:
        with _drawing_on_cpu(seed):
            module = factory.build(config, feature_shape)
    except ShapeMismatch as error:
        raise KernelRejected(SHAPE_MISMATCH, str(error)) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise KernelRejected(BAD_CONFIG, str(error)) from error
    if tensors is not None:
        _load_weights(module, tensors)
    module = module.to(device=device, dtype=dtype)
    if tensors is not None and not all(bool(torch.isfinite(p).all()) for p in module.state_dict().values()):
        raise KernelRejected(NON_FINITE_WEIGHTS, f"they are too large for {dtype}")
    return module


@contextmanager
def _drawing_on_cpu(seed: int) -> Iterator[None]:
    """Draw weights that depend on the seed alone, not on the device, whatever else draws meanwhile."""
    is_default = torch.get_default_device().type == "cpu"
    with nullcontext() if is_default else torch.device("cpu"), SeededDraws(seed):
        yield


def _read_config(manifest: KernelManifest, factory: BlueprintFactory) -> dict[str, Any]:
    """Read the settings, and hold each to the bounds that the factory declares: they decide how much is allocated."""
    try:
        config = orjson.loads(manifest.config_json or "{}")
    except orjson.JSONDecodeError as error:
        raise KernelRejected(BAD_CONFIG, str(error)) from error
    if not isinstance(config, dict):
        raise KernelRejected(BAD_CONFIG, "config_json must be an object")
    for name, bounds in factory.descriptor().allowed_parameters.items():
        value = config.get(name, bounds.min_value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and bounds.min_value <= value <= bounds.max_value):
            raise KernelRejected(BAD_CONFIG, f"{name} must be from {bounds.min_value:g} to {bounds.max_value:g}")
    return config


def _read_weights(manifest: KernelManifest, weights: bytes | None) -> dict[str, Tensor] | None:
    if not manifest.weights_sha256:
        return None
    if weights is None or not hmac.compare_digest(hashlib.sha256(weights).digest(), manifest.weights_sha256):
        raise KernelRejected(CHECKSUM_MISMATCH)
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise KernelRejected(CHECKSUM_MISMATCH, "not a safetensors file") from error
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise KernelRejected(NON_FINITE_WEIGHTS)
    return tensors


def _load_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = module.state_dict()
    # torch would make floats of whole numbers, and the other way round, without a word.
    odd = [
        name
        for name in tensors.keys() & own.keys()
        if tensors[name].dtype.is_floating_point != own[name].dtype.is_floating_point
    ]
    if odd:
        raise KernelRejected(DTYPE_MISMATCH, f"{odd[0]} holds {tensors[odd[0]].dtype}")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise KernelRejected(SHAPE_MISMATCH, str(error).splitlines()[0]) from error
