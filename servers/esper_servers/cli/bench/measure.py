"""What the benchmarks share: a scratch mesh, pacing, percentiles, output."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from esper_servers.cli.console import print_json, print_rows
from esper_servers.cli.home import Home

PACE_SECONDS = 0.030
WARM_UP = 50

Kind = TypeVar("Kind")

CountOption = Annotated[int, typer.Option("--steps", min=20, help="How often to measure.")]


@contextlib.contextmanager
def scratch_home() -> Iterator[Home]:
    """A mesh directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory:
        home = Home(Path(directory))
        home.prepare()
        yield home


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on the calling thread alone, so that what others do on the machine counts less."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed_ms(work: Callable[[], object], count: int, *, warm_up: int = WARM_UP) -> list[float]:
    """Time each of `count` calls, after some that are not counted."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


class Pace:
    """Lets each step begin one interval after the one before."""

    def __init__(self, seconds: float = PACE_SECONDS) -> None:
        self._seconds = seconds
        self._next = time.perf_counter()

    def __call__(self) -> None:
        """Sleep until the next beat."""
        self._next = max(self._next + self._seconds, time.perf_counter())
        time.sleep(max(0.0, self._next - time.perf_counter()))


def at_once() -> None:
    """The pacing of steps back to back."""


def percentiles(values_ms: Sequence[float], *, unit: str = "ms") -> dict[str, float]:
    """Return nearest-rank percentiles, named p50_ms and so on."""
    ordered = sorted(values_ms)
    return {f"p{share}_{unit}": round(_nearest_rank(ordered, share), 4) for share in (50, 95, 99)}


def rounds_for(seconds: float, *, least: int, clock: Callable[[], float] = time.perf_counter) -> Iterator[int]:
    """Count rounds until so much time is over, and there are enough."""
    begun = clock()
    for turn in itertools.count():
        yield turn
        if turn + 1 >= least and clock() - begun >= seconds:
            return


def in_turn(kinds: Sequence[Kind], turn: int) -> list[Kind]:
    """Return the kinds from another one on in each round, and backwards at times: none always follows the same."""
    first = turn % len(kinds)
    order = [*kinds[first:], *kinds[:first]]
    return order if turn // len(kinds) % 2 == 0 else order[::-1]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return where the median of all that could be measured lies, with 95 %, whatever its distribution."""
    ordered, count = sorted(values), len(values)
    # So many may be left out at each end as lie on one side of the median in one case of forty.
    left_out, cases = 0, 1
    while left_out < count // 2 and 40 * (cases := cases + math.comb(count, left_out + 1)) <= 2**count:
        left_out += 1
    return ordered[left_out], ordered[count - 1 - left_out]


def rss_mb(pid: int | str) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def machine() -> dict[str, Any]:
    """Say where the figures come from."""
    return {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2), "python": platform.python_version()}


def show(name: str, document: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result as one JSON object, or as a table of its leaves."""
    if as_json:
        print_json(document)
        return
    print_rows(name, [{"figure": key, "value": value} for key, value in flatten(document)], as_json=False)


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and leaves."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest_rank(ordered: Sequence[float], share: int) -> float:
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]
