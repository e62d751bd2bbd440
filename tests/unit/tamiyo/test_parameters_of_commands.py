"""Who says how an action is carried out: the policy of its own, the heuristic of what the risk demands."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from esper_rpc.proto.leyline.v1 import CommandType
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy import parameters, prior, schema
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.policy_updates.shadow import Sample, agrees_with_live
from esper_servers.tamiyo.records.structure import write_structure
from esper_servers.tamiyo.risk.config import RiskConfig

GERMINATED = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
SAID = (1.5, 2.0, -0.5)
"""By the parameter head; its schedule begins after its end."""


def trained(kind):
    """A policy without a prior that always wants one kind of action."""
    policy = Policy.initial(prior_config=PriorConfig(weight=0.0))
    with torch.no_grad():
        policy.network.kind_head.bias[kind] = 10.0
        policy.network.parameter_head.weight.zero_()
        policy.network.parameter_head.bias.copy_(torch.tensor(SAID))
    return policy


@pytest.fixture
def command(start):
    """The command of the first step of a run, or of the second after `first`."""

    def ask(kind, *, first=None, **metrics):
        controller = start(trained(kind))
        steps = [step for step in (first, metrics) if step is not None]
        for sequence, told in enumerate(steps, start=1):
            command_id = controller.step(sequence, stage=GERMINATED, **{"loss": 0.5, **told})
        return controller.decisions.explain(command_id).command

    return ask


def test_a_seed_operation_carries_the_schedule_of_a_trained_policy_in_order(command):
    sent = command(schema.KIND_SEED).seed_operation.parameters
    _, start, end = parameters.read_out(SAID).tolist()
    assert start > end
    assert (sent["blending_schedule_start"], sent["blending_schedule_end"]) == (end, start)


def test_an_adjustment_carries_the_multiplier_of_a_trained_policy(command):
    found = command(schema.KIND_OPTIMIZER)
    multiplier = parameters.read_out(SAID).tolist()[0]
    assert found.command_type == CommandType.COMMAND_TYPE_OPTIMIZER
    assert dict(found.optimizer_adjustment.hyperparameters) == {"learning_rate_multiplier": multiplier}


def test_a_policy_adjusts_no_more_often_than_the_risk_may(start):
    controller, rest = start(trained(schema.KIND_OPTIMIZER)), RiskConfig().cool_down_steps
    adjusted = [bool(controller.step(n, stage=GERMINATED, loss=0.5)) for n in range(1, 2 * rest + 2)]
    assert [n for n, was in enumerate(adjusted) if was] == [0, rest, 2 * rest]


@pytest.mark.parametrize(
    ("first", "metrics", "multiplier", "reason"),
    [
        (None, {"kasmina.apply_ms": 40.0}, 0.8, "apply_latency"),
        ({"optimizer_lr": 1e-3}, {"optimizer_lr": 1e-3, "loss": 0.6}, 0.8, "loss_drift"),
        ({"optimizer_lr": 1e-9}, {"optimizer_lr": 1e-9, "loss": 0.51}, 1.25, "learning_rate_vanished"),
    ],
    ids=["instead of a seed", "drift", "vanished"],
)
def test_what_the_risk_demands_is_not_for_a_policy_to_say(command, first, metrics, multiplier, reason):
    found = command(schema.KIND_SEED, first=first, **metrics)
    assert found.annotations["reason"] == reason
    sent = dict(found.optimizer_adjustment.hyperparameters)
    assert sent == {"learning_rate_multiplier": float(np.float32(multiplier))}


def test_the_heuristic_prior_sends_its_own(start, policy):
    controller = start(policy)
    (command_id,) = controller.train(1, stage=GERMINATED)
    sent = controller.decisions.explain(command_id).command.seed_operation.parameters
    window = prior.PARAMETERS.blending_schedule_start, prior.PARAMETERS.blending_schedule_end
    assert (sent["blending_schedule_start"], sent["blending_schedule_end"]) == window == (0.0, 1.0)


def test_another_way_to_carry_out_the_same_action_is_no_disagreement_of_a_shadow(start, tmp_path, monkeypatch):
    live, other = trained(schema.KIND_SEED), trained(schema.KIND_SEED)
    with torch.no_grad():
        other.network.parameter_head.bias.neg_()
    controller = start(live)
    run = controller.pipeline.runs.find("run")
    noted = []
    monkeypatch.setattr(controller.pipeline, "shadow", Noting(noted))
    controller.train(1, stage=GERMINATED)
    monkeypatch.setattr("esper_servers.tamiyo.policy_updates.shadow._policy", lambda *_: other)
    structure = write_structure(run.request, run.graph)
    assert agrees_with_live(tmp_path, live.prior, structure, noted[0])
    refusing = dataclasses.replace(noted[0].output, kind=-noted[0].output.kind)
    assert not agrees_with_live(tmp_path, live.prior, structure, dataclasses.replace(noted[0], output=refusing))


class Noting:
    """A shadow that keeps what it is shown."""

    is_free = True

    def __init__(self, noted):
        self._noted = noted

    def note(self, run, decided, seeds):
        self._noted.append(
            Sample(
                features=run.graph.copy_features(), seeds=[seed.SerializeToString() for seed in seeds],
                signals=run.signals(), masks=decided.masks, output=decided.output,
            )
        )  # fmt: skip

    def follow(self):
        """Compute nothing."""
