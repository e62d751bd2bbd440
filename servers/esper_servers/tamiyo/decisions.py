from __future__ import annotations

from esper_rpc.errors import NotFound
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse, StepLedger

KIND = "decision"


class DecisionLog:
    """Keeps the record of every command in the journal; writing never waits for the disk."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def record(
        self,
        command: AdaptationCommand,
        packet: SystemStatePacket,
        reason: str,
        policy_version: str,
        ledger: StepLedger,
    ) -> None:
        """Queue a record."""
        record = ExplainDecisionResponse(
            command=command, packet=packet, reason=reason, policy_version=policy_version, ledger=ledger
        )
        self._journal.append(KIND, command.command_id, record.SerializeToString())

    def explain(self, command_id: str) -> ExplainDecisionResponse:
        """Return the record of a command; raises NotFound. Waits for the disk: keep it off the step path."""
        self._journal.flush()
        record = self._journal.find(KIND, command_id)
        if record is None:
            raise NotFound(f"There is no decision {command_id!r}.")
        return ExplainDecisionResponse.FromString(record.body)
