from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from esper_servers.cli.console import JsonOption

from .measure import CountOption, machine, percentiles, show

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 512
_WARM_UP = 3

LayersOption = Annotated[int, typer.Option("--layers", min=1, help="Layers of the model, of 3.15 million parameters.")]


def optim(steps: CountOption = 50, layers: LayersOption = 8, as_json: JsonOption = False) -> None:
    """Measure learning rates, rebuilds of an optimizer and the aggregation of gradients."""
    bench = OptimBench(layers)
    figures: dict[str, Callable[[], float]] = {
        "lr_step": lambda: elapsed_ms(bench.controller.step),
        "integrity": lambda: elapsed_ms(bench.controller.check),
        "add_parameters": bench.add_parameters,
        "rebuild": bench.rebuild,
        "state_preserve": bench.state_preserve,
        "widen_layer": bench.widen_layer,
        "aggregate": bench.aggregate,
    }
    found = {
        name: percentiles([figure() for _ in range(steps + _WARM_UP)][_WARM_UP:]) for name, figure in figures.items()
    }
    show("optim", {"optim": found, "parameters": bench.parameters, "machine": machine()}, as_json=as_json)


def elapsed_ms(work: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


class OptimBench:
    """A transformer that AdamW has trained for a step, with a group for each layer, and the controller of its rates."""

    def __init__(self, layers: int) -> None:
        import torch
        from torch import nn

        from esper_servers.optim.controller import UnifiedLRController
        from esper_servers.optim.schedules import Cosine, WarmUp

        self._torch, self._nn = torch, nn
        self._model = nn.ModuleList(self._layer(4 * WIDTH) for _ in range(layers))
        groups = [{"params": list(layer.parameters())} for layer in self._model]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        schedule = WarmUp(steps=100, then=Cosine(total_steps=10_000))
        self.controller = UnifiedLRController(self._optimizer, schedule=schedule)
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._seed = nn.Linear(WIDTH, 2 * WIDTH)

    def add_parameters(self) -> float:
        """Let a seed of half a million parameters join; it leaves again when the time is taken."""
        elapsed = elapsed_ms(lambda: self.controller.adopt(self._seed))
        self.controller.release(self._seed)
        return elapsed

    def rebuild(self) -> float:
        """Let one seed leave and another join in one change."""
        from esper_servers.optim.rebuild import Joining, OptimizerChange

        self.controller.adopt(self._seed)
        other = self._nn.Linear(WIDTH, 2 * WIDTH)
        change = OptimizerChange(
            joining=[Joining(parameters=list(other.parameters()), rate=1e-4)], leaving=list(self._seed.parameters())
        )
        elapsed = elapsed_ms(lambda: self.controller.rebuild(change))
        self.controller.release(other)
        return elapsed

    def state_preserve(self) -> float:
        """Replace every parameter of the model by another of its shape, and bring its moments over."""
        return self._replace({p: self._nn.Parameter(p.detach()) for p in self._held()})

    def widen_layer(self) -> float:
        """Replace one layer by one with a wider hidden part, and put it back when the time is taken."""
        old = list(self._optimizer.param_groups[0]["params"])
        wider = dict(zip(old, self._layer(5 * WIDTH).parameters(), strict=True))
        elapsed = self._replace(wider)
        self._replace({new: before for before, new in wider.items()})
        return elapsed

    def aggregate(self) -> float:
        """Put the gradient of the model and those of two seeds together, one of which pulls against it."""
        from esper_servers.tolaria.aggregation.aggregator import GradientAggregator, SeedGradients

        host = [self._torch.ones_like(p) for p in self._held()]
        seeds = {name: SeedGradients([each * sign for each in host], 0.1) for name, sign in (("a", -1.0), ("b", 1.0))}
        return elapsed_ms(lambda: GradientAggregator().combine(host, seeds))

    def _replace(self, replaced: dict[Tensor, Tensor]) -> float:
        from esper_servers.optim.rebuild import OptimizerChange

        return elapsed_ms(lambda: self.controller.rebuild(OptimizerChange(replaced=replaced)))

    def _held(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _layer(self, hidden: int) -> nn.Module:
        return self._nn.TransformerEncoderLayer(WIDTH, 8, hidden, batch_first=True)
