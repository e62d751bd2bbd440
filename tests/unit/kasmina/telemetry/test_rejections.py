from __future__ import annotations

import threading

from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import CommandOutcome, SignedEnvelope, TelemetryLevel
from esper_rpc.telemetry import record_packets
from esper_servers.kasmina.telemetry.rejections import LONGEST_ID, TOLD_EACH, Rejections

WARNING = TelemetryLevel.TELEMETRY_LEVEL_WARNING


def outcome(reason="stale_command", command_id="c"):
    return CommandOutcome(result=CommandOutcome.RESULT_REJECTED, reason=reason, command_id=command_id)


def test_whoever_forges_an_envelope_does_not_choose_how_much_is_kept():
    rejections = Rejections()
    rejections.note(outcome(command_id="x" * 1_000_000))
    (event,) = rejections.take(1)
    assert event.attributes["command_id"] == "x" * LONGEST_ID


def test_a_rejection_is_an_event_by_its_name_alone_and_together():
    rejections = Rejections()
    for _ in range(TOLD_EACH + 2):
        rejections.note(outcome())
    events = rejections.take(7)
    assert {(event.description, event.level) for event in events} == {("command_rejected", WARNING)}
    assert events[-1].attributes["count"] == "2"


def test_rejections_of_many_threads_are_each_told_or_counted_once():
    rejections = Rejections()
    threads = [
        threading.Thread(target=lambda: [rejections.note(outcome()) for _ in range(500)], daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    events = []
    while any(thread.is_alive() for thread in threads):
        events += rejections.take(1)
    events += rejections.take(2)
    assert sum(int(event.attributes.get("count", 1)) for event in events) == 4000
    assert rejections.take(3) == []


def test_rejections_of_many_threads_are_counted_while_somebody_looks(rig):
    seen = rig.host.verifier.rejections
    threads = [
        threading.Thread(target=lambda: [rig.host.submit(SignedEnvelope()) for _ in range(200)], daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        dict(rig.host.verifier.rejections)
    assert rig.host.verifier.rejections == {reasons.MISSING_SIGNATURE: 1600}
    assert seen == {}


def test_a_forged_command_is_logged_once_and_reaches_the_metrics_of_the_trainer(rig):
    labels = {"level": "WARNING", "source": "kasmina"}
    before = REGISTRY.get_sample_value("esper_telemetry_events_total", labels) or 0
    with capture_logs() as told:
        for _ in range(TOLD_EACH):
            rig.host.submit(SignedEnvelope(nonce="forged"))
    record_packets(rig.host.finalize_step(1))
    assert REGISTRY.get_sample_value("esper_telemetry_events_total", labels) == before + TOLD_EACH
    assert [entry["reason"] for entry in told if entry["event"] == "envelope_rejected"] == [reasons.MISSING_SIGNATURE]
