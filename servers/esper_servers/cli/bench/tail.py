"""Where the time of the slowest steps goes, beside that of the steps in the middle."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from esper_client import TrainingSession
from esper_rpc.ledger import StepTiming
from esper_rpc.proto.tamiyo.v1 import StepLedger

from .measure import flatten

SERVER_PARTS = tuple(
    field.name.removesuffix("_us") for field in StepLedger.DESCRIPTOR.fields if field.name != "total_us"
)
SLOWEST_SHARE = 0.01
_BAND = 0.45, 0.55


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step, and what fell into it."""

    total_ms: float
    parts_ms: Mapping[str, float]
    command: bool
    after_command: bool
    """Whether the step before carried a command, which both sides log and record while this step is asked."""
    collecting_ms: float
    """Collecting garbage in the caller's process."""
    caller_waited_ms: float
    """The caller's thread was ready to run and had no core."""
    tamiyo_waited_ms: float
    """So was the thread of Tamiyo that decides."""


def explain(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Describe the slowest hundredth of the steps, and the tenth around the median."""
    ordered = sorted(records, key=lambda record: record.total_ms)
    low, high = (math.floor(len(ordered) * share) for share in _BAND)
    slowest = max(1, math.floor(len(ordered) * SLOWEST_SHARE))
    return {"median": _means(ordered[low : max(high, low + 1)]), "slowest": _means(ordered[-slowest:])}


def table(explained: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay several explanations out side by side, a row a figure."""
    columns = {
        f"{name} {group}": dict(flatten(means)) for name, groups in explained.items() for group, means in groups.items()
    }
    figures = next(iter(columns.values()))
    return [
        {"figure": figure.removeprefix("parts_ms.")} | {name: column[figure] for name, column in columns.items()}
        for figure in figures
    ]


def parts_of(total_ms: float, timing: StepTiming, ledger: StepLedger) -> dict[str, float]:
    """Split a step up. `rest` is what Tamiyo, `other` what the session does not account for."""
    server = {part: getattr(ledger, f"{part}_us") / 1e3 for part in SERVER_PARTS}
    return {
        "build": timing.build / 1e3,
        "wire": timing.wire / 1e3,
        **server,
        "rest": max(0.0, ledger.total_us / 1e3 - sum(server.values())),
        "verify": timing.verify / 1e3,
        "apply": timing.apply / 1e3,
        "other": max(0.0, total_ms - timing.total / 1e3),
    }


class StepWatch:
    """Times steps of a session with what falls into them; a context manager."""

    def __init__(self, session: TrainingSession, tamiyo_pid: int) -> None:
        self._session = session
        self._collector = _Collector()
        self._caller, self._tamiyo = _RunQueue("self"), _RunQueue(tamiyo_pid)
        self._after_command = False

    def __enter__(self) -> Self:
        gc.callbacks.append(self._collector.note)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collector.note)

    def record(self, step: Callable[[], float]) -> StepRecord:
        """Run a step that returns how long it took, in milliseconds."""
        before, commands = self._disturbances(), self._session.reasons["command"]
        total_ms = step()
        collecting, caller, tamiyo = (now - then for now, then in zip(self._disturbances(), before, strict=True))
        command = self._session.reasons["command"] > commands
        after_command, self._after_command = self._after_command, command
        timing = self._session.timings.last
        assert timing is not None
        return StepRecord(
            total_ms=total_ms,
            parts_ms=parts_of(total_ms, timing, self._session.last_ledger),
            command=command,
            after_command=after_command,
            collecting_ms=collecting,
            caller_waited_ms=caller,
            tamiyo_waited_ms=tamiyo,
        )

    def _disturbances(self) -> tuple[float, float, float]:
        return self._collector.spent_ms, self._caller.waited_ms(), self._tamiyo.waited_ms()


class _Collector:
    """Adds up how long the garbage collector of this process works, on whatever thread."""

    def __init__(self) -> None:
        self.spent_ms = 0.0
        self._begun = 0.0

    def note(self, phase: str, _info: Mapping[str, int]) -> None:
        if phase == "start":
            self._begun = time.perf_counter()
        else:
            self.spent_ms += (time.perf_counter() - self._begun) * 1e3


class _RunQueue:
    """How long the main thread of a process was ready to run and had no core; 0 where the kernel does not tell."""

    def __init__(self, pid: int | str) -> None:
        self._path = Path(f"/proc/{pid}/schedstat")
        self._is_told = self._path.exists()

    def waited_ms(self) -> float:
        return int(self._path.read_bytes().split()[1]) / 1e6 if self._is_told else 0.0


_SHARES = ("command", "after_command")
_SPENT = ("collecting_ms", "caller_waited_ms", "tamiyo_waited_ms")


def _means(records: Sequence[StepRecord]) -> dict[str, Any]:
    return {
        "steps": len(records),
        "total_ms": _mean([record.total_ms for record in records]),
        "parts_ms": {part: _mean([record.parts_ms[part] for record in records]) for part in records[0].parts_ms},
        **{name: _mean([getattr(record, name) for record in records]) for name in _SHARES + _SPENT},
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
