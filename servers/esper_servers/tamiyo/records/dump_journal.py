from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from esper_rpc import page_token
from esper_rpc.errors import NotFound
from esper_rpc.journal import Entry, Forgotten, ForgottenBefore, Journal, Record
from esper_rpc.proto.tamiyo.v1 import DumpedStep, RecordedStep, StepDump

from . import recorded_step
from .flight_recorder import AnsweredStep

DUMP, STEP, WRITTEN = "step_dump", recorded_step.KIND, "step_dump_written"
MOST_DUMPS = 16
READ_AT_ONCE = 256
MOST_BETWEEN = 4096
"""Steps of other dumps that may stand between two of one: some parts of each of the processes that there may be."""


class DumpJournal:
    """Dumps of steps in the journal. Every method waits for the disk.

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
        own = list(itertools.islice(self._steps_of(dump_id, max(head, after)), size + 1))
        steps = [recorded_step.summary_of(step) for _, step in own[:size]]
        return steps, page_token.write(STEP, own[size - 1][0]) if len(own) > size else ""

    def _steps_of(self, dump_id: str, after: int) -> Iterator[tuple[int, RecordedStep]]:
        """Steps of a dump with their positions; those of dumps that other processes wrote meanwhile stand between."""
        foreign = 0
        while foreign < MOST_BETWEEN and (found := self._journal.page(STEP, after=after, limit=READ_AT_ONCE)):
            for position, record in found:
                step = RecordedStep.FromString(record.body)
                foreign = 0 if step.dump_id == dump_id else foreign + 1
                if not foreign:
                    yield position, step
            after = found[-1][0]

    def _written(self, dump_ids: Collection[str]) -> dict[str, int]:
        found = self._journal.find_all(WRITTEN, dump_ids)
        return {dump_id: int(found[dump_id].body) if dump_id in found else 0 for dump_id in dump_ids}
