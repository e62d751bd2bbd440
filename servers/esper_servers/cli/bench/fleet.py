from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from .measure import machine, percentiles, scratch_home, show
from .run_streams import Answers, RunStream, close_runs, open_runs
from .served_plan import COMPILED, PlanOption, serving_plan
from .urza import seed

FLEETS = (1, 4, 16, 64)
STEPS_PER_SECOND = 20.0
BUDGET_MS = 5.0
FLAT_OUT_BUDGET_MS = 50.0


def fleet(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=1, help="How long each fleet asks.")] = 5.0,
    plan: PlanOption = COMPILED,
    batch: Annotated[
        int | None, typer.Option(min=1, max=64, help="Most steps in a batch, 1 for none. Default: as in service.")
    ] = None,
    step_processes: Annotated[int, typer.Option(min=1, max=64, help="Processes of Tamiyo that answer.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Ask for 1, 4, 16 and 64 runs at once: 20 steps a second each within 5 ms, and flat out within 50 ms.

    The caller is one process, so that beyond some hundred steps a second its own time counts too.
    """
    from esper_servers.tamiyo.turns.step_queue import BatchConfig

    config = BatchConfig() if batch is None else BatchConfig(most=batch)
    with scratch_home() as home:
        seed(home)
        environ = serving_plan(plan, home, environ_of(context))
        environ |= {"ESPER_BATCH_MOST": str(config.most), "ESPER_STEP_PROCESSES_COUNT": str(step_processes)}
        with Supervisor(home, environ) as supervisor:
            document = run(_measure(home, supervisor.addresses["tamiyo"], seconds))
    settings = {"plan": plan, "batch": config.most, "step_processes": step_processes}
    show("fleet", document | settings | {"machine": machine()}, as_json=as_json)


async def _measure(home: Home, address: str, seconds: float) -> dict[str, Any]:
    channels, runs = await open_runs(home, address, max(FLEETS))
    document = {}
    for count in FLEETS:
        fleet_runs = runs[:count]
        await _paced(fleet_runs, 0.5)  # Streams open and caches warm up.
        document[f"runs_{count}"] = {
            "paced": _row(await _paced(fleet_runs, seconds), seconds),
            "flat_out": _row(await _flat_out(fleet_runs, seconds), seconds),
        }
    await close_runs(channels, runs)
    return document


def _row(answers: Answers, seconds: float) -> dict[str, Any]:
    return {
        "decisions_per_s": round(len(answers.decided) / seconds, 1),
        "decided": percentiles(answers.decided),
        "server": percentiles(answers.server),
        "miss_rate": round(1 - answers.in_time / max(1, answers.total), 4),
        "refused_share": round(len(answers.refused) / max(1, answers.total), 4),
    }


async def _paced(runs: list[RunStream], seconds: float) -> Answers:
    """Every run asks at its own beat; the beats are spread evenly."""
    answers, interval = Answers(BUDGET_MS), 1 / STEPS_PER_SECOND
    begun = time.perf_counter()

    async def beat(stream: RunStream, offset: float) -> None:
        pending = []
        for number in range(int(seconds * STEPS_PER_SECOND)):
            await asyncio.sleep(max(0.0, begun + offset + number * interval - time.perf_counter()))
            pending.append(asyncio.create_task(stream.ask(answers)))
        await asyncio.gather(*pending)

    await asyncio.gather(*(beat(stream, interval * n / len(runs)) for n, stream in enumerate(runs)))
    return answers


async def _flat_out(runs: list[RunStream], seconds: float) -> Answers:
    """Every run asks again as soon as it has its answer, or as the server says, as a session does."""
    answers = Answers(FLAT_OUT_BUDGET_MS)
    until = time.perf_counter() + seconds

    async def ask_again(stream: RunStream) -> None:
        while time.perf_counter() < until:
            pushback_seconds = await stream.ask(answers)
            await asyncio.sleep(pushback_seconds)

    await asyncio.gather(*map(ask_again, runs))
    return answers
