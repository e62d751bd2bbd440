from __future__ import annotations

import pytest

from esper_rpc.envelope import Rejected, reasons
from esper_rpc.envelope.emergency import MALFORMED, SIGNAL_TYPE, SignalVerifier
from esper_rpc.envelope.signing import sign
from esper_rpc.proto.leyline.v1 import EmergencyLevel, SignedEnvelope
from esper_servers.tolaria.emergency.escalation import EmergencyConfig
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, ELEVATED, HALT, NOTICE, RESPONSES, name_of

SECOND = 10**9


def test_every_level_of_leyline_has_a_response_and_the_name_of_the_design():
    assert {level for level in EmergencyLevel.values() if level} == set(RESPONSES)
    assert [(r.design_name, r.within_ms) for r in RESPONSES.values()] == [
        ("MINOR", 5000), ("MAJOR", 2000), ("SEVERE", 500), ("CRITICAL", 100),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("level", "is_halted", "is_conservative"),
    [(NOTICE, False, False), (ELEVATED, False, False), (CONSERVATIVE, False, True), (HALT, True, True)],
    ids=name_of,
)
def test_a_level_takes_effect_and_ends_when_it_is_lowered(ward, level, is_halted, is_conservative):
    ward.emergencies.alarm(level, "why")
    assert (ward.halt.is_engaged, ward.mode.is_active, ward.emergencies.level) == (is_halted, is_conservative, level)
    ward.emergencies.lower(NOTICE, "well")
    assert (ward.halt.is_engaged, ward.mode.is_active, ward.emergencies.level) == (False, False, NOTICE)


def test_a_lower_signal_leaves_the_level_and_is_told(ward):
    ward.emergencies.alarm(CONSERVATIVE, "bad")
    ward.emergencies.alarm(NOTICE, "less bad")
    assert ward.emergencies.level == CONSERVATIVE
    assert [signal.level for signal, _ in ward.announced] == [CONSERVATIVE, NOTICE]
    assert ward.emergencies.in_force[0].reason == "bad"


@pytest.mark.parametrize(("level", "priority"), [(NOTICE, "NORMAL"), (ELEVATED, "NORMAL"), (CONSERVATIVE, "HIGH"), (HALT, "CRITICAL")])  # fmt: skip
def test_from_conservative_on_an_emergency_takes_the_emergency_lane(ward, told, level, priority):
    ward.emergencies.alarm(level, "why")
    (found,) = [attributes for name, attributes in told if name == "emergency_signal"]
    assert (found["priority"], found["reason"], found["emergency"]) == (priority, "why", name_of(level))


def test_what_is_announced_is_verified_by_whoever_watches_runs(ward, keyring):
    ward.emergencies.alarm(HALT, "stop")
    _, envelope = ward.announced[0]
    for role in ("operator", "nissa", "weatherlight", "trainer"):
        watcher = SignalVerifier(
            keyring=keyring(role), audience="run", run_id="run-1", now_ns=lambda: ward.wall_ns, clock=ward.clock
        )
        found = watcher.verify(envelope)
        assert (found.signal.level, found.signal.run_id, found.issuer) == (HALT, "run-1", "trainer")


def test_a_signal_of_an_operator_is_obeyed_once(ward):
    envelope = ward.sealed(HALT)
    assert not ward.emergencies.receive(envelope, peer="p").reason
    assert ward.halt.is_engaged
    ward.emergencies.lower(NOTICE, "well")
    again = ward.emergencies.receive(envelope, peer="p")
    assert (again.reason, again.duplicate, ward.halt.is_engaged) == ("", True, False)


REFUSED = {
    "forged": ({"_mac": bytes(32)}, reasons.INVALID_SIGNATURE),
    "tampered": ({"_payload": b"\x10\x01"}, reasons.INVALID_SIGNATURE),
    "unsigned": ({"_mac": b""}, reasons.MISSING_SIGNATURE),
    "another key": ({"_key_id": "k9"}, reasons.UNKNOWN_KEY),
    "stale": ({"issued_at_ns": -61 * SECOND}, reasons.STALE_COMMAND),
    "from the future": ({"issued_at_ns": 6 * SECOND}, reasons.FUTURE_COMMAND),
    "of another run": ({"run_id": "run-2"}, reasons.WRONG_AUDIENCE),
    "about another run": ({"signal_run_id": "run-2"}, reasons.WRONG_AUDIENCE),
    "for another trainer": ({"audience": "spiffe://esper/trainer/other"}, reasons.WRONG_AUDIENCE),
    "an announcement sent back": ({"role": "trainer", "audience": "run"}, reasons.WRONG_AUDIENCE),
    "of Tamiyo": ({"role": "tamiyo"}, reasons.WRONG_ISSUER),
    "of Urza": ({"role": "urza"}, reasons.WRONG_ISSUER),
    "of another trainer": ({"role": "trainer"}, reasons.WRONG_ISSUER),
    "of another version": ({"signal_version": 2}, reasons.UNSUPPORTED),
    "a halt of weatherlight": ({"role": "weatherlight"}, reasons.LOCAL_LIMIT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_reason_and_changes_nothing(ward, name):
    changes, reason = REFUSED[name]
    envelope_changes = {key[1:]: value for key, value in changes.items() if key.startswith("_")}
    options = {key: value for key, value in changes.items() if not key.startswith("_")}
    if "issued_at_ns" in options:
        options["issued_at_ns"] += ward.wall_ns
    envelope = ward.sealed(HALT, **options)
    for key, value in envelope_changes.items():
        setattr(envelope, key, value)
    assert ward.emergencies.receive(envelope, peer="spiffe://esper/trainer/other").reason == reason
    assert (ward.halt.is_engaged, ward.emergencies.level, ward.announced) == (False, 0, [])
    assert ward.emergencies.verifier.rejections == {reason: 1}


def test_a_level_of_a_later_version_is_refused(ward):
    assert ward.signal(77).reason == reasons.UNSUPPORTED


def test_what_is_no_signal_under_a_good_signature_is_refused(ward, keyring):
    envelope = sign(
        b"\xff\xff", payload_type=SIGNAL_TYPE, keyring=keyring("operator"), audience="spiffe://esper/trainer/test",
        issued_at_ns=ward.wall_ns, nonce="n", run_id="run-1",
    )  # fmt: skip
    assert ward.emergencies.receive(envelope, peer="p").reason == MALFORMED


def test_a_signal_without_a_nonce_is_refused(ward, keyring):
    envelope = ward.sealed(NOTICE)
    blank = sign(
        envelope.payload, payload_type=SIGNAL_TYPE, keyring=keyring("operator"), audience=envelope.audience,
        issued_at_ns=ward.wall_ns, nonce="", run_id="run-1",
    )  # fmt: skip
    assert ward.emergencies.receive(blank, peer="p").reason == MALFORMED


def test_a_used_nonce_with_another_content_is_refused(ward):
    assert not ward.signal(NOTICE, nonce="n").reason
    assert ward.signal(HALT, nonce="n").reason == reasons.NONCE_REPLAYED
    assert not ward.halt.is_engaged


def test_what_was_accepted_is_remembered_for_longer_than_it_is_fresh(ward):
    envelope = ward.sealed(CONSERVATIVE)
    ward.emergencies.receive(envelope, peer="p")
    for seconds, reason, duplicate in ((59, "", True), (240, reasons.STALE_COMMAND, False), (60, reasons.STALE_COMMAND, False)):  # fmt: skip
        ward.clock.advance(seconds)
        ward.wall_ns += seconds * SECOND
        found = ward.emergencies.receive(envelope, peer="p")
        assert (found.reason, found.duplicate) == (reason, duplicate)


def test_a_clock_that_is_stepped_back_does_not_reopen_the_window(ward):
    envelope = ward.sealed(CONSERVATIVE)
    ward.emergencies.receive(envelope, peer="p")
    ward.clock.advance(200)
    ward.wall_ns -= 2 * SECOND
    assert ward.emergencies.receive(envelope, peer="p").duplicate


def test_too_many_signals_are_refused_and_push_none_out(ward, monkeypatch):
    monkeypatch.setattr("esper_rpc.envelope.fence.NonceStore.is_full", lambda _: True)
    assert ward.signal(HALT).reason == reasons.LOCAL_LIMIT


def test_a_calm_that_is_older_than_the_alarm_does_not_end_it(ward):
    calm = ward.sealed(NOTICE, lowers=True)
    ward.wall_ns += SECOND
    ward.signal(HALT)
    assert ward.emergencies.receive(calm, peer="p").reason == reasons.STALE_COMMAND
    assert ward.halt.is_engaged
    assert not ward.signal(NOTICE, lowers=True).reason
    assert not ward.halt.is_engaged


def test_the_trainer_of_the_run_may_send_a_signal_to_itself(ward):
    assert not ward.signal(HALT, role="trainer", peer="spiffe://esper/trainer/test").reason
    assert ward.halt.is_engaged


def test_weatherlight_halts_and_ends_a_halt_only_where_that_is_allowed(make_ward):
    allowing = make_ward(config=EmergencyConfig(allow_remote_halt=True))
    assert not allowing.signal(HALT, role="weatherlight").reason
    assert allowing.halt.is_engaged
    strict = make_ward()
    strict.emergencies.alarm(HALT, "ours")
    assert strict.signal(NOTICE, role="weatherlight", lowers=True).reason == reasons.LOCAL_LIMIT
    assert strict.halt.is_engaged
    assert not strict.signal(NOTICE, role="operator", lowers=True).reason


def test_weatherlight_may_have_a_run_be_conservative(ward):
    assert not ward.signal(CONSERVATIVE, role="weatherlight").reason
    assert ward.mode.reasons == ("emergency",)


def test_who_watches_is_told_when_the_run_is_over(ward):
    ward.emergencies.close()
    assert ward.announced == [None]


def test_a_watcher_refuses_an_announcement_that_was_changed(ward, keyring):
    ward.emergencies.alarm(HALT, "stop")
    envelope = SignedEnvelope.FromString(ward.announced[0][1].SerializeToString())
    envelope.run_id = "run-2"
    watcher = SignalVerifier(keyring=keyring("operator"), audience="run", run_id="run-2", now_ns=lambda: ward.wall_ns)
    with pytest.raises(Rejected, match=reasons.INVALID_SIGNATURE):
        watcher.verify(envelope)
