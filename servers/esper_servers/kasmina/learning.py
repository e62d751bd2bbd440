"""How a seed learns from its gradients, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SEED_LEARNING_RATE = 1e-3
_FUSED = ("cpu", "cuda")


def optimizer_of(parameters: Sequence[Tensor]) -> torch.optim.Optimizer | None:
    """Make the optimizer of a seed; None where nothing learns."""
    if not parameters:
        return None
    # All parameters in one call take a third of the time that they take one by one.
    is_fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(parameters, lr=SEED_LEARNING_RATE, fused=is_fused)


def learn(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with the gradients that are there, wherever the model was moved or cast to since the last one."""
    first = optimizer.param_groups[0]["params"][0]
    remembered = optimizer.state.get(first, {}).get("exp_avg", first)
    if (remembered.dtype, remembered.device) != (first.dtype, first.device):
        # It brings what is remembered to where the parameters are.
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def clip_gradients(parameters: Sequence[Tensor], most: float) -> float | None:
    """Scale gradients to a norm of at most this. Returns the norm that they had, None where there are none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    total = nn.utils.get_total_norm(gradients)
    norm = float(total)
    if norm > most:
        nn.utils.clip_grads_with_norm_(parameters, most, total)
    return norm
