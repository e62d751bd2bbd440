"""`esper training`: a run that trains, for operators: its state, checkpoints and emergencies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from esper_client.client import KasminaClient, TolariaClient
from esper_rpc.envelope import Rejected
from esper_rpc.envelope.emergency import ANNOUNCED, SCHEMA_VERSION, SignalVerifier, seal
from esper_rpc.proto.kasmina.v1 import (
    EmergencyCleanupRequest,
    EmergencyCleanupResponse,
    TerminateSeedRequest,
    TerminateSeedResponse,
    ValidateParametersRequest,
    ValidateParametersResponse,
)
from esper_rpc.proto.leyline.v1 import EmergencyLevel, EmergencySignal, SeedLifecycleStage
from esper_rpc.proto.tolaria.v1 import (
    CreateCheckpointRequest,
    GetStatusRequest,
    GetStatusResponse,
    RollbackRequest,
    RollbackTier,
    SignalEmergencyRequest,
    SignalEmergencyResponse,
    WatchEmergenciesRequest,
)

from .console import Commands, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import Home

LEVELS = [name.removeprefix("EMERGENCY_LEVEL_").lower() for name in EmergencyLevel.keys()[1:]]

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look after a run while it trains.")
AddressArgument = Annotated[str, typer.Argument(help="host:port of the trainer; its loop shows it as kasmina_address.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the log.")]


@app.command(epilog="Example: esper training status 127.0.0.1:40123 --json")
def status(
    context: typer.Context, address: AddressArgument, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Show the state of a run: health, step, emergency in force, conservative mode, checkpoints."""
    found = run(_status(home_of(context, home), address))
    document = MessageToDict(found, preserving_proto_field_name=True)
    if as_json:
        print_json(document)
    else:
        print_rows("Run", [_row(found)], as_json=False)


@app.command(epilog="Example: esper training checkpoint 127.0.0.1:40123 --reason 'before the surgery'")
def checkpoint(
    context: typer.Context,
    address: AddressArgument,
    reason: ReasonOption = "operator",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the run write a checkpoint at its next safe point."""
    _show(run(_checkpoint(home_of(context, home), address, reason)), as_json=as_json)


@app.command(epilog="Example: esper training rollback 127.0.0.1:40123 --reason 'bad data since noon'")
def rollback(
    context: typer.Context,
    address: AddressArgument,
    reason: ReasonOption = "operator",
    name: Annotated[str, typer.Option(help="Which checkpoint; the newest unless it is given.")] = "",
    full: Annotated[bool, typer.Option("--full", help="From the disk, also when it is in memory.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Return the run to a checkpoint at its next safe point."""
    tier = RollbackTier.ROLLBACK_TIER_FULL if full else RollbackTier.ROLLBACK_TIER_FAST
    request = RollbackRequest(checkpoint=name, tier=tier, reason=reason)
    _show(run(_rollback(home_of(context, home), address, request)), as_json=as_json)


@app.command(epilog="Example: esper training signal 127.0.0.1:40123 --level halt --reason 'data is poisoned'")
def signal(
    context: typer.Context,
    address: AddressArgument,
    level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}.")],
    reason: ReasonOption = "operator",
    lower: Annotated[bool, typer.Option("--lower", help="Set the level, also when a higher one is in force.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Signal an emergency to a run, signed as operator; `--level notice --lower` ends one."""
    if level.lower() not in LEVELS:
        raise typer.BadParameter(f"{level!r} is not a level; choose from {', '.join(LEVELS)}.")
    found = EmergencySignal(
        version=SCHEMA_VERSION,
        level=EmergencyLevel.Value(f"EMERGENCY_LEVEL_{level.upper()}"),
        reason=reason,
        origin="operator",
    )
    found.triggered_at.GetCurrentTime()
    if lower:
        found.attributes["lowers"] = "true"
    answer = run(_signal(home_of(context, home), address, found))
    _show(answer, as_json=as_json)
    if not answer.accepted:
        raise typer.Exit(1)


@app.command(epilog="Example: esper training cleanup 127.0.0.1:40123")
def cleanup(
    context: typer.Context, address: AddressArgument, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Have the seed host let go of cached kernels, modules that wait and what culled seeds left."""
    answer = run(_cleanup(home_of(context, home), address))
    _show_all({"freed": answer.freed}, as_json=as_json)


@app.command(epilog="Example: esper training terminate 127.0.0.1:40123 --seed seed-hidden1")
def terminate(
    context: typer.Context,
    address: AddressArgument,
    seed: Annotated[str, typer.Option(help="The seed; a fossil leaves the model and the optimizer.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a seed out for good: its place is its host's alone, and no command reaches it."""
    before = SeedLifecycleStage.Name(run(_terminate(home_of(context, home), address, seed)).from_stage)
    _show_all({"seed": seed, "was": before.removeprefix("SEED_LIFECYCLE_STAGE_").lower()}, as_json=as_json)


@app.command(epilog="Example: esper training validate 127.0.0.1:40123 --seed seed-hidden1 --parameter hidden1.weight")
def validate(
    context: typer.Context,
    address: AddressArgument,
    seed: Annotated[str, typer.Option(help="The seed that would write to the parameters.")],
    parameter: Annotated[
        list[str] | None,
        typer.Option(help="A parameter of the model, or SEED/NAME; several times. Without it all of the seed's."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which parameters a seed may not write to, and whose they are; exits with 1 when there are any."""
    request = ValidateParametersRequest(seed_id=seed, parameter_names=parameter or [])
    found = run(_validate(home_of(context, home), address, request)).violations
    rows = [{"parameter": each.parameter_name, "owner": each.owner} for each in found]
    print_rows("Not the seed's", rows, as_json=as_json)
    if rows:
        raise typer.Exit(1)


@app.command(epilog="Example: esper training watch 127.0.0.1:40123")
def watch(
    context: typer.Context,
    address: AddressArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the emergencies of a run as they come, verified, until the run ends or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        run(_watch(home_of(context, home), address, as_json=as_json))


async def _status(home: Home, address: str) -> GetStatusResponse:
    async with TolariaClient(address, identity=home.identity()) as client:
        return await client.get_status(GetStatusRequest())


async def _checkpoint(home: Home, address: str, reason: str) -> Any:
    async with TolariaClient(address, identity=home.identity()) as client:
        return await client.create_checkpoint(CreateCheckpointRequest(reason=reason))


async def _rollback(home: Home, address: str, request: RollbackRequest) -> Any:
    async with TolariaClient(address, identity=home.identity()) as client:
        return await client.rollback(request)


async def _cleanup(home: Home, address: str) -> EmergencyCleanupResponse:
    async with KasminaClient(address, identity=home.identity()) as client:
        return await client.emergency_cleanup(EmergencyCleanupRequest())


async def _terminate(home: Home, address: str, seed: str) -> TerminateSeedResponse:
    async with KasminaClient(address, identity=home.identity()) as client:
        return await client.terminate_seed(TerminateSeedRequest(seed_id=seed))


async def _validate(home: Home, address: str, request: ValidateParametersRequest) -> ValidateParametersResponse:
    async with KasminaClient(address, identity=home.identity()) as client:
        return await client.validate_parameters(request)


async def _signal(home: Home, address: str, signal: EmergencySignal) -> SignalEmergencyResponse:
    async with TolariaClient(address, identity=home.identity()) as client:
        found = await client.get_status(GetStatusRequest())
        envelope = seal(
            signal,
            keyring=home.keyring("operator"),
            audience=found.audience,
            run_id=found.run_id,
            issued_at_ns=time.time_ns(),
        )
        return await client.signal_emergency(SignalEmergencyRequest(signal=envelope))


async def _watch(home: Home, address: str, *, as_json: bool) -> None:
    async with TolariaClient(address, identity=home.identity()) as client:
        found = await client.get_status(GetStatusRequest())
        verifier = SignalVerifier(keyring=home.keyring("operator"), audience=ANNOUNCED, run_id=found.run_id)
        request = WatchEmergenciesRequest(least_level=EmergencyLevel.EMERGENCY_LEVEL_NOTICE)
        async for response in client.watch_emergencies(request):
            try:
                verified = verifier.verify(response.signal)
            except Rejected as refusal:
                typer.echo(f"refused: {refusal.reason}", err=True)
                continue
            _show(verified.signal, as_json=as_json)


def _row(found: GetStatusResponse) -> dict[str, Any]:
    document = MessageToDict(found, preserving_proto_field_name=True)
    emergency = document.get("emergency", {})
    return {
        "run": found.run_id,
        "status": document.get("status", "").removeprefix("HEALTH_STATUS_").lower(),
        "step": found.global_step,
        "epoch": found.epoch,
        "emergency": emergency.get("level", "none").removeprefix("EMERGENCY_LEVEL_").lower(),
        "reason": emergency.get("reason", ""),
        "halted": found.is_halted,
        "conservative": ", ".join(found.conservative_reasons),
        "checkpoints": len(found.checkpoints),
    }


def _show(message: Any, *, as_json: bool) -> None:
    _show_all(MessageToDict(message, preserving_proto_field_name=True), as_json=as_json)


def _show_all(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        typer.echo(" ".join(f"{key}={value}" for key, value in document.items()) or "done")
