from __future__ import annotations

import hashlib
import io
import itertools

import pytest
import safetensors.torch
import torch
from torch import nn

from esper_rpc.errors import DataLoss, InvalidRequest
from esper_rpc.proto.leyline.v1 import CommandOutcome, CommandType
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.limits import LocalLimits

APPLIED, FAILED, REJECTED = (
    CommandOutcome.RESULT_APPLIED,
    CommandOutcome.RESULT_FAILED,
    CommandOutcome.RESULT_REJECTED,
)


def test_a_known_command_in_another_envelope_changes_nothing(rig, unchanged):
    command = rig.command("CULL")
    rig.order(command)
    refused(rig, unchanged, rig.envelope(command), "nonce_replayed")


@pytest.mark.parametrize("command_id", ["", "not-a-uuid"])
def test_a_command_that_breaks_the_contract_changes_nothing(rig, unchanged, command_id):
    command = rig.command("GERMINATE", blueprint="residual_mlp")
    command.command_id = command_id
    refused(rig, unchanged, rig.envelope(command, nonce="any"), "malformed_payload")


def test_bytes_that_are_no_command_change_nothing(rig, unchanged):
    refused(rig, unchanged, rig.envelope(rig.command(), payload=b"\xff\xff"), "malformed_payload")


@pytest.mark.parametrize("kind", ["ROLLBACK", "EMERGENCY", "CIRCUIT_BREAKER", "STRUCTURAL_PRUNING"])
def test_what_the_host_cannot_do_changes_nothing(rig, unchanged, kind):
    command = rig.command()
    command.command_type = CommandType.Value(f"COMMAND_TYPE_{kind}")
    refused(rig, unchanged, rig.envelope(command), "unsupported")


def refused(rig, unchanged, envelope, reason):
    before = rig.picture()
    outcome = rig.host.submit(envelope)
    assert (outcome.result, outcome.reason) == (REJECTED, reason)
    assert rig.host.apply_pending() == []
    unchanged(before, rig.picture())
    assert rig.host.verifier.rejections[reason] == 1


@pytest.mark.parametrize(
    ("limits", "make"),
    [
        (LocalLimits(live_seeds=0), lambda rig: rig.command("GERMINATE", blueprint="residual_mlp")),
        (LocalLimits(pauses_per_minute=0), lambda rig: rig.pause()),
        (LocalLimits(), lambda rig: rig.optimizer_command(5.0)),
        (LocalLimits(), lambda rig: rig.optimizer_command(0.01)),
        (LocalLimits(), lambda rig: rig.optimizer_command(-1.0)),
    ],
    ids=["live seeds", "pauses", "faster", "slower", "backwards"],
)
def test_a_signed_command_beyond_a_local_limit_changes_nothing(make_rig, unchanged, limits, make):
    rig = make_rig(limits=limits)
    before = rig.picture()
    outcome = rig.order(make(rig))
    assert (outcome.result, outcome.reason) == (REJECTED, "local_limit")
    unchanged(before, rig.picture())


def test_learning_rate_cuts_do_not_add_up_without_end(rig):
    outcomes = [rig.order(rig.optimizer_command(0.1)) for _ in range(4)]
    assert [outcome.result for outcome in outcomes] == [APPLIED, APPLIED, REJECTED, REJECTED]
    assert rig.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.01)


WEIGHTS = {"reduce.weight": torch.ones(8, 8), "expand.weight": torch.ones(8, 8)}
FAILING_KERNELS = {
    "checksum_mismatch": lambda rig, make: make("residual_mlp", b"damaged", weights_sha256=bytes(32)),
    "shape_mismatch": lambda rig, make: make("depthwise_conv"),
    "unknown_factory": lambda rig, make: make("residual_mlp", factory="never_installed"),
    "bad_config": lambda rig, make: make("residual_mlp", config_json='{"no_such": 1}'),
    "dtype_mismatch": lambda rig, make: of_dtype(make("residual_mlp"), "F64"),
    "build_failed": lambda rig, make: rig.kernels[rig.install("raises", lambda shape: Stubborn())],
    "out_of_memory": lambda rig, make: rig.kernels[rig.install("greedy", greedy)],
    "parameter_violation": lambda rig, make: rig.kernels[rig.install("thief", lambda shape: Thief(rig.model[2]))],
}


def of_dtype(kernel, name):
    kernel.blueprint.manifest.dtypes[:] = [name]
    return kernel


class Stubborn(nn.Module):
    """Cannot run."""

    def forward(self, h):
        raise LookupError("no idea what to do")


class Thief(nn.Module):
    """Has a parameter of the host's."""

    def __init__(self, host):
        super().__init__()
        self.weight = host.weight

    def forward(self, h):
        return h * self.weight.mean()


def greedy(shape):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("reason", FAILING_KERNELS)
def test_a_kernel_that_cannot_grow_culls_its_seed_and_training_goes_on(rig, make_kernel, reason):
    kernel = FAILING_KERNELS[reason](rig, make_kernel)
    kernel.blueprint.descriptor.blueprint_id = "bad"
    rig.kernels["bad"] = kernel
    before = {key: value.clone() for key, value in rig.model.state_dict().items()}
    outcome = rig.do("GERMINATE", blueprint="bad")
    assert (outcome.result, outcome.reason) == (FAILED, reason)
    assert rig.slot.stage == lifecycle.CULLED
    assert all(torch.equal(before[key], value) for key, value in rig.model.state_dict().items())
    assert torch.equal(rig.model(rig.x), rig.plain(rig.x))
    [told] = rig.told("fallback_applied")
    assert (told["reason"], told["seed_id"]) == (reason, rig.seed_id)
    rig.train(3)
    assert not torch.equal(before["2.weight"], rig.model.state_dict()["2.weight"])


def test_weights_that_match_their_checksum_are_loaded(rig, make_kernel):
    assert germinate_with(rig, make_kernel, WEIGHTS).result == APPLIED
    assert torch.equal(rig.slot.site.seed.reduce.weight.detach(), torch.ones(8, 8))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({**WEIGHTS, "reduce.weight": torch.full((8, 8), float("nan"))}, "non_finite_weights"),
        ({**WEIGHTS, "reduce.weight": torch.ones(8, 4)}, "shape_mismatch"),
        ({**WEIGHTS, "reduce.weight": torch.ones(8, 8, dtype=torch.int32)}, "dtype_mismatch"),
        ({**WEIGHTS, "reduce.weight": torch.full((8, 8), 1e300, dtype=torch.float64)}, "non_finite_weights"),
    ],
    ids=["not finite", "of another shape", "of another kind", "too large"],
)
def test_weights_that_do_not_fit_cull_the_seed(rig, make_kernel, weights, reason):
    outcome = germinate_with(rig, make_kernel, weights)
    assert (outcome.result, outcome.reason, rig.slot.stage) == (FAILED, reason, lifecycle.CULLED)
    rig.train()


def germinate_with(rig, make_kernel, tensors):
    weights = safetensors.torch.save(tensors)
    digest = hashlib.sha256(weights).digest()
    rig.kernels["lora_linear"] = make_kernel("lora_linear", weights, weights_sha256=digest)
    return rig.do("GERMINATE", blueprint="lora_linear")


def test_a_seed_that_is_too_big_is_refused_by_the_local_limit(make_rig):
    rig = make_rig(limits=LocalLimits(added_parameters=10))
    outcome = rig.do("GERMINATE", blueprint="residual_mlp")
    assert outcome.reason == "local_limit"
    assert rig.slot.site.seed is None


def test_a_culled_seed_makes_room_for_another(make_rig):
    rig = make_rig(limits=LocalLimits(live_seeds=1))
    first, second = rig.seed_ids
    assert rig.do("GERMINATE", blueprint="residual_mlp", seed_id=first).result == APPLIED
    assert rig.do("GERMINATE", blueprint="residual_mlp", seed_id=second).reason == "local_limit"
    rig.do("CULL", seed_id=first)
    assert rig.do("GERMINATE", blueprint="residual_mlp", seed_id=second).result == APPLIED


def test_the_local_limit_counts_the_parameters_of_all_seeds(make_rig):
    alone = make_rig()
    alone.do("GERMINATE", blueprint="residual_mlp")
    rig = make_rig(limits=LocalLimits(added_parameters=2 * alone.slot.parameter_count - 1))
    outcomes = [rig.do("GERMINATE", blueprint="residual_mlp", seed_id=seed_id) for seed_id in rig.seed_ids]
    assert [outcome.reason for outcome in outcomes] == ["", "local_limit"]


def test_a_restored_host_counts_the_seeds_that_live(make_rig):
    first, second = make_rig(), make_rig(limits=LocalLimits(live_seeds=1))
    first.grow(lifecycle.TRAINING)
    second.model.load_state_dict(first.model.state_dict())
    second.host.load_state_dict(first.host.state_dict())
    assert second.do("GERMINATE", blueprint="residual_mlp", seed_id=second.seed_ids[0]).reason == "local_limit"


def test_a_culled_seed_comes_back_after_its_embargo(rig):
    rig.grow(lifecycle.TRAINING)
    assert rig.do("CULL").result == APPLIED
    stages = []
    for _ in range(200):
        rig.train()
        stages.append(rig.slot.stage)
    in_order = [stage for stage, _ in itertools.groupby(stages)]
    assert in_order == [lifecycle.EMBARGOED, lifecycle.RESETTING, lifecycle.DORMANT]
    assert rig.do("GERMINATE", blueprint="residual_mlp").result == APPLIED


@pytest.mark.parametrize("operation", ["START_TRAINING", "FOSSILIZE", "CULL", "STABILIZE"])
def test_an_illegal_operation_changes_nothing(rig, unchanged, operation):
    before = rig.picture()
    outcome = rig.do(operation)
    assert (outcome.result, outcome.reason) == (REJECTED, "illegal_transition")
    unchanged(before, rig.picture())


def test_a_move_that_comes_too_early_leaves_the_seed_where_it_is(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    outcome = rig.do("STABILIZE")
    assert (outcome.result, outcome.reason, rig.slot.stage) == (FAILED, "g2_stability", lifecycle.BLENDING)


def test_a_seed_that_made_the_loss_worse_is_culled_instead_of_kept(rig):
    rig.grow(lifecycle.PROBATIONARY)
    rig.train()
    for step in range(50):
        rig.host.observe(1e3, step)
    outcome = rig.do("FOSSILIZE")
    assert (outcome.result, outcome.reason, rig.slot.stage) == (FAILED, "g4_system_impact", lifecycle.CULLED)


def test_a_seed_whose_gradients_are_not_finite_is_culled(rig):
    rig.grow(lifecycle.TRAINING)
    for _ in range(3):
        for parameter in rig.slot.site.seed.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
        rig.host.finalize_step(1)
    assert rig.slot.stage == lifecycle.CULLED


def test_a_fossil_joins_the_optimizer_at_a_tenth_of_the_rate(rig):
    rig.grow(lifecycle.FOSSILIZED)
    group = rig.optimizer.param_groups[-1]
    assert group["lr"] == pytest.approx(rig.optimizer.param_groups[0]["lr"] * 0.1)
    before = [p.clone() for p in rig.slot.site.seed.parameters()]
    rig.train(2)
    assert any(not torch.equal(a, b) for a, b in zip(before, rig.slot.site.seed.parameters(), strict=True))


def test_a_command_that_raises_has_failed_and_ends_neither_the_step_nor_the_next_command(rig, monkeypatch):
    rig.grow(lifecycle.PROBATIONARY)
    rig.train(2)

    def refuse(_module):
        raise ValueError("this optimizer takes no groups")

    monkeypatch.setattr(rig.authority, "adopt", refuse)
    for command in (
        rig.command("FOSSILIZE"),
        rig.command("GERMINATE", blueprint="residual_mlp", seed_id=rig.seed_ids[0]),
    ):
        rig.host.submit(rig.envelope(command))
    first, second = rig.host.apply_pending()
    assert (first.result, first.reason) == (CommandOutcome.RESULT_FAILED, "seed_failed")
    assert second.result == CommandOutcome.RESULT_APPLIED
    assert rig.host.outcomes_of([first.command_id]) == [first]


def test_a_seed_that_a_command_could_not_move_is_culled(rig, monkeypatch):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)

    def refuse():
        raise TypeError("these weights cannot be looked at")

    monkeypatch.setattr(rig.slot, "has_finite_weights", refuse)
    assert rig.do("START_GRAFTING").reason == "seed_failed"
    rig.train(1)
    assert rig.slot.stage == lifecycle.CULLED


def test_a_fossil_never_breaks_the_scheduler_of_the_user(rig):
    scheduler = torch.optim.lr_scheduler.LambdaLR(rig.optimizer, lambda step: 0.99**step)
    rig.grow(lifecycle.FOSSILIZED)
    before = [p.clone() for p in rig.slot.site.seed.parameters()]
    rig.train(2)
    scheduler.step()
    rig.train(2)
    assert any(not torch.equal(a, b) for a, b in zip(before, rig.slot.site.seed.parameters(), strict=True))


@pytest.mark.parametrize("blueprint", ["residual_mlp", "norm_affine", "lora_linear"])
@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.FOSSILIZED])
def test_an_exported_model_is_plain_and_gives_the_same_outputs(rig, stage, blueprint):
    rig.grow(stage, blueprint)
    rig.train(3)
    exported = rig.host.export()
    assert not [m for m in exported.modules() if type(m).__module__.startswith("esper")]
    rig.model.eval()
    exported.eval()
    expected = rig.model(rig.x)
    if stage == lifecycle.BLENDING:
        expected = rig.model[4](torch.relu(rig.sites["2"].host(torch.relu(rig.sites["0"].host(rig.x)))))
    torch.testing.assert_close(exported(rig.x), expected, rtol=1e-6, atol=1e-6)


def test_an_export_shares_nothing_with_the_model(rig):
    rig.grow(lifecycle.FOSSILIZED)
    exported = rig.host.export()
    mine = {p.data_ptr() for p in [*rig.model.parameters(), *rig.slot.site.seed.parameters()]}
    assert not mine & {p.data_ptr() for p in exported.parameters()}


@pytest.mark.parametrize(
    "stage", [lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.PROBATIONARY, lifecycle.FOSSILIZED]
)
def test_a_run_resumes_bit_equal_from_a_checkpoint(make_rig, stage):
    first = make_rig()
    first.grow(stage)
    first.train(3)
    checkpoint = io.BytesIO()
    torch.save(
        {"model": first.model.state_dict(), "host": first.host.state_dict(), "optimizer": first.optimizer.state_dict()},
        checkpoint,
    )
    first.train(4)
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    second = make_rig()
    second.model.load_state_dict(saved["model"])
    second.host.load_state_dict(saved["host"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.step_index = first.step_index - 4
    second.train(4)
    assert torch.equal(first.model(first.x), second.model(second.x))
    assert first.slot.stage == second.slot.stage
    assert all(torch.equal(first.model.state_dict()[k], v) for k, v in second.model.state_dict().items())


def test_a_damaged_checkpoint_changes_nothing(make_rig, unchanged):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.TRAINING)
    saved = first.host.state_dict()
    saved["seeds"][first.seed_id]["module"]["up.weight"][0, 0] += 1
    before = second.picture()
    with pytest.raises(DataLoss):
        second.host.load_state_dict(saved)
    unchanged(before, second.picture())


def test_a_checkpoint_of_other_seeds_is_refused(rig):
    saved = rig.host.state_dict()
    saved["seeds"]["seed-other"] = saved["seeds"].pop(rig.seed_id)
    with pytest.raises(InvalidRequest):
        rig.host.load_state_dict(saved)


def test_a_step_flushes_one_packet_per_growing_seed_and_a_global_one(rig):
    assert len(rig.host.finalize_step(1)) == 1
    rig.grow(lifecycle.TRAINING)
    assert [p.packet_id for p in rig.host.finalize_step(2)] == [f"{rig.seed_id}-2", "global-2"]


def test_two_germinations_of_one_command_draw_the_same_weights(make_rig):
    torch.manual_seed(5)
    rigs = [make_rig(), make_rig()]
    command = rigs[0].command("GERMINATE", blueprint="residual_mlp")
    for rig in rigs:
        rig.order(command)
    weights = [rig.slot.site.seed.state_dict() for rig in rigs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_germination_leaves_the_random_numbers_of_the_user_alone(rig):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    rig.do("GERMINATE", blueprint="residual_mlp")
    assert torch.equal(torch.rand(3), expected)
