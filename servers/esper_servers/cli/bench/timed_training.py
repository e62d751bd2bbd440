"""A small training with a mesh or without, as benches time its steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from esper_client import find_mesh
from esper_rpc.errors import Unavailable
from esper_servers.cli.home import Home

if TYPE_CHECKING:
    import torch
    from torch import nn

    from esper_client import TrainingSession

BUDGET_MS = 5.0
WIDTH = 256
_CONNECT_SECONDS = 20.0
_WARM_UP_STEPS = 10


class StepTime(NamedTuple):
    """What a step took, and what of it the calls of the session did."""

    total_ms: float
    session_ms: float = 0.0
    session_processor_ms: float = 0.0
    """The time of the training thread in them, without what it waited."""


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


def _model() -> nn.Module:
    import torch
    from torch import nn

    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
