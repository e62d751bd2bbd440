"""The wire format of docs/wire.md, tried by a client that shares no code with this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "examples" / "node"
VECTORS = ROOT / "tests" / "contract" / "envelope_vectors.json"
NO_REGISTRY = re.compile(r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENOTCACHED|E401|E403|network")
PATIENCE_SECONDS = 120


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    if found is None or not re.match(r"v(2\d|[3-9]\d)\.", run(found, "--version", cwd=ROOT).stdout):
        pytest.skip("Node 20 or newer is not installed.")
    return found


@pytest.fixture(scope="module")
def installed(node, tmp_path_factory):
    """The client with its packages, in a directory outside of the repository."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed.")
    directory = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(SOURCES, directory, ignore=shutil.ignore_patterns("node_modules"))
    result = run(npm, "ci", "--prefer-offline", "--no-audit", "--no-fund", cwd=directory)
    if result.returncode and NO_REGISTRY.search(result.stderr):
        pytest.skip(f"No npm registry can be reached: {result.stderr.splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def home(shared_mesh):
    return shared_mesh.home


@pytest.fixture(scope="module")
def tamiyo(shared_mesh):
    return shared_mesh.addresses["tamiyo"]


def client(node, installed, address, identity):
    arguments = ["--address", address, "--identity", str(identity), "--protos", str(ROOT / "protos")]
    return run(node, "client.mjs", *arguments, cwd=installed)


@pytest.fixture(scope="module")
def report(node, installed, home, tamiyo):
    result = client(node, installed, tamiyo, home.identity_dir("trainer"))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_run_is_opened_and_closed(report):
    assert report["opened"]["protocol_version"] == 1
    assert report["opened"]["features"] == ["pause", "seed"]
    assert report["closed"] == {"closed": True}


@pytest.mark.parametrize(("way", "sequence"), [("unary", 1), ("streamed", 2)])
def test_a_command_of_a_real_tamiyo_is_verified(report, way, sequence):
    answer = report[way]
    assert (answer["sequence"], answer["kind"]) == (sequence, "command")
    assert answer["operation"] == "SEED_OPERATION_START_TRAINING"
    assert answer["total_us"] > 0


def test_a_changed_or_misdirected_command_is_refused_for_its_reason(report):
    assert report["refused"] == {
        "untouched": "accepted", "payload": "invalid_signature", "mac": "invalid_signature",
        "no_mac": "missing_signature", "nonce": "invalid_signature", "issuer": "wrong_issuer",
        "audience": "wrong_audience", "key_id": "unknown_key", "old": "stale_command", "early": "future_command",
        "other_epoch": "wrong_epoch", "other_question": "sequence_replayed",
    }  # fmt: skip


def test_the_greeting_gets_an_empty_decision_and_a_malformed_message_an_error_in_band(report):
    assert report["greeted"] == {"sequence": 0, "kind": None}
    assert report["malformed"] == {"kind": "error", "code": 3}


def test_a_role_that_may_not_ask_is_refused(node, installed, home, tamiyo):
    result = client(node, installed, tamiyo, home.identity_dir("urza"))
    assert result.returncode == 1
    error = json.loads(result.stderr)
    assert error["error"] == "PERMISSION_DENIED"
    assert "spiffe://esper/urza/local may not call" in error["message"]


def test_another_service_cannot_pose_as_tamiyo(node, installed, home, tamiyo):
    result = client(node, installed, home.read_mesh()["urza"], home.identity_dir("trainer"))
    assert result.returncode == 1
    assert json.loads(result.stderr)["error"] == "UNAVAILABLE"


def test_every_golden_vector_holds_in_node(node):
    result = run(node, "vectors.mjs", VECTORS, cwd=SOURCES)
    assert result.returncode == 0, result.stdout
    names = [vector["name"] for vector in json.loads(VECTORS.read_text())]
    assert json.loads(result.stdout) == [{"name": name, "ok": True} for name in names]


def test_a_wrong_vector_is_noticed_in_node(node, tmp_path):
    vectors = json.loads(VECTORS.read_text())
    vectors[0]["mac_hex"] = "00" * 32
    (tmp_path / "vectors.json").write_text(json.dumps(vectors))
    result = run(node, "vectors.mjs", tmp_path / "vectors.json", cwd=SOURCES)
    assert result.returncode == 1
    assert not json.loads(result.stdout)[0]["ok"]


def test_the_lock_file_pins_versions_and_names_no_registry():
    package = json.loads((SOURCES / "package.json").read_text())
    lock = json.loads((SOURCES / "package-lock.json").read_text())
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package["dependencies"].values())
    entries = [entry for path, entry in lock["packages"].items() if path]
    assert all("resolved" not in entry and entry["integrity"].startswith("sha512-") for entry in entries)
