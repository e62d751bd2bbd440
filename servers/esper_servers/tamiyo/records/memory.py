from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from esper_servers.tamiyo.risk.window import MovingWindow
from esper_servers.tamiyo.run_state import RunState

_WINDOW = ("fast", "slow", "variance", "last")
_RISK = ("slow_hooks", "high_steps", "adjusted")
_REST = ("late", "until")
_STEPS = ("steps", "germinated_at", "optimizer_at", "paused_at")
_read_window, _read_risk, _read_steps = attrgetter(*_WINDOW), attrgetter(*_RISK), attrgetter(*_STEPS)
_read_rest = attrgetter(*_REST)
Numbers = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller remembers of a run: all numbers that a decision depends on and a step changes."""

    loss: Numbers
    gradient: Numbers
    risk: tuple[int, ...]
    steps: tuple[int, ...]
    moments: Mapping[str, tuple[float, float]]
    rest: tuple[int, ...] = (0, 0)

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
            _read_rest(run.rest),
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
            tuple(int(numbers.get(f"rest.{name}", 0)) for name in _REST),
        )  # fmt: skip

    def numbers(self) -> dict[str, float]:
        """Write it by name; what was never seen is left out."""
        named = {f"loss.{name}": value for name, value in zip(_WINDOW, self.loss, strict=True)}
        named |= {f"gradient.{name}": value for name, value in zip(_WINDOW, self.gradient, strict=True)}
        named |= {f"risk.{name}": value for name, value in zip(_RISK, self.risk, strict=True)}
        named |= dict(zip(_STEPS, self.steps, strict=True))
        if any(self.rest):
            named |= {f"rest.{name}": value for name, value in zip(_REST, self.rest, strict=True)}
        for name, (mean, variance) in self.moments.items():
            named |= {f"norms.{name}.mean": mean, f"norms.{name}.variance": variance}
        return {name: float(value) for name, value in named.items() if value is not None}

    def give_to(self, run: RunState) -> None:
        """Make a run remember this and nothing else."""
        run.risk.loss = MovingWindow(*self.loss)  # type: ignore[arg-type]  # Slow and variance are always known.
        run.risk.gradient = MovingWindow(*self.gradient)  # type: ignore[arg-type]
        slow_hooks, high_steps, adjusted = self.risk
        run.risk.slow_hooks, run.risk.high_steps, run.risk.adjusted = slow_hooks, high_steps, bool(adjusted)
        for name, steps in zip(_STEPS, self.steps, strict=True):
            setattr(run, name, steps)
        run.rest.late, run.rest.until = self.rest
        run.graph.norms.moments.update(self.moments)


def _window_of(numbers: Mapping[str, float], name: str) -> Numbers:
    fast, last = numbers.get(f"{name}.fast"), numbers.get(f"{name}.last")
    return fast, numbers.get(f"{name}.slow", 0.0), numbers.get(f"{name}.variance", 0.0), last
