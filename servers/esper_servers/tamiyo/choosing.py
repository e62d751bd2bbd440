"""From a state to an action: what a step does while it is decided, and what a replay does again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_servers.policy import masks, prior, schema
from esper_servers.policy.masks import Choice, Masks
from esper_servers.policy.parameters import Parameters
from esper_servers.policy.policy import PolicyOutput

from .risk import engine
from .risk.config import RiskConfig
from .risk.engine import Verdict
from .risk.signals.optimizer_hints import LEARNING_RATE_VANISHED
from .run_state import RunState

NOMINAL, POLICY, LATE_COMMANDS = "nominal", "policy", "late_commands"
BUDGET_EXHAUSTED, INFERENCE_FAILED, BREAKER_OPEN = "budget_exhausted", "inference_failed", "inference_breaker_open"
UNDECIDED = frozenset({BUDGET_EXHAUSTED, INFERENCE_FAILED, BREAKER_OPEN})
"""Why a step got no action without a decision: nothing that is recorded of it says so."""
DEMANDED_PARAMETERS = {LEARNING_RATE_VANISHED: prior.PARAMETERS._replace(learning_rate_multiplier=1.25)}
"""By reason, where they are not those of the prior. How far to go is then not for a policy to say."""


@dataclass(frozen=True, slots=True)
class Decided:
    """A choice with its reason, and what it was chosen from; no choice is NoAction."""

    choice: Choice | None
    reason: str
    masks: Masks | None = None
    output: PolicyOutput | None = None
    error: str = ""
    """What the policy failed with."""

    @property
    def batch_size(self) -> int:
        """How many steps the policy was asked about at once, 0 where it was not asked."""
        return self.output.batch_size if self.output else 0


def judge(run: RunState, packet: SystemStatePacket, *, conservative: bool, config: RiskConfig) -> Verdict:
    """Take the packet of a step in and hear the risk engine."""
    verdict = engine.judge(run.observe(packet, config), config, conservative=conservative)
    run.risk.settle(is_high=verdict.is_high, is_nominal=verdict.is_nominal)
    return verdict


def obey(kind: int, verdict: Verdict, run: RunState, config: RiskConfig) -> Decided:
    """Do what the risk demands, if the run can."""
    return Decided(_act(kind, verdict, run, config), verdict.reason)


def select(
    output: PolicyOutput, run: RunState, seeds: Sequence[SeedState], verdict: Verdict, config: RiskConfig
) -> Decided:
    """Take the best that is legal and that the risk leaves."""
    legal = _legal(run, seeds, config)
    choice = _best(output, legal, run, verdict, config)
    undecided = LATE_COMMANDS if run.is_resting else NOMINAL
    reason = verdict.reason or (undecided if choice is None else POLICY)
    return Decided(choice, reason, legal, output)


def _legal(run: RunState, seeds: Sequence[SeedState], config: RiskConfig) -> Masks:
    legal = masks.legal(seeds, run.graph.plantable, run.graph.blendable, run.features)
    # Multipliers multiply: without a rest a policy could take a learning rate to its limit within some steps.
    legal.kind[schema.KIND_OPTIMIZER] &= run.steps - run.optimizer_at >= config.cool_down_steps
    if run.is_resting:
        legal.kind[[schema.KIND_SEED, schema.KIND_OPTIMIZER]] = False
    legal.kind[schema.KIND_PAUSE] = False  # The policy pauses only through a gate until it is trained to.
    return legal


def _best(output: PolicyOutput, legal: Masks, run: RunState, verdict: Verdict, config: RiskConfig) -> Choice | None:
    heads = (output.kind, output.operation, output.blueprint, output.schedule)
    choice = masks.choose(*heads, legal)
    if choice.kind == schema.KIND_SEED and verdict.replaces_seed:
        # Once while the risk lasts: an adjustment after every cool-down would grind the learning rate down.
        return None if run.risk.adjusted else _act(schema.KIND_OPTIMIZER, verdict, run, config)
    if not verdict.allowed[choice.kind]:
        legal.kind[:] &= verdict.allowed
        choice = masks.choose(*heads, legal)
    if choice.kind == schema.KIND_NONE:
        return None
    return replace(choice, parameters=Parameters(*output.parameters.tolist()))


def _act(kind: int, verdict: Verdict, run: RunState, config: RiskConfig) -> Choice | None:
    """The kind, unless the run cannot do it or did it a moment ago, or rests."""
    last, feature = (run.paused_at, "pause") if kind == schema.KIND_PAUSE else (run.optimizer_at, "optimizer")
    if run.is_resting or feature not in run.features or run.steps - last < config.cool_down_steps:
        return None
    return Choice(kind, parameters=DEMANDED_PARAMETERS.get(verdict.reason, prior.PARAMETERS))
