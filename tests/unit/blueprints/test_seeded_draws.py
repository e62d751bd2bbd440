from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from esper_servers.blueprints.seeded_draws import SeededDraws


def drawn():
    """Draw by every way that a module may choose."""
    weight = torch.empty(4, 4)
    return [
        nn.Linear(4, 4).weight.detach(), nn.init.orthogonal_(torch.empty(4, 4)), nn.init.trunc_normal_(torch.empty(8)),
        nn.init.sparse_(torch.empty(4, 4), 0.5), torch.rand(3), torch.randn(3), torch.randint(5, (3,)),
        torch.randint(2, 5, (3,)), torch.randperm(9), torch.bernoulli(torch.full((3,), 0.5)),
        torch.normal(0.0, 1.0, (3,)), torch.multinomial(torch.ones(5), 3), torch.ones(3).exponential_(),
        weight.uniform_(), nn.functional.dropout(torch.ones(9)), torch.randn_like(weight),
    ]  # fmt: skip


def test_what_is_drawn_is_what_a_default_generator_of_this_seed_gives():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)
        expected = drawn()
    with SeededDraws(11):
        got = drawn()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_the_default_generator_is_left_alone_while_another_thread_draws_from_it():
    torch.manual_seed(3)
    expected = torch.rand(64)
    torch.manual_seed(3)
    inside, go_on = threading.Event(), threading.Event()

    def build():
        with SeededDraws(1):
            torch.rand(100)
            inside.set()
            go_on.wait(30)
            torch.rand(100)

    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    assert inside.wait(30)
    first = torch.rand(32)
    go_on.set()
    thread.join(30)
    assert torch.equal(torch.cat([first, torch.rand(32)]), expected)


def test_an_operation_that_takes_no_generator_is_refused():
    with SeededDraws(1), pytest.raises(RuntimeError, match="takes no generator"):
        torch.native_dropout(torch.ones(3), 0.5, True)
