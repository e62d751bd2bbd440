from __future__ import annotations

from typing import Annotated, Any

import typer

from esper_client.client import TamiyoClient
from esper_rpc.proto.leyline.v1 import FieldReport, FieldReportOutcome
from esper_rpc.proto.tamiyo.v1 import AckFieldReportRequest, ListFieldReportsRequest

from .console import AddressOption, Commands, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import Home
from .pages import LARGEST, pages

app = typer.Typer(cls=Commands, help="Field reports: what became of a run after each command.")


@app.callback(invoke_without_command=True, epilog="Example: esper reports --json")
def reports(
    context: typer.Context, address: AddressOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List what became of a run after each command, oldest first."""
    if context.invoked_subcommand is None:
        found = run(_list(home_of(context, home), address))
        print_rows("Field reports", [_row(report) for report in found], as_json=as_json)


@app.command(epilog="Example: esper reports ack fr-synth-5b3c9a52-6d0e-4b7a-9d1f-0c2f6f1f8a11")
def ack(
    context: typer.Context,
    report_id: Annotated[str, typer.Argument(help="The identifier of the report.", show_default=False)],
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mark a report as received; it is not handed over again."""
    known = run(_ack(home_of(context, home), address, report_id))
    if as_json:
        print_json({"report_id": report_id, "already_acknowledged": known})
    else:
        typer.echo(f"{report_id} was acknowledged before." if known else f"{report_id} is acknowledged.")


async def _list(home: Home, address: str | None) -> list[FieldReport]:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        found = await pages(client.list_field_reports, ListFieldReportsRequest(page_size=LARGEST))
    return [report for page in found for report in page.reports]


async def _ack(home: Home, address: str | None, report_id: str) -> bool:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        answer = await client.ack_field_report(AckFieldReportRequest(report_id=report_id))
        return answer.already_acknowledged


def _row(report: FieldReport) -> dict[str, Any]:
    delta = report.metrics.get("loss_delta")
    return {
        "at": report.issued_at.ToJsonString(),
        "report": report.report_id,
        "run": report.training_run_id,
        "seed": report.seed_id,
        "blueprint": report.blueprint_id,
        "outcome": FieldReportOutcome.Name(report.outcome).removeprefix("FIELD_REPORT_OUTCOME_"),
        "epochs": report.observation_window_epochs,
        "loss_delta": None if delta is None else round(delta, 6),
        "policy": report.tamiyo_policy_version,
        "notes": report.notes,
    }
