from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from typing import Any

import typer

from esper_client import LoopThread, SessionConfig, TamiyoClient, TrainingSession
from esper_rpc.breaker import BreakerConfig
from esper_rpc.errors import Unavailable
from esper_rpc.guard import StepGuard
from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    DeviceStatus,
    EvaluateStepRequest,
    GetPolicyRequest,
    GetStatusRequest,
    OpenRunRequest,
    Step,
    StepLedger,
)
from esper_servers.cli.console import JsonOption, environ_of, print_rows, run
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from . import echo, tail
from .measure import WARM_UP, CountOption, Pace, at_once, machine, percentiles, scratch_home, show
from .scene import BenchHost
from .served_plan import COMPILED, PlanOption, serving_plan
from .tail import StepRecord, StepWatch
from .urza import seed

GUARD_MS = 100.0
BUDGET_MS = 5.0
_LEDGER_RUN = "bench-ledger"
_CONNECT_SECONDS = 20.0
# A breaker that opened would hide the misses that are to be counted.
_NO_BREAKER = BreakerConfig(failures=1000, cool_down_seconds=0.5, successes=1)

Before = Callable[[], None]


def step(
    context: typer.Context, steps: CountOption = 1000, plan: PlanOption = COMPILED, as_json: JsonOption = False
) -> None:
    """Measure EvaluateStep as a trainer sees it: another process, mutual TLS, signed, verified, the full graph."""
    environ = environ_of(context)
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ)) as supervisor:
            pid = supervisor.services["tamiyo"].process.pid
            document = measure(home, supervisor.addresses["tamiyo"], pid, steps)
        with echo.serving(home, environ) as running:
            document["echo"] = echo.measure(home, running.address, steps)
    _show(document | {"machine": machine()}, as_json=as_json)


def _show(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show("step", document, as_json=True)
        return
    explained = document.pop("tail")
    show("step", document, as_json=False)
    print_rows("tail", tail.table(explained), as_json=False)


def measure(home: Home, tamiyo: str, pid: int, steps: int) -> dict[str, Any]:
    """Run every pacing with a wide guard for the latencies, then with the real one for the misses."""
    paced = max(20, steps // 4)
    wide, narrow = StepBench(home, tamiyo, GUARD_MS), StepBench(home, tamiyo, BUDGET_MS)
    with wide.session, narrow.session:
        records = {
            "evaluate_step": wide.records(steps, at_once, pid),
            "paced": wide.records(paced, Pace(), pid),
            "loaded": wide.records(paced, _training_step(), pid),
        }
        document: dict[str, Any] = {
            **{name: percentiles([record.total_ms for record in found]) for name, found in records.items()},
            "tail": {name: tail.explain(found) for name, found in records.items()},
            "ledger": {"caller": wide.session.timings.summary(), "server": run(_server_ledger(home, tamiyo, paced))},
            "miss_rate": narrow.miss_rate(steps, at_once),
            "paced_miss_rate": narrow.miss_rate(paced, Pace()),
            "guard_overshoot_ms": _overshoot(),
            "answers": dict(wide.session.reasons),
        }
        return document | run(_ask(home, tamiyo, wide.session.run_id))


class StepBench:
    """A session on the benchmark's run, with one guard."""

    def __init__(self, home: Home, tamiyo: str, budget_ms: float) -> None:
        self._turn = 0
        self.session = TrainingSession(
            host=BenchHost(home),
            identity=home.identity("trainer"),
            tamiyo_address=tamiyo,
            run_id=f"bench-{budget_ms:g}",
            config=SessionConfig(step_budget_ms=budget_ms, breaker=_NO_BREAKER),
            thread=LoopThread(),
        )

    def latencies(self, count: int, before: Before) -> list[float]:
        """Return how long each session.step() took, in milliseconds."""
        self._warm_up(before)
        times = []
        for _ in range(count):
            before()
            times.append(self._step())
        return times

    def records(self, count: int, before: Before, tamiyo_pid: int) -> list[StepRecord]:
        """Return each step with what fell into it."""
        self._warm_up(before)
        found = []
        with StepWatch(self.session, tamiyo_pid) as watch:
            for _ in range(count):
                before()
                found.append(watch.record(self._step))
        return found

    def miss_rate(self, count: int, before: Before) -> float:
        """Return the share of steps that had no answer within the guard."""
        self._warm_up(before)
        missed = self.session.guard.misses
        for _ in range(count):
            before()
            self._step()
        return round((self.session.guard.misses - missed) / count, 4)

    def _step(self) -> float:
        self._turn += 1
        begun = time.perf_counter()
        self.session.step(_loss_at(self._turn), samples=256, gradient_norm=1.0)
        return (time.perf_counter() - begun) * 1e3

    def _warm_up(self, before: Before) -> None:
        deadline = time.monotonic() + _CONNECT_SECONDS
        self._step()
        while not self.session.is_connected:
            if time.monotonic() > deadline:
                raise Unavailable(f"No decision stream after {_CONNECT_SECONDS:g} s.")
            time.sleep(0.02)
        for _ in range(WARM_UP):
            before()
            self._step()


def _training_step() -> Before:
    """Return one real small training step."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels = torch.randn(512, 64), torch.randint(10, (512,))

    def train() -> None:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return train


def _overshoot(count: int = 200) -> dict[str, float]:
    """Time how late the guard is when nobody answers."""
    guard: StepGuard[bytes] = StepGuard()
    late = []
    for sequence in range(1, count + 1):
        guard.wait(guard.arm(sequence), BUDGET_MS / 1e3)
        late.append(guard.last_overshoot_seconds * 1e3)
    found = percentiles(late)
    return {key.removesuffix("_ms"): found[key] for key in ("p50_ms", "p99_ms")}


async def _server_ledger(home: Home, address: str, count: int) -> dict[str, Any]:
    """Ask in unary calls, whose reply carries the server's own account of each step."""
    host, ledgers = BenchHost(home), []
    settled: list[CommandOutcome] = []
    async with TamiyoClient(address, identity=home.identity("trainer")) as client:
        await client.open_run(unary_opening(host))
        for sequence in range(1, count + WARM_UP + 1):
            request = EvaluateStepRequest(step=unary_step(host, sequence, settled))
            decision = (await client.evaluate_step(request)).decision
            if decision.HasField("command"):
                host.submit(decision.command)
            settled = host.apply_pending()
            ledgers.append(decision.ledger)
    names = [field.name for field in StepLedger.DESCRIPTOR.fields]
    kept = ledgers[WARM_UP:]
    return {name.removesuffix("_us"): percentiles([getattr(row, name) / 1e3 for row in kept]) for name in names}


def unary_opening(host: BenchHost, run_id: str = _LEDGER_RUN) -> OpenRunRequest:
    """Build the opening of a run that is asked for in unary calls."""
    described = host.describe()
    return OpenRunRequest(
        run_id=run_id, protocol_versions=[1], features=["seed", "pause", "optimizer"],
        receiver_epoch=host.receiver_epoch, host_topology=described.host_topology, sites=described.sites,
        seeds=described.seeds, world_size=1, step_budget_us=int(GUARD_MS * 1e3),
    )  # fmt: skip


def unary_step(host: BenchHost, sequence: int, outcomes: list[CommandOutcome], run_id: str = _LEDGER_RUN) -> Step:
    """Build the question that a session would ask."""
    host.observe(_loss_at(sequence), sequence)
    packet = SystemStatePacket(
        version=1, packet_id=uuid.uuid4().hex, global_step=sequence, training_loss=_loss_at(sequence),
        timestamp_ns=time.time_ns(), source_subsystem="tolaria", training_run_id=run_id,
        training_metrics={"loss": _loss_at(sequence), "gradient_norm": 1.0}, seed_states=host.export_seed_states(),
    )  # fmt: skip
    budget_us = int(GUARD_MS * 1e3)
    return Step(run_id=run_id, sequence=sequence, budget_us=budget_us, packet=packet, outcomes=outcomes)


def _loss_at(turn: int) -> float:
    return 2.3 * math.exp(-turn / 4000) + 0.02 * math.sin(turn)


async def _ask(home: Home, address: str, run_id: str) -> dict[str, Any]:
    async with TamiyoClient(address, identity=home.identity()) as client:
        status = await client.get_status(GetStatusRequest())
        policy = await client.get_policy(GetPolicyRequest())
    graph = next((r for r in status.runs if r.run_id == run_id), None)
    return {
        "graph": {"nodes": graph.graph_nodes, "edges": graph.graph_edges} if graph is not None else {},
        "policy": {
            "version": policy.policy_version,
            "architecture": policy.architecture_version,
            "plan": policy.plan,
            "plan_problem": status.plan_problem,
            "parameters": policy.parameter_count,
            "digest": policy.policy_digest.hex(),
        },
        "decisions": dict(status.decisions),
        "device": _figures(status.device) if status.HasField("device") else {},
    }


def _figures(device: DeviceStatus) -> dict[str, Any]:
    return {field.name: getattr(device, field.name) for field in device.DESCRIPTOR.fields}
