from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper_rpc.errors import NotFound
from esper_servers.cli.console import JsonOption
from esper_servers.cli.home import Home

from .apply import HostBench
from .measure import machine, percentiles, scratch_home, show, timed_ms

if TYPE_CHECKING:
    from esper_servers.kasmina.kernels.library import Kernel

WINDOWS = 8
WARM_UP = 100

SeedsOption = Annotated[int, typer.Option("--seeds", min=WINDOWS, max=9_000, help="Seeds that are planted.")]


def germinate(seeds: SeedsOption = 2_000, as_json: JsonOption = False) -> None:
    """Measure whether a germination costs the training more the more seeds there are."""
    with scratch_home() as home:
        _plant_each(home, WARM_UP)
        document = {
            "seeds": seeds,
            "beside": _summary(_plant_each(home, seeds)),
            "in_turn": _summary(_plant_in_turn(home, seeds)),
            "cached_kernel": _look_up_cached(),
            "machine": machine(),
        }
    show("germinate", document, as_json=as_json)


def _plant_each(home: Home, seeds: int) -> list[float]:
    """Plant a seed at each of so many sites."""
    bench = HostBench(home, sites=seeds)
    return [bench.apply("GERMINATE", seed_id=seed_id) for seed_id in bench.seed_ids]


def _plant_in_turn(home: Home, seeds: int) -> list[float]:
    """Plant and cull so many seeds at one site."""
    bench, times = HostBench(home), []
    for _ in range(seeds):
        times.append(bench.apply("GERMINATE"))
        bench.apply("CULL")
        bench.rest()
    return times


def _look_up_cached() -> dict[str, float]:
    """Look up each kernel of a cache that is full of them, as a germination does."""
    from esper_rpc.proto.leyline.v1 import BlueprintDescriptor
    from esper_rpc.proto.urza.v1 import Blueprint
    from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary

    library = KernelLibrary(_fetch_nothing, lambda _work: None)
    names = [f"kernel-{number}" for number in range(library.config.entries)]
    for name in names:
        library.add(Kernel(Blueprint(descriptor=BlueprintDescriptor(blueprint_id=name))))
    order = itertools.cycle(names)
    times = timed_ms(lambda: library.get(next(order)), len(names))
    return {**percentiles(times), "mean_ms": round(statistics.fmean(times), 4), "max_ms": round(max(times), 4)}


async def _fetch_nothing(blueprint_id: str) -> Kernel:
    raise NotFound(blueprint_id)


def _summary(times_ms: list[float]) -> dict[str, Any]:
    """Return the percentiles of each window of seeds, and how the last compares with the first."""
    bounds = [len(times_ms) * number // WINDOWS for number in range(WINDOWS + 1)]
    windows = [{"to_seed": end} | percentiles(times_ms[begin:end]) for begin, end in itertools.pairwise(bounds)]
    ratios = {
        f"{name}_ratio": round(windows[-1][f"{name}_ms"] / windows[0][f"{name}_ms"], 3) for name in ("p50", "p95")
    }
    return percentiles(times_ms) | ratios | {"windows": windows}
