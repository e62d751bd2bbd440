from __future__ import annotations

import subprocess
import sys

import torch
from torch_geometric.nn import GATConv, SAGEConv

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_servers.policy import sample, schema
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.network import PolicyNetwork

WITHOUT_GEOMETRIC = """
import sys
sys.modules["torch_geometric"] = None
import esper_servers.tamiyo.server
"""


def sample_inputs():
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), sample.sample_blueprints())
    states = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_TRAINING)
    return graph.fill(SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=states))


def test_messages_pass_two_rounds_of_graphsage_then_two_of_attention_over_every_relation():
    network, calls = PolicyNetwork().eval(), []
    for module in network.modules():
        if isinstance(module, SAGEConv | GATConv):
            module.register_forward_hook(lambda layer, *_: calls.append(type(layer)))
    with torch.no_grad():
        network(sample_inputs())
    relations = len(schema.RELATIONS)
    assert calls == [SAGEConv] * 2 * relations + [GATConv] * 2 * relations


def test_there_are_heads_for_policy_value_and_risk():
    with torch.no_grad():
        heads = PolicyNetwork().eval()(sample_inputs())
    assert heads.kind.shape == (schema.KIND_COUNT,)
    assert heads.operation.shape == (sample.SEEDS, schema.OPERATION_COUNT)
    assert heads.blueprint.shape == (len(sample.sample_blueprints()),)
    assert heads.schedule.shape == (schema.SCHEDULE_COUNT,)
    assert heads.value.shape == ()
    assert heads.risk.shape == (schema.RISK_COUNT,)
    assert bool(((heads.risk >= 0) & (heads.risk <= 1)).all())


def test_a_controller_without_pytorch_geometric_does_not_start_and_says_what_is_missing():
    started = subprocess.run([sys.executable, "-c", WITHOUT_GEOMETRIC], capture_output=True, text=True, check=False)
    assert started.returncode != 0
    assert "torch_geometric" in started.stderr.splitlines()[-1]
