from __future__ import annotations

from collections import Counter, deque
from typing import Any, Self

import structlog

from esper_rpc.guard import StepGuard
from esper_rpc.ledger import TimingWindow
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import StepDecision, StepLedger

from .halt import HaltSwitch
from .session import SessionConfig
from .session.loss import BadArgument, read_epoch
from .session.training_session import StepListener

log = structlog.get_logger(__name__)


class QuietSession:
    """What a loop may look at in a session, of one that asks nobody: all of it is there, and nothing ever came."""

    is_connected = False
    policy_version = ""
    kasmina_address = ""
    streams_opened = 0
    apply_ms = 0.0
    finalize_ms = 0.0
    checkpoints: Any = None
    tolaria: Any = None

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id
        self.config = SessionConfig()
        self.epoch = 0
        self.global_step = 0
        self.halt = HaltSwitch()
        self.guard: StepGuard[StepDecision] = StepGuard()
        self.timings = TimingWindow()
        self.last_ledger = StepLedger()
        self.reasons: Counter[str] = Counter()
        self.outcomes: deque[CommandOutcome] = deque()

    @property
    def halted(self) -> bool:
        """Whether something in this process halted the run; the mesh does not."""
        return self.halt.check()

    def hold(self, timeout: float | None = None) -> bool:
        """Stay here while the run is halted; whether it may go on."""
        return self.halt.hold(timeout)

    def listen(self, listener: StepListener) -> None:
        """Do nothing: there are no packets."""

    def start_epoch(self, epoch: int) -> None:
        """Note that an epoch begins; what is no number of one is told, and that of before goes on."""
        try:
            self.epoch = read_epoch(epoch)
        except BadArgument as error:
            self.reasons["bad_argument"] += 1
            log.error("session_step_failed", problem=str(error))

    def close(self) -> None:
        """Do nothing: there is no connection. The model stays as it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
