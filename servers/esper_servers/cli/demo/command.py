from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esper_rpc.errors import ConfigError
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest, GetStatusRequest
from esper_servers.cli.console import JsonOption, environ_of, print_json, run
from esper_servers.cli.home import Home
from esper_servers.cli.plan import with_plan, without_plan
from esper_servers.cli.processes import Supervisor, child_environ, cli_command, end

_SHOWN_STAGES = 6


def demo(
    context: typer.Context,
    home: Annotated[Path, typer.Option(help="Where certificates, keys, logs and the report go.")] = Path("var/demo"),
    steps: Annotated[int, typer.Option(min=20, help="Training steps, with the mesh and without.")] = 1500,
    batch: Annotated[int, typer.Option(min=16, help="Images a step.")] = 4096,
    budget_ms: Annotated[
        float,
        typer.Option(min=2, max=50, help="How long a step may wait; more than the 5 of a session, for slow machines."),
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the model and the data.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Train a classifier of handwritten digits under a mesh of real processes, and the same one without it."""
    from . import report

    place = Home.find(home, {})
    settings = {"steps": steps, "batch": batch, "seed": seed, "step_budget_ms": budget_ms}
    results = _run(place, environ_of(context), settings, Console(stderr=as_json))
    summary = report.summarise(results["mesh"], results["plain"], results["tamiyo"], settings)
    page = report.write_html(place.directory / "report.html", results["mesh"], results["plain"], summary)
    if as_json:
        print_json(summary)
    else:
        report.print_tables(summary)
        typer.echo(f"Report: {page}")


def _run(home: Home, environ: Mapping[str, str], settings: dict[str, Any], console: Console) -> dict[str, Any]:
    console.print(f"Preparing certificates, keys and the library in {home.directory}")
    home.prepare()
    seeding = [*cli_command(), "urza", "seed", "--home", str(home.directory)]
    subprocess.run(seeding, check=True, stdout=subprocess.DEVNULL)
    served = _environ_with_plan(home, environ, console)
    results: dict[str, Any] = {}
    with _progress(console) as progress:
        results["plain"] = _train(home, environ, {**settings, "mesh": False}, progress)
        with Supervisor(home, served) as supervisor:
            for name, address in supervisor.addresses.items():
                console.print(f"{name} serves at {address} under mutual TLS")
            mesh = {**settings, "mesh": True, "run_id": f"demo-{int(time.time())}"}
            results["mesh"] = _train(home, environ, mesh, progress)
            results["tamiyo"] = run(_ask_tamiyo(home, supervisor.addresses["tamiyo"]))
    return results


def _environ_with_plan(home: Home, environ: Mapping[str, str], console: Console) -> dict[str, str]:
    """The compiled plan now: built beside the training it would take a core from it."""
    if environ.get("ESPER_PLAN_COMPILE", "true") in ("false", "0"):
        return dict(environ)
    console.print("Compiling the policy's plan, once on this machine; that takes a minute or two")
    try:
        return with_plan(home, environ)
    except ConfigError as error:
        console.print(f"The policy is served by its eager plan: {error.message}")
        return without_plan(environ)


def _train(home: Home, environ: Mapping[str, str], settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    name = "with the mesh" if settings["mesh"] else "without it"
    task = progress.add_task(f"{name:14}", total=settings["steps"], loss=0.0, accuracy=0.0, seeds="", latency="")
    result: dict[str, Any] = {}
    for event in _events(home, environ, settings):
        if event["event"] == "progress":
            progress.update(task, completed=event["step"], **_columns(event))
        elif event["event"] == "result":
            result = event
    if not result:
        raise ConfigError(f"The training {name} ended early; see {home.log_file('training')}.")
    progress.update(task, accuracy=result["history"]["accuracies"][-1][1])
    return result


def _events(home: Home, environ: Mapping[str, str], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "esper_servers.cli.demo.training", orjson.dumps(settings).decode()]
    log_file = home.log_file("training")
    log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=child_environ(home, environ), start_new_session=True
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield orjson.loads(line)
    finally:
        end(process)


async def _ask_tamiyo(home: Home, address: str) -> dict[str, Any]:
    from esper_client import TamiyoClient

    async with TamiyoClient(address, identity=home.identity()) as client:
        status = await client.get_status(GetStatusRequest())
        policy = await client.get_policy(GetPolicyRequest())
    return {
        "status": MessageToDict(status, preserving_proto_field_name=True),
        "policy": MessageToDict(policy, preserving_proto_field_name=True),
    }


def _columns(event: dict[str, Any]) -> dict[str, Any]:
    stages = list(event["stages"].values())
    shown = " ".join(stage.lower() for stage in stages[:_SHOWN_STAGES])
    latency = f"{event['latency_ms']:.1f} ms" if event["latency_ms"] else ""
    return {"loss": event["loss"], "accuracy": event["accuracy"], "seeds": shown, "latency": latency}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
        TextColumn("[cyan]{task.fields[latency]}[/] [green]{task.fields[seeds]}[/]"),
        console=console,
    )
