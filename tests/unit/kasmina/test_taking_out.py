"""What a seed that is taken out leaves behind: a payload for a rollback, and nothing else."""

from __future__ import annotations

import pytest
import torch

from esper_rpc.errors import NotFound
from esper_rpc.proto.leyline.v1 import CommandOutcome, CommandType, SeedLifecycleGate
from esper_servers.kasmina import lifecycle

G4 = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT


@pytest.fixture
def seen(rig):
    events = []
    rig.host.listen(events.append)
    return events


def test_a_gate_that_fails_leaves_a_payload_that_leads_to_before_the_graft(rig, seen):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    before = rig.step_index
    rig.do("START_GRAFTING")
    rig.train(21)
    rig.do("STABILIZE")
    rig.train()
    rig.do("EVALUATE")
    rig.host.observe(1e6, rig.step_index)
    rig.do("FOSSILIZE")
    found = rig.host.rollback_payload(rig.seed_id)
    assert (found.reason, found.gate, found.stage) == ("g4_system_impact", G4, lifecycle.PROBATIONARY)
    assert dict(found.payload) == {"step": before, "reason": "g4_system_impact", "tier": "fast"}
    assert [event.rollback for event in seen if event.HasField("rollback")] == [found]


def test_a_seed_that_never_took_part_has_nothing_to_go_back_from(rig):
    rig.grow(lifecycle.TRAINING)
    rig.train()
    rig.do("CULL")
    found = rig.host.rollback_payload(rig.seed_id)
    assert (found.reason, found.blueprint_id, found.HasField("payload")) == ("commanded", "residual_mlp", False)


def test_nothing_is_known_of_a_place_where_nothing_was_taken_out_or_that_went_back(rig):
    with pytest.raises(NotFound):
        rig.host.rollback_payload(rig.seed_id)
    with pytest.raises(NotFound):
        rig.host.rollback_payload("nobody")
    rig.grow(lifecycle.BLENDING)
    saved = rig.host.state_dict()
    rig.do("CULL")
    rig.host.rollback_payload(rig.seed_id)
    rig.host.load_state_dict(saved)
    with pytest.raises(NotFound):
        rig.host.rollback_payload(rig.seed_id)


def test_a_payload_is_what_the_command_to_roll_back_carries(rig):
    taken = []
    rig.host.route(
        CommandType.COMMAND_TYPE_ROLLBACK, lambda queued: taken.append(dict(queued.command.rollback_payload))
    )
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    rig.do("CULL")
    command = rig.command(seed_id="")
    command.command_type = CommandType.COMMAND_TYPE_ROLLBACK
    command.rollback_payload.CopyFrom(rig.host.rollback_payload(rig.seed_id).payload)
    rig.host.submit(rig.envelope(command))
    rig.host.apply_pending()
    assert taken == [{"step": 3.0, "reason": "commanded", "tier": "fast"}]


@pytest.mark.parametrize(
    "stage",
    [lifecycle.DORMANT, lifecycle.GERMINATED, lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.PROBATIONARY],
)
def test_a_seed_that_is_terminated_leaves_the_host_alone_and_never_comes_back(rig, stage):
    if stage != lifecycle.DORMANT:
        rig.grow(stage)
    assert rig.host.terminate(rig.seed_id) == stage
    assert rig.slot.stage == lifecycle.TERMINATED
    site = rig.sites["2"]
    h = torch.ones(2, 8)
    assert torch.equal(site(h), site.host(h))
    rig.clock.advance(100)
    rig.train(5)
    assert rig.do("GERMINATE", blueprint="residual_mlp").reason == "illegal_transition"
    assert rig.host.terminate(rig.seed_id) == lifecycle.TERMINATED
    assert rig.host.validate_parameters(rig.seed_id, []) == ""


def test_a_fossil_that_is_terminated_leaves_the_model_and_the_optimizer(rig, seen):
    rig.grow(lifecycle.FOSSILIZED)
    rig.train()
    parameters = list(rig.slot.site.seed.parameters())
    rig.host.terminate(rig.seed_id)
    trained = [p for group in rig.optimizer.param_groups for p in group["params"]]
    assert not {id(p) for p in parameters} & {id(p) for p in trained}
    assert seen[-1].to_stage == lifecycle.TERMINATED
    assert dict(seen[-1].rollback.payload)["reason"] == "terminated"
    rig.train(2)
    exported = rig.host.export()
    rig.model.eval()
    torch.testing.assert_close(exported.eval()(rig.x), rig.model(rig.x))


def test_a_command_for_a_fossil_changes_nothing(rig, unchanged):
    rig.grow(lifecycle.FOSSILIZED)
    for operation in ("CULL", "FINE_TUNE", "START_GRAFTING", "GERMINATE", "FOSSILIZE", "CANCEL"):
        before = rig.picture()
        outcome = rig.do(operation, blueprint="residual_mlp")
        assert (outcome.result, outcome.reason) == (CommandOutcome.RESULT_REJECTED, "illegal_transition")
        unchanged(before, rig.picture())


def test_a_terminated_seed_stays_so_through_a_checkpoint(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.TRAINING)
    first.host.terminate(first.seed_id)
    second.host.load_state_dict(first.host.state_dict())
    assert second.slot.stage == lifecycle.TERMINATED
    assert second.do("GERMINATE", blueprint="residual_mlp").reason == "illegal_transition"
