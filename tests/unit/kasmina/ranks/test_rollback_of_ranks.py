from __future__ import annotations

import pytest
import torch

from esper_client.seed_host import OutOfStep
from esper_rpc.errors import FailedPrecondition
from esper_servers.kasmina import lifecycle
from esper_servers.tolaria.rollback.rank_exchange import CONFIRM, PREPARE
from esper_servers.tolaria.rollback.rollback import FULL

BLEND = ("GERMINATE", "START_TRAINING", "START_GRAFTING")


def blend(crew):
    """Bring a seed to the midst of blending, keep that, and go on; returns what was kept."""
    crew.grow("GERMINATE", "START_TRAINING")
    assert crew.do("START_GRAFTING").reason == ""
    crew.train(4)
    crew.first.keep()
    crew.train()
    kept = crew.assert_alike()
    assert [slot.stage for slot in crew.slots] == [lifecycle.BLENDING] * len(crew.ranks)
    crew.train(3)
    assert crew.assert_alike() != kept
    return kept


def roll_back(crew, **options):
    asked = crew.first.roll_back(**options)
    crew.train()
    return asked.result()


@pytest.mark.parametrize("size", [2, 3])
def test_a_seed_that_blends_goes_back_on_every_rank_in_the_same_step(make_crew, size):
    crew = make_crew(size=size)
    kept = blend(crew)
    result = roll_back(crew)
    assert (result.tier, result.failures) == ("fast", ())
    assert crew.assert_alike() == kept
    crew.train(3)
    crew.assert_alike()
    assert crew.do("STABILIZE").command_id


def test_what_follows_is_the_same_as_without_anything_between(crew):
    blend(crew)
    assert roll_back(crew).tier == "fast"
    crew.train(4)
    once = crew.assert_alike()
    assert roll_back(crew).tier == "fast"
    crew.train(4)
    assert crew.assert_alike() == once


def test_a_seed_that_was_kept_since_leaves_the_optimizers_of_all_ranks(crew):
    crew.grow("GERMINATE", "START_TRAINING")
    crew.first.keep()
    crew.train()
    kept = crew.assert_alike()
    crew.grow("START_GRAFTING", "STABILIZE", "EVALUATE", "FOSSILIZE")
    assert [slot.stage for slot in crew.slots] == [lifecycle.FOSSILIZED] * 2
    assert roll_back(crew).succeeded
    assert crew.assert_alike() == kept
    crew.train(3)
    crew.assert_alike()


@pytest.mark.parametrize("kept_after", [(), ("GERMINATE", "START_TRAINING")])
def test_a_seed_that_was_born_since_is_gone_and_one_that_is_gone_is_back(crew, kept_after):
    crew.train()
    crew.grow(*kept_after)
    crew.first.keep()
    crew.train()
    kept = crew.assert_alike()
    crew.grow(*(("CULL",) if kept_after else ("GERMINATE", "START_TRAINING")))
    assert roll_back(crew).succeeded
    assert crew.assert_alike() == kept
    crew.train(2)
    crew.assert_alike()


def test_a_rank_without_a_copy_of_its_own_gets_that_of_the_first(make_crew):
    crew = make_crew(size=3)
    kept = blend(crew)
    crew.other.checkpoints._cache.forget_after(0)
    result = roll_back(crew)
    assert (result.tier, result.failures) == ("fast", ())
    assert crew.assert_alike() == kept
    crew.train(2)
    crew.assert_alike()


def test_from_the_disk_of_the_first_rank_alone(make_crew, tmp_path):
    crew = make_crew(directory=tmp_path)
    crew.grow("GERMINATE", "START_TRAINING")
    first = crew.first
    saved = first.between_steps(lambda: first.checkpoints.save(epoch=0, step=first.session.global_step).result())
    crew.train()
    kept = crew.assert_alike()
    crew.train(5)
    result = roll_back(crew, tier=FULL)
    assert (result.tier, result.step) == ("full", saved.result().step)
    assert crew.assert_alike() == kept
    crew.train(2)
    crew.assert_alike()


def test_a_rank_that_cannot_go_back_has_all_go_on_as_they_were(make_crew, tmp_path):
    crew, factories = make_crew(directory=tmp_path), {}
    blend(crew)
    crew.first.between_steps(lambda: crew.first.checkpoints.save(epoch=0, step=crew.first.session.global_step).result())
    crew.train()
    # Its blueprint is gone there: neither copy can be planted.
    crew.other.host._checkpoint._factories = factories
    reference = [slot.site.alpha for slot in crew.slots]
    asked = crew.first.roll_back()
    crew.train()
    result = asked.result()
    assert [(failure.tier, failure.phase, failure.reason) for failure in result.failures] == [
        ("fast", "prepare", "refused"), ("full", "prepare", "refused"),
    ]  # fmt: skip
    assert result.failures[0].detail == "ranks: rank 1 cannot go back"
    assert not result.has_changed
    crew.assert_alike()
    assert [slot.site.alpha for slot in crew.slots] > reference
    crew.train(2)
    crew.assert_alike()


def breaks_once(crew):
    """Have the next commit fail on the other rank, when it has changed something already."""
    member = crew.other.checkpoints._members[1]
    whole = member.commit

    def commit(order):
        member.commit = whole
        raise MemoryError

    member.commit = commit


def test_a_rank_that_fails_on_the_way_back_has_all_go_back_from_the_disk(make_crew, tmp_path):
    crew = make_crew(directory=tmp_path)
    crew.grow("GERMINATE", "START_TRAINING")
    first = crew.first
    first.between_steps(lambda: first.checkpoints.save(epoch=0, step=first.session.global_step).result())
    crew.train()
    kept = crew.assert_alike()
    crew.train(3)
    breaks_once(crew)
    result = roll_back(crew)
    assert (result.tier, [failure.phase for failure in result.failures]) == ("full", ["confirm"])
    assert crew.assert_alike() == kept
    crew.train(2)
    crew.assert_alike()


def test_ranks_that_ended_apart_say_so_on_each(crew):
    blend(crew)
    breaks_once(crew)
    crew.first.roll_back()
    errors = crew.step()
    assert [type(error) for error in errors] == [OutOfStep] * 2
    assert all("hold different weights" in str(error) for error in errors)


def test_a_rollback_that_is_late_everywhere_ends_no_training(make_crew):
    crew = make_crew()
    kept = blend(crew)
    rollback = crew.first.checkpoints._rollback
    ticks = iter(range(10**6))
    rollback._clock = lambda: next(ticks) * 100.0
    result = roll_back(crew)
    assert (result.succeeded, result.has_changed) == (False, False)
    # Late in PREPARE, before anything had changed.
    assert crew.assert_alike() != kept


@pytest.mark.parametrize("lost_at", [PREPARE, CONFIRM])
def test_a_rank_that_is_lost_amid_a_rollback_ends_the_others_by_out_of_step(make_crew, lost_at):
    crew = make_crew(size=3)
    blend(crew)
    lost, whole = crew.others[1], crew.others[1].host.carry_out

    def carry_out(order):
        if order["do"] == lost_at:
            lost.ranks.leave()
            raise SystemExit
        whole(order)

    lost.host.carry_out = carry_out
    asked = crew.first.roll_back()
    found = crew.all_do(crew._step)
    assert [type(each) for each in found] == [OutOfStep, OutOfStep, SystemExit]
    assert isinstance(asked.exception(), OutOfStep)
    survivors = crew.pictures()[:2]
    assert survivors[0] == survivors[1]


def test_outside_of_the_end_of_a_step_nobody_goes_back(crew):
    crew.first.keep()
    crew.train(2)
    before = crew.assert_alike()
    result = crew.first.checkpoints.roll_back(latest_step=9, reason="test")
    assert result.failures[0].detail == "ranks: the other ranks are amid a step"
    assert crew.assert_alike() == before
    with pytest.raises(FailedPrecondition, match="amid a step"):
        crew.first.host.order({"do": PREPARE})
    crew.train()
    crew.assert_alike()


def test_work_between_steps_that_fails_keeps_nobody_waiting(crew):
    crew.first.host.between_steps(lambda: 1 / 0)
    crew.train(2)
    crew.assert_alike()


def test_a_snapshot_that_another_rank_cannot_take_keeps_nobody_waiting(crew):
    crew.other.checkpoints._cache.take = lambda *_, **__: 1 / 0
    crew.first.keep()
    crew.train(2)
    kept = crew.assert_alike()
    assert roll_back(crew).succeeded
    assert crew.assert_alike() != kept


def test_every_rank_resumes_from_the_disk_of_the_first(make_crew, tmp_path):
    crew = make_crew(directory=tmp_path)
    crew.grow("GERMINATE", "START_TRAINING")
    crew.first.checkpoints.save(epoch=0, step=crew.first.session.global_step).result()
    saved = crew.assert_alike()
    again = make_crew(directory=tmp_path)
    manifest, nothing = again.all_do(lambda rank: rank.checkpoints.resume())
    assert (manifest.step, nothing) == (crew.first.session.global_step, None)
    assert again.assert_alike() == saved
    crew.train(3)
    again.train(3)
    assert crew.assert_alike() == again.assert_alike()


def test_without_a_checkpoint_every_rank_begins_anew(make_crew, tmp_path):
    crew = make_crew(directory=tmp_path)
    assert crew.all_do(lambda rank: rank.checkpoints.resume()) == [None, None]
    crew.train()


def test_a_rank_that_cannot_resume_is_named_on_each(make_crew, tmp_path):
    crew = make_crew(directory=tmp_path)
    crew.grow("GERMINATE", "START_TRAINING")
    crew.first.checkpoints.save(epoch=0, step=crew.first.session.global_step).result()
    again = make_crew(directory=tmp_path, other={"factories": {}})
    before = again.assert_alike()
    errors = again.all_do(lambda rank: rank.checkpoints.resume())
    assert [str(error) for error in errors] == ["Rank 1 cannot resume from the checkpoint; its log says why."] * 2
    assert again.assert_alike() == before


class Position:
    """Where a rank is in its data: on each somewhere else."""

    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at, "mixed": torch.tensor([self.at, 0.5])}

    def load_state_dict(self, state):
        assert state["mixed"][0] == state["at"]
        self.at = state["at"]


@pytest.mark.parametrize("tier", ["own", "received", FULL])
def test_data_is_each_ranks_own_wherever_it_comes_from(make_crew, tmp_path, tier):
    crew = make_crew(directory=tmp_path, size=3)
    positions = [Position(100 * rank) for rank in range(3)]
    for rank, position in zip(crew.ranks, positions, strict=True):
        rank.checkpoints.register("data", position)
    crew.train()
    first = crew.first
    first.between_steps(lambda: first.checkpoints.save(epoch=0, step=first.session.global_step).result())
    crew.train()
    for position in positions:
        position.at += 7
    if tier == "received":
        crew.others[1].checkpoints._cache.forget_after(0)
    assert roll_back(crew, tier=FULL if tier == FULL else "fast").failures == ()
    assert [position.at for position in positions] == [0, 100, 200]
