from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from esper_client import find_mesh
from esper_rpc.errors import Unavailable
from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from .measure import in_turn, machine, median_interval, percentiles, rounds_for, scratch_home, show
from .served_plan import COMPILED, PlanOption, serving_plan
from .urza import seed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from esper_client import TrainingSession

PLAIN, SILENT, ASKING, AHEAD = KINDS = ("plain", "silent", "asking", "ahead")
SHARES = ("overhead_percent", "overhead_interval", "ahead_percent", "ahead_interval", "with_seeds_percent")
LENGTHS_MS = [10, 50, 200]
BLOCK_STEPS = 6
# After a pause the first steps of a block are not yet in their rhythm.
SETTLING_STEPS = 2
LEAST_ROUNDS = 8
"""Until then no kind has been at each place in both directions."""
BUDGET_MS = 5.0
WIDTH = 256
_CONNECT_SECONDS = 20.0
_WARM_UP_STEPS = 10


def overhead(
    context: typer.Context,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure each length.")] = 60.0,
    step_ms: Annotated[
        list[int], typer.Option("--step-ms", min=2, help="How long a step is; may be repeated.")
    ] = LENGTHS_MS,
    plan: PlanOption = COMPILED,
    as_json: JsonOption = False,
) -> None:
    """Measure what a whole mesh adds to training steps of 10, 50 and 200 ms.

    Blocks of a plain model, of one with sites and seeds that asks nobody, and of the same one that asks at the end of
    every step, or before its backward pass, take turns in one process, so that a noisy minute hits all of them.
    """
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ_of(context))):
            rows = {f"{length}ms": measure(home, length, seconds) for length in step_ms}
    document = {
        **{share: {name: row[share] for name, row in rows.items()} for share in SHARES},
        "steps": rows,
        "machine": machine(),
    }
    show("overhead", document, as_json=as_json)


def measure(home: Home, step_ms: float, seconds: float) -> dict[str, Any]:
    """Return the shares for steps of about this length, and what they were computed from."""
    import torch

    torch.set_num_threads(1)
    batch = batch_for(step_ms)
    plain, attached = Training.plain(batch), Training.attached(batch, home)
    try:
        attached.connect()
        return row(attached, in_turns(plain, attached, rounds_for(seconds, least=LEAST_ROUNDS)), batch)
    finally:
        attached.close()


def row(attached: Training, times: Times, batch: int) -> dict[str, Any]:
    """Return what is told of steps of one length."""
    session = attached.session
    assert session is not None
    seeds = len(session.host.state_dict()["seeds"])
    return {**times.figures(), "batch": batch, "seeds": seeds, "answers": dict(session.reasons)}


class StepTime(NamedTuple):
    """What a step took, and what of it the calls of the session did."""

    total_ms: float
    session_ms: float = 0.0
    session_processor_ms: float = 0.0
    """The time of the training thread in them, without what it waited."""


class Times:
    """Steps by kind and block."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[list[StepTime]]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, block: list[StepTime]) -> None:
        """Add a block; the ones of a round are compared with each other."""
        self._blocks[kind].append(block)

    def figures(self) -> dict[str, Any]:
        """Return all that is told of them."""
        asking, ahead = self._added(ASKING, SILENT), self._added(AHEAD, SILENT)
        return {
            "overhead_percent": _median(asking),
            "overhead_interval": _interval(asking),
            "ahead_percent": _median(ahead),
            "ahead_interval": _interval(ahead),
            "with_seeds_percent": _median(self._added(ASKING, PLAIN)),
            **{kind: percentiles([step.total_ms for step in self._all(kind)]) for kind in KINDS},
            "session": {kind: self._session(kind) for kind in (ASKING, AHEAD)},
            "rounds": len(self._blocks[PLAIN]),
        }

    def _session(self, kind: str) -> dict[str, Any]:
        steps = self._all(kind)
        plain = statistics.median(step.total_ms for step in self._all(PLAIN))
        found = percentiles([step.session_ms for step in steps])
        return {
            **found,
            "processor": percentiles([step.session_processor_ms for step in steps]),
            "percent": round(100 * found["p50_ms"] / plain, 2),
        }

    def _all(self, kind: str) -> list[StepTime]:
        return [step for block in self._blocks[kind] for step in block]

    def _added(self, with_mesh: str, without: str) -> list[float]:
        """What one kind takes more than another in each round, in percent of a plain step."""
        medians = {kind: [_median_ms(block) for block in blocks] for kind, blocks in self._blocks.items()}
        rounds = zip(medians[with_mesh], medians[without], medians[PLAIN], strict=True)
        return [100 * (longer - shorter) / base for longer, shorter, base in rounds]


def _median_ms(block: list[StepTime]) -> float:
    return statistics.median(step.total_ms for step in block)


def _median(shares: list[float]) -> float:
    return round(statistics.median(shares), 2)


def _interval(shares: list[float]) -> dict[str, float]:
    low, high = median_interval(shares)
    return {"low": round(low, 2), "high": round(high, 2)}


def in_turns(plain: Training, attached: Training, rounds: Iterable[int]) -> Times:
    """Train a block of each kind in every round."""
    kinds: list[tuple[str, Callable[[], StepTime]]] = [
        (PLAIN, plain.step), (SILENT, attached.step),
        (ASKING, attached.step_and_ask), (AHEAD, attached.ask_and_step),
    ]  # fmt: skip
    times = Times()
    for turn in rounds:
        for kind, step in in_turn(kinds, turn):
            times.add(kind, [step() for _ in range(BLOCK_STEPS)][SETTLING_STEPS:])
    return times


def batch_for(step_ms: float) -> int:
    """Find the batch with which a step of the plain model takes about this long."""
    batch = 64
    for _ in range(6):
        training = Training.plain(batch)
        took = statistics.median(training.step().total_ms for _ in range(_WARM_UP_STEPS))
        if 0.9 < took / step_ms < 1.1:
            break
        batch = max(16, int(batch * min(8.0, step_ms / took)))
    return batch


class _Stopwatch:
    """Adds up what parts of a step take this thread."""

    def __init__(self) -> None:
        self._wall = self._processor = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done meanwhile."""
        wall, processor = time.perf_counter(), time.thread_time()
        yield
        self._wall += time.perf_counter() - wall
        self._processor += time.thread_time() - processor

    def part_of(self, begun: float) -> StepTime:
        """Return the time of a step that began then and ends now."""
        return StepTime((time.perf_counter() - begun) * 1e3, self._wall * 1e3, self._processor * 1e3)


class Training:
    """A classifier on fixed data, with a session or without."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        import torch

        self._model = model
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(batch, WIDTH, generator=generator)
        self._labels = torch.randint(10, (batch,), generator=generator)
        self.session: TrainingSession | None = None
        self._batch = batch

    @classmethod
    def plain(cls, batch: int) -> Training:
        """One that knows nothing of a mesh."""
        return cls(_model(), batch)

    @classmethod
    def attached(cls, batch: int, home: Home) -> Training:
        """One that is attached to the mesh."""
        from esper_servers.trainer import attach

        environ = {"ESPER_HOME": str(home.directory)}
        training = cls(_model(), batch)
        session = attach(
            training._model, training.optimizer, environ=environ, mesh=find_mesh(environ), step_budget_ms=BUDGET_MS
        )
        training.session = session  # type: ignore[assignment]  # There is a mesh.
        return training

    def on_ranks(self) -> Training:
        """Train as one of several ranks from here on."""
        from torch.nn.parallel import DistributedDataParallel

        self._model = DistributedDataParallel(self._model)
        return self

    def connect(self, is_connected: Callable[[bool], bool] = bool) -> None:
        """Train until the mesh answers, and some steps more; raises Unavailable.

        Of several ranks `is_connected` tells each whether the first one is.
        """
        assert self.session is not None
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not is_connected(self.session.is_connected):
            if time.monotonic() > deadline:
                raise Unavailable(f"No decision stream after {_CONNECT_SECONDS:g} s.")
            self.step_and_ask()
        for _ in range(_WARM_UP_STEPS):
            self.step_and_ask()

    def step(self) -> StepTime:
        """Train one step."""
        begun = time.perf_counter()
        self._improve(self._loss())
        return StepTime((time.perf_counter() - begun) * 1e3)

    def step_and_ask(self) -> StepTime:
        """Train one step and ask the mesh at its end."""
        assert self.session is not None
        begun, asking = time.perf_counter(), _Stopwatch()
        loss = self._loss()
        self._improve(loss)
        with asking.running():
            self.session.step(loss, samples=self._batch)
        return asking.part_of(begun)

    def ask_and_step(self) -> StepTime:
        """Ask the mesh when the loss is known, and train meanwhile."""
        assert self.session is not None
        begun, asking = time.perf_counter(), _Stopwatch()
        loss = self._loss()
        with asking.running():
            self.session.begin_step(loss, samples=self._batch)
        self._improve(loss)
        with asking.running():
            self.session.finish_step()
        return asking.part_of(begun)

    def close(self) -> None:
        """End the session."""
        if self.session is not None:
            self.session.close()

    def _loss(self) -> torch.Tensor:
        from torch import nn

        return nn.functional.cross_entropy(self._model(self._inputs), self._labels)

    def _improve(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _model() -> nn.Module:
    import torch
    from torch import nn

    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
