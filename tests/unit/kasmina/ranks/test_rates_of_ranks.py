from __future__ import annotations

import pytest

from esper_client.seed_host import OutOfStep
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.optim.schedules import Adaptive, Constant, Cosine, StepDecay

KEEP = ("GERMINATE", "START_TRAINING", "START_GRAFTING", "STABILIZE", "EVALUATE", "FOSSILIZE")


def rates(crew):
    """The rates of every rank as its optimizer has them, which must be the same."""
    found = [[float(group["lr"]) for group in rank.optimizer.param_groups] for rank in crew.ranks]
    assert [list(rank.authority.rates)[: len(found[0])] for rank in crew.ranks] == found
    assert all(each == found[0] for each in found)
    return found[0]


def scale(crew, multiplier):
    return crew.order(crew.first.rig.optimizer_command(multiplier))


def test_a_schedule_and_the_mesh_move_the_rates_of_all_ranks_in_the_same_step(make_controlled):
    crew = make_controlled(Cosine(total_steps=30), size=3)
    seen = [rates(crew)]
    for _ in range(3):
        crew.train()
        seen.append(rates(crew))
    assert len({rate for (rate,) in seen}) == 4
    crew.train()
    before = crew.first.authority.rates
    assert scale(crew, 0.5).result == CommandOutcome.RESULT_APPLIED
    assert rates(crew)[0] < 0.6 * before[0]
    crew.train(2)
    rates(crew)
    crew.assert_alike()


def test_what_one_rank_alone_would_refuse_it_does_as_the_first(make_controlled):
    crew = make_controlled(Constant())
    for _ in range(3):
        crew.other.optimizer.param_groups[0]["lr"] = 5.0
        crew.other.optimizer.zero_grad()
        crew.other.authority.check()
    assert crew.other.authority.is_conservative
    assert scale(crew, 0.5).result == CommandOutcome.RESULT_APPLIED
    assert rates(crew) == [0.05]


def test_what_the_first_refuses_happens_nowhere(make_controlled):
    crew = make_controlled(Constant())
    for _ in range(3):
        crew.first.optimizer.param_groups[0]["lr"] = 5.0
        crew.first.authority.check()
    assert scale(crew, 0.5).result != CommandOutcome.RESULT_APPLIED
    assert rates(crew) == [0.1]


def test_an_adaptive_schedule_goes_by_the_mean_of_what_the_ranks_observe(make_controlled):
    crew = make_controlled(Adaptive(patience=1))
    # One rank gets better and the other worse: their mean stays where it is.
    for step in range(6):
        crew.first.authority.observe(1.0 - 0.1 * step)
        crew.other.authority.observe(1.0 + 0.1 * step)
        crew.train()
    assert rates(crew)[0] < 0.1
    reached = rates(crew)
    for step in range(4):
        crew.other.authority.observe(0.5 - 0.1 * step)
        crew.train()
    assert rates(crew) == reached
    crew.assert_alike()


def test_a_loss_that_one_rank_observes_is_held_against_the_mean_of_all(make_controlled):
    crew = make_controlled(Adaptive(patience=0))
    for rank in crew.ranks:
        rank.authority.observe(1.0)
    crew.train()
    # No more than the sum of both, and more than their mean.
    crew.other.authority.observe(1.5)
    crew.train()
    assert rates(crew) == pytest.approx([0.01])


def test_a_kept_seed_learns_apart_by_gradients_that_are_averaged(make_controlled):
    crew = make_controlled(StepDecay(every=1000))
    crew.grow(*KEEP[:-1])
    crew.do("FOSSILIZE")
    assert [slot.stage for slot in crew.slots] == [lifecycle.FOSSILIZED] * 2
    before = [parameter.detach().clone() for parameter in crew.slots[0].site.seed.parameters()]
    assert [len(rank.optimizer.param_groups) for rank in crew.ranks] == [1, 1]
    joined = [rank.authority.rates[1] for rank in crew.ranks]
    crew.train(8)
    assert [rank.authority.rates[1] for rank in crew.ranks] == pytest.approx([0.01, 0.01])
    assert joined[0] == joined[1] < 0.01
    crew.assert_alike()
    after = list(crew.slots[0].site.seed.parameters())
    assert any(not now.equal(then) for now, then in zip(after, before, strict=True))


def test_rates_and_kept_seeds_go_back_with_all_else(make_controlled):
    crew = make_controlled(Cosine(total_steps=200))
    crew.grow(*KEEP)
    crew.first.keep()
    crew.train()
    kept, rates_of_then = crew.assert_alike(), crew.first.authority.rates
    scale(crew, 0.5)
    crew.train(3)
    once = crew.first.roll_back()
    crew.train()
    assert once.result().tier == "fast"
    assert crew.assert_alike() == kept
    assert [rank.authority.rates for rank in crew.ranks] == [rates_of_then] * 2
    crew.train(2)
    crew.assert_alike()


def test_behind_the_seed_that_was_kept_nothing_learns_apart(make_controlled):
    crew = make_controlled(Constant())
    crew.first.keep()
    crew.train()
    crew.grow(*KEEP)
    assert [len(rank.authority.rates) for rank in crew.ranks] == [2, 2]
    crew.first.roll_back()
    crew.train()
    assert [len(rank.authority.rates) for rank in crew.ranks] == [1, 1]
    crew.train(2)
    crew.assert_alike()


def test_ranks_whose_schedules_differ_say_so(make_controlled):
    crew = make_controlled(StepDecay(every=1), of_others=Constant())
    crew.train()
    errors = crew.step()
    assert [type(error) for error in errors] == [OutOfStep] * 2
    assert "made alike, on every rank" in str(errors[0])


@pytest.mark.parametrize("is_controlled", [False, True])
def test_a_kept_seed_that_is_taken_out_for_good_leaves_the_rates_of_all_ranks(
    make_crew, make_controlled, is_controlled
):
    options = {"has_training_thread": True}
    crew = make_controlled(Constant(), options=options) if is_controlled else make_crew(options=options)
    for rank in crew.ranks:  # As attaching does where there is no controller.
        for group in rank.optimizer.param_groups if not is_controlled else ():
            group["initial_lr"] = group["lr"]
    crew.grow(*KEEP)
    done = crew.first.host.at_safe_point(lambda: crew.first.host.terminate("seed-2"))
    crew.train(2)
    assert done.result() == lifecycle.FOSSILIZED
    assert [slot.stage for slot in crew.slots] == [lifecycle.TERMINATED] * 2
    states = [rank.authority.state_dict() for rank in crew.ranks]
    assert states[0] == states[1]
    assert not states[1].get("apart", states[1].get("followers"))
    crew.assert_alike()
