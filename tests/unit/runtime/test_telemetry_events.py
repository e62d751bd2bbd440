from __future__ import annotations

import pytest
import structlog
from prometheus_client import REGISTRY

from esper_rpc.proto.leyline.v1 import MessagePriority as Priority
from esper_rpc.proto.leyline.v1 import TelemetryLevel as Level
from esper_rpc.telemetry.events import EMERGENCY_LANE, PRIORITY_OF, listen, tell_event


def test_every_severity_has_a_priority_and_only_what_failed_or_endangers_takes_the_emergency_lane():
    assert set(PRIORITY_OF) == set(Level.values()) - {Level.TELEMETRY_LEVEL_UNSPECIFIED}
    assert {Priority.MESSAGE_PRIORITY_HIGH, Priority.MESSAGE_PRIORITY_CRITICAL} == EMERGENCY_LANE
    urgent = {level for level, priority in PRIORITY_OF.items() if priority in EMERGENCY_LANE}
    assert urgent == {Level.TELEMETRY_LEVEL_ERROR, Level.TELEMETRY_LEVEL_CRITICAL}


@pytest.mark.parametrize(
    ("level", "name", "priority"),
    [
        (Level.TELEMETRY_LEVEL_INFO, "info", "NORMAL"),
        (Level.TELEMETRY_LEVEL_WARNING, "warning", "NORMAL"),
        (Level.TELEMETRY_LEVEL_ERROR, "error", "HIGH"),
        (Level.TELEMETRY_LEVEL_CRITICAL, "critical", "CRITICAL"),
    ],
)
def test_an_event_is_a_packet_of_leyline_a_line_of_the_log_and_a_count(level, name, priority):
    labels = {"level": name.upper(), "source": "tamiyo"}
    before = REGISTRY.get_sample_value("esper_telemetry_events_total", labels) or 0
    with structlog.testing.capture_logs() as logs:
        packet = tell_event("tamiyo", "loss_spike", level, reason="loss_spike", step_index=7, run_id="run", score=0.5)
    (event,) = packet.events
    assert (packet.source_subsystem, packet.level, event.level, event.description) == (
        "tamiyo", level, level, "loss_spike",
    )  # fmt: skip
    indicators = {"reason": "loss_spike", "priority": priority, "step_index": "7", "run_id": "run", "score": "0.5"}
    assert dict(event.attributes) == indicators
    assert [(e["event"], e["log_level"], e["priority"], e["step_index"]) for e in logs] == [
        ("loss_spike", name, priority, 7)
    ]
    assert REGISTRY.get_sample_value("esper_telemetry_events_total", labels) == before + 1


def test_whoever_listens_gets_every_event_until_it_stops():
    heard = []
    stop = listen(heard.append)
    told = [tell_event("tamiyo", "loss_spike", level, reason="loss_spike") for level in PRIORITY_OF]
    stop()
    stop()
    tell_event("tamiyo", "loss_spike", Level.TELEMETRY_LEVEL_ERROR, reason="loss_spike")
    assert heard == told
