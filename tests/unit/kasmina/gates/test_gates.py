"""Each gate: what opens it, what keeps it shut for now, and what costs the seed its place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from esper_rpc.proto.kasmina.v1 import GateResult
from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, CommandOutcome, CommandSeedOperation, SeedLifecycleGate
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.blending.steadiness import WINDOW, Steadiness, strength
from esper_servers.kasmina.gates import interface, reset, sanity, stability
from esper_servers.kasmina.gates.config import GateConfig

PASSED, NOT_YET, FAILED = (
    GateResult.GATE_RESULT_PASSED,
    GateResult.GATE_RESULT_NOT_YET,
    GateResult.GATE_RESULT_FAILED,
)
APPLIED = CommandOutcome.RESULT_APPLIED
GATES = [
    "G0_SANITY", "G1_GRADIENT_HEALTH", "G2_STABILITY", "G3_INTERFACE", "G4_SYSTEM_IMPACT", "G5_RESET",
]  # fmt: skip


def name_of(gate):
    return SeedLifecycleGate.Name(gate).removeprefix("SEED_LIFECYCLE_GATE_")


def shut(gate):
    """Return the checks that did not pass."""
    return {each.name: each.reason for each in gate.checks if each.result != PASSED}


@pytest.fixture
def seen(rig):
    """Return all that a host tells of its seeds."""
    events = []
    rig.host.listen(events.append)
    return events


def gates_of(events):
    return [event.gate for event in events if event.HasField("gate")]


def test_a_life_passes_every_gate_in_turn(rig, seen):
    rig.grow(lifecycle.FOSSILIZED)
    told = gates_of(seen)
    assert [name_of(gate.gate) for gate in told] == GATES[:5]
    assert all(gate.result == PASSED and not gate.reason and len(gate.checks) > 1 for gate in told)


def test_a_gate_is_told_before_the_move_that_follows_and_names_its_command(rig, seen):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    command = rig.command("START_GRAFTING")
    rig.order(command)
    gate, move, outcome = seen[-3:]
    assert gate.from_stage == gate.to_stage == lifecycle.TRAINING
    assert (move.from_stage, move.to_stage) == (lifecycle.TRAINING, lifecycle.BLENDING)
    assert {gate.command_id, move.command_id, outcome.command_id} == {command.command_id}


def test_a_gate_is_an_event_of_the_packet_with_its_name_and_result(rig):
    rig.grow(lifecycle.BLENDING)
    rig.events()
    rig.do("STABILIZE")
    [told] = rig.told("gate_event")
    assert (told["gate"], told["result"], told["reason"], told["seed_id"]) == (
        "G2_STABILITY", "NOT_YET", "g2_stability", rig.seed_id,
    )  # fmt: skip


BOUNDED = BlueprintDescriptor(blueprint_id="b", allowed_parameters={"rank": {"min_value": 1, "max_value": 8}})


@pytest.mark.parametrize(
    ("parameters", "result"),
    [
        ({}, PASSED), ({"rank": 1.0}, PASSED), ({"rank": 8.0}, PASSED), ({"another": 5.0}, PASSED),
        ({"rank": 0.5}, FAILED), ({"rank": 9.0}, FAILED), ({"rank": math.nan}, FAILED), ({"another": math.inf}, FAILED),
    ],
)  # fmt: skip
def test_g0_holds_parameters_against_the_bounds_of_the_blueprint(parameters, result):
    gate = sanity.judge(CommandSeedOperation(blueprint_id="b", parameters=parameters), BOUNDED, "")
    assert gate.result == result
    assert shut(gate) == ({"parameters": "parameter_out_of_bounds"} if result == FAILED else {})


def test_g0_wants_a_blueprint_that_is_to_be_had_and_not_in_quarantine():
    asked = CommandSeedOperation(blueprint_id="b")
    assert shut(sanity.judge(CommandSeedOperation(), BOUNDED, "")) == {"request": "g0_sanity"}
    assert sanity.judge(asked, None, "unknown_blueprint").reason == "unknown_blueprint"
    quarantined = BlueprintDescriptor(blueprint_id="b", quarantine_only=True)
    assert sanity.judge(asked, quarantined, "").reason == "bp_quarantine"


@pytest.mark.parametrize(
    ("blueprint", "parameters", "reason"),
    [("nowhere", {}, "unknown_blueprint"), ("residual_mlp", {"expansion": 64.0}, "parameter_out_of_bounds")],
)
def test_a_seed_that_g0_refuses_stays_dormant_and_may_germinate_at_once(rig, blueprint, parameters, reason):
    outcome = rig.do("GERMINATE", blueprint=blueprint, **parameters)
    assert (outcome.result, outcome.reason) == (CommandOutcome.RESULT_FAILED, reason)
    assert rig.slot.stage == lifecycle.DORMANT
    assert rig.do("GERMINATE", blueprint="residual_mlp").result == APPLIED


def test_a_blueprint_in_quarantine_is_not_even_tried(rig):
    class Forbidden(nn.Module):
        def __init__(self):
            raise AssertionError("built")

    rig.install("locked", lambda shape: Forbidden())
    rig.kernels["locked"].blueprint.descriptor.quarantine_only = True
    assert rig.do("GERMINATE", blueprint="locked").reason == "bp_quarantine"


def test_g1_waits_for_a_loss_that_is_a_number(rig):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    rig.host.observe(math.nan, 5)
    assert rig.do("START_GRAFTING").reason == "g1_gradient_health"
    assert rig.slot.stage == lifecycle.TRAINING
    rig.host.observe(1.0, 6)
    assert rig.do("START_GRAFTING").result == APPLIED


def test_g1_waits_for_a_first_update_and_for_gradients_that_are_numbers(rig, seen):
    rig.grow(lifecycle.TRAINING)
    rig.host.observe(1.0, 1)
    rig.do("START_GRAFTING")
    assert shut(gates_of(seen)[-1]) == dict.fromkeys(["learned", "hooks"], "g1_gradient_health")
    rig.train(2)
    rig.slot.violations = 1
    rig.do("START_GRAFTING")
    assert shut(gates_of(seen)[-1]) == {"gradients": "g1_gradient_health"}
    assert rig.slot.stage == lifecycle.TRAINING


def test_g1_culls_a_seed_that_would_have_written_to_another(rig, seen):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    rig.host.validate_parameters(rig.seed_id, rig.model[0].host.parameters())
    rig.do("START_GRAFTING")
    assert shut(gates_of(seen)[-1]) == {"isolation": "g1_gradient_health"}
    assert rig.slot.stage == lifecycle.CULLED


def test_g1_culls_a_seed_whose_gradient_overlapped_with_that_of_the_host(rig, seen):
    rig.grow(lifecycle.TRAINING)
    shared = rig.slot.site.own_parameters[0]
    rig.train(1)
    host = torch.cat([rig.model[2].weight.data.view(-1), torch.zeros(shared.numel())])
    rig.model[2].weight.data = host[:64].view(8, 8)
    shared.data = host[: shared.numel()].view(shared.shape)
    rig.train(2)
    assert rig.host._isolation.violations_of(rig.seed_id) == 1
    rig.do("START_GRAFTING")
    assert shut(gates_of(seen)[-1])["isolation"] == "g1_gradient_health"
    assert rig.slot.stage == lifecycle.CULLED


def test_g1_waits_until_gradients_were_measured(rig, seen):
    rig.grow(lifecycle.TRAINING)
    rig.train(1)
    rig.host._isolation._records[rig.seed_id].problem = "not measured"
    rig.do("START_GRAFTING")
    assert shut(gates_of(seen)[-1]) == {"hooks": "g1_gradient_health"}
    assert rig.slot.stage == lifecycle.TRAINING
    rig.train(1)
    assert rig.do("START_GRAFTING").result == APPLIED


def steady(strengths, hook_ms=1.0):
    steadiness = Steadiness()
    for each in strengths:
        steadiness.note(each, hook_ms)
    return steadiness


@pytest.mark.parametrize(
    ("steadiness", "wrong"),
    [
        (steady([1.0] * WINDOW), set()),
        (steady([1.0, 1.1] * (WINDOW // 2)), set()),
        (steady([1.0] * (WINDOW - 1)), {"outputs"}),
        (steady([0.5] * 4 + [0.7] * 4), {"outputs"}),
        (steady([1.0, 1.6] * (WINDOW // 2)), {"oscillation"}),
        (steady([1.0, 1.6, 1.0, 1.6, 1.3, 1.3, 1.3, 1.3]), set()),
        (steady([1.0, 1.6, 1.0, 1.6, 1.2, 1.5, 1.4, 1.3]), {"oscillation"}),
        (steady([1.0] * WINDOW, hook_ms=50.0), set()),
        (steady([1.0] * WINDOW, hook_ms=51.0), {"hook_latency"}),
    ],
    ids=["steady", "noise", "too few", "drifts", "swings", "three turns", "four turns", "in time", "slow"],
)
def test_g2_waits_until_outputs_are_steady_and_in_time(rig, steadiness, wrong):
    rig.grow(lifecycle.BLENDING)
    rig.slot.steadiness, rig.slot.site.alpha = steadiness, 1.0
    gate = stability.judge(rig.slot, GateConfig())
    assert set(shut(gate)) == wrong
    assert gate.result == (NOT_YET if wrong else PASSED)


@pytest.mark.parametrize(("alpha", "wrong"), [(0.97, {"alpha"}), (0.98, set())])
def test_g2_waits_for_alpha_to_have_run_its_course(rig, alpha, wrong):
    rig.grow(lifecycle.BLENDING)
    rig.slot.steadiness, rig.slot.site.alpha = steady([1.0] * WINDOW), alpha
    assert set(shut(stability.judge(rig.slot, GateConfig()))) == wrong


def test_one_pass_that_compiled_or_waited_does_not_count_as_slow():
    steadiness = Steadiness()
    for hook_ms in (60_000.0, 1.0, 2.0, 900.0, 3.0):
        steadiness.note(1.0, hook_ms)
    assert steadiness.hook_ms == 3.0


def test_a_small_head_is_steady_over_batches_that_are_never_the_same():
    drawn = torch.Generator().manual_seed(0)
    steadiness = Steadiness()
    swung = 0
    for _ in range(100):
        h = torch.randn(64, 3, generator=drawn)
        steadiness.note(float(strength(torch.relu(h), h)), 1.0)
        swung += steadiness.swings(GateConfig().output_drift)
    assert swung == 0


def test_of_large_maps_a_few_samples_are_taken():
    h = torch.ones(8, 2**17)
    s = h.clone()
    s[4:] = 9.0
    assert float(strength(s, h)) == pytest.approx(1.0)


def test_an_empty_batch_tells_nothing_of_the_strength(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    before = list(rig.slot.steadiness.strengths)
    rig.model(rig.x[:0])
    rig.host.finalize_step(rig.step_index + 1)
    assert list(rig.slot.steadiness.strengths) == before
    assert not rig.slot.site.failure


def test_the_strength_of_the_output_is_measured_while_a_seed_blends_and_at_no_other_time(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    assert len(rig.slot.steadiness.strengths) == 2  # The first pass was before alpha had risen.
    assert rig.slot.steadiness.hook_ms > 0
    rig.order(rig.pause())
    rig.train(2)
    assert len(rig.slot.steadiness.strengths) == 2
    rig.clock.advance(2)
    rig.train(20)
    rig.do("STABILIZE")
    before = list(rig.slot.steadiness.strengths)
    rig.train(2)
    assert list(rig.slot.steadiness.strengths) == before


class Deaf(nn.Module):
    """Gives a map of another shape once it has been told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.is_deaf = False

    def forward(self, h):
        return (h * self.weight)[..., :4] if self.is_deaf else h * self.weight


def test_g3_culls_a_seed_that_no_longer_fits(rig, seen):
    rig.install("deaf", lambda shape: Deaf())
    rig.grow(lifecycle.SHADOWING, "deaf")
    rig.slot.site.seed.is_deaf = True
    assert rig.do("EVALUATE").reason == "shape_mismatch"
    assert set(shut(gates_of(seen)[-1])) == {"shapes", "pause_resume"}
    assert rig.slot.stage == lifecycle.CULLED


def test_g3_waits_for_telemetry(rig):
    rig.grow(lifecycle.SHADOWING)
    gate = interface.judge(rig.slot, untold=["kasmina.seed.alpha"])
    assert (gate.result, shut(gate)) == (NOT_YET, {"telemetry": "g3_interface"})


def test_g3_waits_until_the_packet_of_the_seed_is_complete(rig):
    rig.grow(lifecycle.SHADOWING)
    rig.slot.site.hook_ms = math.nan
    assert rig.do("EVALUATE").reason == "g3_interface"
    assert rig.slot.stage == lifecycle.SHADOWING
    rig.slot.site.hook_ms = 1.0
    assert rig.do("EVALUATE").result == APPLIED


def test_g3_culls_a_seed_that_a_pause_does_not_let_go(rig, seen):
    rig.grow(lifecycle.SHADOWING)
    # It stands aside whether it is held or not.
    rig.slot.site.alpha = 0.0
    assert rig.do("EVALUATE").reason == "g3_interface"
    assert shut(gates_of(seen)[-1]) == {"pause_resume": "g3_interface"}
    assert rig.slot.stage == lifecycle.CULLED


def test_g3_holds_and_lets_go_without_a_trace(rig):
    rig.grow(lifecycle.SHADOWING)
    site = rig.slot.site
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    before = rig.model(rig.x)
    assert site.can_be_held()
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(rig.model(rig.x), before)
    assert (site.paused, site.seed.training) == (False, True)


@pytest.mark.parametrize(
    ("before", "loss", "opens"),
    [(1.0, 1.1199, True), (1.0, 1.1201, False), (-1.0, -0.8801, True), (-1.0, -0.8799, False), (1.0, math.nan, False)],
)
def test_g4_lets_the_loss_be_a_little_worse_as_the_settings_say(rig, before, loss, opens):
    rig.grow(lifecycle.PROBATIONARY)
    rig.slot.loss_at_graft = before
    rig.host._progress.loss = loss
    outcome = rig.do("FOSSILIZE")
    failed = (CommandOutcome.RESULT_FAILED, "g4_system_impact", lifecycle.CULLED)
    assert (outcome.result, outcome.reason, rig.slot.stage) == (
        (APPLIED, "", lifecycle.FOSSILIZED) if opens else failed
    )


def test_g5_finds_what_a_seed_has_left(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    slot = rig.slot
    assert set(shut(reset.judge(slot, owned_parameters=5))) == {"module", "alpha", "counters"}
    slot.uproot()
    assert set(shut(reset.judge(slot, owned_parameters=0))) == {"counters"}
    slot.reset()
    assert reset.judge(slot, owned_parameters=0).result == PASSED


def test_a_place_that_g5_does_not_find_clean_is_not_planted_again(rig, monkeypatch):
    rig.grow(lifecycle.BLENDING)
    rig.do("CULL")
    monkeypatch.setattr(rig.slot, "reset", lambda: None)
    for _ in range(5):
        rig.clock.advance(10)
        rig.train()
    assert rig.slot.stage == lifecycle.RESETTING
    assert rig.do("GERMINATE", blueprint="residual_mlp").reason == "illegal_transition"
    monkeypatch.undo()
    rig.train()
    assert rig.slot.stage == lifecycle.DORMANT


def test_an_embargo_is_of_seconds_however_many_steps_there_are(make_rig):
    rig = make_rig(options={"gates": GateConfig(embargo_seconds=2.0)})
    rig.grow(lifecycle.TRAINING)
    rig.do("CULL")
    rig.train()
    for _ in range(100):
        rig.host.finalize_step(1)
    assert rig.slot.stage == lifecycle.EMBARGOED
    rig.clock.advance(2.0)
    rig.host.finalize_step(2)
    assert rig.slot.stage == lifecycle.RESETTING


def test_the_way_back_is_told_with_the_embargo_and_g5(rig, seen):
    rig.grow(lifecycle.BLENDING)
    rig.do("CULL")
    told = []
    for _ in range(3):
        rig.clock.advance(10)
        told += [name for name, _ in rig.events()]
    stages = [stage for stage, _ in itertools.groupby(event.to_stage for event in seen)]
    assert stages[-4:] == [lifecycle.CULLED, lifecycle.EMBARGOED, lifecycle.RESETTING, lifecycle.DORMANT]
    assert [name for name in told if name.startswith("embargo")] == ["embargo_start", "embargo_end"]
    assert name_of(gates_of(seen)[-1].gate) == "G5_RESET"


def test_an_embargo_goes_on_in_a_restored_host(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.TRAINING)
    first.do("CULL")
    first.train()
    first.clock.advance(3)
    first.train()
    second.clock.advance(1_000_000)
    second.host.load_state_dict(first.host.state_dict())
    second.host.finalize_step(1)
    assert second.slot.embargo_left == pytest.approx(first.slot.embargo_left)


@pytest.mark.parametrize(("told", "applied"), [("0.39", False), ("0.41", True), ("nonsense", False), ("", True)])
def test_what_was_known_is_told_and_may_be_too_little(make_rig, told, applied):
    rig = make_rig(options={"gates": GateConfig(least_coverage=0.4)})
    events = []
    rig.host.listen(events.append)
    for operation, stage in (("GERMINATE", lifecycle.DORMANT), ("START_GRAFTING", lifecycle.TRAINING)):
        command = rig.command(operation, blueprint="residual_mlp")
        command.annotations["feature_coverage"] = told
        assert (rig.order(command).result == APPLIED) == applied
        gate = gates_of(events)[-1]
        assert gate.reason == ("" if applied else "degraded_inputs")
        assert [each.detail for each in gate.checks if each.name == "inputs"] == ([f"coverage {told}"] if told else [])
        if not applied:
            assert rig.slot.stage == stage
            rig.do(operation, blueprint="residual_mlp")
        if operation == "GERMINATE":
            rig.do("START_TRAINING")
            rig.train(2)
