from __future__ import annotations

import uuid

import pytest

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CircuitState, CommandOutcome, CommandType, SeedOperation
from esper_rpc.verdict import APPLIED, Verdict
from esper_servers.tolaria.commands import move_breaker, raise_level
from esper_servers.tolaria.emergency.escalation import EmergencyConfig
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, ELEVATED, HALT, NOTICE, name_of
from esper_servers.tolaria.epoch_guard import EpochGuard

CLOSED, OPEN, HALF_OPEN = (
    CircuitState.CIRCUIT_STATE_CLOSED, CircuitState.CIRCUIT_STATE_OPEN, CircuitState.CIRCUIT_STATE_HALF_OPEN,
)  # fmt: skip
REJECTED, FAILED = CommandOutcome.RESULT_REJECTED, CommandOutcome.RESULT_FAILED
MALFORMED, BEYOND = Verdict(REJECTED, "malformed_payload"), Verdict(REJECTED, reasons.LOCAL_LIMIT)


def emergency(level="", **annotations):
    command = AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_EMERGENCY)
    if level:
        command.annotations["emergency_level"] = level
    command.annotations.update(annotations)
    return command


def move(state, target="", rationale="why"):
    command = AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_CIRCUIT_BREAKER)
    command.circuit_breaker.desired_state, command.circuit_breaker.rationale = state, rationale
    if target:
        command.annotations["breaker"] = target
    return command


@pytest.mark.parametrize("issuer", ["tamiyo", "operator"])
@pytest.mark.parametrize("level", [NOTICE, ELEVATED, CONSERVATIVE], ids=name_of)
def test_a_command_raises_the_level_for_its_issuer(ward, level, issuer):
    command = emergency(name_of(level), reason="loss_spike")
    assert raise_level(command, ward.emergencies, issuer=issuer) == APPLIED
    signal, _ = ward.emergencies.in_force
    assert (signal.level, signal.reason, signal.origin) == (level, "loss_spike", issuer)
    assert signal.attributes["command_id"] == command.command_id


def test_a_command_never_lowers_a_level(ward):
    ward.emergencies.alarm(CONSERVATIVE, "bad")
    assert raise_level(emergency("NOTICE", lowers="true"), ward.emergencies, issuer="operator") == APPLIED
    assert ward.emergencies.level == CONSERVATIVE


@pytest.mark.parametrize(
    ("issuer", "is_allowed", "halts"),
    [("tamiyo", False, False), ("tamiyo", True, True), ("operator", False, True), ("", False, False)],
)
def test_a_halt_by_command_needs_a_person_or_consent(make_ward, issuer, is_allowed, halts):
    ward = make_ward(config=EmergencyConfig(allow_remote_halt=is_allowed))
    answer = raise_level(emergency("HALT"), ward.emergencies, issuer=issuer)
    assert (answer, ward.halt.is_engaged) == (APPLIED if halts else BEYOND, halts)
    assert (ward.emergencies.level == HALT) is halts


@pytest.mark.parametrize("level", ["", "NONE", "UNSPECIFIED", "halt", "4", "EMERGENCY_LEVEL_HALT", "PANIC"])
def test_an_emergency_without_a_level_changes_nothing(ward, level):
    assert raise_level(emergency(level), ward.emergencies, issuer="operator") == MALFORMED
    assert (ward.emergencies.in_force, ward.announced) == (None, [])


def test_an_emergency_that_says_more_than_its_level_changes_nothing(ward):
    command = emergency("NOTICE")
    command.seed_operation.operation = SeedOperation.SEED_OPERATION_CULL
    assert raise_level(command, ward.emergencies, issuer="operator") == MALFORMED
    assert ward.announced == []


def test_a_reason_is_cut_to_its_length_and_has_a_default(ward):
    raise_level(emergency("NOTICE", reason="x" * 5000), ward.emergencies, issuer="operator")
    raise_level(emergency("ELEVATED"), ward.emergencies, issuer="operator")
    assert [signal.reason for signal, _ in ward.announced] == ["x" * 256, "commanded"]


@pytest.fixture
def breakers(clock):
    config = BreakerConfig(failures=2, cool_down_seconds=60, successes=2)
    return {"epoch": CircuitBreaker(config=config, clock=clock), "other": CircuitBreaker(config=config, clock=clock)}


@pytest.mark.parametrize(("target", "moved"), [("", "epoch"), ("epoch", "epoch"), ("other", "other")])
@pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN], ids=CircuitState.Name)
def test_an_operator_moves_the_breaker_that_is_named(breakers, state, target, moved):
    before = {name: breaker.state for name, breaker in breakers.items()}
    assert move_breaker(move(state, target), breakers, issuer="operator") == APPLIED
    assert {name: breaker.state for name, breaker in breakers.items()} == before | {moved: state}


@pytest.mark.parametrize(("state", "answer"), [(OPEN, APPLIED), (HALF_OPEN, BEYOND), (CLOSED, BEYOND)])
def test_the_mesh_opens_a_breaker_and_closes_none(breakers, state, answer):
    breakers["epoch"].move_to(OPEN)
    assert move_breaker(move(state), breakers, issuer="tamiyo") == answer
    assert breakers["epoch"].state == OPEN


def test_a_breaker_that_there_is_not_and_a_state_that_is_none_change_nothing(breakers, told):
    assert move_breaker(move(OPEN, "kettle"), breakers, issuer="operator") == Verdict(FAILED, "unknown_breaker")
    assert move_breaker(move(0), breakers, issuer="operator") == MALFORMED
    assert move_breaker(emergency(), breakers, issuer="operator") == MALFORMED
    assert {breaker.state for breaker in breakers.values()} == {CLOSED}
    assert told == []


def test_a_commanded_move_is_told_with_who_wanted_it_and_why(breakers, told):
    command = move(OPEN, "other", rationale="disk is failing")
    move_breaker(command, breakers, issuer="tamiyo")
    (found,) = [attributes for name, attributes in told if name == "breaker_commanded"]
    wanted = {"breaker": "other", "after": "OPEN", "issuer": "tamiyo", "rationale": "disk is failing"}
    assert {key: found[key] for key in wanted} == wanted
    assert found["command_id"] == command.command_id


@pytest.mark.parametrize("state", [OPEN, HALF_OPEN], ids=CircuitState.Name)
def test_moving_the_breaker_of_epochs_moves_conservative_mode(ward, state):
    guard = EpochGuard(mode=ward.mode)
    move_breaker(move(state), {"epoch": guard.breaker}, issuer="operator")
    assert ward.mode.reasons == ("epoch_guard",)
    move_breaker(move(CLOSED), {"epoch": guard.breaker}, issuer="operator")
    assert ward.mode.reasons == ()


def test_a_breaker_that_was_moved_goes_on_from_there(breakers, clock):
    breaker = breakers["epoch"]
    breaker.record_failure()
    breaker.move_to(CLOSED)
    breaker.record_failure()
    assert breaker.state == CLOSED  # The failure before was forgotten.
    breaker.move_to(OPEN)
    clock.advance(59)
    breaker.move_to(OPEN)
    clock.advance(59)
    assert breaker.state == OPEN  # It rests from the last move on.
    clock.advance(1)
    assert breaker.state == HALF_OPEN
    breaker.record_success()
    breaker.move_to(HALF_OPEN)
    breaker.record_success()
    assert breaker.state == HALF_OPEN  # And is on trial anew.
    with pytest.raises(ValueError, match="choose closed"):
        breaker.move_to(CircuitState.CIRCUIT_STATE_UNSPECIFIED)
