from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from esper_client import TamiyoClient
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import (
    CloseRunRequest,
    EvaluateStepRequest,
    ExplainDecisionRequest,
    GetStatusRequest,
    StepLedger,
)
from esper_servers.cli.console import JsonOption, environ_of, print_json, print_rows, run
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from . import scene
from .growth_plot import draw
from .measure import WARM_UP, machine, percentiles, scratch_home
from .scene import BenchHost
from .served_plan import COMPILED, PlanOption, serving_plan
from .step import unary_opening, unary_step
from .urza import seed

BUDGET_SECONDS = 10
"""So wide that the largest graph is decided on too."""
Row = dict[str, Any]
PARTS = ("validate", "features", "inference", "risk", "total")
_OPENINGS, _STEPS, _STEPS_BEFORE = 8, 100, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How many runs are open, and what each of them is."""

    runs: int = 1
    seeds: int = scene.SEEDS
    layers: int = scene.LAYERS


AXES = {
    "runs": tuple(Size(runs=count) for count in (1, 4, 16, 64)),
    "seeds": tuple(Size(seeds=count) for count in (4, 10, 25, 50, 100)),
    "layers": tuple(Size(layers=count) for count in (24, 100, 250, 500, 1000)),
}


def growth(
    context: typer.Context,
    plan: PlanOption = COMPILED,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how the cost of a step at Tamiyo, and of opening a run, grows with runs, seeds and layers."""
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ_of(context))) as supervisor:
            rows = run(measure(home, supervisor.addresses["tamiyo"], AXES))
    _show(rows, rows | {"plan": plan, "machine": machine()}, as_json=as_json)
    if plot is not None:
        draw(plot, rows, plan)


def _show(rows: Mapping[str, Sequence[Row]], document: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    for axis, found in rows.items():
        print_rows(f"growth with {axis}, p50 in ms", [_medians(axis, row) for row in found], as_json=False)


async def measure(home: Home, address: str, axes: Mapping[str, Sequence[Size]]) -> dict[str, list[Row]]:
    """Return a row for each size of each axis."""
    async with (
        TamiyoClient(address, identity=home.identity("trainer")) as trainer,
        TamiyoClient(address, identity=home.identity()) as operator,
    ):
        meter = _Meter(home, trainer, operator)
        await meter.warm_up()
        return {axis: [await meter.row(size) for size in sizes] for axis, sizes in axes.items()}


@dataclass(slots=True)
class _Samples:
    """What was measured of one size."""

    opened_ms: list[float] = field(default_factory=list)
    first_ledgers: list[StepLedger] = field(default_factory=list)
    ledgers: list[StepLedger] = field(default_factory=list)

    def row(self) -> Row:
        return {
            "open_run": _middle(self.opened_ms),
            "first_step": _middle(_part(self.first_ledgers, "total")),
            **{part: _middle(_part(self.ledgers, part)) for part in PARTS},
        }


class _Meter:
    """Opens runs of a size, asks for one after the other, and closes them."""

    def __init__(self, home: Home, trainer: TamiyoClient, operator: TamiyoClient) -> None:
        self._home, self._trainer, self._operator = home, trainer, operator

    async def warm_up(self) -> None:
        """Ask some steps that are not counted."""
        asked = await self._open(Size(), _Samples())
        for _ in range(WARM_UP):
            await asked[0].step()
        await self._close(asked)

    async def row(self, size: Size) -> Row:
        """Measure one size."""
        samples, runs = _Samples(), list[_Run]()
        for _ in range(math.ceil(_OPENINGS / size.runs)):
            await self._close(runs)
            runs = await self._open(size, samples)
        ledgers = [await each.step() for each in islice(cycle(runs), size.runs * _STEPS_BEFORE + _STEPS)]
        samples.ledgers = ledgers[size.runs * _STEPS_BEFORE :]
        described = await self._describe(runs)
        await self._close(runs)
        return {"runs": size.runs, "seeds": size.seeds, "layers": size.layers, **described, **samples.row()}

    async def _open(self, size: Size, samples: _Samples) -> list[_Run]:
        hosts = [BenchHost(self._home, layers=size.layers, seeds=size.seeds) for _ in range(size.runs)]
        runs = [_Run(self._trainer, host, f"growth-{number}") for number, host in enumerate(hosts)]
        samples.opened_ms += [await each.open() for each in runs]
        samples.first_ledgers += [await each.step() for each in runs]
        return runs

    async def _describe(self, runs: Sequence[_Run]) -> dict[str, Any]:
        """The size of the graph, and the plan that decided the last command."""
        status = await self._operator.get_status(GetStatusRequest())
        graph = next(each for each in status.runs if each.run_id == runs[0].run_id)
        last = next((each.last_command for each in runs if each.last_command), "")
        plan = await self._plan_of(last) if last else ""
        return {"nodes": graph.graph_nodes, "edges": graph.graph_edges, "plan": plan}

    async def _plan_of(self, command_id: str) -> str:
        explained = await self._operator.explain_decision(ExplainDecisionRequest(command_id=command_id))
        return explained.evidence.plan

    async def _close(self, runs: Sequence[_Run]) -> None:
        for each in runs:
            await self._trainer.close_run(CloseRunRequest(run_id=each.run_id))


class _Run:
    """One run, asked for in unary calls."""

    def __init__(self, client: TamiyoClient, host: BenchHost, run_id: str) -> None:
        self.run_id = run_id
        self.last_command = ""
        self._client, self._host = client, host
        self._sequence = 0
        self._settled: list[CommandOutcome] = []

    async def open(self) -> float:
        """Open it; returns how long that took, in milliseconds."""
        opening = unary_opening(self._host, self.run_id)
        begun = time.perf_counter()
        await self._client.open_run(opening)
        return (time.perf_counter() - begun) * 1e3

    async def step(self) -> StepLedger:
        """Ask one step and carry out its answer; returns the server's account."""
        self._sequence += 1
        step = unary_step(self._host, self._sequence, self._settled, self.run_id)
        step.budget_us = BUDGET_SECONDS * 10**6
        decision = (await self._client.evaluate_step(EvaluateStepRequest(step=step))).decision
        if decision.HasField("command"):
            self._host.submit(decision.command)
            self.last_command = decision.command.nonce
        self._settled = self._host.apply_pending()
        return decision.ledger


def _part(ledgers: Sequence[StepLedger], name: str) -> list[float]:
    return [getattr(ledger, f"{name}_us") / 1e3 for ledger in ledgers]


def _middle(values_ms: Sequence[float]) -> dict[str, float]:
    """A hundred values have no 99th percentile to speak of."""
    found = percentiles(values_ms)
    return {key: found[key] for key in ("p50_ms", "p95_ms")}


def _medians(axis: str, row: Row) -> Row:
    """What fits on a line: without the sizes that stay the same."""
    parts = {key: round(value["p50_ms"], 2) for key, value in row.items() if isinstance(value, Mapping)}
    return {key: row[key] for key in (axis, "nodes", "edges")} | parts
