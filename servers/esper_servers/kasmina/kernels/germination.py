from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, MetricPoint
from esper_servers.kasmina.ownership import PARAMETER_VIOLATION, Ownership
from esper_servers.kasmina.seed_slot import SeedSlot

from .library import Kernel, KernelLibrary
from .prewarm import Prepared, Prewarmer


class Nursery:
    """Makes modules of kernels and plants those that can serve at their site."""

    def __init__(
        self, *, library: KernelLibrary, prewarmer: Prewarmer, ownership: Ownership, max_parameters: int
    ) -> None:
        self._library = library
        self._prewarmer = prewarmer
        self._ownership = ownership
        self._max_parameters = max_parameters

    def kernel_for(self, command: AdaptationCommand) -> Kernel | str | None:
        """Return the kernel of a command, or the reason why there is none, or None while it is on its way."""
        return self._library.get(command.seed_operation.blueprint_id)

    def module_for(self, slot: SeedSlot, command: AdaptationCommand, kernel: Kernel | str) -> Prepared | None:
        """Return the module of a command, or the reason why there is none, or None while it is being built."""
        if isinstance(kernel, Kernel):
            return self._prewarmer.module_for(command, slot.site, kernel)
        return Prepared(reason=kernel)

    def forget(self, command_id: str) -> None:
        """Let go of what was made for a command."""
        self._prewarmer.forget(command_id)

    def plant(self, slot: SeedSlot, prepared: Prepared) -> str:
        """Plant a module; why that cannot be, empty when it was done."""
        if prepared.module is None or prepared.kernel is None:
            return prepared.reason
        if self._is_too_big(prepared.module):
            return reasons.LOCAL_LIMIT
        if self._ownership.register_seed(slot.seed_id, prepared.module):
            return PARAMETER_VIOLATION
        _plant(slot, prepared.module, prepared.kernel)
        return ""

    def metrics(self) -> Iterator[MetricPoint]:
        """Yield what is known of kernels and of building modules."""
        yield from self._library.metrics()
        yield from self._prewarmer.metrics()

    def _is_too_big(self, module: nn.Module) -> bool:
        added = sum(p.numel() for p in module.parameters())
        return added + self._ownership.added_parameters > self._max_parameters


def _plant(slot: SeedSlot, module: nn.Module, kernel: Kernel) -> None:
    blueprint = kernel.blueprint
    slot.plant(module, blueprint.descriptor.blueprint_id, blueprint.extras_digest)
    slot.manifest = blueprint.manifest.SerializeToString()
    slot.risk = blueprint.descriptor.risk
