"""How the share of a seed rises: the methods that commands name by `blending_method_index`, in its order (F-082)."""

from __future__ import annotations

BLENDING_METHODS: tuple[str, ...] = ("linear", "cosine", "warmup_hold", "sigmoid")
