"""esper contract-test against a mesh that runs, and against a server that breaks the contract."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from typer.testing import CliRunner

from esper_client import LoopThread
from esper_rpc.errors import NotFound
from esper_rpc.proto.urza.v1 import urza_service_pb2
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor, cli_command
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.service import UrzaServicer

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        yield supervisor


@pytest.fixture
def home(mesh):
    return mesh.home


def contract_test(home, address, *options):
    return CliRunner().invoke(app, ["contract-test", address, "--home", str(home.directory), *options], obj={})


@pytest.mark.parametrize("service", ["tamiyo", "urza", "weatherlight"])
def test_a_service_of_the_mesh_keeps_the_contract(mesh, home, service):
    command = [*cli_command(), "contract-test", mesh.addresses[service], "--home", str(home.directory), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    document = json.loads(result.stdout)
    failed = [row for row in document["results"] if row["verdict"] == "failed"]
    assert (result.returncode, failed) == (0, [])
    assert document["passed"] > 5
    skipped = {row["skipped"] for row in document["results"] if row["verdict"] == "skipped"}
    assert skipped <= {"the server does not offer this RPC", "the server has no response.previous_versions[-1]"}


class Forgetful(UrzaServicer):
    """Knows no blueprint, whatever was saved."""

    async def GetBlueprint(self, request, call):
        raise NotFound("There is no such blueprint.", reason="BLUEPRINT_NOT_FOUND")


@pytest.fixture
def forgetful(home, tmp_path):
    thread, library = LoopThread("forgetful"), BlueprintLibrary(tmp_path)

    async def start():
        server = MeshServer(config=ServerConfig(drain_seconds=0.2), identity=home.identity("urza"))
        server.add_service(URZA, Forgetful(library))
        return server, await server.start()

    server, address = thread.run(start())
    yield address
    thread.run(server.drain())
    thread.stop()
    library.close()


def test_a_server_that_breaks_the_contract_is_told_where(home, forgetful):
    result = contract_test(home, forgetful, "--only", "GetBlueprint")
    assert result.exit_code == 1
    assert "✗ GetBlueprint" in result.stdout
    assert "the status is NOT_FOUND: There is no such blueprint., expected OK" in result.stdout


def test_cases_of_ones_own_are_run_too(home, forgetful, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "service: esper.urza.v1.UrzaService\n"
        "cases:\n"
        "  - {name: it knows nothing, rpc: GetBlueprint, caller: trainer, request: {blueprint_id: x},"
        " expect: {code: NOT_FOUND}}\n"
    )
    result = contract_test(home, forgetful, "--cases", str(tmp_path), "--json")
    assert (result.exit_code, json.loads(result.stdout)["passed"]) == (0, 1)


def test_a_case_that_is_written_wrongly_is_named(home, forgetful, tmp_path):
    (tmp_path / "own.yaml").write_text("service: esper.urza.v1.UrzaService\ncases:\n  - {name: odd, rpc: Fetch}\n")
    result = contract_test(home, forgetful, "--cases", str(tmp_path))
    assert result.exit_code == 1
    assert "own.yaml: case 1 (odd): esper.urza.v1.UrzaService has no RPC 'Fetch'" in result.stderr


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [("urza", 1, "is not an address; write host:port"), ("127.0.0.1:1", 3, "does not answer under a certificate")],
)
def test_an_address_that_is_none_or_where_nobody_serves(home, address, code, says):
    result = contract_test(home, address)
    assert (result.exit_code, says in result.stderr) == (code, True), result.stderr


def test_a_pattern_that_matches_nothing_is_an_error(mesh, home):
    result = contract_test(home, mesh.addresses["urza"], "--only", "Nothing*")
    assert result.exit_code == 1
    assert "No case of esper.urza.v1.UrzaService matches 'Nothing*'" in result.stderr
