from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper_client import find_mesh
from esper_rpc.errors import Unavailable
from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from .measure import machine, percentiles, scratch_home, show
from .served_plan import COMPILED, PlanOption, serving_plan
from .urza import seed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from esper_client import TrainingSession

PLAIN, SILENT, ASKING, AHEAD = KINDS = ("plain", "silent", "asking", "ahead")
SHARES = ("overhead_percent", "ahead_percent", "with_seeds_percent")
LENGTHS_MS = [10, 50, 200]
BLOCK_STEPS = 12
# After a pause the first steps of a block are not yet in their rhythm.
SETTLING_STEPS = 2
BUDGET_MS = 5.0
WIDTH = 256
_CONNECT_SECONDS = 20.0
_WARM_UP_STEPS = 10


def overhead(
    context: typer.Context,
    blocks: Annotated[int, typer.Option(min=2, help="How many blocks of each kind for each length of a step.")] = 12,
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
            rows = {f"{length}ms": measure(home, length, blocks) for length in step_ms}
    document = {
        **{share: {name: row[share] for name, row in rows.items()} for share in SHARES},
        "steps": rows,
        "machine": machine(),
    }
    show("overhead", document, as_json=as_json)


def measure(home: Home, step_ms: float, blocks: int) -> dict[str, Any]:
    """Return the shares for steps of about this length, and what they were computed from."""
    import torch

    torch.set_num_threads(1)
    batch = _batch_for(step_ms)
    plain, attached = Training.plain(batch), Training.attached(batch, home)
    try:
        times = _in_turns(plain, attached, blocks)
        session = attached.session
        assert session is not None
        answers, seeds = dict(session.reasons), len(session.host.export_seed_states())
    finally:
        attached.close()
    return {
        "overhead_percent": times.overhead_percent(),
        "ahead_percent": times.ahead_percent(),
        "with_seeds_percent": times.with_seeds_percent(),
        **{kind: percentiles(times.all(kind)) for kind in KINDS},
        "batch": batch,
        "seeds": seeds,
        "answers": answers,
    }


class Times:
    """Steps in milliseconds, by kind and block."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, block: list[float]) -> None:
        """Add a block; the ones of a round are compared with each other."""
        self._blocks[kind].append(block)

    def all(self, kind: str) -> list[float]:
        """Return every step of a kind."""
        return [value for block in self._blocks[kind] for value in block]

    def overhead_percent(self) -> float:
        """What asking adds to a step of the same model, as a share of a plain one."""
        return self._added(ASKING, SILENT)

    def ahead_percent(self) -> float:
        """The same of a step that asks before its backward pass."""
        return self._added(AHEAD, SILENT)

    def with_seeds_percent(self) -> float:
        """What asking, sites and seeds add to a plain step."""
        return self._added(ASKING, PLAIN)

    def _added(self, with_mesh: str, without: str) -> float:
        medians = {kind: [statistics.median(block) for block in self._blocks[kind]] for kind in KINDS}
        rounds = zip(medians[with_mesh], medians[without], medians[PLAIN], strict=True)
        return round(100 * statistics.median((long - short) / base for long, short, base in rounds), 2)


def _in_turns(plain: Training, attached: Training, blocks: int) -> Times:
    times = Times()
    for turn in range(blocks):
        kinds: list[tuple[str, Callable[[], float]]] = [
            (PLAIN, plain.step), (SILENT, attached.step),
            (ASKING, attached.step_and_ask), (AHEAD, attached.ask_and_step),
        ]  # fmt: skip
        for kind, step in _rotated(kinds, turn):
            times.add(kind, [step() for _ in range(BLOCK_STEPS)][SETTLING_STEPS:])
    return times


def _rotated(kinds: list[tuple[str, Callable[[], float]]], turn: int) -> Iterator[tuple[str, Callable[[], float]]]:
    first = turn % len(kinds)
    yield from kinds[first:] + kinds[:first]


def _batch_for(step_ms: float) -> int:
    """Find the batch with which a step of the plain model takes about this long."""
    batch = 64
    for _ in range(6):
        training = Training.plain(batch)
        took = statistics.median(training.step() for _ in range(_WARM_UP_STEPS))
        if 0.9 < took / step_ms < 1.1:
            break
        batch = max(16, int(batch * min(8.0, step_ms / took)))
    return batch


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
        """One that is attached to the mesh, and connected; raises Unavailable."""
        from esper_servers.trainer import attach

        environ = {"ESPER_HOME": str(home.directory)}
        training = cls(_model(), batch)
        session = attach(
            training._model, training.optimizer, environ=environ, mesh=find_mesh(environ), step_budget_ms=BUDGET_MS
        )
        training.session = session  # type: ignore[assignment]  # There is a mesh.
        training._connect()
        return training

    def step(self) -> float:
        """Train one step; returns milliseconds."""
        begun = time.perf_counter()
        self._improve(self._loss())
        return (time.perf_counter() - begun) * 1e3

    def step_and_ask(self) -> float:
        """Train one step and ask the mesh at its end; returns milliseconds."""
        assert self.session is not None
        begun = time.perf_counter()
        loss = self._loss()
        self._improve(loss)
        self.session.step(loss, samples=self._batch)
        return (time.perf_counter() - begun) * 1e3

    def ask_and_step(self) -> float:
        """Ask the mesh when the loss is known, and train meanwhile; returns milliseconds."""
        assert self.session is not None
        begun = time.perf_counter()
        loss = self._loss()
        self.session.begin_step(loss, samples=self._batch)
        self._improve(loss)
        self.session.finish_step()
        return (time.perf_counter() - begun) * 1e3

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

    def _connect(self) -> None:
        assert self.session is not None
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not self.session.is_connected:
            if time.monotonic() > deadline:
                raise Unavailable(f"No decision stream after {_CONNECT_SECONDS:g} s.")
            self.step_and_ask()
        for _ in range(_WARM_UP_STEPS):
            self.step_and_ask()


def _model() -> nn.Module:
    import torch
    from torch import nn

    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
