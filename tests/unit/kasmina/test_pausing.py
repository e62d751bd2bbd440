from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_rpc.pause_quota import PauseConfig
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle

APPLIED = CommandOutcome.RESULT_APPLIED


def test_a_pause_holds_growing_seeds_at_identity_until_it_ends(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(10)
    hidden = rig.model[:2](rig.x)
    assert not torch.equal(rig.sites["2"](hidden), rig.sites["2"].host(hidden))
    alpha = rig.slot.site.alpha
    assert rig.order(rig.pause(units=500)).result == APPLIED
    hidden = rig.model[:2](rig.x)
    assert torch.equal(rig.sites["2"](hidden), rig.sites["2"].host(hidden))
    rig.train()
    assert rig.slot.site.alpha == alpha
    rig.clock.advance(0.6)
    rig.train(2)
    assert rig.slot.site.alpha > alpha


def test_the_eleventh_pause_in_a_minute_is_refused(rig):
    outcomes = [rig.order(rig.pause()) for _ in range(11)]
    assert [outcome.reason for outcome in outcomes] == [""] * 10 + ["local_limit"]
    rig.clock.advance(60)
    assert rig.order(rig.pause()).result == APPLIED


def pause_as(rig, role, units):
    """Order a pause that somebody else signed."""
    command = rig.pause(units=units)
    rig.host.submit(rig.envelope(command, keyring=rig.keyring(role)))
    [outcome] = rig.host.apply_pending()
    return outcome


def test_a_pause_is_granted_in_full_in_part_or_not_at_all_and_each_request_is_told(make_rig):
    rig = make_rig(options={"pause": PauseConfig(units_per_window=1500)})
    outcomes = [rig.order(rig.pause(units=1000)) for _ in range(3)]
    assert [(outcome.result == APPLIED, outcome.reason) for outcome in outcomes] == [
        (True, ""), (True, ""), (False, "local_limit"),
    ]  # fmt: skip
    told = [(name, attributes) for name, attributes in rig.events() if name.startswith("pause_quota")]
    assert [name for name, _ in told] == ["pause_quota_granted", "pause_quota_granted", "pause_quota_denied"]
    assert [attributes["reason"] for _, attributes in told] == ["full", "partial", "denied"]
    assert [attributes["granted_units"] for _, attributes in told] == ["1000", "500", "0"]
    assert [attributes["command_id"] for _, attributes in told] == [outcome.command_id for outcome in outcomes]
    assert {attributes["principal"] for _, attributes in told} == {"tamiyo"}


def test_a_request_gets_a_second_at_most_and_without_a_number(rig):
    rig.order(rig.pause(units=5000))
    rig.order(rig.pause(units=0))
    granted = rig.told("pause_quota_granted")
    assert [(each["requested_units"], each["granted_units"]) for each in granted] == [
        ("5000", "1000"),
        ("1000", "1000"),
    ]


def test_the_quota_of_one_who_signs_is_not_that_of_another(make_rig):
    rig = make_rig(options={"pause": PauseConfig(units_per_window=1000)})
    assert pause_as(rig, "tamiyo", 1000).result == APPLIED
    assert pause_as(rig, "tamiyo", 1).reason == "local_limit"
    assert pause_as(rig, "operator", 1000).result == APPLIED


def test_it_is_told_when_a_quota_is_whole_again(make_rig):
    rig = make_rig(options={"pause": PauseConfig(units_per_window=1000)})
    rig.order(rig.pause(units=600))
    rig.clock.advance(30)
    rig.order(rig.pause(units=400))
    rig.clock.advance(30)
    assert rig.told("pause_quota_reset") == []
    rig.clock.advance(30)
    assert [each["principal"] for each in rig.told("pause_quota_reset")] == ["tamiyo"]
    assert rig.told("pause_quota_reset") == []


def test_a_pause_and_its_end_are_told_and_a_second_one_never_shortens_it(rig):
    rig.grow(lifecycle.BLENDING)
    rig.order(rig.pause(units=900))
    rig.order(rig.pause(units=100))
    assert [each["seed_id"] for each in rig.told("pause")] == [rig.seed_id] * 2
    rig.clock.advance(0.5)
    assert rig.told("resume") == []
    rig.clock.advance(0.4)
    assert [(each["seed_id"], each["reason"]) for each in rig.told("resume")] == [(rig.seed_id, "pause_is_over")]


def test_a_pause_of_an_unknown_seed_costs_nothing(rig):
    assert rig.order(rig.pause("seed-nowhere")).reason == "unknown_seed"
    assert rig.told("pause_quota_granted") == []


class Flattening(nn.Module):
    def forward(self, h):
        return h.flatten()


class Raising(nn.Module):
    def forward(self, h):
        raise RuntimeError("no")


def spoil_weights(rig):
    with torch.no_grad():
        next(rig.slot.site.seed.parameters()).fill_(float("nan"))


def swap(module):
    def swap_in(rig):
        # Around `hold`, which would end the pause.
        object.__setattr__(rig.slot.site, "_seed", module)

    return swap_in


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_weights, "g1_gradient_health"),
        (swap(nn.Sequential(nn.Linear(8, 8), Flattening())), "shape_mismatch"),
        (swap(nn.Sequential(nn.Linear(8, 8), Raising())), "seed_failed"),
    ],
    ids=["weights", "shape", "raises"],
)
def test_a_seed_that_cannot_take_part_any_more_is_culled_when_its_pause_ends(rig, spoil, reason):
    rig.grow(lifecycle.BLENDING)
    rig.train(10)
    rig.order(rig.pause(units=500))
    spoil(rig)
    rig.train()
    assert rig.slot.stage == lifecycle.BLENDING
    rig.clock.advance(0.6)
    told = rig.events()
    assert rig.slot.stage == lifecycle.CULLED
    assert [attributes["reason"] for name, attributes in told if name in ("resume", "fallback_applied")] == [reason] * 2
    rig.train()


def test_a_seed_in_order_keeps_its_mode_and_its_weights_when_its_pause_ends(rig):
    rig.grow(lifecycle.TRAINING)
    rig.train()
    rig.order(rig.pause(units=500))
    rig.clock.advance(0.6)
    before = {name: value.clone() for name, value in rig.slot.site.seed.state_dict().items()}
    rig.host.finalize_step(99)
    assert rig.slot.stage == lifecycle.TRAINING
    assert rig.slot.site.seed.training
    assert all(torch.equal(before[name], value) for name, value in rig.slot.site.seed.state_dict().items())


def test_a_fossil_that_was_named_goes_on_after_its_pause(rig):
    rig.grow(lifecycle.FOSSILIZED)
    rig.order(rig.pause(rig.seed_id, units=500))
    rig.clock.advance(0.6)
    rig.host.finalize_step(99)
    assert (rig.slot.stage, rig.slot.site.paused) == (lifecycle.FOSSILIZED, False)
