from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from esper_rpc.errors import FailedPrecondition
from esper_rpc.journal import JournalReader
from esper_rpc.proto.leyline.v1 import AdaptationCommand
from esper_rpc.proto.tamiyo.v1 import DecisionEvidence, ExplainDecisionResponse, NumberArray, RunStructure
from esper_servers.policy import checkpoint, cuda_plan, plan_package, schema
from esper_servers.policy.graph import GraphInputs
from esper_servers.policy.policy import CUDA, Policy, PolicyOutput
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo import choosing
from esper_servers.tamiyo.blend_modes import annotations_of
from esper_servers.tamiyo.choosing import UNDECIDED, Decided
from esper_servers.tamiyo.commands import build_command
from esper_servers.tamiyo.plans.plan_switch import TOLERANCE
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.engine import Verdict
from esper_servers.tamiyo.run_state import RunState

from .arrays import read_array
from .comparison import differences
from .decisions import DecisionRecords
from .evidence import OUTPUT_NAMES, Evidence
from .memory import Memory
from .structure import digest_of, run_of

Config = TypeVar("Config", RiskConfig, PriorConfig)

DRAWN = frozenset({"command.command_id", "command.issued_at"})
"""What is drawn for each command and not decided."""
OUTPUTS, BATCH_SIZE = "evidence.outputs", "evidence.batch_size"
BATCH_TOLERANCE = 1e-5
_CIRCUMSTANCES = ("evidence.runtime:", f"{BATCH_SIZE}:")
"""They may explain a difference and are none by themselves."""


class Replay:
    """Decides again what stands in a record, on a run made anew from it. Nothing live is touched."""

    def __init__(self, decisions: DecisionRecords, policy: Callable[[], Policy]) -> None:
        self._decisions = decisions
        self._policy = policy

    def differences(self, key: str) -> list[str]:
        """Say what comes out otherwise than recorded; raises NotFound, or FailedPrecondition without the means.

        Takes milliseconds and waits for the disk: keep it off the step path.
        """
        recorded = self._decisions.explain(key)
        if recorded.dump_id:
            raise FailedPrecondition(
                "Of this step only request and reply were kept, not what it was decided on.", reason="NOT_REPLAYABLE"
            )
        if not recorded.HasField("evidence"):
            raise FailedPrecondition("An earlier version recorded this decision.", reason="NOT_REPLAYABLE")
        if recorded.reason in UNDECIDED:
            raise FailedPrecondition(
                f"Nothing was decided at this step ({recorded.reason}), so there is nothing to decide again.",
                reason="NOT_REPLAYABLE",
            )
        structure = self._decisions.structure(recorded.evidence.structure_digest)
        now = decide_again(recorded, structure, self._policy())
        found = list(differences(recorded, now, skip=_skipped(recorded, now)))
        is_same = all(line.startswith(_CIRCUMSTANCES) for line in found)
        return [] if is_same and recorded.evidence.outputs == now.evidence.outputs else found


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where a process that serves nothing finds what a replay needs."""

    journal: Path
    policy: Path | None
    """The file of the live policy; None for the shipped one."""
    prior: PriorConfig
    package: Path | None
    """The compiled plan, where it is served."""


def replay_from(sources: Sources, key: str) -> list[str]:
    """Say what comes out otherwise than recorded, as `Replay.differences`."""
    policy = _policy_of(sources.policy, sources.prior, sources.package)
    return Replay(DecisionRecords(JournalReader(sources.journal)), lambda: policy).differences(key)


@functools.lru_cache(maxsize=1)
def _policy_of(path: Path | None, prior: PriorConfig, package: Path | None) -> Policy:
    policy = checkpoint.load(path, prior) if path else Policy.initial(prior_config=prior)
    if package is not None:
        policy.serve_compiled(plan_package.load(package, policy.network))
    return policy


def decide_again(
    recorded: ExplainDecisionResponse, structure: RunStructure, policy: Policy, *, is_other: bool = False
) -> ExplainDecisionResponse:
    """Return the record that the same state gives now, with the thresholds of then.

    What another policy put out then stands for it now, unless this one `is_other` and is to decide in its place.
    """
    evidence = recorded.evidence
    run = run_of(structure, evidence.run_id)
    memory = Memory.of_numbers(evidence.memory)
    memory.give_to(run)
    run.planted = dict(evidence.planted)
    run.global_step = recorded.packet.global_step
    risk = _config(RiskConfig(), "risk", evidence)
    prior = policy.prior if is_other else _config(PriorConfig(), "prior", evidence)
    verdict = choosing.judge(run, recorded.packet, conservative=evidence.conservative, config=risk)
    inputs = run.graph.fill(recorded.packet)
    if verdict.forced is not None:
        decided = choosing.obey(verdict.forced, verdict, run, risk)
    else:
        stands = not is_other and evidence.policy_digest != policy.digest and bool(evidence.outputs)
        output = _recorded(evidence) if stands else _again(inputs, recorded, run, policy, prior)
        decided = choosing.select(output, run, run.ordered_seeds(recorded.packet), verdict, risk)
    return Evidence.of(
        _command(run, decided, verdict, recorded), recorded.packet, recorded.ledger, decided, verdict,
        run=run, memory=memory, policy=policy, prior=prior, risk=risk, conservative=evidence.conservative,
    ).record(digest_of(structure.SerializeToString(deterministic=True)))  # fmt: skip


def _again(
    inputs: GraphInputs, recorded: ExplainDecisionResponse, run: RunState, policy: Policy, prior: PriorConfig
) -> PolicyOutput:
    seeds = run.ordered_seeds(recorded.packet)
    return policy.evaluate_again(inputs, seeds, run.signals(), prior, recorded.evidence.plan)


def _recorded(evidence: DecisionEvidence) -> PolicyOutput:
    arrays = {name: read_array(array) for name, array in evidence.outputs.items()}
    if arrays.keys() != set(OUTPUT_NAMES):
        others = ", ".join(sorted(set(OUTPUT_NAMES) ^ set(arrays)))
        raise FailedPrecondition(
            f"Another version recorded this decision, whose policies had other heads ({others}).",
            reason="NOT_REPLAYABLE",
        )
    value = float(arrays.pop("value"))
    return PolicyOutput(value=value, plan=evidence.plan, batch_size=max(1, evidence.batch_size), **arrays)


def _command(
    run: RunState, decided: Decided, verdict: Verdict, recorded: ExplainDecisionResponse
) -> AdaptationCommand | None:
    if decided.choice is None:
        return None
    return build_command(
        run,
        decided.choice,
        reason=decided.reason,
        policy_version=recorded.policy_version,
        verdict=verdict,
        blending=annotations_of(recorded.command.annotations),
    )


def _skipped(recorded: ExplainDecisionResponse, now: ExplainDecisionResponse) -> AbstractSet[str]:
    """What need not be the same: two plans compute the same only nearly, and their difference is told as such.

    So do a batch and a single evaluation.
    """
    ours, theirs = recorded.evidence, now.evidence
    same_batch = max(ours.batch_size, 1) == max(theirs.batch_size, 1)
    skipped = DRAWN | {BATCH_SIZE} if same_batch else DRAWN
    if not ours.plan or not theirs.plan or (ours.plan == theirs.plan and same_batch):
        return skipped
    tolerance = _tolerance_between(ours.plan, theirs.plan)
    if not _are_near(ours.outputs, theirs.outputs, tolerance):
        return skipped
    return skipped | {OUTPUTS} | _near_parameters(recorded.command, now.command, tolerance)


def _near_parameters(ours: AdaptationCommand, theirs: AdaptationCommand, tolerance: float) -> AbstractSet[str]:
    """The numbers of a command that differ no more than the outputs that they come from."""
    pairs = {
        "seed_operation.parameters": (ours.seed_operation.parameters, theirs.seed_operation.parameters),
        "optimizer_adjustment.hyperparameters": (
            ours.optimizer_adjustment.hyperparameters, theirs.optimizer_adjustment.hyperparameters,
        ),
    }  # fmt: skip
    return {
        f"command.{path}.{name}"
        for path, (one, other) in pairs.items()
        for name in schema.PARAMETER_NAMES
        if name in one and name in other and math.isclose(one[name], other[name], rel_tol=tolerance, abs_tol=tolerance)
    }


def _tolerance_between(recorded: str, now: str) -> float:
    if recorded == now:
        return BATCH_TOLERANCE
    return cuda_plan.TOLERANCE if CUDA in (recorded, now) else TOLERANCE


def _are_near(ours: Mapping[str, NumberArray], theirs: Mapping[str, NumberArray], tolerance: float) -> bool:
    pairs = [(read_array(ours[name]), read_array(theirs[name])) for name in ours if name in theirs]
    return len(pairs) == len(ours) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs
    )


def _config(default: Config, section: str, evidence: DecisionEvidence) -> Config:
    """The thresholds of then; one that was not known then is as it is by default."""
    found = {}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        found[field.name] = type(value)(evidence.settings.get(f"{section}.{field.name}", value))
    return dataclasses.replace(default, **found)
