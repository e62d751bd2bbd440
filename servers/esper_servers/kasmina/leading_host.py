from __future__ import annotations

import math
from typing import Any

import structlog

from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.leyline.v1 import CommandOutcome, TelemetryPacket

from .host import InProcessSeedHost
from .learning_rate import LearningRateAuthority
from .lockstep import Lockstep
from .mirroring import Announcer, RecordedAuthority
from .ranks import Ranks, together

log = structlog.get_logger(__name__)


class LeadingSeedHost(InProcessSeedHost):
    """The seed host of the first of several ranks: it verifies, judges and decides, and the others do as it did.

    However a step goes here it ends by telling the others, lest they wait. Only OutOfStep passes.
    """

    def __init__(self, *, ranks: Ranks, learning_rate: LearningRateAuthority, **options: Any) -> None:
        authority = RecordedAuthority(learning_rate)
        super().__init__(learning_rate=authority, **options)
        self._ranks = ranks
        self._lockstep = Lockstep(ranks, self.seeds)
        self._announcer = Announcer(self.seeds, authority, self._lockstep)
        self._observed = (math.nan, 0)
        self._is_applying = False

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
        try:
            return super().finalize_step(step_index)
        except Exception as error:  # The others wait for what follows.
            log.error("step_not_finalized", exc_info=error)
            return []
        finally:
            with together(), self._lock:
                self._ranks.share(self._announcer.compose())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every rank must."""
        super().load_state_dict(state)
        self._announcer.settle()
