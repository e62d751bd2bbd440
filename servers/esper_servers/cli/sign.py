from __future__ import annotations

import hashlib
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from esper_client.client import KasminaClient
from esper_rpc.envelope import sign as sign_envelope
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.kasmina.v1 import ApplyCommandRequest, GetStatusRequest, GetStatusResponse
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    CommandSeedOperation,
    CommandType,
    SeedOperation,
    SignedEnvelope,
)

from .console import HomeOption, JsonOption, home_of, print_json, run
from .home import Home

OPERATIONS = sorted(name.removeprefix("SEED_OPERATION_").lower() for name in SeedOperation.keys()[1:])


def sign(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="host:port of the trainer's KasminaService.")],
    seed: Annotated[str, typer.Option(help="The seed that the command is for.")],
    operation: Annotated[str, typer.Option(help=f"One of {', '.join(OPERATIONS)}.")],
    blueprint: Annotated[str, typer.Option(help="For germinate: which blueprint.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the envelope to this file.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Send it at once.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a command as operator for one seed host, and apply it or write it down."""
    command = command_for(seed, operation, blueprint)
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
    if operation.lower() not in OPERATIONS:
        raise typer.BadParameter(f"{operation!r} is not an operation; choose from {', '.join(OPERATIONS)}.")
    change = CommandSeedOperation(
        operation=SeedOperation.Value(f"SEED_OPERATION_{operation.upper()}"), blueprint_id=blueprint
    )
    command = AdaptationCommand(
        version=1,
        command_id=str(uuid.uuid4()),
        command_type=CommandType.COMMAND_TYPE_SEED,
        target_seed_id=seed,
        issued_by="operator",
        seed_operation=change,
    )
    command.issued_at.FromNanoseconds(time.time_ns())
    command.annotations["reason"] = "operator"
    return command


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
