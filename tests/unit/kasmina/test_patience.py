"""A grafted seed that does harm, or that nobody moves on, goes by itself: no mesh is needed to be rid of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.gates.config import GateConfig
from esper_servers.kasmina.patience import Patience
from esper_servers.kasmina.progress import Progress
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.kasmina.site import Site

G4 = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT
GOOD, BAD = 1.0, 2.0


class Wrecking(nn.Module):
    """Tells what follows nothing of the map."""

    def forward(self, h):
        return torch.zeros_like(h)


@pytest.fixture
def make(make_rig):
    def of(**gates):
        rig = make_rig(options={"gates": GateConfig(**gates)})
        rig.install("wrecking", lambda _features: Wrecking())
        return rig

    return of


def smoothed_loss(rig):
    return rig.host._progress.loss


def test_a_seed_that_ruins_the_map_goes_without_a_command_and_the_loss_comes_back(make):
    rig = make(loss_patience=25)
    rig.train(150)
    events = []
    rig.host.listen(events.append)
    rig.grow(lifecycle.BLENDING, "wrecking")
    before, grafted_at = smoothed_loss(rig), rig.step_index
    worst = before
    while rig.slot.stage == lifecycle.BLENDING and rig.step_index < grafted_at + 200:
        rig.train()
        worst = max(worst, smoothed_loss(rig))
    assert rig.slot.stage == lifecycle.CULLED
    assert worst > 1.1 * before + 0.02
    told = [event.gate for event in events if event.HasField("gate")][-1]
    assert (told.gate, told.reason, [check.name for check in told.checks]) == (G4, "loss_patience", ["patience"])
    payload = rig.host.rollback_payload(rig.seed_id)
    assert (payload.reason, payload.gate, payload.payload["step"]) == ("loss_patience", G4, grafted_at)
    site, h = rig.sites["2"], torch.ones(2, 8)
    assert torch.equal(site(h), site.host(h))
    rig.train(120)
    assert smoothed_loss(rig) < before
    assert rig.slot.stage == lifecycle.DORMANT


@pytest.mark.parametrize(("blueprint", "gates"), [
    ("residual_mlp", {"loss_patience": 25, "stage_patience": 0}),
    ("wrecking", {"loss_patience": 0, "stage_patience": 0}),
])  # fmt: skip
def test_a_seed_that_does_no_harm_stays_and_so_does_any_where_patience_has_no_end(make, blueprint, gates):
    rig = make(**gates)
    rig.train(150)
    rig.grow(lifecycle.BLENDING, blueprint)
    rig.train(60)
    assert rig.slot.stage == lifecycle.BLENDING


@pytest.mark.parametrize("stage", [lifecycle.BLENDING, lifecycle.SHADOWING, lifecycle.PROBATIONARY])
def test_a_grafted_seed_that_nobody_moves_on_goes_and_what_lies_below_it_learns_again(make, stage):
    rig = make(stage_patience=30, loss_patience=0)
    rig.grow(stage)
    rig.train(30)
    below = rig.model[0].weight.clone()
    assert rig.slot.stage == stage
    rig.train(1)
    assert rig.slot.stage == lifecycle.CULLED
    assert rig.host.rollback_payload(rig.seed_id).reason == "stage_patience"
    # As ever while it is grafted: its host gets no gradient through the mix.
    assert torch.equal(below, rig.model[0].weight)
    rig.train(2)
    assert not torch.equal(below, rig.model[0].weight)


@pytest.mark.parametrize("stage", [lifecycle.GERMINATED, lifecycle.TRAINING, lifecycle.FOSSILIZED])
def test_what_holds_nothing_back_may_stay(make, stage):
    rig = make(stage_patience=30)
    rig.grow(stage)
    below = rig.model[0].weight.clone()
    rig.train(40)
    assert rig.slot.stage == stage
    assert not torch.equal(below, rig.model[0].weight)


def test_a_seed_that_is_tuned_in_time_may_stay(make):
    rig = make(stage_patience=30, loss_patience=0)
    rig.grow(lifecycle.SHADOWING)
    for _ in range(4):
        rig.train(20)
        assert rig.do("FINE_TUNE").reason == ""
    assert rig.slot.stage == lifecycle.SHADOWING


def test_after_a_checkpoint_was_restored_steps_are_counted_anew(make):
    rig = make(stage_patience=30, loss_patience=0)
    rig.grow(lifecycle.BLENDING)
    rig.train(20)
    rig.host.load_state_dict(rig.host.state_dict())
    rig.train(30)
    assert rig.slot.stage == lifecycle.BLENDING
    rig.train(1)
    assert rig.slot.stage == lifecycle.CULLED


class Bed:
    """Seeds that are grafted when a test says so, and a loss that it gives."""

    def __init__(self, **gates):
        self.progress = Progress()
        self.patience = Patience(config=GateConfig(**{"loss_patience": 5, "stage_patience": 0, **gates}),
                                 progress=self.progress)  # fmt: skip
        self.seeds = []

    def graft(self, loss=GOOD):
        site = Site(nn.Linear(2, 2))
        site.stage = lifecycle.BLENDING
        slot = SeedSlot(seed_id=f"seed-{len(self.seeds)}", site_id="", site=site, depth=-len(self.seeds))
        slot.loss_at_graft, slot.grafted_at = loss, self.progress.global_step
        self.seeds.append(slot)
        return slot

    def step(self, loss=GOOD, times=1):
        """Return the names of those that went."""
        gone = []
        for _ in range(times):
            if loss is not None:
                self.progress.loss = math.nan
                self.progress.observe(loss, self.progress.global_step + 1)
            found = self.patience.look(self.seeds)
            if found is not None:
                gone.append(found[0].seed_id)
                self.seeds.remove(found[0])
        return gone


def test_a_loss_is_held_against_a_seed_only_when_it_is_worse_in_a_row():
    bed = Bed()
    bed.graft()
    assert bed.step(BAD, 4) == []
    assert bed.step(GOOD) == []
    assert bed.step(BAD, 4) == []
    assert bed.step(BAD) == ["seed-0"]


def test_the_seed_that_was_grafted_last_goes_first_and_with_the_others_it_begins_anew():
    bed = Bed()
    for _ in range(3):
        bed.graft()
        bed.step()
    assert bed.step(BAD, 5) == ["seed-2"]
    assert bed.step(BAD, 4) == []
    assert bed.step(BAD) == ["seed-1"]
    assert bed.step(GOOD, 20) == []


def test_a_seed_that_came_when_the_loss_was_worse_already_is_not_blamed():
    bed = Bed()
    bed.graft()
    bed.step()
    bed.step(BAD, 3)
    bed.graft(BAD)
    assert bed.step(BAD, 2) == ["seed-0"]
    assert bed.step(BAD, 20) == []


def test_a_seed_that_made_it_worse_within_its_own_bounds_is_blamed_all_the_same():
    bed = Bed()
    bed.graft()
    bed.step()
    bed.graft(loss=1.1)
    bed.step(1.1)
    assert bed.step(1.2, 5) == ["seed-1"]


def test_with_a_seed_that_goes_for_another_reason_the_others_begin_anew():
    bed = Bed()
    bed.graft()
    other = bed.graft()
    bed.step()
    bed.step(BAD, 4)
    bed.seeds.remove(other)
    assert bed.step(BAD, 4) == []
    assert bed.step(BAD) == ["seed-0"]


@pytest.mark.parametrize("gates", [{"loss_patience": 5}, {"loss_patience": 0, "stage_patience": 5}])
def test_steps_in_which_a_seed_is_paused_do_not_count(gates):
    bed = Bed(**gates)
    slot = bed.graft()
    bed.step()
    bed.step(BAD, 3)
    slot.site.paused = True
    assert bed.step(BAD, 20) == []
    slot.site.paused = False
    assert bed.step(BAD) == []
    assert bed.step(BAD) == ["seed-0"]


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_steps_without_a_loss_that_is_a_number_neither_count_nor_end_a_row(loss):
    bed = Bed()
    bed.graft()
    bed.step()
    bed.step(BAD, 4)
    assert bed.step(loss, 20) == []
    assert bed.step(BAD) == ["seed-0"]


def test_seeds_that_were_restored_together_are_blamed_in_the_order_of_their_grafts():
    bed = Bed()
    first, second = bed.graft(), bed.graft()
    first.grafted_at, second.grafted_at = 9, 3
    assert bed.step(BAD, 5) == ["seed-0"]
