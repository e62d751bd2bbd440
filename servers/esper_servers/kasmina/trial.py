from __future__ import annotations

import torch
from torch import nn

from .gates.health import NOT_FINITE
from .site import Site

SHAPE_MISMATCH = "shape_mismatch"


def trial(module: nn.Module, site: Site) -> str:
    """Run a module once on zeros; why it cannot serve at this site, empty when it can."""
    h = torch.zeros((2, *site.output_shape), dtype=site.dtype, device=site.device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            s = module(h)
    finally:
        module.train(was_training)
    if s.shape != h.shape:
        return SHAPE_MISMATCH
    return "" if bool(torch.isfinite(s).all()) else NOT_FINITE
