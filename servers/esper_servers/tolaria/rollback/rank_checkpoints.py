from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog
from torch import Tensor

from esper_rpc.proto.leyline.v1 import EmergencyLevel
from esper_servers.tolaria.state.snapshot_cache import SnapshotCache
from esper_servers.tolaria.state.training_state import (
    RANDOM,
    RANKS,
    RandomNumbers,
    Stateful,
    TrainingState,
    first_not_finite,
)

from .fingerprint import fingerprint
from .participants import Counters, SeedHost, SeedHostParticipant, TrainingParticipant
from .rank_exchange import (
    ABORT,
    BROKEN,
    COMMIT,
    COMPARE,
    CONFIRM,
    KEEP,
    LACKING,
    PREPARE,
    READY,
    UNABLE,
    Ranks,
    collect,
    compare,
    pack,
    receive,
    require_all,
    unpack,
)
from .rollback import FAST, Participant, RollbackOrder

_UNSPECIFIED = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED
log = structlog.get_logger(__name__)


class RankCheckpoints:
    """The checkpoints of every rank but the first, which decides when they are made and when to go back to them."""

    def __init__(
        self,
        state: TrainingState,
        *,
        session: Counters,
        host: SeedHost,
        ranks: Ranks,
        trained: Callable[[], Iterable[Tensor]],
        cache: SnapshotCache,
    ) -> None:
        self._state = state
        self._ranks = ranks
        self._trained = trained
        self._cache = cache
        self._members: Sequence[Participant] = (SeedHostParticipant(session, host), TrainingParticipant(state))
        self._order: RollbackOrder | None = None
        self._is_broken = False

    def register(self, name: str, part: Stateful) -> None:
        """Have a scheduler, a scaler, a data loader saved and restored too, as on the first rank."""
        self._state.register(name, part)

    def snapshot(self, *, epoch: int, step: int) -> None:
        """Copy the state of this rank, as the first one does at the same place of its loop."""
        self._take(epoch, step)

    def save(self, *, epoch: int, step: int) -> None:
        """Copy the state of this rank; the first one writes its own to the disk."""
        self._take(epoch, step)

    def resume(self) -> None:
        """Restore what the first rank resumes from, when it does so.

        Raises FailedPrecondition when a rank cannot.
        """
        received = receive(self._ranks)
        if received is not None:
            require_all(self._ranks.each(self._answer(0, 0, self._own(received))))
            self._state.restore(self._own(received))

    def carry_out(self, order: Mapping[str, Any]) -> None:
        """Do what the first rank ordered; raises OutOfStep when the ranks have come apart."""
        work: dict[str, Callable[[Mapping[str, Any]], None]] = {
            KEEP: self._keep, PREPARE: self._prepare, COMMIT: self._commit, CONFIRM: self._confirm,
            ABORT: self._abort, COMPARE: lambda _: compare(self._ranks, fingerprint(self._trained())),
        }  # fmt: skip
        work[order["do"]](order)

    def _keep(self, order: Mapping[str, Any]) -> None:
        collect(self._ranks, self._take(order["epoch"], order["step"]))

    def _take(self, epoch: int, step: int) -> bytes:
        """Copy the state, and return what of it is this rank's own."""
        try:
            state = self._state.capture()
            if not first_not_finite(state):
                self._cache.take(state, epoch=epoch, step=step)
            return pack(self._state.own(state))
        except Exception as error:  # noqa: BLE001  # Without a copy of its own it gets that of the first rank.
            log.error("snapshot_not_taken_on_this_rank", step=step, error=str(error))
            return b""

    def _prepare(self, order: Mapping[str, Any]) -> None:
        epoch, step, tier = order["epoch"], order["step"], order["tier"]
        snapshot = self._cache.find(step) if tier == FAST else None
        state = snapshot.state if snapshot is not None and (snapshot.epoch, snapshot.step) == (epoch, step) else None
        answers = self._ranks.each(LACKING if state is None else self._answer(epoch, step, state))
        if LACKING not in answers or UNABLE in answers:
            return
        received = receive(self._ranks)
        if state is None and received is not None:
            state = self._own(received)
        self._ranks.each(UNABLE if state is None else self._answer(epoch, step, state))

    def _own(self, received: Mapping[str, Any]) -> dict[str, Any]:
        """Put what is this rank's own in its place; what is not known stays as it is."""
        packed = received.get(RANKS, {}).get(str(self._ranks.rank))
        own = unpack(packed) if packed is not None else {RANDOM: RandomNumbers().state_dict()}
        return {**received, **own}

    def _answer(self, epoch: int, step: int, state: Mapping[str, Any]) -> float:
        """Say whether it can go back to a state, and remember that."""
        self._order = RollbackOrder(epoch, step, "", "", _UNSPECIFIED, state)
        try:
            refusal = next(
                (vote.reason for member in self._members if not (vote := member.prepare(self._order)).agrees), ""
            )
        except Exception as error:  # noqa: BLE001  # Whatever it is, the others wait for the answer.
            refusal = str(error) or type(error).__name__
        if refusal:
            log.error("rollback_refused_on_this_rank", step=step, reason=refusal)
        return UNABLE if refusal else READY

    def _commit(self, _: Mapping[str, Any]) -> None:
        assert self._order is not None
        self._is_broken = True
        try:
            for member in self._members:
                member.commit(self._order)
            self._is_broken = False
        except Exception as error:  # noqa: BLE001  # The first rank hears of it in CONFIRM.
            log.error("rollback_failed_on_this_rank", step=self._order.step, error=str(error))
        self._cache.forget_after(self._order.step)

    def _confirm(self, _: Mapping[str, Any]) -> None:
        self._order = None
        self._ranks.each(BROKEN if self._is_broken else fingerprint(self._trained()))

    def _abort(self, _: Mapping[str, Any]) -> None:
        self._order = None
