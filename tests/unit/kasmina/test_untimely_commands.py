"""Commands that come in the middle of a step, or for a seed that is beyond commands."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle

APPLIED, QUEUED, REJECTED = (
    CommandOutcome.RESULT_APPLIED,
    CommandOutcome.RESULT_QUEUED,
    CommandOutcome.RESULT_REJECTED,
)


def backward(rig, meanwhile=lambda: None):
    """Run forward and backward; something happens when half of the gradients are known."""
    rig.model.zero_grad(set_to_none=True)
    h = rig.model[1](rig.model[0](rig.x))
    h.register_hook(lambda _gradient: meanwhile())
    nn.functional.cross_entropy(rig.model[4](rig.model[3](rig.model[2](h))), rig.y).backward()
    return [p.grad.clone() for p in rig.model.parameters()]


def beside(work):
    """Do it on another thread, and wait for it."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("place", [lambda work: work(), beside], ids=["in the backward pass", "on another thread"])
@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING])
def test_a_command_during_a_backward_pass_waits_for_its_end_and_changes_no_gradient(rig, unchanged, stage, place):
    rig.grow(stage)
    weights = copy.deepcopy(rig.model.state_dict())
    expected, before, seen = backward(rig), rig.picture(), []
    command = rig.command("CULL")
    gradients = backward(rig, lambda: place(lambda: seen.append(rig.host.submit(rig.envelope(command)))))
    assert [outcome.result for outcome in seen] == [QUEUED]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    unchanged((*before[:-1], 1), rig.picture())
    assert [outcome.result for outcome in rig.host.apply_pending()] == [APPLIED]
    assert rig.slot.stage == lifecycle.CULLED
    assert all(torch.equal(weights[name], value) for name, value in rig.model.state_dict().items())


@pytest.mark.parametrize(
    "operation",
    [
        "GERMINATE", "START_TRAINING", "START_GRAFTING", "STABILIZE", "EVALUATE", "FINE_TUNE", "FOSSILIZE", "CULL",
        "CANCEL",
    ],
)  # fmt: skip
def test_a_fossil_is_beyond_every_operation(rig, unchanged, operation):
    rig.grow(lifecycle.FOSSILIZED)
    before = rig.picture()
    outcome = rig.do(operation, blueprint="residual_mlp" if operation == "GERMINATE" else "")
    assert (outcome.result, outcome.reason) == (REJECTED, "illegal_transition")
    unchanged(before, rig.picture())
    rig.train(2)
    assert rig.slot.stage == lifecycle.FOSSILIZED


def test_a_command_for_a_seed_that_was_culled_meanwhile_changes_nothing(rig, unchanged):
    rig.grow(lifecycle.TRAINING)
    late = rig.command("START_GRAFTING")
    assert rig.host.submit(rig.envelope(rig.command("CULL"))).result == QUEUED
    assert rig.host.submit(rig.envelope(late)).result == QUEUED
    first, second = rig.host.apply_pending()
    assert first.result == APPLIED
    assert (second.result, second.reason) == (REJECTED, "illegal_transition")
    assert rig.slot.stage == lifecycle.CULLED
    assert rig.slot.site.seed is None


def test_work_that_waits_for_a_safe_point_is_given_up_when_the_host_closes(make_rig):
    rig = make_rig(options={"has_training_thread": True})
    waiting = rig.host.at_safe_point(lambda: "done")
    rig.host.close()
    assert waiting.cancelled()
