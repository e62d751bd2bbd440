from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from esper_rpc import page_token
from esper_rpc.errors import NotFound
from esper_rpc.journal import Entry, Forgotten, ForgottenBefore, Journal, Record
from esper_rpc.proto.tamiyo.v1 import DumpedStep, RecordedStep, StepDump

from . import recorded_step
from .flight_recorder import AnsweredStep

DUMP, STEP, WRITTEN = "step_dump", recorded_step.KIND, "step_dump_written"
MOST_DUMPS = 16
READ_AT_ONCE = 256


class DumpJournal:
    """Dumps of steps in the journal, one after the other. Every method waits for the disk.

    The head of a dump stands before its steps, so that a journal that drops its oldest records drops the head first.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def add(self, dump: StepDump, steps: Sequence[AnsweredStep], *, written: int) -> bool:
        """Write steps of a dump that holds `written`, all or none, its head first; False when the disk refused them."""
        holds = written + len(steps)
        entries: list[Entry] = [] if written else [Record(DUMP, dump.dump_id, dump.SerializeToString())]
        entries += (recorded_step.record_of(dump.dump_id, step) for step in steps)
        entries += [Forgotten(WRITTEN, dump.dump_id), Record(WRITTEN, dump.dump_id, str(holds).encode())]
        self._journal.append_made(lambda: entries)
        self._journal.flush()
        return self._written([dump.dump_id])[dump.dump_id] == holds

    def prune(self) -> None:
        """Let go of all dumps but the newest."""
        found = self._journal.page(DUMP, after=0, limit=READ_AT_ONCE)
        if len(found) > MOST_DUMPS:
            first, _ = found[-MOST_DUMPS]
            self._journal.append_made(lambda: [ForgottenBefore(kind, first) for kind in (DUMP, STEP, WRITTEN)])

    def page(self, size: int, token: str) -> tuple[list[StepDump], str]:
        """Return dumps, oldest first, and the token of the next page; raises InvalidRequest for a token not of here."""
        found = self._journal.page(DUMP, after=page_token.read(token, DUMP), limit=size + 1)
        dumps = [StepDump.FromString(record.body) for _, record in found[:size]]
        written = self._written([dump.dump_id for dump in dumps])
        for dump in dumps:
            dump.written = written[dump.dump_id]
        return dumps, page_token.write(DUMP, found[size - 1][0]) if len(found) > size else ""

    def steps(self, dump_id: str, size: int, token: str) -> tuple[list[DumpedStep], str]:
        """Return steps of a dump, oldest first, and the token of the next page; raises NotFound and InvalidRequest."""
        after = page_token.read(token, STEP)
        head = self._journal.position(DUMP, dump_id)
        if head is None:
            raise NotFound(f"There is no dump {dump_id!r}.")
        found = self._journal.page(STEP, after=max(head, after), limit=size + 1)
        recorded = ((position, RecordedStep.FromString(record.body)) for position, record in found)
        own = list(itertools.takewhile(lambda each: each[1].dump_id == dump_id, recorded))
        steps = [recorded_step.summary_of(step) for _, step in own[:size]]
        return steps, page_token.write(STEP, own[size - 1][0]) if len(own) > size else ""

    def _written(self, dump_ids: Collection[str]) -> dict[str, int]:
        found = self._journal.find_all(WRITTEN, dump_ids)
        return {dump_id: int(found[dump_id].body) if dump_id in found else 0 for dump_id in dump_ids}
