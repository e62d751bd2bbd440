from __future__ import annotations

import itertools
import threading
import time
from typing import Annotated, Any

import typer

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.cli.console import JsonOption
from esper_servers.cli.home import Home

from .apply import HostBench
from .measure import machine, percentiles, scratch_home, show

WINDOWS = 8
WARM_UP = 100
BUILD_SECONDS = 30.0

SeedsOption = Annotated[int, typer.Option("--seeds", min=WINDOWS, max=9_000, help="Seeds that are planted.")]


def germinate(seeds: SeedsOption = 2_000, as_json: JsonOption = False) -> None:
    """Measure whether a germination costs the training more the more seeds there are."""
    with scratch_home() as home:
        _plant_each(home, WARM_UP)
        document = {
            "seeds": seeds,
            "beside": _summary(_plant_each(home, seeds)),
            "in_turn": _summary(_plant_in_turn(home, seeds)),
            "machine": machine(),
        }
    show("germinate", document, as_json=as_json)


def _plant_each(home: Home, seeds: int) -> list[float]:
    """Plant a seed at each of so many sites, as `attach` does it: what each took of the training thread, in ms."""
    from esper_servers.kasmina.background import BackgroundWorker

    worker = BackgroundWorker("bench")
    bench = HostBench(home, sites=seeds, background=worker)
    return [_plant(bench, seed_id, worker) for seed_id in bench.seed_ids]


def _plant_in_turn(home: Home, seeds: int) -> list[float]:
    """Plant and cull so many seeds at one site, each built at the safe point."""
    bench, times = HostBench(home), []
    for _ in range(seeds):
        times.append(bench.apply("GERMINATE"))
        bench.apply("CULL")
        bench.rest()
    return times


def _plant(bench: HostBench, seed_id: str, worker: Any) -> float:
    envelope = bench.seal("GERMINATE", seed_id=seed_id)
    begun = time.perf_counter()
    bench.host.submit(envelope)
    bench.host.apply_pending()
    asked = time.perf_counter() - begun
    built = threading.Event()
    worker(built.set)
    if not built.wait(BUILD_SECONDS):
        raise RuntimeError("The module was not built.")
    begun = time.perf_counter()
    outcomes = bench.host.apply_pending()
    planted = time.perf_counter() - begun
    if [outcome.result for outcome in outcomes] != [CommandOutcome.RESULT_APPLIED]:
        raise RuntimeError(f"GERMINATE was not applied: {outcomes}")
    return (asked + planted) * 1e3


def _summary(times_ms: list[float]) -> dict[str, Any]:
    """Return the percentiles of each window of seeds, and how the last compares with the first."""
    bounds = [len(times_ms) * number // WINDOWS for number in range(WINDOWS + 1)]
    windows = [{"to_seed": end} | percentiles(times_ms[begin:end]) for begin, end in itertools.pairwise(bounds)]
    ratios = {
        f"{name}_ratio": round(windows[-1][f"{name}_ms"] / windows[0][f"{name}_ms"], 3) for name in ("p50", "p95")
    }
    return percentiles(times_ms) | ratios | {"windows": windows}
