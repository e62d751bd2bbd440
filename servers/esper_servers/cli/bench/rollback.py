from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption

from .measure import machine, percentiles, rss_mb, show

MIB = 2**20
WIDTH = 1024
CHUNK_BYTES = 8 * MIB

MillionsOption = Annotated[int, typer.Option("--parameters", min=2, help="Millions of parameters of the model.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="How often to measure.")]
DirectoryOption = Annotated[
    Path | None, typer.Option("--directory", help="Where to write; the disk that is measured. A scratch one otherwise.")
]


def rollback(
    parameters: MillionsOption = 25,
    rounds: RoundsOption = 10,
    directory: DirectoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure checkpoints and rollbacks, in memory and on the disk, beside plain copies, writes and reads."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-", dir=directory) as scratch:
        document = RollbackBench(parameters, Path(scratch)).run(rounds)
    show("rollback", document, as_json=as_json)


class RollbackBench:
    """A model with the moments of AdamW, its checkpoints, and the same number of bytes to copy and write plainly."""

    def __init__(self, millions: int, scratch: Path) -> None:
        import torch
        from torch import nn

        from esper_servers.tolaria.checkpoints.checkpoints import Checkpoints
        from esper_servers.tolaria.rollback.participants import TrainingParticipant
        from esper_servers.tolaria.rollback.rollback import Rollback, RollbackConfig
        from esper_servers.tolaria.state.checkpoint_store import CheckpointStore
        from esper_servers.tolaria.state.snapshot_cache import SnapshotCache
        from esper_servers.tolaria.state.training_state import TrainingState, tensors_in

        layers = max(1, round(millions * 1e6 / (WIDTH * WIDTH + WIDTH)))
        self._model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._train()
        state, cache = TrainingState(self._model, self._optimizer), SnapshotCache()
        self._state, store = state, CheckpointStore(scratch / "checkpoints")
        # Whether a deadline holds is for the reader to see, so none cuts a measurement short.
        unhurried = RollbackConfig(prepare_ms=60_000, commit_ms=60_000, confirm_ms=60_000, full_seconds=3600)
        taking_back = Rollback([TrainingParticipant(state)], cache=cache, store=store, config=unhurried)
        self._checkpoints = Checkpoints(state, cache=cache, store=store, rollback=taking_back)
        self._parameters = sum(p.numel() for p in self._model.parameters())
        self._bytes = sum(tensor.nbytes for tensor in tensors_in(state.capture()))
        self._plain, self._other = (torch.ones(self._bytes, dtype=torch.uint8) for _ in range(2))
        self._file = scratch / "plain"
        self._step = 0

    def run(self, rounds: int) -> dict[str, Any]:
        """Measure in turn, so that what else the machine does hits all alike."""
        work: dict[str, Callable[[], object]] = {
            "take": self._take,
            "fast": self._fast,
            "copy": lambda: self._other.copy_(self._plain),
            "save": self._save,
            "write": self._write,
            "torch_save": self._torch_save,
            "full": self._full,
            "read": self._read,
            "torch_load": self._torch_load,
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        # Until there are five snapshots, each takes new memory from the system.
        for turn in range(-3, rounds):
            for name, each in work.items():
                elapsed = _timed_ms(each)
                if turn >= 0:
                    times[name].append(elapsed)
            self._train()
        self._checkpoints.close()
        return self._document(times)

    def _document(self, times: dict[str, list[float]]) -> dict[str, Any]:
        megabytes = self._bytes / MIB
        figures = {name: percentiles(values) for name, values in times.items()}
        for each in figures.values():
            each["ms_per_mb"] = round(each["p50_ms"] / megabytes, 4)
        p50 = {name: each["p50_ms"] for name, each in figures.items()}
        return {
            "parameters": self._parameters,
            "state_mb": round(megabytes, 1),
            **figures,
            "over_floor": {
                "take": round(p50["take"] / p50["copy"], 2),
                "fast": round(p50["fast"] / p50["copy"], 2),
                "save": round(p50["save"] / p50["write"], 2),
                "full": round(p50["full"] / (p50["read"] + p50["copy"]), 2),
            },
            "rss_mb": rss_mb("self"),
            "machine": machine(),
        }

    def _train(self) -> None:
        import torch

        self._model(torch.ones(1, WIDTH)).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _take(self) -> None:
        self._step += 1
        _require(self._checkpoints.snapshot(epoch=0, step=self._step) is not None, "the snapshot was not taken")

    def _fast(self) -> None:
        self._roll_back("fast")

    def _save(self) -> None:
        self._checkpoints.save(epoch=0, step=self._step).result()

    def _full(self) -> None:
        self._roll_back("full")

    def _roll_back(self, tier: str) -> None:
        result = self._checkpoints.roll_back(latest_step=self._step, reason="bench", tier=tier)
        _require(result.tier == tier, f"{result.failures}")

    def _write(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            content: memoryview = self._plain.numpy().data
            for start in range(0, len(content), CHUNK_BYTES):
                file.write(content[start : start + CHUNK_BYTES])
            os.fsync(file.fileno())

    def _read(self) -> None:
        with self._file.open("rb", buffering=0) as file:
            content: memoryview = self._other.numpy().data
            for start in range(0, len(content), CHUNK_BYTES):
                file.readinto(content[start : start + CHUNK_BYTES])

    def _torch_save(self) -> None:
        import torch

        with self._torch_file.open("wb") as file:
            torch.save(self._torch_state(), file)
            file.flush()
            os.fsync(file.fileno())

    def _torch_load(self) -> None:
        import torch

        state = torch.load(self._torch_file, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _torch_state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    @property
    def _torch_file(self) -> Path:
        return self._file.with_suffix(".pt")


def _timed_ms(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(problem)
