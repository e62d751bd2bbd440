from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

from esper_rpc.errors import FailedPrecondition, NotFound
from esper_rpc.journal import Journal, JournalReader, Record
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse, RecordedStep, RunStructure
from esper_servers.policy.graph import RunGraph

from . import recorded_step
from .evidence import Evidence
from .structure import digest_of, write_structure

KIND = "decision"
STRUCTURE = "structure"


class DecisionRecords:
    """Reads the records of decisions, and what their graphs were built from, as far as they are on the disk."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader

    def explain(self, key: str) -> ExplainDecisionResponse:
        """Return the record of a command or, by `key_of_step`, of a step; raises NotFound.

        Of a step that has none a dump of the last steps may still tell what came and what was answered.
        """
        found = self._recorded(key) or self._dumped(key)
        if found is None:
            raise NotFound(f"There is no decision {key!r}.")
        return found

    def structure(self, digest: bytes) -> RunStructure:
        """Return what a graph was built from; raises FailedPrecondition when the journal dropped it."""
        record = self._reader.find(STRUCTURE, digest.hex())
        if record is None:
            raise FailedPrecondition(
                "The journal no longer holds the structure of this decision's run.", reason="NOT_REPLAYABLE"
            )
        return RunStructure.FromString(record.body)

    def _recorded(self, key: str) -> ExplainDecisionResponse | None:
        record = self._reader.find(KIND, key)
        return ExplainDecisionResponse.FromString(record.body) if record is not None else None

    def _dumped(self, key: str) -> ExplainDecisionResponse | None:
        record = self._reader.find(recorded_step.KIND, key)
        if record is None:
            return None
        dumped = recorded_step.explanation_of(RecordedStep.FromString(record.body))
        # The record of a command is found by the identifier of the command only.
        return self._recorded(dumped.command.command_id) or dumped


class DecisionLog(DecisionRecords):
    """Keeps records of decisions in the journal, and beside it once what each graph was built from."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal)
        self._journal = journal
        # Only the journal's writer looks at it.
        self._digests: WeakKeyDictionary[RunGraph, bytes] = WeakKeyDictionary()

    def record(self, evidence: Evidence) -> None:
        """Have a record written down on the journal's thread, together with others; `hand_over` bounds how long."""
        self._journal.append_made(partial(self._records, evidence), may_wait=True)

    async def hand_over(self) -> None:
        """Have what waits for company written down; to be called again and again."""
        self._journal.hand_over()

    def flush(self) -> None:
        """Wait until everything that was recorded is on the disk."""
        self._journal.flush()

    def explain(self, key: str) -> ExplainDecisionResponse:
        """As of `DecisionRecords`. Waits for the disk: keep it off the step path."""
        self.flush()
        return super().explain(key)

    def _records(self, evidence: Evidence) -> list[Record]:
        digest, records = self._digests.get(evidence.graph), []
        # The journal drops what is oldest, so a structure that is still in use may have to be written again.
        if digest is None or not self._journal.holds(STRUCTURE, digest.hex()):
            body = write_structure(evidence.request, evidence.graph)
            digest = self._digests[evidence.graph] = digest_of(body)
            if not self._journal.holds(STRUCTURE, digest.hex()):
                records.append(Record(STRUCTURE, digest.hex(), body))
        body = evidence.record(digest).SerializeToString()
        return [*records, Record(KIND, evidence.key, body)]
