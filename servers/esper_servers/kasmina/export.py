from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import lifecycle
from .site import Site


def without_sites(model: nn.Module, sites: Iterable[Site]) -> nn.Module:
    """Return a plain copy: each site is its host, followed by its seed if that is fossilised.

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
    seed = torch.fx.symbolic_trace(copy.deepcopy(site.seed))
    seed.train(site.training)
    return nn.Sequential(host, seed)
