"""esper doctor, logs and top against a mesh that runs, and homes that are broken on purpose."""

from __future__ import annotations

import json
import os
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from esper_client import UrzaClient
from esper_rpc.errors import PermissionDenied
from esper_rpc.identity import Authority, SpiffeId
from esper_rpc.identity.deny_list import write_denied
from esper_rpc.proto.urza.v1 import SaveBlueprintRequest
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

ME = SpiffeId("trainer", "local")


def esper(*arguments, environ=None):
    return CliRunner().invoke(app, list(arguments), obj=environ or {})


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        assert esper("urza", "seed", "--home", str(home.directory)).exit_code == 0
        yield supervisor


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    return home


def findings(home, environ=None):
    result = esper("doctor", "--json", "--home", str(home.directory), environ=environ)
    document = json.loads(result.stdout)
    assert result.exit_code == (1 if document["findings"] else 0)
    return document["findings"]


def test_a_healthy_mesh_has_no_findings(mesh):
    assert findings(mesh.home) == []


def test_a_home_without_a_mesh_is_told_the_first_step(tmp_path):
    fixes = [finding["fix"] for finding in findings(Home(tmp_path))]
    assert {"esper pki init", "esper keys init", "esper up"} <= set(fixes)


def break_certificate(home):
    leaf = Authority.load(home.pki).issue(ME, lifetime=timedelta(microseconds=1))
    for name, content in (("cert.pem", leaf.chain_pem), ("key.pem", leaf.key_pem)):
        (home.identity_dir("trainer") / name).write_bytes(content)


def break_permission(home):
    (home.identity_dir("trainer") / "key.pem").chmod(0o644)


def break_keyring(home):
    other = Home(home.directory / "other")
    other.prepare()
    (home.identity_dir("tamiyo") / "keyring.json").write_bytes(
        (other.identity_dir("tamiyo") / "keyring.json").read_bytes()
    )


def break_settings(home):
    home.settings_file.write_text("[risk]\nhook_latency_ms = 0\n")


def break_section(home):
    home.settings_file.write_text("[risks]\n")


def break_toml(home):
    home.settings_file.write_text("[risk\n")


def break_deny_list(home):
    write_denied(home.deny_list, {str(ME): "by mistake"})


def break_mesh(home):
    home.write_mesh({"tamiyo": "127.0.0.1:1", "urza": "127.0.0.1:1"})


def break_authority(home):
    other = Home(home.directory / "other")
    other.prepare()
    other.issue_identity(ME)
    for name in ("cert.pem", "key.pem", "ca.pem"):
        (home.identity_dir("trainer") / name).write_bytes((other.identity_dir("trainer") / name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "problem", "fix"),
    [
        (break_certificate, "ended at", "esper pki issue trainer"),
        (break_permission, "can be read by others", "esper pki issue trainer"),
        (break_keyring, "not active", "esper keys issue tamiyo"),
        (break_settings, "[risk] hook_latency_ms = 0", "correct it in"),
        (break_section, "[risks] is read by nobody", "use one of"),
        (break_toml, "not valid TOML", "correct it in"),
        (break_deny_list, "by mistake", "esper pki allow trainer local"),
        (break_mesh, "nobody listens for tamiyo at 127.0.0.1:1", "esper up"),
        (break_authority, "issued by another authority", "esper pki issue trainer"),
    ],
)
def test_each_misconfiguration_is_found_with_its_fix(home, spoil, problem, fix):
    spoil(home)
    assert any(problem in f["problem"] and fix in f["fix"] for f in findings(home)), findings(home)


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"GRPC_ENABLE_FORK_SUPPORT": "1"}, "DataLoader workers crash"),
        ({"OMP_WAIT_POLICY": "active"}, "tail of steps"),
        ({"http_proxy": "http://proxy:3128"}, "gRPC heeds it"),
        ({"ESPER_LEYLINE_SECRET": "{}"}, "is not a keyring"),
        ({"ESPER_QUOTA_BURST": "0"}, "[quota] burst = 0"),
    ],
)
def test_a_bad_environment_is_found(home, environ, problem):
    assert any(problem in f["problem"] for f in findings(home, environ))


async def test_logs_are_merged_filtered_and_json(mesh):
    home = str(mesh.home.directory)
    async with UrzaClient(mesh.addresses["urza"], identity=mesh.home.identity("tamiyo")) as client:
        with pytest.raises(PermissionDenied):
            await client.save_blueprint(SaveBlueprintRequest())
    refused = esper("logs", "--audit", "--json", "--match", "SaveBlueprint", "--home", home)
    entries = [json.loads(line) for line in refused.stdout.splitlines()]
    assert entries
    assert all((e["service"], e["event"]) == ("urza", "refused") for e in entries)
    assert esper("logs", "--service", "nobody", "--home", home).exit_code == 2
    assert esper("logs", "--level", "loud", "--home", home).exit_code == 2
    everything = esper("logs", "--json", "--home", home)
    times = [json.loads(line).get("timestamp", "") for line in everything.stdout.splitlines()]
    assert times == sorted(times)


def test_top_tells_health_memory_and_rates(mesh):
    result = esper("top", "--json", "--count", "1", "--every", "0.2", "--home", str(mesh.home.directory))
    look = json.loads(result.stdout)
    services = {row["service"]: row for row in look["services"]}
    assert services["tamiyo"]["health"] == "SERVING"
    assert services["tamiyo"]["rss_mb"] > 10
    assert look["decisions_per_second"] == 0
    assert esper("top", "--count", "1", "--every", "0.2", "--home", str(mesh.home.directory)).exit_code == 0


def test_top_without_a_mesh_says_how_to_start_one(home):
    result = esper("top", "--count", "1", "--home", str(home.directory))
    assert result.exit_code == 1
    assert "esper up" in result.output
