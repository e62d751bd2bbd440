from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson
import structlog
from torch import Tensor

from esper_client.seed_host import OutOfStep
from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.leyline.v1 import CommandOutcome, TelemetryPacket
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.learning_rate import RankAuthority

from .lockstep import Lockstep, trained_tensors
from .mirroring import STANDING, Announcer, RecordedAuthority
from .ranks import Ranks, together

log = structlog.get_logger(__name__)


class LeadingSeedHost(InProcessSeedHost):
    """The seed host of the first of several ranks: it verifies, judges and decides, and the others do as it did.

    However a step goes here it ends by telling the others, lest they wait. Only OutOfStep passes.
    """

    def __init__(self, *, ranks: Ranks, learning_rate: RankAuthority, **options: Any) -> None:
        authority = RecordedAuthority(learning_rate)
        super().__init__(learning_rate=authority, **options)
        self.ranks = ranks
        self._lockstep = Lockstep(ranks, self.seeds, learning_rate)
        self._announcer = Announcer(self.seeds, authority, self._lockstep)
        self._observed = (math.nan, 0)
        self._is_applying = False
        self._between_steps: list[Callable[[], object]] = []
        self.before_parting: Callable[[], object] = lambda: None
        """Called after all of that; it may raise OutOfStep."""
        self.is_heard = False
        """Whether the others wait for `order` now."""
        self._has_told = False

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss of this rank; what the seeds are judged by is the mean over all."""
        self._observed = (loss, global_step)

    def apply_pending(self) -> list[CommandOutcome]:
        """Meet the other ranks, then carry out what is queued."""
        if self._is_applying:
            raise FailedPrecondition("Several ranks train this model: only their own loop ends a step.")
        loss, global_step = self._observed
        self._observed = (math.nan, global_step)
        mean = self._lockstep.meet(loss)
        self._is_applying = True
        try:
            self._progress.observe(mean, global_step)
            return super().apply_pending()
        except Exception as error:  # The others wait for the end of this step.
            log.error("commands_not_applied", exc_info=error)
            return []
        finally:
            self._is_applying = False

    def advance_alphas(self) -> None:
        """Move every blending seed one step on; the others get its alpha with the end of the step."""
        try:
            super().advance_alphas()
        except Exception as error:  # The others wait for the end of this step.
            log.error("alphas_not_advanced", exc_info=error)

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """End the step here, and tell the others how."""
        if self._is_applying:
            raise FailedPrecondition("Several ranks train this model: only their own loop ends a step.")
        packets: list[TelemetryPacket] = []
        try:
            packets = super().finalize_step(step_index)
        except Exception as error:  # The others wait for what follows.
            log.error("step_not_finalized", exc_info=error)
        with together():
            self._part()
        return packets

    def between_steps(self, work: Callable[[], object]) -> None:
        """Have work done at the end of every step, before the ranks part; it may `order`."""
        self._between_steps.append(work)

    def order(self, order: Mapping[str, Any]) -> None:
        """Have the other ranks carry something out, which ends their step as it ended here; raises OutOfStep."""
        if not self.is_heard:
            raise FailedPrecondition("The other ranks are amid a step; order between two.")
        with together():
            if not self._has_told:
                self._tell(is_last=False)
            self.ranks.share(orjson.dumps(order))

    def stand(self) -> None:
        """Keep the other ranks waiting while the run stands still; to be called again and again. Raises OutOfStep."""
        if not self.is_heard:
            self._lockstep.stand()
        elif self._lockstep.must_beat():
            self.order(STANDING)

    def trained_tensors(self) -> Iterator[Tensor]:
        """Every number that must be the same on all ranks."""
        return trained_tensors(self.seeds.values())

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore a state; the other ranks must do so too, in this step."""
        super().roll_back(state)
        self._announcer.settle()

    def _part(self) -> None:
        """Do what is due between two steps, and let the others go on."""
        self.is_heard, self._has_told = True, False
        for work in (*self._between_steps, self.before_parting):
            try:
                work()
            except OutOfStep:
                raise
            except Exception as error:  # The others wait for what follows.
                log.error("work_between_steps_failed", exc_info=error)
        self.is_heard = False
        if self._has_told:
            self.ranks.share()
        else:
            self._tell(is_last=True)

    def _tell(self, *, is_last: bool) -> None:
        self._has_told = True
        with self._lock:
            told = self._announcer.compose(is_last=is_last)
        self.ranks.share(told)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every rank must."""
        super().load_state_dict(state)
        self._announcer.settle()
