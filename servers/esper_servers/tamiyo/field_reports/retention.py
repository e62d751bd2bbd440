from __future__ import annotations

import itertools
from collections.abc import Iterator

from esper_rpc.proto.leyline.v1 import FieldReport

from .report_journal import ReportJournal

AT_ONCE = 512
AGE, NUMBER = "retention", "journal"


def prune(journal: ReportJournal, *, before_ns: int, most: int) -> list[tuple[FieldReport, str]]:
    """Take out what is older than a time and, oldest first, what is too much; returns what nobody acknowledged.

    Waits for the disk.
    """
    unacknowledged: list[tuple[FieldReport, str]] = []
    while found := list(itertools.islice(_superfluous(journal, before_ns, journal.count() - most), AT_ONCE)):
        journal.forget([report.report_id for report, _, _ in found])
        if journal.holds(found[0][0].report_id):
            break  # The disk is full; there is another time.
        unacknowledged += [(report, reason) for report, acknowledged, reason in found if not acknowledged]
    return unacknowledged


def _superfluous(journal: ReportJournal, before_ns: int, excess: int) -> Iterator[tuple[FieldReport, bool, str]]:
    for number, (report, acknowledged) in enumerate(journal.oldest()):
        is_old = report.issued_at.ToNanoseconds() < before_ns
        if not is_old and number >= excess:
            return
        yield report, acknowledged, AGE if is_old else NUMBER
