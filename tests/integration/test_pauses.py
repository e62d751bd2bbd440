"""Pause quotas of a mesh that runs: a crash of Tamiyo gives nobody a second quota, and esper pauses tells it all."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request

from typer.testing import CliRunner

from esper_client import TamiyoClient
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest, RequestPauseRequest
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

SETTINGS = "[pause]\nunits_per_window = 1_500\nwindow_seconds = 3600\n"


async def ask(home, units):
    """Open the run, which a controller that was restarted does not know, and ask."""
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity("trainer")) as client:
        await client.open_run(OpenRunRequest(run_id="run", protocol_versions=[2], receiver_epoch=bytes(16)))
        answer = await client.request_pause(RequestPauseRequest(run_id="run", units=units, reason="test"))
    return answer.granted_units, answer.remaining_units


async def test_a_quota_that_was_spent_stays_spent_when_tamiyo_is_killed(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    home.settings_file.write_text(SETTINGS)
    with Supervisor(home, os.environ) as mesh:
        assert await ask(home, 1000) == (1000, 500)
        mesh.services["tamiyo"].process.kill()
        mesh.services["tamiyo"].process.wait()
        mesh.restart("tamiyo")
        assert await ask(home, 600) == (500, 0)
        assert await ask(home, 1) == (0, 0)
        assert [row["granted_ms"] for row in await asyncio.to_thread(listed, home)] == [1000, 500, 0]
        assert 'esper_pause_requests_total{result="denied"} 1.0' in scrape(mesh)


def listed(home):
    result = CliRunner().invoke(app, ["pauses", "--json", "--home", str(home.directory)], obj={})
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def scrape(mesh):
    with urllib.request.urlopen(f"http://{mesh.addresses['metrics']}/metrics") as answer:
        return answer.read().decode()
