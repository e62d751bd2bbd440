from __future__ import annotations

from collections.abc import Callable

import torch

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_servers.policy import sample
from esper_servers.policy.graph import GraphInputs, RunGraph
from esper_servers.policy.network import Heads
from esper_servers.policy.policy import Policy


def check_heads(policy: Policy, compute: Callable[[GraphInputs], Heads | None], plan: str, tolerance: float) -> None:
    """Raise ConfigError unless a plan computes what the eager one does, on a graph and on the smallest one."""
    for inputs in (sample_inputs(), RunGraph({}, [], [], []).inputs):
        expected, found = policy.compute(inputs), compute(inputs)
        if found is None or not _are_near(expected, found, tolerance):
            raise ConfigError(f"The {plan} plan computes something else than the eager one.")


def sample_inputs() -> GraphInputs:
    """A graph as a step fills it."""
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
    return graph.fill(SystemStatePacket(training_metrics={"loss": 0.5}))


def _are_near(ours: Heads, theirs: Heads, tolerance: float) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(ours, theirs, strict=True))
