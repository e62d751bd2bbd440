from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import lifecycle
from .blending.mixing import Mixing
from .site import Site


class _Grown(nn.Module):
    """A fossil as a layer behind its host; exists to be traced."""

    def __init__(self, seed: nn.Module, mixing: Mixing) -> None:
        super().__init__()
        self.seed, self.mixing = seed, mixing

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.mixing(h, self.seed(h).to(h.dtype))
        return out


def without_sites(model: nn.Module, sites: Iterable[Site]) -> nn.Module:
    """Return a plain copy: each site is its host, followed by its seed if that is fossilised, mixed in as it stood.

    Seeds become torch.fx graphs of torch.nn modules, so that the copy loads where this package is not installed.
    """
    memo: dict[int, Any] = {}
    # Inner sites first: the copy of an outer host must find them replaced.
    for site in sorted(sites, key=lambda each: sum(1 for _ in each.host.modules())):
        memo[id(site)] = _plain(site, memo)
    return copy.deepcopy(model, memo)


def _plain(site: Site, memo: dict[int, Any]) -> nn.Module:
    host: nn.Module = copy.deepcopy(site.host, memo)
    if site.stage != lifecycle.FOSSILIZED or site.seed is None or site.failure:
        return host
    grown = torch.fx.symbolic_trace(_Grown(copy.deepcopy(site.seed), copy.deepcopy(site.seed_mixing)))
    for node in grown.graph.nodes:
        # Annotations that are strings cannot be pickled.
        node.type = None
    grown.recompile()
    grown.train(site.training)
    return nn.Sequential(host, grown)
