from __future__ import annotations

from structlog.testing import capture_logs

from esper_rpc.telemetry.events import listen
from esper_servers.kasmina.telemetry.notices import CRITICAL, ERROR, INFO, LONGEST_DETAIL, TOLD_EACH, WARNING, Notices


def test_what_happened_is_told_once_with_reason_priority_and_step():
    notices = Notices()
    notices.tell("pause", INFO, reason="commanded", seed_id="a", units=5)
    [event] = notices.take(7)
    assert (event.description, event.level) == ("pause", INFO)
    assert dict(event.attributes) == {
        "reason": "commanded", "priority": "NORMAL", "seed_id": "a", "units": "5", "step_index": "7",
    }  # fmt: skip
    assert notices.take(8) == []


def test_what_is_not_in_order_is_logged_at_once():
    notices = Notices()
    with capture_logs() as told:
        for name, level in (("pause", INFO), ("fallback_applied", WARNING), ("emergency_cleanup", ERROR)):
            notices.tell(name, level, reason="r")
    assert [(entry["event"], entry["log_level"], entry["priority"]) for entry in told] == [
        ("fallback_applied", "warning", "NORMAL"),
        ("emergency_cleanup", "error", "HIGH"),
    ]


def test_a_flood_is_bounded_and_the_rest_is_counted_by_name():
    notices = Notices()
    for number in range(TOLD_EACH + 3):
        notices.tell("parameter.registration" if number < TOLD_EACH else "pause", INFO, reason="x" * 1000)
    *first, rest = notices.take(1)
    assert len(first) == TOLD_EACH
    assert {len(event.attributes["reason"]) for event in first} == {LONGEST_DETAIL}
    assert (rest.description, rest.attributes["count"]) == ("pause", "3")


def test_what_is_critical_waits_for_no_step():
    notices, packets = Notices(), []
    stop = listen(packets.append)
    notices.tell("isolation_violations", CRITICAL, reason="breaker_open", seed_id="a")
    stop()
    [packet] = packets
    assert (packet.source_subsystem, packet.level) == ("kasmina", CRITICAL)
    assert packet.events[0].attributes["seed_id"] == "a"
    assert packet.events[0].attributes["priority"] == "CRITICAL"
    assert [event.event_id for event in notices.take(1)] == [packet.packet_id]
