from __future__ import annotations

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsResponse

METRICS = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}


async def test_the_ledger_of_a_step_says_where_its_time_went(controller):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, **METRICS)
    for sequence in range(1, 20):
        answer = await controller.pipeline.evaluate_in_band(controller.request(sequence, packet), controller.owner)
        ledger = EvaluateStepsResponse.FromString(answer).decision.ledger
        parts = ledger.queue_us + ledger.validate_us + ledger.features_us + ledger.inference_us + ledger.risk_us
        assert 0 < ledger.inference_us < parts <= ledger.total_us
