from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_client.follower_session import FollowerSession
from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage
from esper_servers.tolaria.aggregation.weights import SeedLoss
from esper_servers.tolaria.train_step import TrainStep
from esper_servers.tolaria.trainer import Trainer
from esper_servers.trainer import DetachedSession, orchestrate
from esper_servers.trainer.quiet_trainer import QuietTrainer

BATCH = (torch.arange(8.0).reshape(2, 4), torch.ones(2, 2))


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def test_a_loop_that_is_orchestrated_trains_on_without_a_mesh(model, tmp_path):
    plain = copy.deepcopy(model)
    optimizer = sgd(model)
    trainer = orchestrate(
        DetachedSession(model), optimizer, train_step=TrainStep(model, optimizer, loss_of), traces=tmp_path
    )  # fmt: skip
    path = trainer.profiler.request(steps=1)
    step = TrainStep(plain, sgd(plain), loss_of)
    for batch in trainer.metrics.batches([BATCH] * 3):
        assert trainer.train(batch, samples=2) == step(batch)
    assert torch.equal(plain.weight, model.weight)
    assert (trainer.end_epoch(accuracy=1.0), trainer.hold(), trainer.is_halted) == (None, True, False)
    assert path.exists()


def test_traces_without_a_mesh_lie_in_the_home_of_the_environment(model, tmp_path):
    trainer = orchestrate(DetachedSession(model), sgd(model), environ={"ESPER_HOME": str(tmp_path)})
    assert trainer.profiler.request().is_relative_to(tmp_path / "state" / "trainer" / "traces")


def test_the_parts_of_a_step_are_there_without_a_mesh(model, tmp_path):
    trainer = orchestrate(DetachedSession(model), sgd(model), traces=tmp_path)
    assert (trainer.begin_step(1.0), trainer.finish_step(gradient_norm=1.0), trainer.step(1.0)) == (None, [], [])
    weight = model.weight
    stage = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_SHADOWING
    seeds = {"a": SeedLoss(loss=-weight.sum(), stage=stage, samples=1)}
    assert trainer.backward(weight.sum(), seeds, [weight], samples=1).conflicts == ("a",)
    with pytest.raises(FailedPrecondition, match="train_step"):
        trainer.train(BATCH)


def test_whatever_a_loop_may_call_is_there_with_and_without_a_mesh():
    missing = {name for name in vars(Trainer) if not name.startswith("_")} - set(dir(QuietTrainer))
    assert missing == set()


class Host:
    """The seeds of a rank that follows."""

    def __init__(self):
        self.steps = []

    def step(self, loss, global_step):
        self.steps.append((loss, global_step))


def test_a_rank_that_follows_ends_its_steps_and_epochs_with_the_others(model, tmp_path):
    host = Host()
    session = FollowerSession(host, "run")
    optimizer = sgd(model)
    step = TrainStep(model, optimizer, loss_of)
    trainer = orchestrate(session, optimizer, train_step=step, traces=tmp_path)
    result = trainer.train(BATCH, samples=2)
    trainer.step(0.5, samples=2, gradient_norm=1.0)
    trainer.end_epoch(accuracy=0.5)
    assert host.steps == [(pytest.approx(result.loss), 1), (0.5, 2)]
    assert session.epoch == 1
