"""The budgets of the requirements (2.4), on the graph that benchmarks use. `esper bench` measures; this only guards.

A decision is made on one thread, so its processor time is its latency on a machine that does nothing else.
"""

from __future__ import annotations

import time

import numpy as np

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsResponse
from esper_servers.policy import sample

INFERENCE_P95_SECONDS = 0.045
STEP_P95_SECONDS = 0.010
STEPS = 100
ROUNDS = 5
METRICS = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}


def p95(work):
    """The best of some rounds: what else the machine does in one of them is not what is asked for."""
    return min(float(np.percentile([timed(work) for _ in range(STEPS)], 95)) for _ in range(ROUNDS))


def timed(work):
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def test_inference_of_the_eager_plan_is_within_its_budget(controller):
    run = controller.pipeline.runs.find("run")
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, **METRICS)
    seeds = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_TRAINING)
    inputs, signals = run.graph.fill(packet), run.signals()
    assert p95(lambda: controller.policy.evaluate(inputs, seeds, signals)) < INFERENCE_P95_SECONDS


async def test_a_step_is_within_its_budget_and_its_ledger_says_where_the_time_went(controller):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, **METRICS)
    ledgers, sequences = [], iter(range(1, 10_000))

    async def step():
        raw = controller.request(next(sequences), packet)
        begun = time.thread_time()
        answer = await controller.pipeline.evaluate_in_band(raw, controller.owner)
        took = time.thread_time() - begun
        ledgers.append(EvaluateStepsResponse.FromString(answer).decision.ledger)
        return took

    rounds = [[await step() for _ in range(STEPS)] for _ in range(ROUNDS)]
    assert min(float(np.percentile(found, 95)) for found in rounds) < STEP_P95_SECONDS
    for ledger in ledgers:
        parts = ledger.queue_us + ledger.validate_us + ledger.features_us + ledger.inference_us + ledger.risk_us
        assert 0 < ledger.inference_us < parts <= ledger.total_us
