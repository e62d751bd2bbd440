from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_servers.policy import compiled_plan, cuda_plan
from esper_servers.policy.cuda_plan import CudaPlan
from esper_servers.policy.dense_plan import DensePlan
from esper_servers.policy.policy import COMPILED, CUDA, EAGER, Policy
from esper_servers.policy.prior import PriorConfig

GERMINATED = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
OTHER_PLAN = "evidence.plan: recorded 'compiled', now 'eager'"


@pytest.fixture
def compiling(start):
    """A controller of whose policy the dense plan stands for the compiled one."""
    controller = start(Policy.initial())
    controller.policy.serve_compiled(DensePlan(controller.policy.network))
    return controller


def plan_of(controller, command_id):
    return controller.decisions.explain(command_id).evidence.plan


def test_a_decision_of_the_compiled_plan_is_replayed_bit_for_bit_by_it(compiling):
    commands = compiling.train(40, stage=GERMINATED)
    assert {plan_of(compiling, command_id) for command_id in commands} == {COMPILED}
    found = []
    thread = threading.Thread(target=lambda: found.extend(map(compiling.replay.differences, commands)))
    thread.start()
    compiling.train(20, stage=GERMINATED)
    thread.join()
    assert found == [[]] * len(commands)


def test_under_the_eager_plan_the_plan_is_the_only_difference(compiling):
    commands = compiling.train(20, stage=GERMINATED)
    compiling.policy.serve_eager()
    assert [compiling.replay.differences(command_id) for command_id in commands] == [[OTHER_PLAN]] * len(commands)


def test_a_decision_of_the_eager_plan_is_replayed_by_it_also_when_the_compiled_one_serves(compiling):
    compiling.policy.serve_eager()
    (command_id,) = compiling.train(1, stage=GERMINATED)
    compiling.policy.serve_compiled(DensePlan(compiling.policy.network))
    assert plan_of(compiling, command_id) == EAGER
    assert compiling.replay.differences(command_id) == []


@pytest.fixture
def on_device(compiling):
    """The same controller, with a CPU for a device."""
    policy = compiling.policy
    policy.serve_on_device(CudaPlan(policy.network, torch.device("cpu")))
    policy.prepare(compiling.pipeline.runs.find("run").graph.inputs)
    return compiling


def test_a_decision_of_a_device_is_replayed_by_the_eager_plan_within_what_bfloat16_leaves(on_device):
    commands = on_device.train(20, stage=GERMINATED)
    assert {plan_of(on_device, command_id) for command_id in commands} == {CUDA}
    told = ["evidence.plan: recorded 'cuda', now 'eager'"]
    assert [on_device.replay.differences(command_id) for command_id in commands] == [told] * len(commands)


@pytest.mark.parametrize(("drift", "is_named"), [(cuda_plan.TOLERANCE / 2, False), (3 * cuda_plan.TOLERANCE, True)])
def test_outputs_beyond_what_bfloat16_leaves_are_named(on_device, drift, is_named):
    (command_id,) = on_device.train(1, stage=GERMINATED)

    def change(record):
        values = np.frombuffer(record.evidence.outputs["risk"].values, "<f4") + np.float32(drift)
        record.evidence.outputs["risk"].values = values.tobytes()

    on_device.change(command_id, change)
    names = {line.partition(":")[0] for line in on_device.replay.differences(command_id)}
    assert ("evidence.outputs.risk" in names) == is_named


def test_outputs_beyond_what_plans_may_differ_by_are_named(compiling):
    (command_id,) = compiling.train(1, stage=GERMINATED)
    compiling.policy.serve_eager()

    def drift(record):
        values = np.frombuffer(record.evidence.outputs["risk"].values, "<f4") + np.float32(0.01)
        record.evidence.outputs["risk"].values = values.tobytes()

    compiling.change(command_id, drift)
    names = {line.partition(":")[0] for line in compiling.replay.differences(command_id)}
    assert {"evidence.plan", "evidence.outputs.risk"} <= names


def test_another_choice_of_another_plan_is_named(compiling):
    (command_id,) = compiling.train(1, stage=GERMINATED)
    compiling.policy.serve_eager()

    def otherwise(record):
        record.command.seed_operation.operation = Operation.SEED_OPERATION_CULL

    compiling.change(command_id, otherwise)
    told = "command.seed_operation.operation: recorded SEED_OPERATION_CULL, now SEED_OPERATION_START_TRAINING"
    assert compiling.replay.differences(command_id) == [told, OTHER_PLAN]


@pytest.fixture
def half_trained(start):
    """A controller whose commands carry what the network says too, computed by the dense plan."""
    controller = start(Policy.initial(prior_config=PriorConfig(weight=0.5)))
    controller.policy.serve_compiled(DensePlan(controller.policy.network))
    return controller


def test_numbers_of_a_command_may_differ_as_the_outputs_do_that_they_come_from(half_trained):
    commands = half_trained.train(20, stage=GERMINATED)
    half_trained.policy.serve_eager()
    assert [half_trained.replay.differences(command_id) for command_id in commands] == [[OTHER_PLAN]] * len(commands)


def test_numbers_of_a_command_that_differ_by_more_are_named(half_trained):
    (command_id,) = half_trained.train(1, stage=GERMINATED)
    half_trained.policy.serve_eager()

    def drift(record):
        record.command.seed_operation.parameters["blending_schedule_start"] += 0.01

    half_trained.change(command_id, drift)
    names = [line.partition(":")[0] for line in half_trained.replay.differences(command_id)]
    assert names == ["command.seed_operation.parameters.blending_schedule_start", "evidence.plan"]


def test_what_the_risk_demanded_was_decided_by_no_plan(compiling):
    command_id = compiling.step(1, loss=float("nan"))
    assert plan_of(compiling, command_id) == ""
    compiling.policy.serve_eager()
    assert compiling.replay.differences(command_id) == []


def test_a_graph_that_is_too_large_for_the_compiled_plan_was_decided_by_the_eager_one(compiling, monkeypatch):
    monkeypatch.setattr(compiled_plan, "CELL_LIMIT", 10)
    (command_id,) = compiling.train(1, stage=GERMINATED)
    assert plan_of(compiling, command_id) == EAGER
    assert compiling.replay.differences(command_id) == []


def test_a_package_that_fails_leaves_the_decision_to_the_eager_plan_also_in_the_record(compiling):
    def broken(_tensors):
        raise RuntimeError("illegal instruction")

    compiling.policy.serve_compiled(broken)
    (command_id,) = compiling.train(1, stage=GERMINATED)
    assert plan_of(compiling, command_id) == EAGER
    assert compiling.replay.differences(command_id) == []
