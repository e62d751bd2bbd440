from __future__ import annotations

import json
import os
import resource
import stat
from contextlib import contextmanager
from datetime import timedelta

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from esper_rpc.envelope import Keyring, Rejected, Verifier
from esper_rpc.errors import ConfigError, FailedPrecondition
from esper_rpc.identity import Identity, SpiffeId
from esper_rpc.proto.kasmina.v1 import GetStatusResponse, IssuerFence
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SeedOperation
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.sign import command_for, seal

EPOCH = bytes(range(16))


@pytest.fixture
def esper(tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, [*arguments], obj={"ESPER_HOME": str(tmp_path)})

    return invoke


@pytest.fixture
def home(tmp_path):
    place = Home(tmp_path)
    place.prepare()
    return place


def _leaf_commands(command, path=()):
    children = getattr(command, "commands", None)
    if children is None:
        yield path
        return
    for name, child in children.items():
        yield from _leaf_commands(child, (*path, name))


@pytest.mark.parametrize("path", sorted(_leaf_commands(get_command(app))), ids=" ".join)
def test_every_command_shows_an_example_in_its_help(esper, path):
    result = esper(*path, "--help")
    assert result.exit_code == 0
    assert "Example: esper " + " ".join(path) in " ".join(result.output.replace("│", " ").split())


WRITING = [
    ("pki", "issue", "trainer"), ("pki", "token", "trainer", "b", "--address", "127.0.0.1:1"),
    ("pki", "deny", "trainer", "b"), ("pki", "intermediate"), ("keys", "issue", "trainer"), ("keys", "add"),
    ("keys", "rotate", "--settle", "0"),
]  # fmt: skip


def _contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def no_room():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_a_command_on_a_full_disk_fails_in_one_line_and_changes_nothing(esper, home, command):
    before = _contents(home.directory)
    with no_room():
        result = esper(*command)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert str(home.directory) in result.output
    assert "cannot be written (File too large)" in result.output
    assert _contents(home.directory) == before


@pytest.mark.parametrize("command", [("pki", "init"), ("keys", "init")], ids=" ".join)
def test_an_authority_that_a_full_disk_refused_can_be_made_later(esper, tmp_path, command):
    with no_room():
        assert esper(*command).exit_code == 1
    assert not _contents(tmp_path)
    assert esper(*command).exit_code == 0


@pytest.mark.parametrize("command", [("pki", "init"), ("pki", "status"), ("keys", "list")], ids=" ".join)
def test_a_home_of_which_nothing_can_be_made_is_one_line(esper, tmp_path, command):
    result = esper(*command, "--home", str(tmp_path / ("x" * 1000)))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith("esper: ")
    assert "File name too long" in result.output


def test_an_authority_issues_an_identity_that_only_its_owner_can_read(esper, tmp_path):
    assert esper("pki", "init").exit_code == 0
    assert esper("pki", "issue", "trainer", "gpu-3").exit_code == 0
    identity = Identity.load(tmp_path / "identities" / "trainer-gpu-3")
    assert identity.spiffe_id == SpiffeId("trainer", "gpu-3")
    assert stat.S_IMODE((identity.directory / "key.pem").stat().st_mode) == 0o600


def test_a_second_authority_is_refused_and_the_first_one_stays(esper, tmp_path):
    esper("pki", "init")
    before = (tmp_path / "pki" / "root.pem").read_bytes()
    result = esper("pki", "init")
    assert result.exit_code == 1
    assert "holds an authority already" in result.output
    assert (tmp_path / "pki" / "root.pem").read_bytes() == before


def test_pki_status_tells_valid_from_broken_identities(esper, home):
    (home.identity_dir("urza") / "key.pem").chmod(0o644)
    document = json.loads(esper("pki", "status", "--json").stdout)
    problems = {row["identity"]: row["problem"] for row in document["identities"]}
    assert problems["spiffe://esper/tamiyo/local"] == ""
    assert "chmod 600" in problems["urza-local"]


def test_keys_are_listed_by_name_without_their_secrets(esper, home):
    output = esper("keys", "list", "--json").stdout
    document = json.loads(output)
    trainer = next(row for row in document["keyrings"] if row["identity"] == "trainer-local")
    assert trainer["verifies"] == ["operator", "tamiyo", "weatherlight"]
    roots = json.loads(home.root_keys.read_text())["roots"]
    assert not any(secret in output for secret in roots.values())


def test_an_unknown_role_is_a_failure_that_names_it(esper, home):
    result = esper("pki", "issue", "Trainer")
    assert result.exit_code == 1
    assert "spiffe://esper/Trainer/local" in result.output


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--seed", "seed-0", "--operation", "explode"), "germinate"), (("--operation", "cull"), "--seed"),
        ((), "--emergency"), (("--seed", "seed-0", "--emergency", "halt"), "--breaker"),
        (("--emergency", "panic"), "halt"), (("--breaker", "epoch", "--state", "ajar"), "half_open"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(esper, home, options, hint):
    result = esper("sign", "--address", "127.0.0.1:1", *options)
    assert result.exit_code == 2
    assert hint in result.output


def test_an_unreachable_peer_exits_with_3(esper, home):
    home.write_mesh({"urza": "127.0.0.1:1", "tamiyo": "127.0.0.1:1"})
    assert esper("urza", "list").exit_code == 3
    result = esper("status", "--json")
    assert result.exit_code == 3
    assert [row["reachable"] for row in json.loads(result.stdout)["services"]] == [False, False]


def test_without_a_mesh_the_message_says_how_to_start_one(esper, home):
    result = esper("status")
    assert result.exit_code == 1
    assert "esper up" in result.output


def test_the_library_is_seeded_once(esper, home):
    assert "8 of 8" in esper("urza", "seed").output
    assert "0 of 8" in esper("urza", "seed").output


def test_a_home_is_prepared_once_and_an_ending_leaf_is_issued_again(home):
    before = {role: home.identity(role).chain_pem for role in ("urza", "tamiyo")}
    home.issue_identity(SpiffeId("tamiyo", "local"), lifetime=timedelta(hours=1))
    ending = home.identity("tamiyo").chain_pem
    home.prepare()
    assert home.identity("urza").chain_pem == before["urza"]
    assert home.identity("tamiyo").chain_pem not in (before["tamiyo"], ending)


def test_the_option_wins_over_the_environment(tmp_path):
    assert Home.find(tmp_path, {"ESPER_HOME": "/elsewhere"}).directory == tmp_path.resolve()
    assert Home.find(None, {"ESPER_HOME": str(tmp_path)}).directory == tmp_path.resolve()


def test_written_addresses_are_found_by_the_sdk(home):
    from esper_client import find_mesh

    home.write_mesh({"urza": "127.0.0.1:2", "tamiyo": "127.0.0.1:1"})
    found = find_mesh({"ESPER_HOME": str(home.directory)})
    assert (found.tamiyo, found.urza) == ("127.0.0.1:1", "127.0.0.1:2")
    assert found.identity_dir == home.identity_dir("trainer")


def _status(home, fence=4):
    return GetStatusResponse(
        run_id="run-1",
        receiver_epoch=EPOCH,
        audience=str(home.identity("trainer").spiffe_id),
        fences=[IssuerFence(issuer="tamiyo", sequence=900), IssuerFence(issuer="operator", sequence=fence)],
    )


def test_a_command_signed_as_operator_is_accepted_by_the_host_it_is_for(home):
    envelope = seal(home, command_for("seed-0", "cull", ""), _status(home))
    verifier = Verifier(keyring=home.keyring("trainer"), audience=envelope.audience, receiver_epoch=EPOCH)
    accepted = verifier.verify(envelope)
    command = AdaptationCommand.FromString(accepted.payload)
    assert (accepted.issuer, envelope.sequence) == ("operator", 5)
    assert command.seed_operation.operation == SeedOperation.SEED_OPERATION_CULL


def test_a_command_signed_for_one_host_is_refused_by_another(home):
    other = SpiffeId("trainer", "other")
    home.issue_keyring(other)
    envelope = seal(home, command_for("seed-0", "cull", ""), _status(home))
    keyring = Keyring.load(home.identity_dir("trainer", "other") / "keyring.json")
    verifier = Verifier(keyring=keyring, audience=str(other), receiver_epoch=EPOCH)
    with pytest.raises(Rejected, match="wrong_audience"):
        verifier.verify(envelope)


def test_a_host_without_a_run_cannot_be_commanded(home):
    with pytest.raises(FailedPrecondition):
        seal(home, command_for("seed-0", "cull", ""), GetStatusResponse())


def test_the_command_line_loads_neither_torch_nor_numpy_for_help(tmp_path):
    import subprocess
    import sys

    program = "import sys, esper_servers.cli; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == 0


@pytest.mark.parametrize("value", ["7", "[1]", "{ a = 1 }", "true", "1979-05-27"])
def test_an_address_that_is_not_text_is_a_clear_error(home, value):
    from esper_client import find_mesh

    home.mesh_file.write_text(f'[mesh]\ntamiyo = "a:1"\nurza = "a:2"\nidentity = {value}\n')
    with pytest.raises(ConfigError, match="must name tamiyo, urza and identity"):
        find_mesh({"ESPER_HOME": str(home.directory)})
    with pytest.raises(ConfigError, match="must hold text only"):
        home.read_mesh()
