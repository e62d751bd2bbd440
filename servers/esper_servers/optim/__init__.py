"""Learning rates and optimizers: who may change a rate, and how an optimizer takes parameters in and lets them go."""

from __future__ import annotations
