"""What a framework's loop does not say of a step by itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def gradient_norm(optimizer: Any) -> Any:
    """Return the norm of the gradients that an optimizer is about to use, where they are; None for sparse ones."""
    given = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    if not given or any(each.is_sparse for each in given):
        return None
    # By its name: the SDK is free of torch, and whoever has gradients has it.
    return importlib.import_module("torch.nn.utils").get_total_norm(given)


def samples_in(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch, None when there is none."""
    if hasattr(batch, "shape"):
        return int(batch.shape[0]) if len(batch.shape) else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for each in parts if (count := samples_in(each)) is not None), None)
