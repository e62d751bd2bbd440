from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import orjson
import typer

from esper_rpc.blending import BLEND_MODES, CHANNEL, CONVEX, MAP_CEILING
from esper_servers.cli.console import JsonOption

from .measure import in_turn, machine, median_interval, one_thread, rounds_for, show

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 3
LEAST_ROUNDS = len(BLEND_MODES)
"""Until then no mode has been at each place."""
BLENDED = 0.5
BATCH = 32

SecondsOption = Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure each model.")]


def blend(seconds: SecondsOption = 18.0, as_json: JsonOption = False) -> None:
    """Measure what each way of blending costs a training step, against CONVEX."""
    with one_thread():
        document = {name: _compared(Scene(name), seconds) for name in ("cnn", "transformer", "mlp")}
    show("blend", {"blend": document, "machine": machine()}, as_json=as_json)


class Block(NamedTuple):
    """The median step of a block, by both clocks."""

    processor_ms: float
    """The time of this thread, on which all runs: others on the machine do not count."""
    wall_ms: float


class Scene:
    """A small model in training with one seed half blended in."""

    def __init__(self, name: str) -> None:
        import torch

        from esper_servers.blueprints.catalogue import load_factories
        from esper_servers.kasmina import lifecycle
        from esper_servers.kasmina.seed_slot import SeedSlot
        from esper_servers.trainer import wrap_sites

        torch.manual_seed(0)
        self._model, site_id, blueprint, self._batch = _MODELS[name]()
        site = wrap_sites(self._model, [site_id])[site_id]
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._model(self._batch)
        self._slot = SeedSlot(seed_id="seed", site_id=site_id, site=site, depth=0)
        self._slot.plant(load_factories()[blueprint].build({}, site.output_shape), blueprint, b"")
        site.stage, site.alpha = lifecycle.BLENDING, BLENDED

    @property
    def seed(self) -> nn.Module:
        """The module that grows in the model."""
        assert self._slot.site.seed is not None
        return self._slot.site.seed

    @property
    def failure(self) -> str:
        """Why the seed was left out, empty while it is not."""
        return self._slot.site.failure

    def use(self, mode: str) -> None:
        """Blend in a mode from here on; raises RuntimeError when it cannot be."""
        channels = self._slot.site.seed_channels
        vector = orjson.dumps([MAP_CEILING] * channels).decode()
        problem = self._slot.blend_as({"blend_mode": mode, **({"alpha_vec": vector} if mode == CHANNEL else {})})
        if problem:
            raise RuntimeError(problem)

    def step(self) -> None:
        """Train one step: the model and the seed."""
        self._optimizer.zero_grad(set_to_none=True)
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._slot.step_optimizer()


def _compared(scene: Scene, seconds: float) -> dict[str, Any]:
    """Take blocks of the modes in turns, so that a noisy moment hits all; compare within each round."""
    blocks: dict[str, list[Block]] = {mode: [] for mode in BLEND_MODES}
    _round(scene, BLEND_MODES)
    for turn in rounds_for(seconds, least=LEAST_ROUNDS):
        for mode, block in _round(scene, in_turn(BLEND_MODES, turn)).items():
            blocks[mode].append(block)
    return {mode.lower(): _figures(blocks, mode) for mode in BLEND_MODES} | {"rounds": turn + 1}


def _round(scene: Scene, modes: Sequence[str]) -> dict[str, Block]:
    blocks = {}
    for mode in modes:
        scene.use(mode)
        blocks[mode] = _block(scene.step)
    return blocks


def _block(step: Callable[[], object]) -> Block:
    """The median step of a block; the first one after a change of mode is not counted."""
    step()
    steps = [_timed(step) for _ in range(BLOCK)]
    return Block(*(statistics.median(times) for times in zip(*steps, strict=True)))


def _timed(step: Callable[[], object]) -> Block:
    processor, wall = time.thread_time(), time.perf_counter()
    step()
    return Block((time.thread_time() - processor) * 1e3, (time.perf_counter() - wall) * 1e3)


def _figures(blocks: Mapping[str, list[Block]], mode: str) -> dict[str, float]:
    pairs = list(zip(blocks[mode], blocks[CONVEX], strict=True))
    ratios = [own.processor_ms / convex.processor_ms for own, convex in pairs]
    low, high = median_interval(ratios)
    found = {
        "step_ms": statistics.median(own.processor_ms for own, _ in pairs),
        "ratio_to_convex": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "over_convex_ms": statistics.median(own.processor_ms - convex.processor_ms for own, convex in pairs),
        "wall_ms": statistics.median(own.wall_ms for own, _ in pairs),
        "wall_ratio_to_convex": statistics.median(own.wall_ms / convex.wall_ms for own, convex in pairs),
    }
    return {name: round(value, 4) for name, value in found.items()}


def _cnn() -> tuple[nn.Module, str, str, torch.Tensor]:
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, "3", "depthwise_conv", torch.randn(BATCH, 3, 32, 32)


def _transformer() -> tuple[nn.Module, str, str, torch.Tensor]:
    import torch
    from torch import nn

    layers = [nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(256, 128), *layers, nn.LayerNorm(128), nn.Linear(128, 256))
    return model, "1", "residual_mlp", torch.randint(0, 256, (BATCH, 64))


def _mlp() -> tuple[nn.Module, str, str, torch.Tensor]:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, "2", "residual_mlp", torch.randn(4 * BATCH, 256)


_MODELS: Mapping[str, Callable[[], tuple[nn.Module, str, str, torch.Tensor]]] = {
    "cnn": _cnn,
    "transformer": _transformer,
    "mlp": _mlp,
}
