from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from esper_rpc.proto.leyline.v1 import SeedState

from . import prior
from .compiled_plan import CompiledPlan, Package
from .graph import GraphInputs
from .network import Heads, NetworkConfig, PolicyNetwork
from .plan import FusedPlan
from .prior import PriorConfig, RunSignals

ARCHITECTURE_VERSION = "gnn_v1"
EAGER, COMPILED = "eager", "compiled"
log = structlog.get_logger(__name__)


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
        self._eager = FusedPlan(network)
        self._plan: Callable[[GraphInputs], Heads] = self._eager
        self.plan = EAGER
        """Which form of the network is served: `eager` or `compiled`."""
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
            heads = self._heads(inputs)
        added = prior.bonus(seeds, signals, self._prior)
        return PolicyOutput(
            np.tanh(heads.kind.numpy()) + added.kind,
            np.tanh(heads.operation.numpy()) + added.operation,
            heads.blueprint.numpy(),
            heads.schedule.numpy(),
            float(heads.value),
            heads.risk.numpy(),
        )

    def compute(self, inputs: GraphInputs, package: Package | None = None) -> Heads:
        """Compute the heads alone, by the eager plan or by a package that is not served yet."""
        with torch.inference_mode():
            return self._eager(inputs) if package is None else CompiledPlan(package, self._eager)(inputs)

    def serve_compiled(self, package: Package) -> None:
        """Serve a package from the next step on."""
        self._plan, self.plan = CompiledPlan(package, self._eager), COMPILED

    def serve_eager(self) -> None:
        """Serve the eager plan from the next step on."""
        self._plan, self.plan = self._eager, EAGER

    def _heads(self, inputs: GraphInputs) -> Heads:
        try:
            return self._plan(inputs)
        except RuntimeError as error:
            if self.plan == EAGER:
                raise
            log.error("compiled_plan_failed", error=str(error)[:200], priority="HIGH")
            self.serve_eager()
            return self._eager(inputs)


def _digest(network: PolicyNetwork) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
