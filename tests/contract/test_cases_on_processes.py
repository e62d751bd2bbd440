from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from esper_rpc.identity import SpiffeId
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import cli_command, end, lines_until, parse_event
from esper_servers.contract.case import load_cases
from esper_servers.contract.methods import CLIENTS
from esper_servers.contract.remote import RemoteTransport
from esper_servers.contract.runner import Runner
from esper_servers.contract.templates import Surroundings

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Anything that takes this long hangs; no figure is asserted here.
START_SECONDS = 60.0
SEED_HOST = Path(__file__).parent / "seed_host_process.py"
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    place = Home(tmp_path_factory.mktemp("home"))
    place.prepare()
    for member in (SpiffeId("nissa", "local"), SpiffeId("simic", "local"), SpiffeId("trainer", "other")):
        place.issue_identity(member)
    return place


@contextlib.contextmanager
def running(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON)
    try:
        yield process
    finally:
        end(process)
        process.stderr.close()


def seed_host_address(process):
    events = (parse_event(line) for line in lines_until(process.stdout, START_SECONDS))
    return next(event["address"] for event in events if event.get("event") == "serving")


def wait_until_up(process):
    """`esper up` says on its standard error when it has written the addresses."""
    assert any(line.startswith(b"wrote ") for line in lines_until(process.stderr, START_SECONDS))


def push_a_policy(home):
    """A rollback needs a policy to return to."""
    file = home.directory / "policy.safetensors"
    for command in (["export", str(file), "--version", "gnn_v1-2"], ["push", str(file)]):
        result = CliRunner().invoke(app, ["policy", *command, "--home", str(home.directory)], obj={})
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def addresses_of_processes(home):
    """`esper up` with the authority, under it `esper serve urza` and `esper serve tamiyo`; and a seed host."""
    up = [*cli_command(), "up", "--home", str(home.directory)]
    seed_host = [sys.executable, str(SEED_HOST), str(home.identity_dir("trainer"))]
    with running(up) as mesh, running(seed_host) as trainer:
        address = seed_host_address(trainer)
        wait_until_up(mesh)
        push_a_policy(home)
        yield home.read_mesh() | {"trainer": address}


@pytest.fixture(scope="module")
def surroundings_of_processes(home, make_token):
    return Surroundings(
        identity=lambda member: home.identity(member.role, member.instance),
        keyring=home.keyring,
        token=lambda member: make_token(home.tokens_dir, member),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def processes(addresses_of_processes, surroundings_of_processes):
    found = addresses_of_processes
    addresses = {name: found[client.role] for name, client in CLIENTS.items()}
    strangers = {"esper.identity.v1.IdentityService": found["enrolment"]}
    async with RemoteTransport(addresses, surroundings_of_processes.identity, strangers=strangers) as transport:
        yield transport


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)
async def test_a_process_of_the_mesh_answers_as_the_case_says(case, processes, surroundings_of_processes, unique):
    result = await Runner(processes, surroundings_of_processes, unique=unique).run(case)
    assert result.verdict == "passed", result
