from __future__ import annotations

from typing import Annotated, Any

import typer

from esper_client.client import TamiyoClient
from esper_rpc.proto.leyline.v1 import CommandType, SeedOperation
from esper_rpc.proto.tamiyo.v1 import DumpedStep, ListDumpedStepsRequest, ListStepDumpsRequest, StepDump
from esper_rpc.telemetry.events import PRIORITY_OF, name_of

from .console import AddressOption, Commands, HomeOption, JsonOption, home_of, print_rows, run
from .home import Home
from .pages import LARGEST, pages

app = typer.Typer(cls=Commands, help="Dumps of Tamiyo's flight recorder: the last steps before something went wrong.")


@app.callback(invoke_without_command=True, epilog="Example: esper dumps --json")
def dumps(
    context: typer.Context, address: AddressOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List what Tamiyo wrote down of its last steps after events of priority HIGH and CRITICAL, oldest first."""
    if context.invoked_subcommand is None:
        found = run(_list(home_of(context, home), address))
        print_rows("Dumps", [_dump_row(dump) for dump in found], as_json=as_json)


@app.command(epilog="Example: esper dumps show 5b3c9a52-6d0e-4b7a-9d1f-0c2f6f1f8a11")
def show(
    context: typer.Context,
    dump_id: Annotated[str, typer.Argument(help="The identifier of the dump.", show_default=False)],
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the steps of a dump, oldest first, with what was answered; `esper explain RUN/SEQUENCE` shows one."""
    found = run(_steps(home_of(context, home), address, dump_id))
    print_rows("Steps", [_step_row(step) for step in found], as_json=as_json)


async def _list(home: Home, address: str | None) -> list[StepDump]:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        found = await pages(client.list_step_dumps, ListStepDumpsRequest(page_size=LARGEST))
    return [dump for page in found for dump in page.dumps]


async def _steps(home: Home, address: str | None, dump_id: str) -> list[DumpedStep]:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        found = await pages(client.list_dumped_steps, ListDumpedStepsRequest(dump_id=dump_id, page_size=LARGEST))
    return [step for page in found for step in page.steps]


def _dump_row(dump: StepDump) -> dict[str, Any]:
    return {
        "at": dump.triggered_at.ToJsonString(),
        "dump": dump.dump_id,
        "event": dump.event,
        "reason": dump.reason,
        "priority": name_of(PRIORITY_OF[dump.level]),
        "run": dump.run_id,
        "events": dump.events,
        "steps": dump.steps,
        "written": dump.written,
        "partial": dump.written < dump.steps,
    }


def _step_row(step: DumpedStep) -> dict[str, Any]:
    return {
        "at": step.answered_at.ToJsonString(),
        "run": step.run_id,
        "sequence": step.sequence,
        "step": step.global_step,
        "decision": _decision(step),
        "command": step.command_id,
        "reason": step.reason,
        "budget_us": step.budget_us,
        "total_us": step.ledger.total_us,
        "policy": step.policy_version,
    }


def _decision(step: DumpedStep) -> str:
    if not step.command_type:
        return "NO_ACTION"
    if step.operation:
        return SeedOperation.Name(step.operation).removeprefix("SEED_OPERATION_")
    return CommandType.Name(step.command_type).removeprefix("COMMAND_TYPE_")
