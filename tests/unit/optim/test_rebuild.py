from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_rpc.errors import FailedPrecondition, InvalidRequest
from esper_servers.optim.rebuild import Joining, OptimizerChange, rebuild

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_rate_as_tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def picture(optimizer):
    """All that an optimizer holds, by the identity of what it holds and by value."""
    groups = [(id(group), dict(group), list(group["params"])) for group in optimizer.param_groups]
    return groups, {id(p): (id(s), copy.deepcopy(s)) for p, s in optimizer.state.items()}


def assert_same(before, after):
    assert [group[0] for group in before[0]] == [group[0] for group in after[0]]
    for one, other in zip(before[0], after[0], strict=True):
        assert one[1].keys() == other[1].keys()
        assert [id(p) for p in one[2]] == [id(p) for p in other[2]]
    assert before[1].keys() == after[1].keys()
    for key, (place, state) in before[1].items():
        assert after[1][key][0] == place
        for name, part in state.items():
            now = after[1][key][1][name]
            assert torch.equal(part, now) if isinstance(part, torch.Tensor) else part == now


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_optimizer
def test_parameters_that_stay_keep_what_is_remembered_of_them_bit_for_bit(make, make_model, train):
    model, newcomer = make_model(), nn.Linear(4, 4)
    optimizer = make(model.parameters())
    train(model, optimizer)
    before = {p: (s, copy.deepcopy(s)) for p, s in optimizer.state.items()}
    rebuild(optimizer, OptimizerChange(joining=[Joining(parameters=list(newcomer.parameters()), rate=0.01)]))
    assert optimizer.state.keys() == before.keys()
    for parameter, (same, values) in before.items():
        assert optimizer.state[parameter] is same
        assert all(torch.equal(same[k], v) if isinstance(v, torch.Tensor) else same[k] == v for k, v in values.items())


@every_optimizer
def test_training_goes_on_as_if_nothing_had_joined_and_left_again(make, make_model, train):
    plain, model, guest = make_model(), make_model(), nn.Linear(4, 4)
    alone, optimizer = make(plain.parameters()), make(model.parameters())
    train(plain, alone, 6)
    train(model, optimizer, 3)
    rebuild(optimizer, OptimizerChange(joining=[Joining(parameters=list(guest.parameters()), rate=0.01)]))
    rebuild(optimizer, OptimizerChange(leaving=list(guest.parameters())))
    train(model, optimizer, 3, first=3)
    assert all_equal(weights(plain), weights(model))
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_what_joins_learns_at_its_rate_and_with_the_options_of_the_group(make, make_model, train):
    model, newcomer = make_model(), nn.Linear(4, 4)
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["weight_decay"] = 0.125
    train(model, optimizer)
    rebuild(optimizer, OptimizerChange(joining=[Joining(parameters=list(newcomer.parameters()), rate=0.01)]))
    ours, joined = optimizer.param_groups
    assert float(joined["lr"]) == pytest.approx(0.01)
    assert type(joined["lr"]) is type(ours["lr"])
    assert float(ours["lr"]) == pytest.approx(0.1)
    others = {key for key in ours if key not in ("lr", "params")}
    assert {key: joined[key] for key in others} == {key: ours[key] for key in others}
    before = weights(newcomer)
    train(model, optimizer, through=[newcomer])
    assert not all_equal(before, weights(newcomer))


@every_optimizer
def test_a_group_with_all_its_parameters_gone_goes_with_what_was_remembered(make, make_model, train):
    model = make_model()
    optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    train(model, optimizer)
    before = weights(model[0])
    rebuild(optimizer, OptimizerChange(leaving=list(model[0].parameters())))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        list(map(id, model[2].parameters()))
    ]
    assert not set(optimizer.state) & set(model[0].parameters())
    train(model, optimizer)
    assert all_equal(before, weights(model[0]))


@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "adamw", "rmsprop"])
def test_a_wider_parameter_takes_over_the_momentum_of_the_one_in_whose_place_it_is(name, make_model, train):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    old, kept = model[0].weight, model[0].bias
    state, other = copy.deepcopy(optimizer.state[old]), optimizer.state[kept]
    wider = nn.Parameter(torch.zeros(6, 7))
    rebuild(optimizer, OptimizerChange(replaced={old: wider}))
    assert [p is wider for p in optimizer.param_groups[0]["params"]] == [True, False, False, False]
    assert old not in optimizer.state
    assert optimizer.state[kept] is other
    assert optimizer.state[wider].keys() == state.keys()
    for key, part in optimizer.state[wider].items():
        expected = state[key]
        assert torch.equal(part[:, :4] if part.dim() else part, expected)
    wider.grad = torch.ones_like(wider)
    optimizer.step()
    assert bool(wider.detach().ne(0).all())


def test_a_state_that_does_not_fit_the_new_shape_begins_anew(make_model, train):
    model = make_model()
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    train(model, optimizer)
    narrower = nn.Parameter(torch.zeros(3, 2))
    rebuild(optimizer, OptimizerChange(replaced={model[0].weight: narrower}))
    assert narrower not in optimizer.state
    narrower.grad = torch.ones_like(narrower)
    optimizer.step()
    assert narrower in optimizer.state


def test_named_parameters_stay_named(make_model, train):
    model, newcomer = make_model(), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    rebuild(optimizer, OptimizerChange(joining=[Joining(parameters=list(newcomer.parameters()), rate=0.01)]))
    rebuild(optimizer, OptimizerChange(leaving=[model[0].weight]))
    assert optimizer.param_groups[0]["param_names"] == ["0.bias", "2.weight", "2.bias"]
    assert len(optimizer.param_groups[1]["param_names"]) == 2
    train(model, optimizer, through=[newcomer])
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda own, new: OptimizerChange(leaving=[new]),
        lambda own, new: OptimizerChange(leaving=[own, own]),
        lambda own, new: OptimizerChange(replaced={new: own}),
        lambda own, new: OptimizerChange(joining=[Joining(parameters=[own], rate=0.1)]),
        lambda own, new: OptimizerChange(joining=[Joining(parameters=[new, new], rate=0.1)]),
        lambda own, new: OptimizerChange(replaced={own: new}, leaving=[own]),
        lambda own, new: OptimizerChange(joining=[Joining(parameters=[], rate=0.1)]),
    ],
    ids=[
        "stranger leaves",
        "leaves twice",
        "stranger replaced",
        "joins again",
        "joins twice",
        "replaced and leaves",
        "nobody joins",
    ],
)
def test_a_change_that_makes_no_sense_is_refused_and_changes_nothing(change, make_model, train):
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    before = picture(optimizer)
    with pytest.raises(InvalidRequest):
        rebuild(optimizer, change(model[0].weight, nn.Parameter(torch.zeros(2))))
    assert_same(before, picture(optimizer))


def test_whatever_fails_half_way_leaves_the_optimizer_as_it_was_and_able_to_go_on(make_model, train):
    plain, model = make_model(), make_model()
    alone, optimizer = OPTIMIZERS["adamw"](plain.parameters()), OPTIMIZERS["adamw"](model.parameters())
    train(plain, alone, 6)
    train(model, optimizer, 3)
    before = picture(optimizer)
    # torch refuses it when the rest of the change has been made already.
    not_a_leaf = torch.zeros(2, requires_grad=True) * 1.0
    wider = nn.Parameter(torch.zeros(6, 9))
    change = OptimizerChange(
        leaving=[model[2].bias],
        replaced={model[0].weight: wider},
        joining=[
            Joining(parameters=[nn.Parameter(torch.zeros(3))], rate=0.1),
            Joining(parameters=[not_a_leaf], rate=0.1),
        ],
    )
    with pytest.raises(ValueError, match="non-leaf"):
        rebuild(optimizer, change)
    assert_same(before, picture(optimizer))
    train(model, optimizer, 3, first=3)
    assert all_equal(weights(plain), weights(model))


def test_an_optimizer_is_never_left_without_parameters(make_model, train):
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = picture(optimizer)
    with pytest.raises(FailedPrecondition, match="no parameters left"):
        rebuild(optimizer, OptimizerChange(leaving=list(model.parameters())))
    assert_same(before, picture(optimizer))


def test_what_is_remembered_of_all_parameters_together_is_refused(make_model):
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(FailedPrecondition, match="L-BFGS"):
        rebuild(optimizer, OptimizerChange(leaving=[model[0].weight]))
