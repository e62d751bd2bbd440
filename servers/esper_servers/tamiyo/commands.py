from __future__ import annotations

import functools
import itertools
import uuid

import orjson

from esper_rpc.envelope import Keyring, sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandType,
    HandlingClass,
    HazardBand,
    SeedOperation,
    SignedEnvelope,
)
from esper_rpc.telemetry.events import name_of
from esper_servers.policy import parameters, schema
from esper_servers.policy.coverage import Coverage
from esper_servers.policy.graph import BlueprintCandidate
from esper_servers.policy.masks import Choice
from esper_servers.policy.vocabularies import SCHEDULES

from .risk.engine import Verdict
from .risk.events import priority_of
from .run_state import RunState

PAUSE_UNITS_MS = 100
COVERAGE_KEYS = 32
MOST_COVERAGES = 256


def build_command(
    run: RunState, choice: Choice, *, reason: str, policy_version: str, verdict: Verdict
) -> AdaptationCommand:
    """Write the command of a choice, with the annotations that operators read."""
    command = AdaptationCommand(version=1, command_id=str(uuid.uuid4()), issued_by="tamiyo", execution_deadline_ms=5)
    command.issued_at.GetCurrentTime()
    command.annotations["reason"] = reason
    command.annotations["priority"] = name_of(priority_of(verdict))
    command.annotations["step_index"] = str(run.global_step)
    command.annotations["policy_version"] = policy_version
    for name, text in _coverage_texts(run.graph.coverage()):
        command.annotations[name] = text
    command.annotations["risk_score"] = f"{verdict.score:.4f}"
    command.annotations["risk_map"] = orjson.dumps({n: round(r.score, 4) for n, r in verdict.readings.items()}).decode()
    if choice.kind == schema.KIND_SEED:
        _write_seed_operation(command, run, choice)
    elif choice.kind == schema.KIND_OPTIMIZER:
        command.command_type = CommandType.COMMAND_TYPE_OPTIMIZER
        multiplier = parameters.made_fit(choice.parameters).learning_rate_multiplier
        command.optimizer_adjustment.hyperparameters["learning_rate_multiplier"] = multiplier
    else:
        command.command_type = CommandType.COMMAND_TYPE_PAUSE
        command.execution_deadline_ms = PAUSE_UNITS_MS
    return command


@functools.lru_cache(maxsize=MOST_COVERAGES)
def _coverage_texts(coverage: Coverage) -> tuple[tuple[str, str], ...]:
    """What is known of a run is the same at most of its commands, and takes longer to write than to sign."""
    least_known = dict(itertools.islice(coverage.features.items(), COVERAGE_KEYS))
    return (
        ("feature_coverage", f"{coverage.overall:.4f}"),
        ("coverage_types", orjson.dumps(coverage.types).decode()),
        ("coverage_map", orjson.dumps(least_known).decode()),
    )


def _write_seed_operation(command: AdaptationCommand, run: RunState, choice: Choice) -> None:
    command.command_type = CommandType.COMMAND_TYPE_SEED
    command.target_seed_id = run.graph.seed_ids[choice.seed]
    operation = command.seed_operation
    operation.operation = SeedOperation.ValueType(choice.operation)
    if choice.blueprint >= 0:
        blueprint = run.graph.blueprints[choice.blueprint]
        operation.blueprint_id = blueprint.blueprint_id
        _annotate_hazard(command, blueprint)
    operation.parameters["blending_method_index"] = float(choice.schedule)
    fit = parameters.made_fit(choice.parameters)
    operation.parameters["blending_schedule_start"] = fit.blending_schedule_start
    operation.parameters["blending_schedule_end"] = fit.blending_schedule_end
    command.annotations["blending_method_index"] = str(choice.schedule)
    command.annotations["blending_method"] = SCHEDULES[choice.schedule]


def _annotate_hazard(command: AdaptationCommand, blueprint: BlueprintCandidate) -> None:
    """Tell what the safety data sheet of a blueprint says, where there is one."""
    if blueprint.hazard_band:
        band = HazardBand.Name(blueprint.hazard_band).removeprefix("HAZARD_BAND_")
        command.annotations["bsds_hazard_band"] = band
    if blueprint.handling_class:
        handling = HandlingClass.Name(blueprint.handling_class).removeprefix("HANDLING_CLASS_")
        command.annotations["bsds_handling_class"] = handling
    if blueprint.bsds_risk is not None:
        command.annotations["bsds_risk"] = f"{blueprint.bsds_risk:.4f}"


def sign_command(
    command: AdaptationCommand, *, keyring: Keyring, run: RunState, sequence: int, request_digest: bytes, now_ns: int
) -> SignedEnvelope:
    """Sign a command for the run's owner, bound to its challenge and to the request it answers."""
    return sign(
        command.SerializeToString(),
        payload_type=COMMAND_TYPE,
        keyring=keyring,
        audience=run.owner,
        issued_at_ns=now_ns,
        nonce=command.command_id,
        run_id=run.request.run_id,
        receiver_epoch=run.request.receiver_epoch,
        sequence=sequence,
        request_digest=request_digest,
    )
