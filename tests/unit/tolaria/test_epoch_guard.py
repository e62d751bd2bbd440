from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from esper_rpc.proto.leyline.v1 import CircuitState
from esper_rpc.testing import FakeClock
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.epoch_guard import EpochGuard, EpochGuardConfig

CLOSED, OPEN, HALF_OPEN = (
    CircuitState.CIRCUIT_STATE_CLOSED, CircuitState.CIRCUIT_STATE_OPEN, CircuitState.CIRCUIT_STATE_HALF_OPEN,
)  # fmt: skip


class Bench:
    """A guard whose clock moves when a part of the work says so."""

    def __init__(self, **config):
        self.clock, self.rest, self.mode = FakeClock(), FakeClock(), ConservativeMode()
        self.guard = EpochGuard(
            mode=self.mode, config=EpochGuardConfig(**config), clock=self.clock, breaker_clock=self.rest
        )

    def spend(self, milliseconds, result=None):
        def work(*_):
            self.clock.advance(milliseconds / 1e3)
            return result

        return work

    def run(self, *, state=1.0, command=1.0, answer="yes", ask=None, **options):
        return self.guard.run(
            7, assemble=self.spend(state, "state"), ask=ask or (lambda _state: done(answer)),
            process=self.spend(command), **options,
        )  # fmt: skip


def done(answer):
    future = Future()
    future.set_result(answer)
    return future


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def never(_state):
    return Future()


@pytest.fixture
def bench():
    return Bench()


def test_the_figures_of_the_requirements_are_the_defaults():
    config = EpochGuardConfig()
    assert (config.budget_ms, config.handshake_ms, config.handshake_timeout_seconds) == (18.0, 12.0, 2.0)


def test_an_epoch_within_its_budget_is_measured_by_its_parts(bench, told):
    report = bench.run(state=3.0, command=1.5)
    parts = (report.state_ms, report.handshake_ms, report.command_ms, report.total_ms)
    assert parts == pytest.approx((3.0, 0.0, 1.5, 4.5))
    assert (report.epoch, report.handshake, report.answer, report.breached) == (7, "answered", "yes", False)
    assert (bench.mode.is_active, told) == (False, [])


def test_a_breach_is_told_with_its_parts_and_puts_the_trainer_into_conservative_mode(bench, told):
    assert bench.run(state=17.0, command=1.5).breached
    assert (bench.guard.breaker.state, bench.mode.reasons) == (OPEN, ("epoch_guard",))
    events = dict(told)
    assert [name for name, _ in told] == ["latency_high", "conservative_mode_triggered"]
    assert (events["latency_high"]["budget_ms"], events["latency_high"]["spent_ms"]) == ("18.0", "18.5")
    assert (events["latency_high"]["priority"], events["latency_high"]["state_ms"]) == ("NORMAL", "17.0")
    assert events["conservative_mode_triggered"]["priority"] == "HIGH"


def test_the_mode_ends_after_a_cool_down_and_enough_epochs_within_the_budget(bench):
    bench.run(state=100.0)
    assert bench.run().handshake == "skipped"
    bench.rest.advance(60)
    for _ in range(2):
        assert (bench.run().handshake, bench.guard.breaker.state) == ("answered", HALF_OPEN)
        assert bench.mode.is_active
    bench.run()
    assert (bench.guard.breaker.state, bench.mode.is_active) == (CLOSED, False)


def test_a_breach_while_it_is_tried_again_opens_the_breaker_anew(bench):
    bench.run(state=100.0)
    bench.rest.advance(60)
    bench.run(state=100.0)
    assert (bench.guard.breaker.state, bench.mode.is_active) == (OPEN, True)
    assert bench.run().handshake == "skipped"


def test_a_breach_while_nothing_is_tried_does_not_prolong_the_rest(bench):
    bench.run(state=100.0)
    bench.rest.advance(59)
    bench.run(state=100.0)
    bench.rest.advance(1)
    assert bench.guard.breaker.state == HALF_OPEN


def test_a_state_that_is_not_sound_counts_like_a_breach(bench):
    bench.run(problem="loss_not_finite")
    assert bench.mode.is_active


def test_more_breaches_may_be_tolerated():
    bench = Bench(breaches=2)
    bench.run(state=100.0)
    assert not bench.mode.is_active
    bench.run(state=100.0)
    assert bench.mode.is_active


def test_a_controller_that_does_not_answer_is_not_waited_for_beyond_the_budget():
    # Its whole budget went into assembling, so that nothing is left to wait.
    bench = Bench(budget_ms=20.0)
    report = bench.run(state=20.0, ask=never, command=50.0)
    assert (report.handshake, report.answer, report.breached) == ("late", None, False)


class Waited(Future):
    """An answer that does not come; keeps for how long it was waited for."""

    def result(self, timeout=None):
        self.seconds = timeout
        raise TimeoutError


@pytest.mark.parametrize(("state", "waited"), [(1.0, 12.0), (10.0, 8.0), (30.0, 0.0)])
def test_an_answer_is_waited_for_as_long_as_the_budget_of_the_epoch_allows(bench, state, waited):
    pending = Waited()
    assert bench.run(state=state, ask=lambda _state: pending).handshake == "late"
    assert pending.seconds * 1e3 == pytest.approx(waited)


def test_an_answer_that_comes_late_is_counted_and_never_carried_out(bench):
    pending = Future()
    carried_out = []
    report = bench.guard.run(1, assemble=bench.spend(18.0), ask=lambda _state: pending, process=carried_out.append)
    assert (report.handshake, bench.guard.late_answers) == ("late", 0)
    thread = threading.Thread(target=pending.set_result, args=("late",))
    thread.start()
    thread.join()
    assert (bench.guard.late_answers, carried_out) == (1, [])


def test_a_question_that_fails_late_is_no_late_answer(bench):
    pending, given_up = Future(), Future()
    for future in (pending, given_up):
        bench.guard.run(1, assemble=bench.spend(18.0), ask=lambda _state, each=future: each)
    pending.set_exception(OSError("gone"))
    given_up.cancel()
    assert bench.guard.late_answers == 0


@pytest.mark.parametrize("error", [OSError("gone"), TimeoutError("its own"), ValueError("odd")])
def test_a_controller_that_fails_costs_the_answer_and_nothing_else(bench, error):
    def refuse(_state):
        raise error

    for ask in (refuse, lambda _state: failed(error)):
        report = bench.run(ask=ask)
        assert (report.handshake, report.answer, report.breached) == ("failed", None, False)


def test_a_command_that_fails_does_not_reach_the_loop(bench):
    def refuse(_answer):
        raise ValueError("odd")

    report = bench.guard.run(1, assemble=lambda: None, ask=lambda _state: done("yes"), process=refuse)
    assert report.handshake == "failed"


def test_peers_are_waited_for_twice_as_long_in_conservative_mode(bench):
    assert bench.guard.handshake_timeout_seconds == 2.0
    bench.mode.enter("emergency")
    assert bench.guard.handshake_timeout_seconds == 4.0


def test_without_a_controller_there_is_no_handshake(bench):
    assert bench.guard.run(1, assemble=lambda: "state").handshake == "skipped"


def test_conservative_mode_lasts_until_its_last_reason_is_gone(told):
    mode = ConservativeMode(lambda: 5)
    mode.enter("emergency")
    mode.enter("epoch_guard")
    mode.enter("emergency")
    assert (mode.reasons, mode.sample_every) == (("emergency", "epoch_guard"), 10)
    mode.leave("emergency")
    assert mode.is_active
    mode.leave("epoch_guard")
    mode.leave("epoch_guard")
    assert (mode.is_active, mode.sample_every) == (False, 1)
    assert [name for name, _ in told] == ["conservative_mode_triggered", "conservative_mode_left"]
    assert told[0][1]["step_index"] == "5"
