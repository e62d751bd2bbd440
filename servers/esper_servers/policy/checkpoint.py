"""A policy as a file: a manifest and the weights, in the safetensors format. Nothing in it is unpickled or executed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .network import PolicyNetwork
from .policy import ARCHITECTURE_VERSION, Policy, digest_of
from .prior import PriorConfig

MANIFEST = "manifest"
UNREADABLE = "unreadable"
WRONG_ARCHITECTURE = "wrong_architecture"
SHAPE_MISMATCH = "shape_mismatch"
CHECKSUM_MISMATCH = "checksum_mismatch"
NOT_FINITE = "not_finite"


class CheckpointRejected(Exception):  # It names a verdict.
    """A policy cannot be used here; `reason` is stable."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a policy says of itself."""

    version: str
    digest: str
    """SHA-256 of the weights, in hexadecimal digits, as GetPolicy tells it."""
    architecture: str = ARCHITECTURE_VERSION
    parent: str = ""
    """The version that it was trained from."""
    origin: str = "trained"
    prior_weight: float = 0.0
    """How much of the heuristic prior it still needs."""
    registries: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each vocabulary that it was trained with."""
    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and variance of inputs."""


def write(policy: Policy, *, parent: str = "", registries: Mapping[str, str] | None = None) -> bytes:
    """Write a policy with its manifest."""
    manifest = Manifest(
        version=policy.version,
        digest=policy.digest.hex(),
        parent=parent,
        origin=policy.origin,
        prior_weight=policy.prior.weight,
        registries=registries or {},
        norms=policy.norms,
    )
    weights = {name: tensor.detach().contiguous() for name, tensor in policy.network.state_dict().items()}
    document = orjson.dumps(dataclasses.asdict(manifest)).decode()
    return safetensors.torch.save(weights, metadata={MANIFEST: document})


def read_manifest(path: Path) -> Manifest:
    """Read what a file says of itself; raises CheckpointRejected, or OSError where there is no file."""
    with _opened(path) as file:
        document = (file.metadata() or {}).get(MANIFEST, "")
    try:
        return _manifest_of(orjson.loads(document))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointRejected(UNREADABLE, f"the manifest lacks or misspells {error}") from error


def load(path: Path, prior: PriorConfig) -> Policy:
    """Make a policy from a file; raises CheckpointRejected, or OSError where there is no file."""
    manifest = read_manifest(path)
    if manifest.architecture != ARCHITECTURE_VERSION:
        raise CheckpointRejected(WRONG_ARCHITECTURE, f"{manifest.architecture} is not {ARCHITECTURE_VERSION}")
    weights = _read_weights(path)
    if digest_of(weights).hex() != manifest.digest:
        raise CheckpointRejected(CHECKSUM_MISMATCH, "the weights are not those of the manifest")
    return Policy(
        _network_of(weights),
        version=manifest.version,
        origin=manifest.origin,
        prior_config=dataclasses.replace(prior, weight=manifest.prior_weight),
        norms=manifest.norms,
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        # Copied to where torch aligns them: in the file they lie anywhere, and the last bit of a product depends on it.
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # It is no mapping.
    wrong = [name for name, tensor in weights.items() if tensor.dtype != torch.float32]
    if wrong:
        raise CheckpointRejected(SHAPE_MISMATCH, f"{wrong[0]} is not float32")
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointRejected(NOT_FINITE, f"{broken[0]} holds NaN or infinity")
    return weights


def _network_of(weights: Mapping[str, Tensor]) -> PolicyNetwork:
    """Build the network around the weights, without drawing any."""
    with torch.device("meta"):
        network = PolicyNetwork()
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        raise CheckpointRejected(SHAPE_MISMATCH, _difference(expected, found))
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False)


def _difference(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """Name the first weight that is missing, too much, or of another shape."""
    name = next(name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name))
    if name not in found:
        return f"{name} is missing"
    return f"{name} is {list(found[name])}, not {list(expected[name])}" if name in expected else f"{name} is unknown"


def _opened(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"There is no policy at {path}.")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise CheckpointRejected(UNREADABLE, f"not a safetensors file: {error}") from error


def _manifest_of(document: Mapping[str, Any]) -> Manifest:
    """Take what is known of a document; raises KeyError, TypeError or ValueError."""
    weight = float(document["prior_weight"])
    if not 0 <= weight <= 1:
        raise ValueError("prior_weight")
    return Manifest(
        version=_text(document, "version"),
        digest=_text(document, "digest"),
        architecture=_text(document, "architecture"),
        parent=_text(document, "parent"),
        origin=_text(document, "origin"),
        prior_weight=weight,
        registries={str(name): str(digest) for name, digest in dict(document["registries"]).items()},
        norms={str(name): _moments(pair) for name, pair in dict(document["norms"]).items()},
    )


def _text(document: Mapping[str, Any], key: str) -> str:
    text = document[key]
    if not isinstance(text, str):
        raise TypeError(key)
    return text


def _moments(pair: Any) -> tuple[float, float]:
    mean, variance = (float(value) for value in pair)
    if not (math.isfinite(mean) and math.isfinite(variance) and variance >= 0):
        raise ValueError("norms")
    return mean, variance
