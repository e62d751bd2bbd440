"""The risk engine: what each signal of a step says, and what may still be done (requirements 2.6)."""

from __future__ import annotations
