"""What the demo says of commands at the host."""

from __future__ import annotations

from esper_servers.cli.demo.report import _count_outcomes


def test_outcomes_are_counted_by_what_was_asked_as_far_as_that_is_known():
    rows = [
        (1, "seed-0", "GERMINATE", "QUEUED", ""),
        (1, "seed-0", "GERMINATE", "APPLIED", ""),
        (2, "seed-0", "CULL", "REJECTED", "stale_command"),
        (3, "", "UNSPECIFIED", "APPLIED", ""),
        (4, "", "UNSPECIFIED", "LATE", ""),
        (5, "", "UNSPECIFIED", "LATE", ""),
    ]
    assert _count_outcomes(rows) == {
        "command late": 2, "cull rejected stale_command": 1, "germinate applied": 1, "pause or optimizer applied": 1,
    }  # fmt: skip
