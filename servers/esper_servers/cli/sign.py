from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from esper_client.client import KasminaClient
from esper_rpc.envelope import sign as sign_envelope
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.kasmina.v1 import (
    ApplyCommandRequest,
    GetRollbackPayloadRequest,
    GetStatusRequest,
    GetStatusResponse,
)
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CircuitState,
    CommandOutcome,
    CommandType,
    EmergencyLevel,
    SeedOperation,
    SignedEnvelope,
)

from .console import HomeOption, JsonOption, home_of, print_json, run
from .home import Home

LEVELS = [name.removeprefix("EMERGENCY_LEVEL_").lower() for name in EmergencyLevel.keys()[1:]]
STATES = [name.removeprefix("CIRCUIT_STATE_").lower() for name in CircuitState.keys()[1:]]
OPERATIONS = sorted(name.removeprefix("SEED_OPERATION_").lower() for name in SeedOperation.keys()[1:])


def sign(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="host:port of the trainer's KasminaService.")],
    seed: Annotated[str, typer.Option(help="The seed that the command is for.")] = "",
    operation: Annotated[str, typer.Option(help=f"What the seed does: {', '.join(OPERATIONS)}.")] = "",
    blueprint: Annotated[str, typer.Option(help="For germinate: which blueprint.")] = "",
    emergency: Annotated[str, typer.Option(help=f"Instead of a seed, raise a level: {', '.join(LEVELS)}.")] = "",
    breaker: Annotated[str, typer.Option(help="Instead of a seed, move this breaker of the trainer.")] = "",
    state: Annotated[str, typer.Option(help=f"Where the breaker moves to: {', '.join(STATES)}.")] = "open",
    undo: Annotated[str, typer.Option(help="Instead, roll back to before this seed, which was taken out.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "operator",
    output: Annotated[Path | None, typer.Option(help="Write the envelope to this file.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Send it at once.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a command as operator for one seed host, and apply it or write it down."""
    if bool(seed or operation) + bool(emergency) + bool(breaker) + bool(undo) != 1:
        raise typer.BadParameter("Give one of --seed with --operation, --emergency, --breaker and --undo.")
    command = _begin(reason)
    if emergency:
        _write_emergency(command, emergency)
    elif breaker:
        _write_breaker(command, breaker, state, reason)
    elif undo:
        command.command_type = CommandType.COMMAND_TYPE_ROLLBACK
        command.rollback_payload.CopyFrom(run(_payload(home_of(context, home), address, undo)))
    else:
        _write_operation(command, seed, operation, blueprint)
    envelope, document = run(_sign(home_of(context, home), address, command, apply=apply))
    if output is not None:
        output.write_bytes(envelope.SerializeToString())
    if as_json:
        print_json(document)
    else:
        typer.echo(" ".join(f"{key}={value}" for key, value in document.items()))
    if document.get("result") == "RESULT_REJECTED":
        raise typer.Exit(1)


def command_for(seed: str, operation: str, blueprint: str) -> AdaptationCommand:
    """Build a seed command; raises a usage error for an unknown operation."""
    command = _begin("operator")
    _write_operation(command, seed, operation, blueprint)
    return command


def _begin(reason: str) -> AdaptationCommand:
    command = AdaptationCommand(
        version=1, command_id=str(uuid.uuid4()), issued_by="operator", annotations={"reason": reason}
    )
    command.issued_at.FromNanoseconds(time.time_ns())
    return command


def _write_operation(command: AdaptationCommand, seed: str, operation: str, blueprint: str) -> None:
    if not seed:
        raise typer.BadParameter("--operation is for a seed: name it with --seed.")
    _require(operation, OPERATIONS, "an operation")
    command.command_type, command.target_seed_id = CommandType.COMMAND_TYPE_SEED, seed
    command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{operation.upper()}")
    command.seed_operation.blueprint_id = blueprint


def _write_emergency(command: AdaptationCommand, level: str) -> None:
    _require(level, LEVELS, "a level")
    command.command_type = CommandType.COMMAND_TYPE_EMERGENCY
    command.annotations["emergency_level"] = level.upper()


def _write_breaker(command: AdaptationCommand, breaker: str, state: str, reason: str) -> None:
    _require(state, STATES, "a state")
    command.command_type = CommandType.COMMAND_TYPE_CIRCUIT_BREAKER
    command.annotations["breaker"] = breaker
    command.circuit_breaker.desired_state = CircuitState.Value(f"CIRCUIT_STATE_{state.upper()}")
    command.circuit_breaker.rationale = reason


def _require(given: str, known: Sequence[str], what: str) -> None:
    if given.lower() not in known:
        raise typer.BadParameter(f"{given!r} is not {what}; choose from {', '.join(known)}.")


async def _payload(home: Home, address: str, seed: str) -> Struct:
    async with KasminaClient(address, identity=home.identity()) as client:
        answer = await client.get_rollback_payload(GetRollbackPayloadRequest(seed_id=seed))
    if not answer.rollback.HasField("payload"):
        raise FailedPrecondition(f"{seed!r} never had a part in the output; there is nothing to go back from.")
    return answer.rollback.payload


async def _sign(
    home: Home, address: str, command: AdaptationCommand, *, apply: bool
) -> tuple[SignedEnvelope, dict[str, Any]]:
    async with KasminaClient(address, identity=home.identity()) as client:
        status = await client.get_status(GetStatusRequest())
        envelope = seal(home, command, status)
        document: dict[str, Any] = {"command_id": command.command_id, "audience": envelope.audience, "applied": apply}
        if apply:
            answer = await client.apply_command(ApplyCommandRequest(command=envelope))
            document |= _describe(answer.outcome)
        return envelope, document


def seal(home: Home, command: AdaptationCommand, status: GetStatusResponse) -> SignedEnvelope:
    """Sign a command for the host that gave this status."""
    if not status.receiver_epoch:
        raise FailedPrecondition("The seed host has no run open.")
    fence = max((f.sequence for f in status.fences if f.issuer == "operator"), default=0)
    return sign_envelope(
        command.SerializeToString(),
        payload_type=COMMAND_TYPE,
        keyring=home.keyring("operator"),
        audience=status.audience,
        issued_at_ns=time.time_ns(),
        nonce=command.command_id,
        run_id=status.run_id,
        receiver_epoch=status.receiver_epoch,
        sequence=fence + 1,
        request_digest=hashlib.sha256(status.SerializeToString()).digest(),
    )


def _describe(outcome: CommandOutcome) -> dict[str, Any]:
    found = MessageToDict(outcome, preserving_proto_field_name=True)
    return {"result": found.get("result", ""), "reason": found.get("reason", "")}
