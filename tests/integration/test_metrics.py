"""What Prometheus reads from a running mesh."""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper_client import TamiyoClient
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, OpenRunRequest, Step
from esper_rpc.telemetry.exposition import MetricsEndpoint
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor


@pytest.fixture(scope="module")
def mesh_process(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        yield supervisor


def scrape(supervisor):
    text = httpx.get(f"http://{supervisor.addresses['metrics']}/metrics").raise_for_status().text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *sorted(s.labels.values())): s.value for s in samples}


async def evaluate(home, address, steps):
    async with TamiyoClient(address, identity=home.identity("trainer")) as client:
        await client.open_run(OpenRunRequest(run_id="r", protocol_versions=[2], receiver_epoch=bytes(range(16))))
        for sequence in range(1, steps + 1):
            packet = SystemStatePacket(version=1, packet_id=str(sequence), training_metrics={"loss": 1.0})
            step = Step(run_id="r", sequence=sequence, budget_us=1_000_000, packet=packet)
            await client.evaluate_step(EvaluateStepRequest(step=step))


async def test_calls_decisions_and_processes_are_rendered_outside_the_step_process(mesh_process):
    await evaluate(mesh_process.home, mesh_process.addresses["tamiyo"], 5)
    samples = scrape(mesh_process)
    method = "esper.tamiyo.v1.TamiyoService/EvaluateStep"
    assert samples["grpc_server_call_started_total", method] == 5
    assert samples["grpc_server_call_duration_seconds_count", "OK", method] == 5
    assert samples["esper_decision_part_seconds_count", "inference"] == 5
    assert samples[("esper_tamiyo_process_resident_memory_bytes",)] > 10_000_000


async def test_what_waits_and_the_time_of_the_warm_up_are_shown_by_a_controller_that_serves(mesh_process):
    samples = {}
    async with asyncio.timeout(30):
        while ("esper_queue_length", "journal") not in samples:
            await asyncio.sleep(0.1)
            samples = scrape(mesh_process)
    assert samples["esper_queue_length", "steps"] == samples["esper_queue_length", "journal"] == 0
    assert samples[("esper_plan_warm_up_seconds",)] > 0


def test_counters_survive_the_restart_of_a_service(mesh_process):
    mesh_process.services["urza"].process.kill()
    mesh_process.services["urza"].process.wait()
    assert ("esper_urza_process_resident_memory_bytes",) not in scrape(mesh_process)
    mesh_process.restart("urza")
    assert ("esper_urza_process_resident_memory_bytes",) in scrape(mesh_process)


def test_a_taken_port_is_named(mesh_process, tmp_path):
    port = int(mesh_process.addresses["metrics"].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        MetricsEndpoint(tmp_path, dict, port=port).start()
