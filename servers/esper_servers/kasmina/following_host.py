from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from esper_servers.blueprints.catalogue import BlueprintFactory

from .checkpoint import Checkpoint
from .export import without_sites
from .learning_rate import LearningRateAuthority
from .lockstep import Lockstep
from .mirroring import Mirror
from .progress import Progress
from .ranks import Ranks, together
from .seed_slot import SeedSlot
from .site import Site


class FollowingSeedHost:
    """The seeds of every rank but the first. It hears of no command, only of what the first rank has done."""

    def __init__(
        self,
        *,
        model: nn.Module,
        sites: Mapping[str, Site],
        factories: Mapping[str, BlueprintFactory],
        learning_rate: LearningRateAuthority,
        ranks: Ranks,
    ) -> None:
        self._model, self._sites, self._ranks = model, dict(sites), ranks
        self.seeds = {
            f"seed-{site_id}": SeedSlot(seed_id=f"seed-{site_id}", site_id=site_id, site=site, depth=depth)
            for depth, (site_id, site) in enumerate(sites.items())
        }
        self._progress = Progress()
        self._lockstep = Lockstep(ranks, self.seeds)
        self._mirror = Mirror(self.seeds, learning_rate, self._lockstep, factories)
        self._checkpoint = Checkpoint(
            seeds=self.seeds, factories=factories, learning_rate=learning_rate, progress=self._progress
        )

    def step(self, loss: float, global_step: int) -> None:
        """End a training step together with the other ranks; raises OutOfStep when they are gone."""
        with together():
            self._progress.observe(self._lockstep.meet(loss), global_step)
            self._mirror.follow(self._ranks.share())

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers: on every rank the same."""
        return self._checkpoint.save()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every rank must. Raises as InProcessSeedHost does."""
        self._checkpoint.restore(state)
        self._lockstep.measure()

    def export(self) -> nn.Module:
        """Return a plain copy, as the first rank does."""
        return without_sites(self._model, self._sites.values())
