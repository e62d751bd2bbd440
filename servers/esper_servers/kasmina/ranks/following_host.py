from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson
from torch import Tensor, nn

from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.kasmina.checkpoint import Checkpoint
from esper_servers.kasmina.export import without_sites
from esper_servers.kasmina.learning_rate import RankAuthority
from esper_servers.kasmina.progress import Progress
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.kasmina.site import Site

from .lockstep import Lockstep, trained_tensors
from .mirroring import STANDING, Mirror
from .ranks import Ranks, together


class FollowingSeedHost:
    """The seeds of every rank but the first. It hears of no command, only of what the first rank has done."""

    def __init__(
        self,
        *,
        model: nn.Module,
        sites: Mapping[str, Site],
        factories: Mapping[str, BlueprintFactory],
        learning_rate: RankAuthority,
        ranks: Ranks,
    ) -> None:
        self._model, self._sites, self.ranks = model, dict(sites), ranks
        self.carry_out: Callable[[dict[str, Any]], None] = lambda _order: None
        """Carries out what the first rank orders between two steps."""
        self.seeds = {
            f"seed-{site_id}": SeedSlot(seed_id=f"seed-{site_id}", site_id=site_id, site=site, depth=depth)
            for depth, (site_id, site) in enumerate(sites.items())
        }
        self._progress = Progress()
        self._lockstep = Lockstep(ranks, self.seeds, learning_rate)
        self._mirror = Mirror(self.seeds, learning_rate, self._lockstep, factories)
        self._checkpoint = Checkpoint(
            seeds=self.seeds, factories=factories, learning_rate=learning_rate, progress=self._progress
        )

    def step(self, loss: float, global_step: int) -> None:
        """End a training step together with the other ranks; raises OutOfStep when they are gone."""
        with together():
            self._progress.observe(self._lockstep.meet(loss), global_step)
            if self._mirror.follow(self.ranks.share()):
                while told := self.ranks.share():
                    if (order := orjson.loads(told)) != STANDING:
                        self.carry_out(order)

    def stand(self) -> None:
        """Keep the other ranks waiting while this one stands still; to be called again and again. Raises OutOfStep."""
        self._lockstep.stand()

    def trained_tensors(self) -> Iterator[Tensor]:
        """Every number that must be the same on all ranks."""
        return trained_tensors(self.seeds.values())

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers: on every rank the same."""
        return self._checkpoint.save()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every rank must. Raises as InProcessSeedHost does."""
        self._checkpoint.restore(state)
        self._lockstep.measure()

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        self._checkpoint.check(state)

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore a state, as the first rank does in this step."""
        self.load_state_dict(state)

    def export(self) -> nn.Module:
        """Return a plain copy, as the first rank does."""
        return without_sites(self._model, self._sites.values())
