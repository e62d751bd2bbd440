from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from esper_servers.tamiyo.risk.window import MovingWindow
from esper_servers.tamiyo.run_state import RunState

_WINDOW = ("fast", "slow", "variance", "last")
_RISK = ("slow_hooks", "high_steps", "adjusted")
_STEPS = ("steps", "germinated_at", "optimizer_at", "paused_at")
_read_window, _read_risk, _read_steps = attrgetter(*_WINDOW), attrgetter(*_RISK), attrgetter(*_STEPS)
_NAMES = (
    *(f"loss.{name}" for name in _WINDOW), *(f"gradient.{name}" for name in _WINDOW),
    *(f"risk.{name}" for name in _RISK), *_STEPS,
)  # fmt: skip
Numbers = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller remembers of a run: all numbers that a decision depends on and a step changes."""

    loss: Numbers
    gradient: Numbers
    risk: tuple[int, ...]
    steps: tuple[int, ...]
    moments: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, run: RunState) -> Memory:
        """Copy it; made at every step, before the step is taken in."""
        risk = run.risk
        return cls(
            _read_window(risk.loss),
            _read_window(risk.gradient),
            _read_risk(risk),
            _read_steps(run),
            run.graph.norms.moments.copy(),
        )

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, float]) -> Memory:
        """Read what `numbers` wrote; what is missing is as in a new run."""
        moments = {key.split(".")[1] for key in numbers if key.startswith("norms.")}
        return cls(
            _window_of(numbers, "loss"),
            _window_of(numbers, "gradient"),
            tuple(int(numbers.get(f"risk.{name}", 0)) for name in _RISK),
            tuple(int(numbers.get(name, 0)) for name in _STEPS),
            {name: (numbers.get(f"norms.{name}.mean", 0.0), numbers.get(f"norms.{name}.variance", 0.0))
             for name in sorted(moments)},
        )  # fmt: skip

    def numbers(self) -> dict[str, float]:
        """Write it by name; what was never seen is left out."""
        values = zip(_NAMES, (*self.loss, *self.gradient, *self.risk, *self.steps), strict=True)
        named = {name: float(value) for name, value in values if value is not None}
        for name, moments in self.moments.items():
            named.update(zip(_moment_names(name), moments, strict=True))
        return named

    def give_to(self, run: RunState) -> None:
        """Make a run remember this and nothing else."""
        run.risk.loss = MovingWindow(*self.loss)  # type: ignore[arg-type]  # Slow and variance are always known.
        run.risk.gradient = MovingWindow(*self.gradient)  # type: ignore[arg-type]
        slow_hooks, high_steps, adjusted = self.risk
        run.risk.slow_hooks, run.risk.high_steps, run.risk.adjusted = slow_hooks, high_steps, bool(adjusted)
        for name, steps in zip(_STEPS, self.steps, strict=True):
            setattr(run, name, steps)
        run.graph.norms.moments.update(self.moments)


@functools.cache
def _moment_names(name: str) -> tuple[str, str]:
    return f"norms.{name}.mean", f"norms.{name}.variance"


def _window_of(numbers: Mapping[str, float], name: str) -> Numbers:
    fast, last = numbers.get(f"{name}.fast"), numbers.get(f"{name}.last")
    return fast, numbers.get(f"{name}.slow", 0.0), numbers.get(f"{name}.variance", 0.0), last
