"""What a controller leaves in its state directory, and what the next one makes of it."""

from __future__ import annotations

import os

import orjson
import pytest

from esper_client import TamiyoClient
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, OpenRunRequest, RunSeed, RunSite, Step
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

STEPS = 60


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    return home


async def train(home, loss, seed_id):
    """Start a mesh, take steps of one loss, and end it; returns what it left by name of the file."""
    with Supervisor(home, os.environ | {"ESPER_PLAN_COMPILE": "false"}) as mesh:
        async with TamiyoClient(mesh.addresses["tamiyo"], identity=home.identity("trainer")) as client:
            opened = OpenRunRequest(
                run_id="r", protocol_versions=[2], receiver_epoch=bytes(range(16)), sites=[RunSite(site_id="site")],
                seeds=[RunSeed(seed_id=seed_id, site_id="site")],
            )  # fmt: skip
            await client.open_run(opened)
            for sequence in range(1, STEPS + 1):
                packet = SystemStatePacket(version=1, packet_id=str(sequence), training_metrics={"loss": loss})
                step = Step(run_id="r", sequence=sequence, budget_us=1_000_000, packet=packet)
                await client.evaluate_step(EvaluateStepRequest(step=step))
    files = home.state_dir("tamiyo").glob("*.json*")
    return {path.name: path.read_bytes() for path in files}


async def test_norms_and_registries_outlive_a_controller_also_when_a_file_was_spoiled(home):
    left = await train(home, 5.0, "first")
    norms = orjson.loads(left["gnn_norms.json"])
    assert norms["steps"] == STEPS
    assert norms["moments"]["loss"]["mean"] == pytest.approx(5.0, abs=0.05)
    assert orjson.loads(left["seed_registry.json"]) == {"first": 1}
    assert {"layer_type_registry.json", "schedule_registry.json"} <= set(left)

    spoiled = home.state_dir("tamiyo") / "layer_type_registry.json"
    spoiled.write_bytes(b'{"Linear": 1')
    left = await train(home, 5.0, "second")
    assert orjson.loads(left["gnn_norms.json"])["steps"] == 2 * STEPS
    assert orjson.loads(left["seed_registry.json"]) == {"first": 1, "second": 2}
    assert left["layer_type_registry.json.unusable"] == b'{"Linear": 1'
    assert orjson.loads(left["layer_type_registry.json"])["Linear"] == 1
    assert home.log_file("tamiyo").read_text().count("state_file_unusable") == 1
