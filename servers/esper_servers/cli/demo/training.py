"""A classifier of handwritten digits, trained with or without the mesh; a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # Its name everywhere.

import esper_client
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedLifecycleStage, SeedOperation

Emit = Callable[[dict[str, Any]], None]

_SAMPLES_FOR_TRAINING = 1200
_TEST_VIEWS = 8
_WARM_UP_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training. The hidden layers are narrow on purpose: seeds have something to add."""

    mesh: bool
    steps: int = 1500
    batch: int = 4096
    widths: tuple[int, ...] = (16, 8, 8)
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 7
    evaluate_every: int = 100
    report_every: int = 10
    step_budget_ms: float = 20.0
    run_id: str = "demo"


@dataclass(slots=True)
class History:
    """What a report is drawn from."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    work_ms: list[float] = field(default_factory=list)
    """Forward, backward and optimizer of each step."""
    mesh_ms: list[float] = field(default_factory=list)
    """session.begin_step() and finish_step() of each step."""
    seeds: list[tuple[int, str, str, float]] = field(default_factory=list)
    """Step, seed, stage, alpha."""
    outcomes: list[tuple[int, str, str, str, str]] = field(default_factory=list)
    """Step, seed, operation, result, reason."""


class Digits:
    """scikit-learn's handwritten digits; each look at one is turned, moved and scaled a little."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.data / 16.0, dtype=torch.float32)
        labels = torch.tensor(data.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen, held_out = order[:_SAMPLES_FOR_TRAINING], order[_SAMPLES_FOR_TRAINING:]
        self._images, self._labels = images[chosen], labels[chosen]
        self._generator = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(1)
        self.test_images = torch.cat([distort(images[held_out], fixed) for _ in range(_TEST_VIEWS)])
        self.test_labels = labels[held_out].repeat(_TEST_VIEWS)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draw a batch with repetition."""
        rows = torch.randint(len(self._images), (size,), generator=self._generator)
        return distort(self._images[rows], self._generator), self._labels[rows]


def distort(images_NF: Tensor, generator: torch.Generator) -> Tensor:
    """Turn (±17°), scale (±15 %) and move (±0.8 pixels) each 8 by 8 image by itself."""
    count = len(images_NF)
    spread = torch.rand(count, 4, generator=generator) * 2 - 1
    angle, scale, move = spread[:, 0] * 0.3, 1 + spread[:, 1] * 0.15, spread[:, 2:] * 0.2
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, -sine, move[:, 0]], 1), torch.stack([sine, cosine, move[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, 8, 8], align_corners=False)
    return F.grid_sample(images_NF.view(count, 1, 8, 8), grid, align_corners=False).reshape(count, 64)


def build_model(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """An MLP whose hidden layers have these widths."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def train(config: TrainingConfig, emit: Emit) -> History:
    """Train, telling `emit` how it goes."""
    data, history = Digits(config.seed), History()
    model = build_model(config.widths, config.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
    warm_up(config, data)
    with _session(config, model, optimizer) as mesh:
        for step in range(1, config.steps + 1):
            loss = _timed_step(config, data, model, optimizer, mesh, history, step)
            if step % config.report_every == 0 or step == config.steps:
                _note_seeds(history, step, mesh)
                emit(_progress(history, step, loss))
            if step % config.evaluate_every == 0 or step == config.steps:
                history.accuracies.append((step, accuracy(model, data)))
        emit({"event": "result", "history": dataclasses.asdict(history), **_summary(mesh)})
    return history


def warm_up(config: TrainingConfig, data: Digits) -> None:
    """Run a few steps on a throw-away model, so that first-call costs fall on neither training."""
    scratch = build_model(config.widths, config.seed)
    state = data._generator.get_state()
    for _ in range(_WARM_UP_STEPS):
        images, labels = data.batch(config.batch)
        F.cross_entropy(scratch(images), labels).backward()  # type: ignore[no-untyped-call]
    data._generator.set_state(state)


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the held-out digits, distorted once and for all, that are read right."""
    model.eval()
    with torch.inference_mode():
        right = (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()
    model.train()
    return round(float(right), 4)


def _session(config: TrainingConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    if not config.mesh:
        return contextlib.nullcontext()
    return esper_client.attach(model, optimizer, run_id=config.run_id, step_budget_ms=config.step_budget_ms)


def _timed_step(
    config: TrainingConfig,
    data: Digits,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: Any,
    history: History,
    step: int,
) -> float:
    begun, asking = time.perf_counter(), 0.0
    images, labels = data.batch(config.batch)
    loss = F.cross_entropy(model(images), labels)
    value = float(loss.item())
    if mesh is not None:
        asking += _seconds(lambda: mesh.begin_step(value, samples=config.batch))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if mesh is not None:
        asking += _seconds(lambda: _note_outcomes(history, step, mesh.finish_step()))
        history.mesh_ms.append(round(asking * 1e3, 3))
    history.work_ms.append(round((time.perf_counter() - begun - asking) * 1e3, 3))
    history.losses.append(round(value, 5))
    return value


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _note_outcomes(history: History, step: int, outcomes: Sequence[CommandOutcome]) -> None:
    for outcome in outcomes:
        operation = SeedOperation.Name(outcome.operation).removeprefix("SEED_OPERATION_")
        result = CommandOutcome.Result.Name(outcome.result).removeprefix("RESULT_")
        history.outcomes.append((step, outcome.seed_id, operation, result, outcome.reason))


def _note_seeds(history: History, step: int, mesh: Any) -> None:
    for seed in mesh.host.export_seed_states() if mesh is not None else ():
        stage = SeedLifecycleStage.Name(seed.stage).removeprefix("SEED_LIFECYCLE_STAGE_")
        history.seeds.append((step, seed.seed_id, stage, round(seed.metrics["alpha"], 3)))


def _progress(history: History, step: int, loss: float) -> dict[str, Any]:
    stages = {seed: stage for at, seed, stage, _ in history.seeds[-64:] if at == step}
    latency = history.mesh_ms[-1] if history.mesh_ms else 0.0
    return {
        "event": "progress",
        "step": step,
        "loss": round(loss, 4),
        "accuracy": history.accuracies[-1][1] if history.accuracies else 0.0,
        "stages": stages,
        "latency_ms": latency,
    }


def _summary(mesh: Any) -> dict[str, Any]:
    if mesh is None:
        return {}
    return {
        "reasons": dict(mesh.reasons),
        "misses": mesh.guard.misses,
        "late_answers": mesh.guard.late_answers,
        "timings": mesh.timings.summary(),
        "policy_version": mesh.policy_version,
    }


def main() -> None:
    """Train as told by one JSON argument, one JSON event a line on stdout."""
    torch.set_num_threads(1)
    settings = orjson.loads(sys.argv[1])

    def emit(event: dict[str, Any]) -> None:
        sys.stdout.buffer.write(orjson.dumps(event) + b"\n")
        sys.stdout.buffer.flush()

    train(TrainingConfig(**settings), emit)


if __name__ == "__main__":
    main()
