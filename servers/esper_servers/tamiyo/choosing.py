"""From a state to an action: what a step does while it is decided, and what a replay does again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_servers.policy import masks, schema
from esper_servers.policy.masks import Choice, Masks
from esper_servers.policy.policy import PolicyOutput

from .risk import engine
from .risk.config import RiskConfig
from .risk.engine import Verdict
from .run_state import RunState

NOMINAL, POLICY = "nominal", "policy"
BUDGET_EXHAUSTED, INFERENCE_FAILED, BREAKER_OPEN = "budget_exhausted", "inference_failed", "inference_breaker_open"
UNDECIDED = frozenset({BUDGET_EXHAUSTED, INFERENCE_FAILED, BREAKER_OPEN})
"""Why a step got no action without a decision: nothing that is recorded of it says so."""


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
    return Decided(_act(kind, run, config), verdict.reason)


def select(
    output: PolicyOutput, run: RunState, seeds: Sequence[SeedState], verdict: Verdict, config: RiskConfig
) -> Decided:
    """Take the best that is legal and that the risk leaves."""
    legal = _legal(run, seeds)
    choice = _best(output, legal, run, verdict, config)
    reason = verdict.reason or (NOMINAL if choice is None else POLICY)
    return Decided(choice, reason, legal, output)


def _legal(run: RunState, seeds: Sequence[SeedState]) -> Masks:
    legal = masks.legal(seeds, run.graph.plantable, run.features)
    legal.kind[schema.KIND_PAUSE] = False  # The policy pauses only through a gate until it is trained to.
    return legal


def _best(output: PolicyOutput, legal: Masks, run: RunState, verdict: Verdict, config: RiskConfig) -> Choice | None:
    heads = (output.kind, output.operation, output.blueprint, output.schedule)
    choice = masks.choose(*heads, legal)
    if choice.kind == schema.KIND_SEED and verdict.replaces_seed:
        # Once while the risk lasts: an adjustment after every cool-down would grind the learning rate down.
        return None if run.risk.adjusted else _act(schema.KIND_OPTIMIZER, run, config)
    if not verdict.allowed[choice.kind]:
        legal.kind[:] &= verdict.allowed
        choice = masks.choose(*heads, legal)
    return None if choice.kind == schema.KIND_NONE else choice


def _act(kind: int, run: RunState, config: RiskConfig) -> Choice | None:
    """The kind, unless the run cannot do it or did it a moment ago."""
    last, feature = (run.paused_at, "pause") if kind == schema.KIND_PAUSE else (run.optimizer_at, "optimizer")
    if feature not in run.features or run.steps - last < config.cool_down_steps:
        return None
    return Choice(kind)
