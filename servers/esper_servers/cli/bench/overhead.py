from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home

from .measure import in_turn, machine, median_interval, percentiles, rounds_for, scratch_home, show
from .memory_share import memory_share
from .mesh_beside import mesh_beside
from .served_plan import COMPILED, PlanOption, serving_plan
from .timed_training import StepTime, Training, batch_for
from .urza import seed

PLAIN, SILENT, ASKING, AHEAD = KINDS = ("plain", "silent", "asking", "ahead")
SHARES = ("overhead_percent", "overhead_interval", "ahead_percent", "ahead_interval", "with_seeds_percent")
LENGTHS_MS = [10, 50, 200]
BLOCK_STEPS = 6
# After a pause the first steps of a block are not yet in their rhythm.
SETTLING_STEPS = 2
LEAST_ROUNDS = 8
"""Until then no kind has been at each place in both directions."""


def overhead(
    context: typer.Context,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure each length.")] = 60.0,
    step_ms: Annotated[
        list[int], typer.Option("--step-ms", min=2, help="How long a step is; may be repeated.")
    ] = LENGTHS_MS,
    plan: PlanOption = COMPILED,
    as_json: JsonOption = False,
) -> None:
    """Measure what a whole mesh adds to training steps of 10, 50 and 200 ms, and to the memory of a trainer.

    Blocks of a plain model, of one with sites and seeds that asks nobody, and of the same one that asks at the end of
    every step, or before its backward pass, take turns in one process, so that a noisy minute hits all of them.
    """
    with scratch_home() as home:
        seed(home)
        environ = serving_plan(plan, home, environ_of(context))
        with mesh_beside(home, environ):
            rows = {f"{length}ms": measure(home, length, seconds) for length in step_ms}
            memory = memory_share(home, environ)
    document = {
        **{share: {name: row[share] for name, row in rows.items()} for share in SHARES},
        "memory_percent": memory["percent"],
        "memory": memory,
        "steps": rows,
        "machine": machine(),
    }
    show("overhead", document, as_json=as_json)


def measure(home: Home, step_ms: float, seconds: float) -> dict[str, Any]:
    """Return the shares for steps of about this length, and what they were computed from."""
    import torch

    torch.set_num_threads(1)
    batch = batch_for(step_ms)
    plain, attached = Training.plain(batch), Training.attached(batch, home)
    try:
        attached.connect()
        return row(attached, in_turns(plain, attached, rounds_for(seconds, least=LEAST_ROUNDS)), batch)
    finally:
        attached.close()


def row(attached: Training, times: Times, batch: int) -> dict[str, Any]:
    """Return what is told of steps of one length."""
    session = attached.session
    assert session is not None
    seeds = len(session.host.state_dict()["seeds"])
    return {**times.figures(), "batch": batch, "seeds": seeds, "answers": dict(session.reasons)}


class Times:
    """Steps by kind and block."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[list[StepTime]]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, block: list[StepTime]) -> None:
        """Add a block; the ones of a round are compared with each other."""
        self._blocks[kind].append(block)

    def figures(self) -> dict[str, Any]:
        """Return all that is told of them."""
        asking, ahead = self._added(ASKING, SILENT), self._added(AHEAD, SILENT)
        return {
            "overhead_percent": _median(asking),
            "overhead_interval": _interval(asking),
            "ahead_percent": _median(ahead),
            "ahead_interval": _interval(ahead),
            "with_seeds_percent": _median(self._added(ASKING, PLAIN)),
            **{kind: percentiles([step.total_ms for step in self._all(kind)]) for kind in KINDS},
            "session": {kind: self._session(kind) for kind in (ASKING, AHEAD)},
            "rounds": len(self._blocks[PLAIN]),
        }

    def _session(self, kind: str) -> dict[str, Any]:
        steps = self._all(kind)
        plain = statistics.median(step.total_ms for step in self._all(PLAIN))
        found = percentiles([step.session_ms for step in steps])
        return {
            **found,
            "processor": percentiles([step.session_processor_ms for step in steps]),
            "percent": round(100 * found["p50_ms"] / plain, 2),
        }

    def _all(self, kind: str) -> list[StepTime]:
        return [step for block in self._blocks[kind] for step in block]

    def _added(self, with_mesh: str, without: str) -> list[float]:
        """What one kind takes more than another in each round, in percent of a plain step."""
        medians = {kind: [_median_ms(block) for block in blocks] for kind, blocks in self._blocks.items()}
        rounds = zip(medians[with_mesh], medians[without], medians[PLAIN], strict=True)
        return [100 * (longer - shorter) / base for longer, shorter, base in rounds]


def _median_ms(block: list[StepTime]) -> float:
    return statistics.median(step.total_ms for step in block)


def _median(shares: list[float]) -> float:
    return round(statistics.median(shares), 2)


def _interval(shares: list[float]) -> dict[str, float]:
    low, high = median_interval(shares)
    return {"low": round(low, 2), "high": round(high, 2)}


def in_turns(plain: Training, attached: Training, rounds: Iterable[int]) -> Times:
    """Train a block of each kind in every round."""
    kinds: list[tuple[str, Callable[[], StepTime]]] = [
        (PLAIN, plain.step), (SILENT, attached.step),
        (ASKING, attached.step_and_ask), (AHEAD, attached.ask_and_step),
    ]  # fmt: skip
    times = Times()
    for turn in rounds:
        for kind, step in in_turn(kinds, turn):
            times.add(kind, [step() for _ in range(BLOCK_STEPS)][SETTLING_STEPS:])
    return times
