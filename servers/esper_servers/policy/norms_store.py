from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from esper_rpc import disk

from .norms import PRIORS, Experience, Moments, Norms, is_sound, pool, prior_moments

FILE_NAME = "gnn_norms.json"
MOST_STEPS = 10_000
"""As which any run and all runs before count at most, so that what is new is learned in the end."""


class NormsStore:
    """What a new run starts from: the norms that were loaded, those of ended runs, and when saved, of open ones.

    One thread begins and ends runs; `save` may run on another.
    """

    def __init__(self, path: Path | None = None, loaded: Experience | None = None) -> None:
        self._path = path
        self._past = loaded or Experience()
        self._start = self._past
        self._saved: Sequence[Experience] = [self._past]
        self._one_save_at_a_time = threading.Lock()

    @classmethod
    def load(cls, directory: Path | None) -> Self:
        """Read the file in a directory: priors where there is none, or one that cannot be used, which is set aside."""
        if directory is None:
            return cls()
        path = directory / FILE_NAME
        return cls(path, disk.read_whole(path, read_experience))

    def begin(self, policy: Moments | None = None) -> Norms:
        """Return the norms of a new run: what was learned here, else those of the policy, else priors."""
        if self._start.steps:
            return Norms(dict(self._start.moments))
        known = {name: moments for name, moments in (policy or {}).items() if name in PRIORS and is_sound(*moments)}
        return Norms(dict(self._start.moments) | known)

    def end(self, run: Experience) -> None:
        """Keep what a run has learned that is about to be forgotten."""
        self._past = _limited(pool([self._past, _limited(run)]))

    def parts(self, open_runs: Iterable[Experience]) -> list[Experience]:
        """Return what is to be saved."""
        return [self._past, *map(_limited, open_runs)]

    def save(self, parts: Sequence[Experience]) -> None:
        """Pool parts and write them if they are others than last time; waits for the disk, and raises OSError."""
        with self._one_save_at_a_time:
            if self._path is None or parts == self._saved:
                return
            pooled = _limited(pool(parts))
            disk.write_whole(self._path, write_experience(pooled))
            self._start, self._saved = pooled, parts


def write_experience(experience: Experience) -> bytes:
    """Write a file that `read_experience` reads back as the same."""
    moments = {name: {"mean": mean, "variance": variance} for name, (mean, variance) in experience.moments.items()}
    return orjson.dumps({"steps": experience.steps, "moments": moments}, option=orjson.OPT_INDENT_2)


def read_experience(content: bytes) -> Experience:
    """Read a file; an input that is absent has its prior. Raises ValueError for what no run may start from."""
    document = orjson.loads(content)
    if not isinstance(document, dict) or not isinstance(document.get("moments"), dict):
        raise ValueError("it has no moments by name")
    steps = document.get("steps")
    if type(steps) is not int or steps < 0:
        raise ValueError("it has no number of steps")
    named = {name: _read_moments(name, told) for name, told in document["moments"].items() if name in PRIORS}
    return _limited(Experience(prior_moments() | named, steps))


def _read_moments(name: str, told: Any) -> tuple[float, float]:
    values: list[Any] = [told.get("mean"), told.get("variance")] if isinstance(told, dict) else []
    if not values or not all(type(value) in (int, float) for value in values) or not is_sound(*values):
        raise ValueError(f"the mean or variance of {name} cannot be one")
    return float(values[0]), float(values[1])


def _limited(experience: Experience) -> Experience:
    return Experience(experience.moments, min(MOST_STEPS, experience.steps))
