"""The budgets of inference and of a step, in CPU time: a busy machine must not make them look missed."""

from __future__ import annotations

import itertools
import time

import pytest

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy import sample
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.prior import RunSignals

INFERENCE_MS, STEP_MS = 45.0, 10.0
ROUNDS, STEPS = 5, 40
METRICS = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}
SIGNALS = RunSignals(
    steps=1000, steps_since_germination=1000, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
)


def p95(durations):
    return sorted(durations)[int(0.95 * len(durations))] * 1000


async def keeps(budget_ms, once):
    """Whether a round of calls has its p95 within a budget; one may fall into a time when the core is shared."""
    for _ in range(ROUNDS):
        durations = []
        for _ in range(STEPS):
            began = time.thread_time()
            await once()
            durations.append(time.thread_time() - began)
        if p95(durations) < budget_ms:
            return True
    return False


async def test_inference_by_the_eager_plan_keeps_to_its_budget(controller):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, **METRICS)
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), sample.sample_blueprints())

    async def once():
        controller.policy.evaluate(graph.fill(packet), packet.seed_states, SIGNALS)

    assert await keeps(INFERENCE_MS, once)


@pytest.mark.parametrize("stage", [Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, Stage.SEED_LIFECYCLE_STAGE_GERMINATED])
async def test_a_step_keeps_to_its_budget_with_a_command_and_without(controller, stage):
    packet, pipeline = controller.packet(stage, **METRICS), controller.pipeline
    requests = (controller.request(sequence, packet) for sequence in itertools.count(1))

    async def once():
        await pipeline.evaluate_in_band(next(requests), controller.owner)

    assert await keeps(STEP_MS, once)
    assert (set(pipeline.kinds) == {"NO_ACTION"}) == (stage == Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED)
