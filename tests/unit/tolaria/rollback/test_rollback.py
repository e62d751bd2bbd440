from __future__ import annotations

import pytest
import torch

from esper_rpc.errors import ConfigError, FailedPrecondition
from esper_rpc.proto.leyline.v1 import EmergencyLevel
from esper_servers.tolaria.rollback.participants import SeedHostParticipant, TamiyoParticipant, TrainingParticipant
from esper_servers.tolaria.rollback.rollback import FULL, Failure, Rollback, RollbackConfig, Vote
from esper_servers.tolaria.state.training_state import SESSION

SEVERE = EmergencyLevel.EMERGENCY_LEVEL_CONSERVATIVE


class Member:
    """Takes so long in each phase, and fails in those that are named."""

    def __init__(self, name, clock, *, log=None, vote=None, fails=(), **ms):
        self.name, self.clock, self.vote, self.fails, self.ms = name, clock, vote, fails, ms
        self.log = [] if log is None else log

    def _take_part(self, phase, order=None):
        self.log.append((self.name, phase, order.step if order else None))
        self.clock.advance(self.ms.get(phase, 0) / 1000)
        if phase in self.fails:
            raise FailedPrecondition(f"{self.name} cannot {phase}", reason="NOT_NOW")

    def prepare(self, order):
        self._take_part("prepare", order)
        return self.vote or Vote(self.name, True)

    def commit(self, order):
        self._take_part("commit", order)

    def confirm(self, order):
        self._take_part("confirm", order)

    def abort(self):
        self._take_part("abort")


@pytest.fixture
def make(training, clock, cache, store):
    """A rollback of some members and the training, with a snapshot at step 8 and a checkpoint at step 5."""
    training.train(1)
    store.save(training.state.capture(), epoch=1, step=5)
    training.at_5 = training.picture()
    training.train(1)
    cache.take(training.state.capture(), epoch=2, step=8)
    training.at_8 = training.picture()
    training.train(2)

    def make_rollback(*members, has_store=True, **config):
        return Rollback(
            [*members, TrainingParticipant(training.state)], cache=cache, store=store if has_store else None,
            config=RollbackConfig(**config), clock=clock,
        )  # fmt: skip

    return make_rollback


def run(rollback, **options):
    return rollback.run(**{"latest_step": 10, "reason": "loss_spike", "severity": SEVERE, **options})


def test_from_memory_in_three_phases(make, training, clock):
    log = []
    first = Member("first", clock, log=log, prepare=140, commit=240, confirm=90)
    result = run(make(first, Member("second", clock, log=log)))
    assert training.picture() == training.at_8
    assert log == [(name, phase, 8) for phase in ("prepare", "commit", "confirm") for name in ("first", "second")]
    assert (result.tier, result.epoch, result.step, result.reason) == ("fast", 2, 8, "loss_spike")
    assert result.phases_ms == pytest.approx({"fast.prepare": 140, "fast.commit": 240, "fast.confirm": 90})
    assert result.elapsed_ms == pytest.approx(470)
    assert [vote.participant for vote in result.votes] == ["first", "second", "tolaria"]
    assert (result.needs_conservative_mode, result.needs_halt, result.failures) == (False, False, ())


@pytest.mark.parametrize(("phase", "limit"), [("prepare", 150), ("commit", 250), ("confirm", 100)])
def test_a_phase_that_takes_too_long_is_aborted_for_the_disk(make, training, clock, phase, limit):
    member = Member("slow", clock, **{phase: limit + 1})
    result = run(make(member))
    assert training.picture() == training.at_5
    assert (result.tier, result.epoch, result.step) == ("full", 1, 5)
    assert result.failures == (Failure("fast", phase, "late", f"{limit + 1} of {limit} ms"),)
    assert ("slow", "abort", None) in member.log
    assert result.needs_halt is False


@pytest.mark.parametrize("phase", ["prepare", "commit", "confirm"])
def test_a_phase_that_fails_is_aborted_for_the_disk(make, training, clock, phase):
    member = Member("member", clock, fails=[phase])
    member.abort = lambda: member.fails.clear()
    result = run(make(member))
    assert training.picture() == training.at_5
    assert result.failures == (Failure("fast", phase, "not_now", f"member cannot {phase}"),)
    assert (result.tier, result.has_changed) == ("full", False)


def test_what_raises_when_it_is_told_to_forget_stops_nothing(make, training, clock):
    result = run(make(Member("member", clock, vote=Vote("member", False, reason="no"), fails=["abort"])))
    assert [failure[:3] for failure in result.failures] == [
        ("fast", "prepare", "refused"),
        ("full", "prepare", "refused"),
    ]
    assert (result.succeeded, result.needs_halt, result.has_changed) == (False, True, False)


def test_one_refusal_is_enough(make, training, clock):
    before = training.picture()
    result = run(make(Member("a", clock), Member("b", clock, vote=Vote("b", False, reason="another model"))))
    assert training.picture() == before
    assert result.failures[0].detail == "b: another model"


def absent(clock, name="tamiyo"):
    return Member(name, clock, vote=Vote(name, False, is_absent=True))


def test_one_of_three_may_be_absent_and_two_may_not(make, training, clock):
    assert run(make(absent(clock), Member("kasmina", clock))).tier == "fast"
    assert run(make(absent(clock), absent(clock, "kasmina"))).failures[0].detail == "1 of 3 participants are there"
    assert run(make(absent(clock), absent(clock, "kasmina"), quorum=0.3)).tier == "fast"


def test_over_half_a_second_the_run_is_held_back(make, clock):
    assert run(make(Member("slow", clock, prepare=151))).needs_conservative_mode is False
    assert run(make(Member("slow", clock, prepare=151, confirm=200))).needs_conservative_mode is True


def test_memory_may_be_passed_over(make, training):
    result = run(make(), tier=FULL)
    assert (result.tier, result.failures) == ("full", ())
    assert training.picture() == training.at_5


def test_an_earlier_step_may_be_wanted(make, training):
    assert run(make(), latest_step=7).step == 5
    assert training.picture() == training.at_5
    result = run(make(), latest_step=4)
    assert [failure[:3] for failure in result.failures] == [
        ("fast", "prepare", "no_snapshot"),
        ("full", "load", "no_checkpoint"),
    ]
    assert result.needs_halt


def test_without_a_disk_a_failure_calls_for_a_halt(make, training, clock):
    before = training.picture()
    result = run(make(Member("slow", clock, prepare=200), has_store=False))
    assert [failure[:3] for failure in result.failures] == [("fast", "prepare", "late"), ("full", "load", "no_store")]
    assert (result.needs_halt, result.has_changed) == (True, False)
    assert training.picture() == before


def test_a_failure_on_the_way_back_from_the_disk_tells_that_the_model_is_between_two_states(make, clock):
    result = run(make(Member("member", clock, fails=["commit"])))
    assert (result.needs_halt, result.has_changed) == (True, True)


def test_a_broken_checkpoint_is_passed_over_for_an_older_one(make, training, cache, store):
    training.model[0].weight.data[0, 0] = torch.nan
    broken = store.save(training.state.capture(), epoch=3, step=9)
    damaged = store.save(training.state.capture(), epoch=3, step=9)
    (store.directory / damaged.name / "structure.json").unlink()
    cache.forget_after(0)
    result = run(make())
    assert (result.tier, result.step) == ("full", 5)
    assert result.skipped == ((damaged.name, "part_missing"), (broken.name, "not_finite"))
    assert training.picture() == training.at_5


def test_reading_ends_at_the_deadline_and_calls_for_a_halt(make, training, clock):
    before = training.picture()
    rollback = make()

    def ticking():
        clock.advance(5)
        return clock()

    rollback._clock = ticking
    result = run(rollback, tier=FULL)
    assert result.failures == (Failure("full", "load", "late", "A rollback from the disk may take 12 s."),)
    assert result.needs_halt
    assert training.picture() == before


@pytest.mark.parametrize("ms", [{"commit": 5001}, {"prepare": 1900, "commit": 4900, "confirm": 5300}])
def test_who_comes_back_too_late_is_back_and_halts(make, training, clock, ms):
    result = run(make(Member("slow", clock, **ms)), tier=FULL)
    assert training.picture() == training.at_5
    assert (result.tier, result.is_late, result.needs_halt) == ("full", True, True)


def test_a_vote_on_the_checkpoint_of_the_disk_may_not_take_for_ever(make, clock):
    result = run(make(Member("slow", clock, prepare=2001)), tier=FULL)
    assert result.failures == (Failure("full", "prepare", "late", "2001 of 2000 ms"),)


def test_a_config_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="quorum"):
        RollbackConfig(quorum=1.5)


class FakeSession:
    epoch, global_step, is_connected = 7, 10, True

    def __init__(self):
        self.opened, self.restored = 0, []

    def open_again(self):
        self.opened += 1

    def check_state(self, state):
        if state == "broken":
            raise FailedPrecondition("a seed cannot be built")

    def roll_back(self, state):
        self.restored.append(state)


def order_of(session_state):
    return type("Order", (), {"state": {SESSION: session_state}, "step": 8, "epoch": 2})()


def test_tamiyo_has_no_veto_and_is_told_when_all_is_done():
    session = FakeSession()
    tamiyo = TamiyoParticipant(session)
    assert tamiyo.prepare(None) == Vote("tamiyo", True)
    tamiyo.commit(None)
    assert session.opened == 0
    tamiyo.confirm(None)
    assert session.opened == 1
    session.is_connected = False
    assert tamiyo.prepare(None) == Vote("tamiyo", False, is_absent=True)


def test_kasmina_refuses_what_it_cannot_restore_and_moves_the_session_with_the_seeds():
    session = FakeSession()
    kasmina = SeedHostParticipant(session, session)
    assert kasmina.prepare(order_of({"host": "broken"})) == Vote("kasmina", False, reason="a seed cannot be built")
    order = order_of({"host": "seeds", "epoch": 2, "global_step": 8})
    assert kasmina.prepare(order).agrees
    with pytest.raises(FailedPrecondition, match="at step 10, not 8"):
        kasmina.confirm(order)
    kasmina.commit(order)
    kasmina.confirm(order)
    assert (session.restored, session.epoch, session.global_step) == (["seeds"], 2, 8)


def test_the_trainer_refuses_the_checkpoint_of_another_model(make, training):
    participant = TrainingParticipant(training.state)
    order = order_of({})
    assert not participant.prepare(order).agrees
    assert "same parts" in participant.prepare(order).reason
