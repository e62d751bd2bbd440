from __future__ import annotations

import gc
import time

import torch

from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.telemetry.metrics import tell_warm_up
from esper_servers.policy import sample
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import LEGAL_OPERATIONS
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import RunSignals

WARM_UP_STEPS = 20


def prepare(policy: Policy) -> None:
    """Make the process fit for steps: one thread, warm caches, long-lived objects out of the collector."""
    # Two torch threads are twice as slow as one on graphs of this size.
    torch.set_num_threads(1)
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
    states = sample.sample_states(next(iter(LEGAL_OPERATIONS)))  # type: ignore[arg-type]  # A stage by number.
    signals = RunSignals(
        steps=0, steps_since_germination=0, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
    )
    began = time.perf_counter()
    policy.warm_up(graph.inputs)
    for _ in range(WARM_UP_STEPS):
        policy.evaluate(graph.fill(SystemStatePacket(seed_states=states)), states, signals)
    tell_warm_up(time.perf_counter() - began)
    gc.collect()
    gc.freeze()
