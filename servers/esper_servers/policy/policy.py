from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from esper_rpc.proto.leyline.v1 import SeedState

from . import prior
from .graph import GraphInputs
from .network import NetworkConfig, PolicyNetwork
from .plan import FusedPlan
from .prior import PriorConfig, RunSignals

ARCHITECTURE_VERSION = "gnn_v1"
PLAN = "eager"


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """Logits of every head after the prior, the value and the risks (0 to 1)."""

    kind: NDArray[np.float32]
    operation: NDArray[np.float32]
    blueprint: NDArray[np.float32]
    schedule: NDArray[np.float32]
    value: float
    risk: NDArray[np.float32]

    @property
    def is_finite(self) -> bool:
        """Whether every number can be used."""
        parts = (self.kind, self.operation, self.blueprint, self.schedule, self.risk)
        return all(bool(np.isfinite(part).all()) for part in parts) and bool(np.isfinite(self.value))


class Policy:
    """A network, its prior and their version."""

    def __init__(self, network: PolicyNetwork, *, version: str, origin: str, prior_config: PriorConfig) -> None:
        self.network = network.eval()
        self.version = version
        self.origin = origin
        self._prior = prior_config
        self._plan = FusedPlan(network)
        self.digest = _digest(network)
        self.parameter_count = sum(p.numel() for p in network.parameters())

    @classmethod
    def initial(cls, *, seed: int = 0, prior_config: PriorConfig | None = None) -> Policy:
        """Make the policy that is shipped: seeded weights under the heuristic prior."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PolicyNetwork(NetworkConfig())
        return cls(
            network,
            version=f"{ARCHITECTURE_VERSION}-heuristic-1",
            origin=prior.ORIGIN,
            prior_config=prior_config or PriorConfig(),
        )

    def evaluate(self, inputs: GraphInputs, seeds: Sequence[SeedState], signals: RunSignals) -> PolicyOutput:
        """Run the network on one graph and add the prior. `seeds` are in the order of the graph's seed nodes."""
        with torch.inference_mode():
            heads = self._plan(inputs)
        added = prior.bonus(seeds, signals, self._prior)
        return PolicyOutput(
            np.tanh(heads.kind.numpy()) + added.kind,
            np.tanh(heads.operation.numpy()) + added.operation,
            heads.blueprint.numpy(),
            heads.schedule.numpy(),
            float(heads.value),
            heads.risk.numpy(),
        )


def _digest(network: PolicyNetwork) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
