from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch_geometric.nn import GATConv, SAGEConv

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_servers.policy import sample, schema
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.network import PolicyNetwork
from esper_servers.policy.plan import FusedPlan
from esper_servers.policy.reference import ReferenceNetwork
from esper_servers.tamiyo.server import serve


def sample_inputs():
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), sample.sample_blueprints())
    states = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_TRAINING)
    return graph.fill(SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=states))


def test_messages_pass_two_rounds_of_graphsage_then_two_of_attention_over_every_relation():
    network, calls = ReferenceNetwork().eval(), []
    for module in network.modules():
        if isinstance(module, SAGEConv | GATConv):
            module.register_forward_hook(lambda layer, *_: calls.append(type(layer)))
    with torch.no_grad():
        network(sample_inputs())
    relations = len(schema.RELATIONS)
    assert calls == [SAGEConv] * 2 * relations + [GATConv] * 2 * relations


def test_there_are_heads_for_policy_value_and_risk():
    with torch.no_grad():
        heads = ReferenceNetwork().eval()(sample_inputs())
    assert heads.kind.shape == (schema.KIND_COUNT,)
    assert heads.operation.shape == (sample.SEEDS, schema.OPERATION_COUNT)
    assert heads.blueprint.shape == (len(sample.sample_blueprints()),)
    assert heads.schedule.shape == (schema.SCHEDULE_COUNT,)
    assert heads.value.shape == ()
    assert heads.risk.shape == (schema.RISK_COUNT,)
    assert bool(((heads.risk >= 0) & (heads.risk <= 1)).all())


def test_the_weights_are_those_of_the_reference_by_name_and_bit_for_bit():
    torch.manual_seed(3)
    weights = PolicyNetwork().state_dict()
    torch.manual_seed(3)
    expected = ReferenceNetwork().state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_weights_move_into_the_reference():
    torch.manual_seed(3)
    weights, inputs = PolicyNetwork(), sample_inputs()
    reference = ReferenceNetwork().eval()
    reference.load_state_dict(weights.state_dict())
    with torch.no_grad():
        found, expected = FusedPlan(weights)(inputs), reference(inputs)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


async def test_a_controller_without_pytorch_geometric_does_not_start_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(ConfigError, match="torch_geometric is missing; install"):
        await serve(None)


def test_a_controller_does_not_import_it():
    script = "import sys, esper_servers.tamiyo.server; sys.exit('torch_geometric' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
