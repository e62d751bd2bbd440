from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from esper_servers.cli.console import JsonOption

from .measure import machine, one_thread, show

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS = ("bare", "apart", "shared")
BLOCK = 4
WARM_UP_ROUNDS = 1
BATCH = 2

RoundsOption = Annotated[int, typer.Option("--rounds", min=2, help="Blocks of four steps of each kind.")]
ModelsOption = Annotated[list[str] | None, typer.Option("--model", help="One of them; may be repeated.")]


def isolation(rounds: RoundsOption = 10, model: ModelsOption = None, as_json: JsonOption = False) -> None:
    """Measure what it costs to see whether the gradients of a host and of its seed overlap."""
    names = model or list(_MODELS)
    if unknown := set(names) - set(_MODELS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; choose of {', '.join(_MODELS)}.")
    with one_thread():
        found = {name: compared(Scene(name), rounds) for name in names}
    show("isolation", {"isolation": found, "steps": rounds * BLOCK, "machine": machine()}, as_json=as_json)


class Scene:
    """A model in training with one seed that trains beside it, and the measuring of both."""

    def __init__(self, name: str) -> None:
        import torch

        from esper_servers.blueprints.catalogue import load_factories
        from esper_servers.kasmina import lifecycle
        from esper_servers.kasmina.isolation.isolation import Isolation
        from esper_servers.kasmina.seed_slot import SeedSlot
        from esper_servers.trainer import wrap_sites

        torch.manual_seed(0)
        self._model, site_id, blueprint, self._batch = _MODELS[name]()
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        site = wrap_sites(self._model, [site_id])[site_id]
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        self._model(self._batch)
        self._slot = SeedSlot(seed_id="seed", site_id=site_id, site=site, depth=0)
        self._slot.plant(load_factories()[blueprint].build({}, site.output_shape), blueprint, b"")
        site.stage = lifecycle.TRAINING
        self._own = [parameter.data for parameter in site.own_parameters]
        # Others on the machine must not count.
        self._isolation = Isolation(self._model.parameters, stopwatch=time.process_time)
        self._measures = False

    @property
    def violations(self) -> int:
        """Steps in which an overlap was found since the kind was chosen."""
        return self._isolation.violations_of("seed")

    def use(self, kind: str) -> None:
        """Train from here on without the measuring, with it, or with it while the seed lies in the host's memory."""
        self._isolation.release("seed")
        self._measures = kind != "bare"
        largest = max(self._model.parameters(), key=lambda parameter: parameter.numel()).data.view(-1)
        for parameter, own in zip(self._slot.site.own_parameters, self._own, strict=True):
            parameter.data = largest[: own.numel()].view(own.shape) if kind == "shared" else own

    def step(self) -> float:
        """Train one step: the model and the seed; returns the milliseconds that the measuring took of it."""
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._measures:
            self._isolation.measure([self._slot])
        self._slot.step_optimizer()
        return self._isolation.last_ms if self._measures else 0.0


class _Step(NamedTuple):
    processor_ms: float
    measuring_ms: float


def compared(scene: Scene, rounds: int) -> dict[str, Any]:
    """Take blocks of the kinds in turns, so that a noisy moment hits all of them."""
    blocks: dict[str, list[list[_Step]]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + WARM_UP_ROUNDS):
        for kind in KINDS:
            scene.use(kind)
            block = _block(scene.step)
            if turn >= WARM_UP_ROUNDS:
                blocks[kind].append(block)
    return {"parameters": scene.parameters, **{kind: _figures(blocks, kind) for kind in KINDS}}


def _block(step: Callable[[], float]) -> list[_Step]:
    """Time the steps of a block, but for the first two: hooks are put on at the end of a step."""
    steps = []
    for _ in range(BLOCK + 2):
        begun = time.process_time()
        measuring = step()
        steps.append(_Step((time.process_time() - begun) * 1e3, measuring))
    return steps[2:]


def _figures(blocks: Mapping[str, list[list[_Step]]], kind: str) -> dict[str, float]:
    medians = {
        each: [statistics.median(step.processor_ms for step in block) for block in blocks[each]]
        for each in ("bare", kind)
    }
    figures = {"step_ms": round(statistics.median(medians[kind]), 3)}
    if kind == "bare":
        return figures
    added = [own - bare for own, bare in zip(medians[kind], medians["bare"], strict=True)]
    measuring = [step.measuring_ms for block in blocks[kind] for step in block]
    return {
        **figures,
        "added_ms": round(statistics.median(added), 3),
        "measuring_mean_ms": round(statistics.fmean(measuring), 3),
        "measuring_max_ms": round(max(measuring), 3),
    }


def _cnn(width: int) -> tuple[nn.Module, str, str, torch.Tensor]:
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip
    return model, "4", "depthwise_conv", torch.randn(BATCH, 3, 8, 8)


def _transformer(width: int) -> tuple[nn.Module, str, str, torch.Tensor]:
    import torch
    from torch import nn

    layers = [nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(256, width), *layers, nn.Linear(width, 256))
    return model, "2", "residual_mlp", torch.randint(0, 256, (BATCH, 16))


_MODELS: Mapping[str, Callable[[], tuple[nn.Module, str, str, torch.Tensor]]] = {
    "cnn_1m": lambda: _cnn(64),
    "cnn_11m": lambda: _cnn(216),
    "cnn_25m": lambda: _cnn(328),
    "transformer_1m": lambda: _transformer(144),
    "transformer_11m": lambda: _transformer(472),
    "transformer_25m": lambda: _transformer(712),
}
"""By their number of parameters."""
