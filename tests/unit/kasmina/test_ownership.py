from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.ownership import Ownership

FAILED = CommandOutcome.RESULT_FAILED


class Scale(nn.Module):
    """A small seed."""

    def __init__(self, _shape=(), parameter=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8)) if parameter is None else parameter

    def forward(self, h):
        return h * self.scale


class Writer(Scale):
    """A seed that would give gradients to a tensor that is not its own."""

    def __init__(self, foreign):
        super().__init__()
        # In a list, where nn.Module does not see it.
        self.hidden = [foreign]

    def forward(self, h):
        return super().forward(h) * self.hidden[0].mean()


def germinate(rig, blueprint, seed_id=None):
    return rig.do("GERMINATE", blueprint=blueprint, seed_id=seed_id)


def test_a_blueprint_that_gives_every_seed_the_same_module_plants_one_of_them(rig):
    shared = Scale()
    rig.install("shared", lambda shape: shared)
    first, second = rig.seed_ids
    assert germinate(rig, "shared", first).result == CommandOutcome.RESULT_APPLIED
    outcome = germinate(rig, "shared", second)
    assert (outcome.result, outcome.reason) == (FAILED, "parameter_violation")
    [told] = rig.told("parameter.violation")
    assert (told["seed_id"], told["owner"]) == (second, first)
    assert rig.host.seeds[first].stage == lifecycle.GERMINATED


def test_a_view_of_the_memory_of_the_host_is_refused_like_its_parameter(rig):
    rig.install("view", lambda shape: Scale(parameter=nn.Parameter(rig.model[2].weight.detach()[0])))
    assert germinate(rig, "view").reason == "parameter_violation"
    assert rig.told("parameter.violation")[0]["owner"] == "host"


def test_what_a_culled_seed_had_may_be_planted_again(rig):
    shared = Scale()
    rig.install("shared", lambda shape: shared)
    first, second = rig.seed_ids
    germinate(rig, "shared", first)
    rig.do("CULL", seed_id=first)
    assert germinate(rig, "shared", second).result == CommandOutcome.RESULT_APPLIED


def test_a_registration_is_told_with_its_size(rig):
    rig.install("scale", Scale)
    germinate(rig, "scale")
    assert [(each["seed_id"], each["count"]) for each in rig.told("parameter.registration")] == [(rig.seed_id, "8")]


@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING])
@pytest.mark.parametrize("victim", ["host", "teacher", "another seed"])
def test_a_seed_writes_no_gradient_into_what_is_not_its_own_and_is_culled_when_it_tries_again(rig, stage, victim):
    teacher = nn.Linear(4, 4)
    rig.host.register_teacher("teacher", teacher)
    if victim == "another seed":
        germinate(rig, "residual_mlp", rig.seed_ids[0])
    targets = {
        "host": lambda: rig.model[4].weight,
        "teacher": lambda: teacher.weight,
        "another seed": lambda: next(rig.host.seeds[rig.seed_ids[0]].site.seed.parameters()),
    }
    target = targets[victim]()
    rig.grow(stage)
    rig.train(3)
    rig.events()
    alpha = rig.slot.site.alpha
    rig.slot.site.hold(Writer(target))
    rig.slot.site.alpha = alpha
    told = []
    for _ in range(3):
        rig.model.zero_grad(set_to_none=True)
        target.grad = None
        loss = nn.functional.cross_entropy(rig.model(rig.x), rig.y)
        expected = torch.autograd.grad(loss, target, retain_graph=True, allow_unused=True)[0]
        loss.backward()
        assert torch.equal(target.grad, expected) if expected is not None else target.grad is None
        told += rig.events()
    owners = {"host": "host", "teacher": "teacher", "another seed": rig.seed_ids[0]}
    violations = [attributes["owner"] for name, attributes in told if name == "parameter.violation"]
    assert violations == [owners[victim]] * 3
    assert [a["reason"] for name, a in told if name == "fallback_applied"] == ["parameter_violation"]
    assert rig.slot.stage == lifecycle.CULLED


def test_a_tensor_of_nobody_is_no_violation(rig):
    rig.grow(lifecycle.TRAINING)
    rig.slot.site.hold(Writer(torch.ones(3, requires_grad=True)))
    rig.train(4)
    assert rig.slot.stage == lifecycle.TRAINING
    assert rig.told("parameter.violation") == []


def test_parameters_are_validated_by_name_of_their_seed(rig):
    germinate(rig, "residual_mlp")
    own, host = rig.slot.site.seed.parameters(), rig.model.parameters()
    assert rig.host.validate_parameters(rig.seed_id, own) == ""
    assert rig.host.validate_parameters(rig.seed_id, host) == "host"
    assert rig.host.validate_parameters(rig.seed_ids[0], rig.slot.site.seed.parameters()) == rig.seed_id


def test_a_teacher_must_be_its_own(rig):
    germinate(rig, "residual_mlp")
    for module in (rig.model, rig.slot.site.seed):
        with pytest.raises(InvalidRequest, match="shares memory"):
            rig.host.register_teacher("teacher", module)
    with pytest.raises(InvalidRequest, match="another name"):
        rig.host.register_teacher(rig.seed_id, nn.Linear(2, 2))
    rig.host.register_teacher("teacher", nn.Linear(2, 2))
    rig.host.register_teacher("teacher", nn.Linear(3, 3))


def test_memory_that_was_given_back_belongs_to_nobody():
    ownership = Ownership(nn.Linear(2, 2))
    module = nn.Linear(2, 2)
    assert ownership.register_seed("a", module) == ""
    # What `to` does: the parameter lies elsewhere, and somebody else takes its place.
    old = module.weight.data
    module.weight.data = torch.zeros(2, 2)
    other = nn.Module()
    other.weight = nn.Parameter(old)
    assert ownership.register_seed("b", other) == ""


def test_a_model_that_was_cast_is_known_where_it_lies_now():
    model, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    ownership = Ownership(model)
    ownership.register_seed("a", seed)
    model.double()
    seed.double()
    for stolen, owner in ((model.weight, "host"), (seed.weight, "a")):
        thief = nn.Module()
        thief.weight = nn.Parameter(stolen.detach())
        assert ownership.register_seed("b", thief) == owner


def test_added_parameters_are_those_of_the_seeds_that_are_there():
    ownership = Ownership(nn.Linear(2, 2))
    ownership.register_seed("a", nn.Linear(3, 3))
    ownership.register_seed("b", nn.Linear(4, 4, bias=False))
    assert ownership.added_parameters == 12 + 16
    ownership.release("a")
    ownership.release("a")
    assert ownership.added_parameters == 16
    ownership.refresh([("c", nn.Linear(1, 1))])
    assert ownership.added_parameters == 2


def test_violations_are_counted_for_as_long_as_a_seed_is_there():
    model, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    ownership = Ownership(model)
    ownership.register_seed("a", seed)
    assert [(ownership.validate("a", [model.weight]), ownership.is_repeated("a")) for _ in range(3)] == [
        ("host", False), ("host", False), ("host", True),
    ]  # fmt: skip
    ownership.release("a")
    ownership.register_seed("a", seed)
    assert not ownership.is_repeated("a")


def test_asking_costs_what_is_asked_about_however_many_are_registered():
    ownership = Ownership(nn.Linear(2, 2))
    looks = []
    inner = ownership._owned
    for number in range(500):
        ownership.register_seed(str(number), nn.Linear(2, 2))

    class Counting(dict):
        def get(self, key, default=None):
            looks.append(key)
            return super().get(key, default)

    ownership._owned = Counting(inner)
    ownership.register_seed("new", nn.Linear(2, 2))
    assert len(looks) == 2


def test_a_restored_host_knows_its_seeds(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.TRAINING)
    second.model.load_state_dict(first.model.state_dict())
    second.host.load_state_dict(first.host.state_dict())
    stolen = next(second.slot.site.seed.parameters())
    second.install("thief", lambda shape: Scale(parameter=stolen))
    assert germinate(second, "thief", second.seed_ids[0]).reason == "parameter_violation"


def test_seeds_grow_in_a_model_with_sparse_tensors(make_rig):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[4].register_buffer("neighbours", torch.eye(4).to_sparse())
    rig = make_rig(model=model)
    rig.grow(lifecycle.TRAINING)
    rig.train(3)
    assert rig.slot.updates > 0
    assert rig.do("START_GRAFTING").result == CommandOutcome.RESULT_APPLIED
