"""The names by which Tamiyo and Kasmina speak of blending. How fast and how are two questions (requirements C-36)."""

from __future__ import annotations

from typing import Final

BLENDING_METHODS: Final[tuple[str, ...]] = ("linear", "cosine", "warmup_hold", "sigmoid")
"""How the share of a seed rises: the methods that commands name by `blending_method_index`, in its order (F-082)."""

CONVEX: Final = "CONVEX"
RESIDUAL: Final = "RESIDUAL"
CHANNEL: Final = "CHANNEL"
CONFIDENCE: Final = "CONFIDENCE"
BLEND_MODES: Final[tuple[str, ...]] = (CONVEX, RESIDUAL, CHANNEL, CONFIDENCE)
"""How the output of a seed meets that of its host: the annotation `blend_mode` (requirements 2.7, 4.5)."""

OVERRIDE: Final = "override"
HEURISTIC: Final = "heuristic"
BLEND_SOURCES: Final[tuple[str, ...]] = (OVERRIDE, HEURISTIC)
"""Who chose the mode: the annotation `blend_mode_source`."""

GATE_K: Final = 6.0
GATE_TAU: Final = 0.2
GATE_K_RANGE: Final = (4.0, 8.0)
GATE_TAU_RANGE: Final = (0.1, 0.3)
MAP_CEILING: Final = 0.8
"""What at most one element in `MAP_ROOM` of an alpha_vec may pass."""
MAP_ROOM: Final = 5
