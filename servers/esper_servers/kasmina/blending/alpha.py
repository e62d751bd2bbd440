from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from esper_rpc.blending import BLENDING_METHODS
from esper_rpc.proto.leyline.v1 import AdaptationCommand

DEFAULT_STEPS = 20
DEFAULT_TEMPERATURE = 2.0
BANDS = (0.3, 0.7)
HYSTERESIS = 0.02
WIDEST_CLIP = 0.1


def _sigmoid(x: float, temperature: float) -> float:
    """A logistic ramp rescaled to reach 0 and 1 exactly (requirements 3.5)."""
    low, high, value = (1 / (1 + math.exp(-(p - 0.5) * temperature * 2 * math.pi)) for p in (0.0, 1.0, x))
    return (value - low) / (high - low)


_CURVES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, _: x,
    "cosine": lambda x, _: (1 - math.cos(math.pi * x)) / 2,
    "warmup_hold": lambda x, _: min(1.0, 2 * x),
    "sigmoid": _sigmoid,
}


@dataclass(slots=True)
class AlphaSchedule:
    """Raises alpha from 0 to 1 between two fractions of a window of steps; monotonic, and 1 at the end."""

    method: str = "linear"
    total_steps: int = DEFAULT_STEPS
    start: float = 0.0
    end: float = 1.0
    temperature: float = DEFAULT_TEMPERATURE
    step: int = 0

    def advance(self) -> float:
        """Move one step on and return alpha."""
        self.step = min(self.step + 1, self.total_steps)
        return self.value()

    def value(self) -> float:
        """Return alpha at the present step."""
        if self.step >= self.total_steps:
            return 1.0
        fraction = self.step / self.total_steps
        if fraction >= self.end:
            return 1.0
        progress = max(0.0, (fraction - self.start) / max(1e-9, self.end - self.start))
        return min(1.0, max(0.0, _CURVES[self.method](progress, self.temperature)))


def schedule_of(command: AdaptationCommand) -> AlphaSchedule:
    """Read the schedule a command asks for; fractions outside 0 to 1 are clamped, a swapped pair is ordered."""
    parameters = command.seed_operation.parameters
    bounds = [parameters.get("blending_schedule_start", 0.0), parameters.get("blending_schedule_end", 1.0)]
    start, end = sorted(min(1.0, max(0.0, b)) for b in bounds)
    index = int(parameters.get("blending_method_index", 0))
    method = BLENDING_METHODS[index] if 0 <= index < len(BLENDING_METHODS) else BLENDING_METHODS[0]
    return AlphaSchedule(method=method, start=start, end=end)


def band_after(band: int, alpha: float) -> int:
    """Return who leads at an alpha: 0 the host, 1 neither, 2 the seed.

    Around the thresholds the band of before stays, so that an alpha that lingers there is not told again and again.
    """
    return sum(alpha > threshold + (-HYSTERESIS if band > i else HYSTERESIS) for i, threshold in enumerate(BANDS))


def gradient_clip(alpha: float) -> float:
    """Return the norm that a blending seed's gradient is clipped to: 0.1 half way, 0.004 at both ends.

    Where the host hands over, and where it has, the output should change by alpha alone.
    """
    return WIDEST_CLIP / (1 + 100 * (alpha - 0.5) ** 2)
