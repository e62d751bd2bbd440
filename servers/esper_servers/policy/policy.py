from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_rpc.proto.leyline.v1 import SeedState
from esper_rpc.telemetry.metrics import PLAN_FALLBACKS

from . import parameters, prior
from .compiled_plan import CompiledPlan, Package
from .cuda_plan import CudaPlan, DeviceUse
from .graph import GraphInputs
from .network import Heads, NetworkConfig, PolicyNetwork
from .plan import FusedPlan
from .prior import Bonus, PriorConfig, RunSignals

ARCHITECTURE_VERSION = "gnn_v1"
EAGER, COMPILED, CUDA = "eager", "compiled", "cuda"
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """Logits of every head after the prior, the value, the risks (0 to 1) and the parameters of an action."""

    kind: NDArray[np.float32]
    operation: NDArray[np.float32]
    blueprint: NDArray[np.float32]
    schedule: NDArray[np.float32]
    value: float
    risk: NDArray[np.float32]
    parameters: NDArray[np.float32]
    """Within their bounds, in the order of `schema.PARAMETER_NAMES`."""
    plan: str = EAGER
    """Which plan computed it: also under another it may be `eager`, for large graphs or those not prepared yet."""
    batch_size: int = 1
    """How many graphs were computed in the same pass."""

    @property
    def is_finite(self) -> bool:
        """Whether every number can be used."""
        parts = (self.kind, self.operation, self.blueprint, self.schedule, self.risk, self.parameters)
        return all(bool(np.isfinite(part).all()) for part in parts) and bool(np.isfinite(self.value))


class Asked(NamedTuple):
    """What a policy is asked about: a graph, its seeds in the order of its seed nodes, and signals of the run."""

    inputs: GraphInputs
    seeds: Sequence[SeedState]
    signals: RunSignals


class Policy:
    """A network, its prior and their version."""

    def __init__(
        self,
        network: PolicyNetwork,
        *,
        version: str,
        origin: str,
        prior_config: PriorConfig,
        norms: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.network = network.eval()
        self.norms = dict(norms or {})
        """Mean and variance of inputs as they were when the policy was trained; a new run starts from them."""
        self.version = version
        self.origin = origin
        self.prior = prior_config
        self._eager = FusedPlan(network)
        self._compiled: CompiledPlan | None = None
        self._cuda: CudaPlan | None = None
        self.plan_problem = ""
        """Why another plan is served than the one that is wanted."""
        self.digest = digest_of(network.state_dict())
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

    def evaluate(
        self, inputs: GraphInputs, seeds: Sequence[SeedState], signals: RunSignals, *, beside: bool = False
    ) -> PolicyOutput:
        """Run the network on one graph and add the prior. `seeds` are in the order of the graph's seed nodes.

        `beside` leaves the interpreter to other threads meanwhile, if `can_run_beside`.
        """
        with torch.inference_mode():
            heads, plan = self._heads(inputs, beside=beside)
        return _with_bonus(heads, prior.bonus(seeds, signals, self.prior), plan)

    def evaluate_many(self, asked: Sequence[Asked]) -> list[PolicyOutput]:
        """Evaluate different graphs, in one pass if all of them `can_share`, else one after the other."""
        if not all(self.can_share(each.inputs) for each in asked):
            return [self.evaluate(*each) for each in asked]
        with torch.inference_mode():
            found = self._eager.compute_many([each.inputs for each in asked])
        return [
            _with_bonus(heads, prior.bonus(each.seeds, each.signals, self.prior), EAGER, batch_size=len(asked))
            for heads, each in zip(found, asked, strict=True)
        ]

    def can_share(self, inputs: GraphInputs) -> bool:
        """Whether this graph gains by a pass with others; only the eager plan does: dispatch is most of its time."""
        return self.plan == EAGER and self._eager.can_share(inputs)

    def can_run_beside(self, inputs: GraphInputs) -> bool:
        """Whether other threads can use the interpreter while this graph is evaluated."""
        return any(plan is not None and plan.covers(inputs) for plan in (self._cuda, self._compiled))

    def evaluate_again(
        self, inputs: GraphInputs, seeds: Sequence[SeedState], signals: RunSignals, prior_config: PriorConfig, plan: str
    ) -> PolicyOutput:
        """Evaluate with other thresholds, and by this plan if it is here; on any thread, for it changes nothing."""
        with torch.inference_mode():
            heads, used = self._heads_again(inputs, plan)
        return _with_bonus(heads, prior.bonus(seeds, signals, prior_config), used)

    def compute(self, inputs: GraphInputs, package: Package | None = None) -> Heads:
        """Compute the heads alone, by the eager plan or by a package that is not served yet."""
        with torch.inference_mode():
            return self._eager(inputs) if package is None else self._by_package(package)(inputs)

    def warm_up(self, inputs: GraphInputs) -> None:
        """Lay a graph out before the first step on it; on any thread, until this policy is served."""
        self.prepare(inputs)
        with torch.inference_mode():
            self._heads(inputs)

    def prepare(self, inputs: GraphInputs) -> None:
        """Lay a graph out for the plan that serves, also on a device, before its first step; on any thread."""
        compiled, cuda = self._compiled, self._cuda
        if compiled is None or not compiled.covers(inputs):
            self._eager.lay_out(inputs)
        if cuda is not None:
            try:
                cuda.prepare(inputs)
            except RuntimeError as error:
                self._tell_failure("graph_not_prepared", error)

    @property
    def missed(self) -> GraphInputs | None:
        """A graph that was asked for and is still to be prepared."""
        cuda = self._cuda
        return None if cuda is None else cuda.missed

    @property
    def plan(self) -> str:
        """Which form of the network is served: `eager`, `compiled` or `cuda`."""
        if self._cuda is not None:
            return CUDA
        return COMPILED if self.has_compiled else EAGER

    @property
    def has_compiled(self) -> bool:
        """Whether a package serves what no device does."""
        return self._compiled is not None

    @property
    def device_use(self) -> DeviceUse | None:
        """What is taken of the device that serves."""
        cuda = self._cuda
        return None if cuda is None else cuda.use

    def serve_compiled(self, package: Package) -> None:
        """Serve a package from the next step on."""
        self._compiled = self._by_package(package)

    def _by_package(self, package: Package) -> CompiledPlan:
        return CompiledPlan(package, self._eager, self._eager.edge_scores)

    def serve_on_device(self, plan: CudaPlan) -> None:
        """Serve from the next step on what is prepared on a device; all else as before."""
        self._cuda = plan

    def serve_eager(self) -> None:
        """Serve the eager plan from the next step on."""
        self._cuda = self._compiled = None

    def _heads(self, inputs: GraphInputs, *, beside: bool = False) -> tuple[Heads, str]:
        """The heads, and the plan that computed them."""
        heads = self._heads_of_device(inputs)
        if heads is not None:
            return heads, CUDA
        compiled = self._compiled  # Read once: another thread sets it.
        if compiled is None:
            return self._eager(inputs), EAGER
        try:
            return _by(compiled, inputs, beside=beside)
        except RuntimeError as error:
            self._tell_failure("compiled_plan_failed", error)
            self._compiled = None
            return self._eager(inputs), EAGER

    def _heads_of_device(self, inputs: GraphInputs) -> Heads | None:
        cuda = self._cuda
        if cuda is None:
            return None
        try:
            return cuda(inputs)
        except RuntimeError as error:  # Out of memory too.
            self._tell_failure("cuda_plan_failed", error)
            self._cuda = None
            return None

    def _tell_failure(self, event: str, error: RuntimeError) -> None:
        self.plan_problem = f"{event}: {str(error)[:200]}"
        PLAN_FALLBACKS.inc()
        log.error(event, error=str(error)[:200], priority="HIGH")

    def _heads_again(self, inputs: GraphInputs, plan: str) -> tuple[Heads, str]:
        compiled = self._compiled
        # Whoever replays has no device; the eager plan is what all others are held to.
        if plan in (EAGER, CUDA) or compiled is None:
            return self._eager.compute_once(inputs), EAGER
        # What the served plans keep of each graph belongs to the thread of the steps.
        return _by(CompiledPlan(compiled.package, self._eager.compute_once, self._eager.edge_scores), inputs)


def _by(compiled: CompiledPlan, inputs: GraphInputs, *, beside: bool = False) -> tuple[Heads, str]:
    return compiled(inputs, beside=beside), COMPILED if compiled.covers(inputs) else EAGER


def _with_bonus(heads: Heads, added: Bonus, plan: str, *, batch_size: int = 1) -> PolicyOutput:
    return PolicyOutput(
        np.tanh(heads.kind.numpy()) + added.kind,
        np.tanh(heads.operation.numpy()) + added.operation,
        heads.blueprint.numpy(),
        heads.schedule.numpy(),
        float(heads.value),
        heads.risk.numpy(),
        added.mixed_with(parameters.read_out(heads.parameters.tolist())),
        plan,
        batch_size,
    )


def digest_of(weights: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
