from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import CircuitState, CommandOutcome, TelemetryLevel
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.isolation.isolation import Isolation
from esper_servers.kasmina.isolation.spans import MemoryMap, span_of
from esper_servers.kasmina.live_seeds import LiveSeeds
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.kasmina.site import Site

APPLIED, REJECTED = CommandOutcome.RESULT_APPLIED, CommandOutcome.RESULT_REJECTED
STAGES = [lifecycle.TRAINING, lifecycle.BLENDING]
SHARING = "gradients_overlap"


class Scale(nn.Module):
    """A small seed."""

    def __init__(self, _shape=(), parameter=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8)) if parameter is None else parameter

    def forward(self, h):
        return h * self.scale.reshape(-1)[:8]


class Step:
    """What one training step has shown; gradients are gone before its safe point, as in a plain loop."""

    def __init__(self, rig, *, losses=1, scale=1.0, model=None, before_finalize=lambda: None, extra=lambda: 0.0):
        rig.model.zero_grad(set_to_none=True)
        for _ in range(losses):
            loss = nn.functional.cross_entropy((model or rig.model)(rig.x), rig.y) + extra()
            (loss * scale).backward()
        own = rig.slot.site.own_parameters
        self.seed = [p.grad.clone() for p in own if p.grad is not None]
        self.host = {name: p.grad.clone() for name, p in rig.model.named_parameters() if p.grad is not None}
        if scale == 1.0:
            rig.optimizer.step()
        rig.model.zero_grad(set_to_none=True)
        rig.step_index += 1
        rig.host.observe(loss.item(), rig.step_index)
        before_finalize()
        rig.host.apply_pending()
        packets = rig.host.finalize_step(rig.step_index)
        self.of_seed = {
            m.name: m.value for p in packets[:-1] for m in p.metrics if m.attributes["seed_id"] == rig.seed_id
        }
        self.of_all = {
            m.name: m.value for m in packets[-1].metrics if m.attributes.get("breaker", "grad")[:4] == "grad"
        }
        self.events = [(e.description, e.level, dict(e.attributes)) for e in packets[-1].events]

    def told(self, name):
        return [(level, attributes) for event, level, attributes in self.events if event == name]

    @property
    def dot(self):
        return self.of_seed.get("isolation.dot")


def grown(rig, stage=lifecycle.TRAINING):
    rig.install("scale", Scale)
    rig.grow(stage, blueprint="scale")
    rig.train(3)
    assert rig.slot.stage == stage
    return rig.host._isolation


def lay_over(rig, memory):
    """Have the seed's parameter lie in memory of the host, as code that ties weights late does."""
    [parameter] = rig.slot.site.own_parameters
    parameter.data = memory


WAYS = {
    "a row": (lambda m: m[4].weight.data[0], lambda g: g["4.weight"][0]),
    "across two rows": (lambda m: m[4].weight.data.view(-1)[5:13], lambda g: g["4.weight"].view(-1)[5:13]),
    "every third element": (lambda m: m[4].weight.data.view(-1)[::3], lambda g: g["4.weight"].view(-1)[::3]),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_host_and_seed_share_gives_the_dot_product_of_their_gradients(rig, stage, way):
    isolation = grown(rig, stage)
    memory, gradient = WAYS[way]
    lay_over(rig, memory(rig.model))
    first, second = Step(rig), Step(rig)
    # The hooks of the host go on at the safe point that sees it.
    assert first.dot == 0.0
    assert second.dot == pytest.approx(float(gradient(second.host) @ second.seed[0]), rel=1e-4)
    assert second.dot != 0.0
    assert isolation.violations_of(rig.seed_id) == second.of_seed["kasmina.seed.isolation_violations"] == 1
    assert second.of_all["kasmina.isolation.violations"] == 1


@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_is_not_shared_gives_exactly_nothing_also_beside_the_host_in_one_block(rig, stage):
    isolation = grown(rig, stage)
    block = torch.randn(3 * 8 + 8)
    rig.model[4].weight.data = block[:24].view(3, 8)
    lay_over(rig, block[24:])
    steps = [Step(rig) for _ in range(5)]
    assert [step.dot for step in steps] == [0.0] * 5
    assert isolation.violations_of(rig.seed_id) == 0
    assert isolation.is_healthy(rig.seed_id)
    assert rig.slot.stage == stage
    assert all(step.of_all["kasmina.isolation.violations"] == 0 for step in steps)


def test_the_first_step_of_a_seed_that_trains_is_measured(rig):
    rig.grow(lifecycle.TRAINING)
    assert not rig.host._isolation.is_healthy(rig.seed_id)
    assert Step(rig).dot == 0.0
    assert rig.host._isolation.is_healthy(rig.seed_id)


@pytest.mark.parametrize("stage", STAGES)
def test_the_norms_of_both_gradients_are_told(rig, stage):
    grown(rig, stage)
    step = Step(rig)
    total = torch.stack([g.norm() for g in step.host.values()]).norm()
    assert step.of_seed["isolation.host_norm"] == pytest.approx(float(total), rel=1e-5)
    assert step.of_seed["isolation.seed_norm"] == pytest.approx(float(step.seed[0].norm()), rel=1e-5)


def test_a_parameter_that_both_have_is_told_apart_by_whose_backward_pass_it_is(rig):
    isolation = grown(rig)
    shared = rig.model[2].bias
    rig.slot.site.hold(Scale(parameter=shared))
    Step(rig)
    model = copy.deepcopy(rig.plain)
    model.load_state_dict(rig.model.state_dict())
    nn.functional.cross_entropy(model(rig.x), rig.y).backward()
    host = model[2].bias.grad
    second = Step(rig)
    both = second.host["2.bias"]
    assert second.dot == pytest.approx(float(host @ (both - host)), rel=1e-4)
    assert isolation.violations_of(rig.seed_id) == 1


def test_a_seed_that_is_restored_by_a_factory_that_ties_it_is_seen(rig):
    isolation = grown(rig)
    saved = rig.host.state_dict()
    rig.install("scale", lambda shape: Scale(parameter=rig.model[2].bias))
    rig.host.load_state_dict(saved)
    # A restored seed is hooked anew.
    assert Step(rig).dot is None
    assert Step(rig).dot != 0.0
    assert isolation.violations_of(rig.seed_id) == 1


def test_violations_are_not_forgotten_by_a_resume_and_go_back_with_a_rollback(make_rig):
    first, second = make_rig(), make_rig()
    grown(first)
    before = first.host.state_dict()
    lay_over(first, first.model[4].weight.data[0])
    Step(first)
    Step(first)
    first.host.validate_parameters(first.seed_id, first.model[0].host.parameters())
    saved = first.host.state_dict()
    assert saved["violations"] == {first.seed_id: [1, 1]}
    second.install("scale", Scale)
    second.host.load_state_dict(saved)
    assert second.host.state_dict()["violations"] == saved["violations"]
    second.train(3)
    assert outcome(second, "START_GRAFTING", second.seed_id) == "RESULT_FAILED"
    assert second.slot.stage == lifecycle.CULLED
    first.host.roll_back(before)
    assert "violations" not in first.host.state_dict()


def test_a_loss_of_the_user_that_reads_what_is_the_seeds_is_seen(rig):
    isolation = grown(rig)
    [own] = rig.slot.site.own_parameters
    updates = rig.slot.updates
    for _ in range(2):
        decay = 2 * own.detach().clone()
        step = Step(rig, extra=lambda: own.square().sum())
    assert step.dot == pytest.approx(float(decay @ (step.seed[0] - decay)), rel=1e-3)
    assert isolation.violations_of(rig.seed_id) >= 1
    # The memory is the seed's own, so its optimizer goes on.
    assert rig.slot.updates == updates + 2


def test_what_is_accumulated_over_several_backward_passes_is_the_dot_of_the_sums(rig):
    grown(rig)
    lay_over(rig, rig.model[4].weight.data[0])
    Step(rig)
    step = Step(rig, losses=3)
    assert step.dot == pytest.approx(float(step.host["4.weight"][0] @ step.seed[0]), rel=1e-4)
    assert step.of_seed["isolation.host_norm"] == pytest.approx(
        float(torch.stack([g.norm() for g in step.host.values()]).norm()), rel=1e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_violation_leaves_the_host_as_it_would_be_and_the_third_one_culls_the_seed(rig, stage):
    isolation = grown(rig, stage)
    host = rig.model[4].weight
    lay_over(rig, host.data[0])
    found = []
    while rig.slot.stage == stage:
        expected = host.detach().clone()
        found.append(Step(rig))
        expected.add_(found[-1].host["4.weight"], alpha=-0.1)
        assert torch.equal(host.detach(), expected)
    levels = [level for step in found for level, _ in step.told("isolation_violations")]
    warning, critical = TelemetryLevel.TELEMETRY_LEVEL_WARNING, TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
    assert levels == [warning, warning, critical]
    [(_, told)] = found[-1].told("isolation_violations")
    assert (told["reason"], told["seed_id"], told["count"], told["priority"]) == (SHARING, rig.seed_id, "3", "CRITICAL")
    assert [each["breaker"] for _, each in found[-1].told("breaker_open")] == ["gradient_isolation"]
    assert [each["reason"] for _, each in found[-1].told("fallback_applied")] == ["isolation_violations"]
    assert rig.slot.stage == lifecycle.CULLED
    assert isolation.violations_of(rig.seed_id) == 0
    assert not host._backward_hooks


def violate(rig):
    """Have a seed overlap until it is culled and the breaker is open."""
    grown(rig)
    lay_over(rig, rig.model[4].weight.data[0])
    for _ in range(4):
        Step(rig)
    assert rig.host.breakers["gradient_isolation"].state == CircuitState.CIRCUIT_STATE_OPEN


def outcome(rig, operation, seed_id=None, **options):
    found = rig.do(operation, seed_id=seed_id or rig.seed_ids[0], **options)
    return found.reason if found.result == REJECTED else CommandOutcome.Result.Name(found.result)


def test_while_the_breaker_is_open_seeds_are_left_as_they_are_and_only_taken_out(rig):
    other = rig.host.seeds[rig.seed_ids[0]]
    assert outcome(rig, "GERMINATE", blueprint="residual_mlp") == "RESULT_APPLIED"
    violate(rig)
    assert outcome(rig, "START_TRAINING") == "isolation_breaker_open"
    assert other.stage == lifecycle.GERMINATED
    assert outcome(rig, "CANCEL") == "RESULT_APPLIED"
    assert other.stage == lifecycle.CULLED


def test_after_its_rest_the_breaker_lets_one_operation_through_a_step_and_closes_after_three_without_a_violation(rig):
    violate(rig)
    breaker = rig.host.breakers["gradient_isolation"]
    rig.clock.advance(29.9)
    assert outcome(rig, "GERMINATE", blueprint="residual_mlp") == "isolation_breaker_open"
    rig.clock.advance(0.2)
    # What is not legal is not one of them.
    assert outcome(rig, "STABILIZE") == "illegal_transition"
    assert outcome(rig, "GERMINATE", blueprint="residual_mlp") == "RESULT_APPLIED"
    assert outcome(rig, "START_TRAINING") == "isolation_breaker_open"
    steps = [Step(rig) for _ in range(2)]
    assert breaker.state == CircuitState.CIRCUIT_STATE_HALF_OPEN
    assert outcome(rig, "START_TRAINING") == "RESULT_APPLIED"
    steps.append(Step(rig))
    assert [each["breaker"] for _, each in steps[-1].told("breaker_closed")] == ["gradient_isolation"]
    assert [step.of_all["kasmina.breaker.state"] for step in steps] == [3.0, 3.0, 1.0]
    assert outcome(rig, "CULL") == "RESULT_APPLIED"


def test_half_open_one_violation_opens_it_again(rig):
    violate(rig)
    rig.clock.advance(30)
    other = rig.host.seeds[rig.seed_ids[0]]
    for operation in ("GERMINATE", "START_TRAINING"):
        assert outcome(rig, operation, blueprint="scale" if operation == "GERMINATE" else "") == "RESULT_APPLIED"
        Step(rig)
    other.site.own_parameters[0].data = rig.model[4].weight.data[1]
    rig.host.breakers["gradient_isolation"].record_failure()
    rig.clock.advance(30)
    Step(rig)
    opened = Step(rig)
    assert opened.told("isolation_violations")[0][0] == TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
    assert rig.host.breakers["gradient_isolation"].state == CircuitState.CIRCUIT_STATE_OPEN
    assert outcome(rig, "START_GRAFTING") == "isolation_breaker_open"


@pytest.mark.parametrize(("pause", "opens"), [(299.0, True), (301.0, False)])
def test_violations_of_five_minutes_ago_count_no_more_towards_the_breaker(make_rig, pause, opens):
    rig = make_rig()
    isolation, opened = grown(rig), []
    for _ in range(3):
        rig.slot.site.hold(Scale())
        Step(rig)
        lay_over(rig, rig.model[4].weight.data[0])
        Step(rig)
        opened += Step(rig).told("breaker_open")
        assert isolation.violations_of(rig.seed_id) == 1
        lay_over(rig, torch.ones(8))
        rig.clock.advance(pause)
        Step(rig)
    assert bool(opened) == opens


def test_memory_that_is_shared_without_an_overlap_of_gradients_is_a_violation_of_ownership(rig):
    isolation = grown(rig, lifecycle.BLENDING)
    # While it blends, the layer below gets no gradient.
    before = rig.model[2].bias.detach().clone()
    lay_over(rig, rig.model[2].bias.data)
    told = [Step(rig) for _ in range(4)]
    assert [len(step.told("parameter.violation")) for step in told] == [0, 1, 1, 1]
    assert [each["reason"] for _, each in told[3].told("fallback_applied")] == ["parameter_violation"]
    assert rig.slot.stage in (lifecycle.CULLED, lifecycle.EMBARGOED)
    assert isolation.breaker.consecutive_failures == 0
    assert torch.equal(rig.model[2].bias, before)


class TiesLate(Scale):
    """A seed that takes a parameter of the host for its own when it runs."""

    def __init__(self, host):
        super().__init__()
        self.host = [host]

    def forward(self, h):
        self.scale = self.host[0].bias
        return super().forward(h)


def test_a_seed_that_takes_a_parameter_of_the_host_when_it_runs_does_not_touch_its_gradient(rig):
    isolation = grown(rig)
    rig.slot.site.hold(TiesLate(rig.model[2]))
    kept = []
    for _ in range(3):
        rig.model.zero_grad()
        loss = nn.functional.cross_entropy(rig.model(rig.x), rig.y)
        [expected] = torch.autograd.grad(loss, [rig.model[2].bias], retain_graph=True)
        loss.backward()
        kept.append((expected, rig.told("fallback_applied"), rig.model[2].bias.grad))
    assert all(torch.equal(expected, found) for expected, _, found in kept)
    assert [told[0]["reason"] for _, told, _ in kept if told] == ["parameter_violation"]
    assert isolation.breaker.consecutive_failures == 0


class Nan(Scale):
    """A seed that gives numbers and gets gradients that are none."""

    def forward(self, h):
        return torch.sqrt(super().forward(h).relu() * 0.0)


def test_a_gradient_that_is_no_number_is_no_violation_and_not_measured(rig):
    isolation = grown(rig)
    rig.slot.site.hold(Nan())
    lay_over(rig, rig.model[4].weight.data[0])
    Step(rig)
    step = Step(rig)
    assert torch.isnan(step.seed[0]).any()
    assert "isolation.dot" not in step.of_seed
    assert isolation.violations_of(rig.seed_id) == 0
    assert not isolation.is_healthy(rig.seed_id)


def test_a_step_without_a_backward_pass_measures_nothing_and_forgets_nothing(rig):
    isolation = grown(rig)
    assert isolation.is_healthy(rig.seed_id)
    step = Step(rig, losses=1, before_finalize=lambda: None)
    rig.step_index += 1
    packets = rig.host.finalize_step(rig.step_index)
    assert step.dot == 0.0
    names = {metric.name for packet in packets for metric in packet.metrics}
    assert "kasmina.seed.isolation_violations" in names
    assert not {"isolation.dot", "isolation.host_norm", "kasmina.isolation.violations"} & names
    assert isolation.is_healthy(rig.seed_id)


def test_gradients_of_the_host_that_are_gone_leave_only_its_norm_out(rig):
    isolation = grown(rig)
    for parameter in rig.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    step = Step(rig)
    assert (step.dot, "isolation.host_norm" in step.of_seed) == (0.0, False)
    assert isolation.is_healthy(rig.seed_id)


def test_a_seed_whose_parameters_get_no_gradient_is_not_measured(rig):
    isolation = grown(rig)
    rig.slot.site.hold(TiesLate(rig.model[2]))
    Step(rig)
    assert not isolation.is_healthy(rig.seed_id)
    Step(rig)
    assert not isolation.is_healthy(rig.seed_id)


def test_a_seed_with_nothing_that_learns_has_nothing_to_measure(rig):
    isolation = grown(rig)
    rig.slot.site.hold(nn.Identity())
    Step(rig)
    assert isolation.is_healthy(rig.seed_id)


def test_memory_of_another_type_cannot_be_measured_and_the_training_goes_on(make_rig):
    rig = make_rig()
    isolation = grown(rig)
    for parameter in rig.model.parameters():
        parameter.data = parameter.data.double()
    rig.x = rig.x.double()
    rig.slot.site.own_parameters[0].data = rig.model[4].weight.data[0].view(torch.float32)[:8]
    before = rig.model[4].weight.clone()
    for _ in range(2):
        Step(rig)
    assert not isolation.is_healthy(rig.seed_id)
    assert isolation.violations_of(rig.seed_id) == 0
    assert not torch.equal(before, rig.model[4].weight)


def test_a_seed_that_is_culled_behind_its_backward_pass_is_forgotten(rig):
    isolation = grown(rig)
    lay_over(rig, rig.model[4].weight.data[0])
    Step(rig)
    assert rig.model[4].weight._backward_hooks
    module = rig.slot.site.seed
    step = Step(rig, before_finalize=lambda: rig.host.submit(rig.envelope(rig.command("CULL"))))
    assert rig.slot.stage in (lifecycle.CULLED, lifecycle.EMBARGOED)
    assert step.told("isolation_violations") == []
    assert isolation.violations_of(rig.seed_id) == 0
    assert not rig.model[4].weight._backward_hooks
    assert not module.scale._backward_hooks


@pytest.mark.parametrize("stage", [lifecycle.SHADOWING, lifecycle.PROBATIONARY])
def test_hooks_are_there_only_while_a_seed_trains_or_blends(rig, stage):
    isolation = grown(rig)
    [own] = rig.slot.site.own_parameters
    assert len(own._backward_hooks) == 1
    rig.slot.site.hold(None)
    Step(rig)
    assert not own._backward_hooks
    rig = type(rig)()
    rig.grow(stage)
    rig.do("FINE_TUNE")
    rig.train(2)
    assert all(not p._backward_hooks for p in rig.slot.site.own_parameters)
    assert isolation is not rig.host._isolation


def test_two_hundred_sites_without_seeds_cost_nothing():
    asked = []
    sites = {str(number): Site(nn.Linear(2, 2)) for number in range(200)}
    slots = {name: SeedSlot(seed_id=name, site_id=name, site=site, depth=0) for name, site in sites.items()}
    live = LiveSeeds()
    live.recount(slots.values())
    isolation = Isolation(lambda: asked.append(1) or [])
    isolation.measure(slots[name] for name in live)
    assert (asked, isolation.metrics()) == ([], [])


def test_parameters_that_the_host_gets_later_are_found_in_time(rig):
    isolation = grown(rig)
    [own] = rig.slot.site.own_parameters
    rig.model[4].bias = nn.Parameter(torch.zeros(3))
    own.data = torch.cat([rig.model[4].bias.data, torch.ones(5)])
    rig.model[4].bias.data = own.data[:3]
    for _ in range(66):
        Step(rig)
        if isolation.violations_of(rig.seed_id):
            return
    raise AssertionError("it was not found")


def test_a_fossil_belongs_to_the_host(rig):
    rig.grow(lifecycle.FOSSILIZED)
    fossil = next(p for p in rig.slot.site.seed.parameters() if p.numel() >= 8)
    rig.install("scale", Scale)
    first = rig.seed_ids[0]
    rig.do("GERMINATE", blueprint="scale", seed_id=first)
    Step(rig)
    rig.do("START_TRAINING", seed_id=first)
    Step(rig)
    rig.host.seeds[first].site.own_parameters[0].data = fossil.data.view(-1)[:8]
    Step(rig), Step(rig)
    assert rig.host._isolation.violations_of(first) == 1


# Dynamo looks at .grad of every graph input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_under_torch_compile_the_same_is_measured_and_nothing_compiled_anew(rig):
    isolation = grown(rig, lifecycle.BLENDING)
    torch._dynamo.reset()
    compiled = torch.compile(rig.model, backend="aot_eager")
    Step(rig, model=compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    lay_over(rig, rig.model[4].weight.data[0])
    Step(rig, model=compiled)
    step = Step(rig, model=compiled)
    assert step.dot == pytest.approx(float(step.host["4.weight"][0] @ step.seed[0]), rel=1e-4)
    assert isolation.violations_of(rig.seed_id) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_under_a_loss_scale_products_are_scaled_and_what_overflows_is_no_violation(rig):
    isolation = grown(rig)
    lay_over(rig, rig.model[4].weight.data[0])
    Step(rig)

    def in_bfloat16(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return rig.model(x).float()

    step = Step(rig, model=in_bfloat16, scale=1024.0)
    assert step.dot == pytest.approx(float(step.host["4.weight"][0] @ step.seed[0]), rel=1e-4)
    assert isolation.violations_of(rig.seed_id) == 1
    overflown = Step(rig, model=in_bfloat16, scale=math.inf)
    assert "isolation.dot" not in overflown.of_seed
    assert isolation.violations_of(rig.seed_id) == 1


def test_sparse_parameters_of_a_host_lie_on_nothing():
    dense = torch.ones(4)
    found = MemoryMap([torch.eye(4).to_sparse(), dense])
    assert found.is_current
    assert [each is dense for each in found.over(span_of(dense))] == [True]
    assert span_of(torch.eye(4).to_sparse()) is None
