from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

import structlog
import torch
from torch import nn

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.kernel import KernelRejected, instantiate

from . import gates
from .kernel_library import Kernel
from .seed_slot import SeedSlot
from .site import Site

log = structlog.get_logger(__name__)

BUILD_FAILED = "build_failed"
SHAPE_MISMATCH = "shape_mismatch"


class Nursery:
    """Makes modules of kernels and plants those that can serve at their site."""

    def __init__(self, *, factories: Mapping[str, BlueprintFactory], max_parameters: int) -> None:
        self._factories = factories
        self._max_parameters = max_parameters

    def plant(self, slot: SeedSlot, command: AdaptationCommand, kernel: Kernel, seeds: Iterable[SeedSlot]) -> str:
        """Plant a kernel; why that cannot be, empty when it was done."""
        try:
            module = self._build(slot.site, kernel, seed=uuid.UUID(command.command_id).int)
            reason = _trial(module, slot.site)
        except KernelRejected as rejected:
            return rejected.reason
        except Exception as error:  # noqa: BLE001  # A blueprint is foreign code; whatever it raises, the training goes on.
            log.warning("blueprint_failed", seed_id=slot.seed_id, error=str(error))
            return BUILD_FAILED
        if self._is_too_big(module, seeds):
            return reasons.LOCAL_LIMIT
        if not reason:
            _plant(slot, module, kernel)
        return reason

    def _build(self, site: Site, kernel: Kernel, *, seed: int) -> nn.Module:
        return instantiate(
            kernel.blueprint.manifest,
            self._factories,
            feature_shape=site.output_shape,
            dtype=site.dtype,
            device=site.device,
            weights=kernel.weights,
            seed=seed,
        )

    def _is_too_big(self, module: nn.Module, seeds: Iterable[SeedSlot]) -> bool:
        added = sum(p.numel() for p in module.parameters()) + sum(slot.parameter_count for slot in seeds)
        return added > self._max_parameters


def _plant(slot: SeedSlot, module: nn.Module, kernel: Kernel) -> None:
    blueprint = kernel.blueprint
    slot.plant(module, blueprint.descriptor.blueprint_id, blueprint.extras_digest)
    slot.manifest = blueprint.manifest.SerializeToString()
    slot.risk = blueprint.descriptor.risk


def _trial(module: nn.Module, site: Site) -> str:
    """Run a new module once; why it cannot serve at this site, empty when it can."""
    h = torch.zeros((2, *site.output_shape), dtype=site.dtype, device=site.device)
    module.eval()
    with torch.no_grad():
        s = module(h)
    if s.shape != h.shape:
        return SHAPE_MISMATCH
    return "" if bool(torch.isfinite(s).all()) else gates.NOT_FINITE
