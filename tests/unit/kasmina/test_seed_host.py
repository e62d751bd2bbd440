from __future__ import annotations

import hashlib
import time
import uuid

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper_rpc.envelope import sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import ConfigError, NotFound
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SignedEnvelope
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.alpha import SCHEDULES, AlphaSchedule
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernel_library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.surgery import EMBARGO_STEPS
from esper_servers.trainer import wrap_sites

FACTORIES = load_factories()
GERMINATE, TRAIN, GRAFT = (
    Operation.SEED_OPERATION_GERMINATE, Operation.SEED_OPERATION_START_TRAINING, Operation.SEED_OPERATION_START_GRAFTING,
)  # fmt: skip
STABILIZE, EVALUATE, FOSSILIZE = (
    Operation.SEED_OPERATION_STABILIZE, Operation.SEED_OPERATION_EVALUATE, Operation.SEED_OPERATION_FOSSILIZE,
)  # fmt: skip
APPLIED, REJECTED, FAILED = (
    CommandOutcome.RESULT_APPLIED, CommandOutcome.RESULT_REJECTED, CommandOutcome.RESULT_FAILED,
)  # fmt: skip


class Bench:
    """A small model with one site, its host, and a controller's keys."""

    def __init__(self, mesh, limits=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        self.plain_keys = list(self.model.state_dict())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.sites = wrap_sites(self.model, ["0"])
        self.x = torch.randn(16, 6)
        self.library = KernelLibrary(self.fetch, self.run)
        identity = mesh.identity("trainer")
        self.tamiyo = mesh.keyring("tamiyo")
        self.host = InProcessSeedHost(
            model=self.model, sites=self.sites, keyring=mesh.keyring("trainer"), audience=str(identity.spiffe_id),
            library=self.library, factories=FACTORIES, learning_rate=OptimizerAuthority(self.optimizer), limits=limits,
        )  # fmt: skip
        self.model(self.x)
        self.sequence = 0
        self.blueprints = {name: Kernel(Blueprint(descriptor=f.descriptor(), manifest=f.manifest()))
                           for name, f in FACTORIES.items()}  # fmt: skip

    async def fetch(self, blueprint_id):
        if blueprint_id not in self.blueprints:
            raise NotFound("no")
        return self.blueprints[blueprint_id]

    @staticmethod
    def run(work):
        with pytest.raises(StopIteration):
            work.send(None)

    @property
    def slot(self):
        return self.host.seeds["seed-0"]

    def command(self, operation, blueprint="residual_mlp", **fields):
        command = AdaptationCommand(
            command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_SEED, target_seed_id="seed-0"
        )
        command.seed_operation.operation = operation
        command.seed_operation.blueprint_id = blueprint if operation == GERMINATE else ""
        for name, value in fields.items():
            setattr(command, name, value)
        return command

    def signed(self, command, **overrides):
        self.sequence += 1
        fields = {
            "payload_type": COMMAND_TYPE, "audience": self.host.verifier.audience, "issued_at_ns": time.time_ns(),
            "nonce": command.command_id, "receiver_epoch": self.host.receiver_epoch, "sequence": self.sequence,
        } | overrides  # fmt: skip
        return sign(command.SerializeToString(), keyring=self.tamiyo, **fields)

    def do(self, operation, **fields):
        self.host.submit(self.signed(self.command(operation, **fields)))
        return self.host.apply_pending()[0]

    def step(self):
        self.optimizer.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.host.observe(float(loss.detach()), self.host.global_step + 1)
        self.host.advance_alphas()
        self.host.finalize_step(self.host.global_step)

    def grow(self, until):
        path = [GERMINATE, TRAIN, GRAFT, STABILIZE, EVALUATE, FOSSILIZE]
        for operation in path[: path.index(until) + 1]:
            if operation == STABILIZE:
                for _ in range(20):
                    self.step()
            assert self.do(operation).result == APPLIED
            self.step()

    def weights(self):
        return {k: v.clone() for k, v in self.model.state_dict().items()}


@pytest.fixture
def bench(mesh):
    return Bench(mesh)


@given(st.lists(st.sampled_from(list(lifecycle.OPERATIONS)), max_size=30))
def test_no_sequence_of_operations_leaves_the_legal_transitions(operations):
    stage = lifecycle.DORMANT
    for operation in operations:
        target = lifecycle.target_of(operation, stage)
        if target is not None:
            assert target == stage or lifecycle.is_legal(stage, target)
            stage = target


def test_every_stage_has_a_row_and_terminated_is_final():
    assert len(lifecycle.TRANSITIONS) == 11
    assert not lifecycle.TRANSITIONS[lifecycle.TERMINATED]


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_alpha_rises_from_zero_to_one_and_never_falls(method, a, b, steps):
    schedule = AlphaSchedule(method=method, start=min(a, b), end=max(a, b), total_steps=steps)
    values = [schedule.value()] + [schedule.advance() for _ in range(steps)]
    assert all(x <= y + 1e-9 for x, y in zip(values, values[1:], strict=False))
    assert all(0 <= v <= 1 for v in values)
    assert values[-1] == 1.0


def test_the_host_keeps_its_state_dict_keys_through_a_whole_life(bench):
    bench.grow(until=GRAFT)
    assert list(bench.model.state_dict()) == bench.plain_keys
    bench.model.load_state_dict(bench.weights())


def test_in_training_the_output_is_the_hosts_bit_for_bit_and_the_seed_learns(bench):
    expected = bench.model(bench.x).clone()
    bench.do(GERMINATE)
    bench.do(TRAIN)
    before = [p.clone() for p in bench.slot.site.seed.parameters()]
    assert torch.equal(bench.model(bench.x), expected)
    bench.model(bench.x).square().mean().backward()
    bench.host.finalize_step(1)
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.slot.site.seed.parameters(), strict=True))


def test_in_training_the_hosts_gradients_are_what_they_are_without_the_seed(bench):
    def gradient():
        bench.optimizer.zero_grad()
        bench.model(bench.x).square().mean().backward()
        return [p.grad.clone() for p in bench.model.parameters()]

    alone = gradient()
    bench.do(GERMINATE)
    bench.do(TRAIN)
    assert all(torch.equal(a, b) for a, b in zip(alone, gradient(), strict=True))


def test_a_seed_that_yields_nan_never_reaches_the_output_in_training(bench):
    bench.do(GERMINATE)
    bench.do(TRAIN)
    for p in bench.slot.site.seed.parameters():
        p.data.fill_(float("nan"))
    assert bool(torch.isfinite(bench.model(bench.x)).all())


def test_while_blending_no_gradient_passes_into_the_host(bench):
    bench.grow(until=GRAFT)
    bench.optimizer.zero_grad()
    bench.model(bench.x).square().mean().backward()
    assert bench.sites["0"].host.weight.grad is None


def test_a_seed_grows_up_and_its_parameters_join_at_a_tenth_of_the_rate(bench):
    bench.grow(until=FOSSILIZE)
    assert bench.slot.stage == lifecycle.FOSSILIZED
    assert [g["lr"] for g in bench.optimizer.param_groups] == [0.1, pytest.approx(0.01)]
    assert set(bench.optimizer.param_groups[1]["params"]) == set(bench.slot.site.seed.parameters())


def test_the_export_is_a_plain_module_with_equal_outputs(bench):
    bench.grow(until=FOSSILIZE)
    plain = bench.host.export()
    torch.testing.assert_close(plain(bench.x), bench.model(bench.x), atol=1e-6, rtol=0)
    assert not any("kasmina" in type(m).__module__ for m in plain.modules())


def test_a_seed_that_is_not_fossilised_is_gone_from_the_export(bench):
    host_alone = bench.model(bench.x).clone()
    bench.do(GERMINATE)
    assert torch.equal(bench.host.export()(bench.x), host_alone)


def test_a_resumed_run_goes_on_bit_equal(mesh):
    first, second = Bench(mesh), Bench(mesh)
    first.grow(until=GRAFT)
    second.library.add(second.blueprints["residual_mlp"])
    second.model.load_state_dict(first.weights())
    second.host.load_state_dict(first.host.state_dict())
    for _ in range(3):
        first.step()
        second.step()
    assert torch.equal(first.model(first.x), second.model(second.x))


def altered(envelope, **fields):
    copy = SignedEnvelope.FromString(envelope.SerializeToString())
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


BAD_ENVELOPES = {
    "missing_signature": lambda b, c: altered(b.signed(c), mac=b""),
    "invalid_signature": lambda b, c: altered(b.signed(c), run_id="another"),
    "unknown_key": lambda b, c: altered(b.signed(c), key_id="no"),
    "wrong_epoch": lambda b, c: b.signed(c, receiver_epoch=bytes(16)),
    "stale_command": lambda b, c: b.signed(c, issued_at_ns=time.time_ns() - 61 * 10**9),
    "future_command": lambda b, c: b.signed(c, issued_at_ns=time.time_ns() + 30 * 10**9),
    "wrong_payload_type": lambda b, c: b.signed(c, payload_type="esper.leyline.v1.PolicyUpdate"),
    "wrong_audience": lambda b, c: b.signed(c, audience="spiffe://esper/trainer/other"),
    "malformed_payload": lambda b, c: sign(
        b"\xff\xff", keyring=b.tamiyo, payload_type=COMMAND_TYPE, audience=b.host.verifier.audience,
        issued_at_ns=time.time_ns(), nonce=c.command_id, receiver_epoch=b.host.receiver_epoch, sequence=99,
    ),
    "unsupported": lambda b, c: b.signed(
        AdaptationCommand(command_id=c.command_id, command_type=CommandType.COMMAND_TYPE_STRUCTURAL_PRUNING)
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_ENVELOPES)
def test_a_rejected_command_leaves_the_model_as_it_was(bench, reason):
    weights, states = bench.weights(), bench.host.export_seed_states()
    outcome = bench.host.submit(BAD_ENVELOPES[reason](bench, bench.command(GERMINATE)))
    assert (outcome.result, outcome.reason) == (REJECTED, reason)
    assert bench.host.apply_pending() == []
    assert bench.host.export_seed_states() == states
    assert all(torch.equal(v, weights[k]) for k, v in bench.model.state_dict().items())
    assert bench.host.verifier.rejections[reason] == 1


def test_a_command_sent_twice_is_applied_once(bench):
    envelope = bench.signed(bench.command(GERMINATE))
    bench.host.submit(envelope)
    bench.host.apply_pending()
    outcome, duplicate = bench.host.receive(envelope)
    assert (duplicate, outcome.result) == (True, APPLIED)
    assert bench.host.apply_pending() == []


def test_an_unknown_blueprint_culls_the_seed_and_training_goes_on(bench):
    command = bench.command(GERMINATE, blueprint="no_such")
    bench.host.submit(bench.signed(command))
    (outcome,) = bench.host.apply_pending()
    assert (outcome.result, outcome.reason) == (FAILED, "unknown_blueprint")
    assert bench.slot.stage == lifecycle.CULLED
    bench.step()
    assert bench.slot.stage == lifecycle.EMBARGOED


def test_a_shape_that_cannot_bind_culls_the_seed(bench):
    bench.host.submit(bench.signed(bench.command(GERMINATE, blueprint="depthwise_conv")))
    (outcome,) = bench.host.apply_pending()
    assert (outcome.result, outcome.reason) == (FAILED, "shape_mismatch")


def with_weights(bench, tensors, digest=None):
    weights = safetensors.torch.save(tensors)
    blueprint = Blueprint()
    blueprint.CopyFrom(bench.blueprints["lora_linear"].blueprint)
    blueprint.manifest.weights_sha256 = digest or hashlib.sha256(weights).digest()
    bench.blueprints["lora_linear"] = Kernel(blueprint, weights)
    bench.host.submit(bench.signed(bench.command(GERMINATE, blueprint="lora_linear")))
    return bench.host.apply_pending()[0]


def test_weights_that_match_their_checksum_are_loaded(bench):
    tensors = {"reduce.weight": torch.ones(8, 5), "expand.weight": torch.ones(5, 8)}
    assert with_weights(bench, tensors).result == APPLIED
    assert torch.equal(bench.slot.site.seed.reduce.weight.detach(), torch.ones(8, 5))


@pytest.mark.parametrize(
    ("tensors", "digest", "reason"),
    [
        ({"reduce.weight": torch.ones(8, 5)}, bytes(32), "checksum_mismatch"),
        ({"reduce.weight": torch.full((8, 5), float("nan"))}, None, "non_finite_weights"),
        ({"reduce.weight": torch.ones(8, 4), "expand.weight": torch.ones(5, 8)}, None, "shape_mismatch"),
    ],
)
def test_a_bad_kernel_culls_the_seed(bench, tensors, digest, reason):
    outcome = with_weights(bench, tensors, digest)
    assert (outcome.result, outcome.reason, bench.slot.stage) == (FAILED, reason, lifecycle.CULLED)
    bench.step()


@pytest.mark.parametrize("operation", [TRAIN, GRAFT, STABILIZE, FOSSILIZE])
def test_an_operation_out_of_order_is_refused(bench, operation):
    outcome = bench.do(operation)
    assert (outcome.result, outcome.reason) == (REJECTED, "illegal_transition")
    assert bench.slot.stage == lifecycle.DORMANT


def test_a_command_for_an_unknown_seed_fails(bench):
    assert bench.do(TRAIN, target_seed_id="nobody").reason == "unknown_seed"


def test_a_culled_seed_comes_back_to_dormancy_after_its_embargo(bench):
    bench.do(GERMINATE)
    bench.do(Operation.SEED_OPERATION_CULL)
    for _ in range(EMBARGO_STEPS + 3):
        bench.host.finalize_step(1)
    assert bench.slot.stage == lifecycle.DORMANT
    assert bench.slot.site.seed is None


@pytest.mark.parametrize("multiplier", [0.01, 3.0, -1.0])
def test_a_learning_rate_beyond_the_local_limit_is_refused(bench, multiplier):
    command = bench.command(TRAIN, command_type=CommandType.COMMAND_TYPE_OPTIMIZER)
    command.optimizer_adjustment.hyperparameters["learning_rate_multiplier"] = multiplier
    bench.host.submit(bench.signed(command))
    (outcome,) = bench.host.apply_pending()
    assert outcome.reason == "local_limit"
    assert bench.optimizer.param_groups[0]["lr"] == 0.1


def test_a_seed_beyond_the_parameter_limit_is_refused(mesh):
    bench = Bench(mesh, LocalLimits(added_parameters=10))
    assert bench.do(GERMINATE).reason == "local_limit"


def test_pause_holds_the_seed_at_identity_and_the_eleventh_is_refused(bench):
    bench.grow(until=GRAFT)
    results = []
    for _ in range(11):
        command = bench.command(TRAIN, command_type=CommandType.COMMAND_TYPE_PAUSE, execution_deadline_ms=1000)
        bench.host.submit(bench.signed(command))
        results += bench.host.apply_pending()
    assert torch.equal(bench.sites["0"](bench.x), bench.sites["0"].host(bench.x))
    assert [r.reason for r in results] == [""] * 10 + ["local_limit"]


def test_a_wrapped_model_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        wrap_sites(torch.compile(model), ["0"])
    wrap_sites(model, ["0"])
    with pytest.raises(ConfigError, match="attached already"):
        wrap_sites(model, ["1"])
    with pytest.raises(ConfigError, match="no submodule 'x'"):
        wrap_sites(nn.Sequential(nn.Linear(2, 2)), ["x"])
