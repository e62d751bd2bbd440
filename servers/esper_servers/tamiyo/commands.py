from __future__ import annotations

import functools
import itertools
import time
import uuid
from collections.abc import Mapping

import orjson
from google.protobuf.timestamp_pb2 import Timestamp

from esper_rpc.envelope import Keyring, sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandType,
    HandlingClass,
    HazardBand,
    MessagePriority,
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
# An enum looks its names up each time.
_PRIORITY_NAMES = {priority: name_of(priority) for priority in MessagePriority.values()}
_BAND_NAMES = {number: name.removeprefix("HAZARD_BAND_") for name, number in HazardBand.items()}
_HANDLING_NAMES = {number: name.removeprefix("HANDLING_CLASS_") for name, number in HandlingClass.items()}


def build_command(
    run: RunState,
    choice: Choice,
    *,
    reason: str,
    policy_version: str,
    verdict: Verdict,
    blending: Mapping[str, str] | None = None,
) -> AdaptationCommand:
    """Write the command of a choice, with the annotations that operators read and those on `blending`."""
    seconds, nanos = divmod(time.time_ns(), 10**9)
    command = AdaptationCommand(
        version=1,
        command_id=str(uuid.uuid4()),
        issued_by="tamiyo",
        issued_at=Timestamp(seconds=seconds, nanos=nanos),
        execution_deadline_ms=5,
        annotations=_annotations(run, reason, policy_version, verdict) | (dict(blending) if blending else {}),
    )
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


def _annotations(run: RunState, reason: str, policy_version: str, verdict: Verdict) -> dict[str, str]:
    return {
        "reason": reason,
        "priority": _PRIORITY_NAMES[priority_of(verdict)],
        "step_index": str(run.global_step),
        "policy_version": policy_version,
        "risk_score": f"{verdict.score:.4f}",
        "risk_map": orjson.dumps({n: round(r.score, 4) for n, r in verdict.readings.items()}).decode(),
        **_coverage_texts(run.graph.coverage()),
    }


@functools.lru_cache(maxsize=MOST_COVERAGES)
def _coverage_texts(coverage: Coverage) -> Mapping[str, str]:
    """What is known of a run is the same at most of its commands, and takes longer to write than to sign."""
    least_known = dict(itertools.islice(coverage.features.items(), COVERAGE_KEYS))
    return {
        "feature_coverage": f"{coverage.overall:.4f}",
        "coverage_types": orjson.dumps(coverage.types).decode(),
        "coverage_map": orjson.dumps(least_known).decode(),
    }


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
        command.annotations["bsds_hazard_band"] = _BAND_NAMES[blueprint.hazard_band]
    if blueprint.handling_class:
        command.annotations["bsds_handling_class"] = _HANDLING_NAMES[blueprint.handling_class]
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
