from __future__ import annotations

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.tolaria.aggregation.layer_norms import SeedGradients


class GrowingSeeds:
    """The seeds of a host that grow, as Tolaria looks at them. For the training thread."""

    def __init__(self, host: InProcessSeedHost) -> None:
        self._host = host

    def growing(self) -> list[SeedGradients]:
        """Return them in the order of their sites, with the gradients that are there at present."""
        return [_gradients(slot) for slot in self._host.seeds.values() if slot.stage in lifecycle.LIVE]


def _gradients(slot: SeedSlot) -> SeedGradients:
    module = slot.site.seed
    named = () if module is None else module.named_parameters()
    stage = SeedLifecycleStage.Name(slot.stage).removeprefix("SEED_LIFECYCLE_STAGE_")
    return SeedGradients(slot.seed_id, stage, [(name, each.grad) for name, each in named if each.grad is not None])
