from __future__ import annotations

import math

import pytest

from esper_rpc import errors, rules, status
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SeedState, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, OpenRunRequest, Step


def step_request(**packet):
    return EvaluateStepRequest(step=Step(run_id="r", sequence=1, budget_us=5000, packet=SystemStatePacket(**packet)))


CASES = [
    (EvaluateStepRequest(), "step", "is required"),
    (step_request(seed_states=[SeedState(risk_score=2)]), "step.packet.seed_states[0].risk_score", "at most 1"),
    (step_request(seed_states=[SeedState(risk_score=math.nan)]), "step.packet.seed_states[0].risk_score", "nan"),
    (OpenRunRequest(run_id="r", protocol_versions=[1], receiver_epoch=b"x"), "receiver_epoch", "exactly 16"),
    (OpenRunRequest(run_id="r" * 129, protocol_versions=[1], receiver_epoch=bytes(16)), "run_id", "at most 128"),
    (AdaptationCommand(command_id="no", command_type=CommandType.COMMAND_TYPE_SEED), "command_id", "UUID"),
]


@pytest.mark.parametrize(("message", "field", "text"), CASES, ids=[c[1] + c[2] for c in CASES])
def test_a_broken_rule_names_its_field(message, field, text):
    with pytest.raises(errors.InvalidRequest) as caught:
        rules.check(message)
    assert any(v.field == field and text in v.description for v in caught.value.violations)


def test_a_diverged_loss_still_gets_through():
    rules.check(step_request(training_metrics={"loss": math.nan}, training_loss=math.inf))


@pytest.mark.parametrize(("error", "code"), status.TABLE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_every_error_survives_the_wire(error, code):
    sent = error("what to do", metadata={"k": "v"})
    received = status.from_status(status.to_status(sent))
    assert (type(received), vars(received)) == (error, vars(sent))
    assert status.to_status(sent).code == code.value[0]


def test_violations_and_pushback_survive_the_wire():
    invalid = errors.InvalidRequest("x", violations=(errors.Violation("a.b", "is required"),))
    exhausted = errors.ResourceExhausted("x", retry_after_ms=250)
    assert status.from_status(status.to_status(invalid)).violations == invalid.violations
    assert status.from_status(status.to_status(exhausted)).retry_after_ms == 250


@pytest.mark.parametrize("error", [ValueError, errors.ConfigError])
def test_an_exception_that_is_not_for_callers_tells_only_a_correlation_id(error):
    shown = status.hide_unexpected(error("secret"))
    assert isinstance(shown, errors.Internal)
    assert "secret" not in str(status.to_status(shown))
    assert shown.metadata["correlation_id"] in shown.message
