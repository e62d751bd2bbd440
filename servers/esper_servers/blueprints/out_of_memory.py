from __future__ import annotations

import torch

OUT_OF_MEMORY = "out_of_memory"
_CPU_ALLOCATOR = "not enough memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on an accelerator, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in told or _CPU_ALLOCATOR in told)


def describe(error: BaseException) -> str:
    """Say what a seed died of; it begins with OUT_OF_MEMORY where that was it."""
    told = f"{type(error).__name__}: {error}"
    return f"{OUT_OF_MEMORY}: {told}" if is_out_of_memory(error) else told
