from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from esper_rpc.proto.kasmina.v1 import GateEvent, GateResult, RollbackPayload, SeedEvent
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedLifecycleGate, SeedLifecycleStage
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.gates.report import FAILED
from esper_servers.kasmina.progress import Progress
from esper_servers.kasmina.seed_slot import SeedSlot

from .notices import INFO, WARNING, Tell, tell_nobody
from .rejections import Rejections

REMEMBERED_OUTCOMES = 64

Listener = Callable[[SeedEvent | None], None]
"""Gets None when the host closes."""


class SeedEvents:
    """Tells listeners what happens to seeds, and remembers the last outcomes."""

    def __init__(self, seeds: Mapping[str, SeedSlot], progress: Progress, tell: Tell = tell_nobody) -> None:
        self._seeds = seeds
        self._telemetry = tell
        self._progress = progress
        self._listeners: list[Listener] = []
        self.outcomes: deque[CommandOutcome] = deque(maxlen=REMEMBERED_OUTCOMES)
        self.rejections = Rejections()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function at every event, from whatever thread it happens in; returns how to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def moved(
        self,
        slot: SeedSlot,
        before: SeedLifecycleStage.ValueType,
        reason: str,
        command_id: str = "",
        rollback: RollbackPayload | None = None,
    ) -> None:
        """Tell that a seed has left a stage, or begun anew in the one it is in."""
        self._telemetry(
            "seed_stage", INFO, reason=reason, seed_id=slot.seed_id, stage=_name(slot.stage), before=_name(before)
        )
        self._tell(
            SeedEvent(
                seed_id=slot.seed_id,
                from_stage=before,
                to_stage=slot.stage,
                reason=reason,
                command_id=command_id,
                rollback=rollback,
            )
        )

    def judged(self, slot: SeedSlot, gate: GateEvent, command_id: str) -> None:
        """Tell how a seed stood before a gate."""
        self._tell(
            SeedEvent(
                seed_id=slot.seed_id, from_stage=slot.stage, to_stage=slot.stage, reason=gate.reason,
                command_id=command_id, gate=gate,
            )
        )  # fmt: skip
        result = GateResult.Name(gate.result).removeprefix("GATE_RESULT_")
        name = SeedLifecycleGate.Name(gate.gate).removeprefix("SEED_LIFECYCLE_GATE_")
        level = WARNING if gate.result == FAILED else INFO
        reason = gate.reason or "passed"
        self._telemetry("gate_event", level, reason=reason, seed_id=slot.seed_id, gate=name, result=result)

    def settled(self, outcome: CommandOutcome) -> CommandOutcome:
        """Remember what became of a command, and tell it."""
        self.outcomes.append(outcome)
        if outcome.result == CommandOutcome.RESULT_REJECTED:
            self.rejections.note(outcome)
        slot = self._seeds.get(outcome.seed_id)
        stage = slot.stage if slot is not None else lifecycle.DORMANT
        self._tell(
            SeedEvent(
                seed_id=outcome.seed_id, from_stage=stage, to_stage=stage, reason=outcome.reason,
                command_id=outcome.command_id, outcome=outcome,
            )
        )  # fmt: skip
        return outcome

    def close(self) -> None:
        """Tell listeners that nothing more will happen."""
        for listener in list(self._listeners):
            listener(None)
        self._listeners.clear()

    def _tell(self, event: SeedEvent) -> None:
        if not self._listeners:
            return
        event.global_step = self._progress.global_step
        event.occurred_at.GetCurrentTime()
        for listener in list(self._listeners):
            listener(event)


def _name(stage: SeedLifecycleStage.ValueType) -> str:
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_LIFECYCLE_STAGE_")
