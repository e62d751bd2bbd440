"""The service of one's own in docs/extend.md: its files are quoted as they stand, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from esper_client.renewal import CertificateRenewer
from esper_rpc.identity import Identity, SpiffeId
from esper_servers.cli.home import Home
from esper_servers.cli.status import HealthClient
from esper_servers.weatherlight.identity_server import IdentityServer, IdentityServerConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_service"
SECTION = (ROOT / "docs" / "extend.md").read_text().partition("## A service of your own\n")[2]
BIN = Path(sys.executable).parent


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


def commands(block):
    return [line[2:].partition("  #")[0].strip() for line in block.splitlines() if line.startswith("$ ")]


ISSUE, SERVE, CALL = commands(blocks("console")[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    home.write_mesh({"tamiyo": "127.0.0.1:1", "urza": "127.0.0.1:1"})
    return home


@pytest.fixture(scope="module")
def shell(home):
    environ = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "ESPER_HOME": str(home.directory)}
    return {"args": ["bash", "-euc"], "env": environ, "cwd": ROOT, "text": True}


def run(shell, command):
    settings = {**shell, "args": [*shell["args"], command]}
    return subprocess.run(**settings, capture_output=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def address(shell):
    issued = run(shell, ISSUE)
    assert issued.returncode == 0, issued.stderr
    settings = {**shell, "args": [*shell["args"], f"exec {SERVE}"]}
    with subprocess.Popen(**settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process.stdout.readline().strip()
        process.terminate()


def test_the_commands_of_the_page_count(shell, address):
    totals = [run(shell, CALL.replace("127.0.0.1:PORT", address)) for _ in range(2)]
    assert [answer.stdout for answer in totals] == ["2\n", "4\n"], totals[0].stderr


def test_a_role_without_a_row_is_refused(shell, address):
    refused = run(shell, CALL.replace("127.0.0.1:PORT", address).replace("trainer-local", "urza-local"))
    assert "spiffe://esper/urza/local may not call /example.counter.v1.CounterService/Add" in refused.stderr


def test_the_field_rules_of_the_example_hold(shell, address):
    refused = run(shell, CALL.replace("127.0.0.1:PORT", address).replace("seeds 2", "seeds 2000"))
    assert "InvalidRequest: amount: " in refused.stderr


async def test_a_role_of_ones_own_tells_how_it_is_and_is_told(home, address):
    identity = home.identity("counter")
    async with HealthClient(address, identity=identity, role="counter") as client:
        assert await client.check("example.counter.v1.CounterService") == "SERVING"


@pytest.mark.parametrize("code", [*blocks("python"), *blocks("proto")], ids=lambda code: code.split("(")[0].strip())
def test_the_page_quotes_the_example(code):
    sources = [file.read_text() for file in EXAMPLE.iterdir() if file.suffix in (".py", ".proto")]
    assert any(code in source for source in sources)


def test_the_generated_code_of_the_example_is_what_its_proto_gives(tmp_path):
    for source in (*(ROOT / "protos").glob("esper/leyline/v1/rules.proto"), EXAMPLE / "counter.proto"):
        base = ROOT / "protos" if "protos" in source.parts else EXAMPLE
        target = tmp_path / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    command = [BIN / "buf", "build", "--exclude-source-info", "-o", "-"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=True).stdout
    proto = next(file for file in FileDescriptorSet.FromString(built).file if file.name == "counter.proto")
    assert _messages_and_services(proto) == _messages_and_services(_checked_in())


def _checked_in():
    script = "import sys, counter_pb2; sys.stdout.buffer.write(counter_pb2.DESCRIPTOR.serialized_pb)"
    raw = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLE, capture_output=True, check=True).stdout
    return FileDescriptorProto.FromString(raw)


def _messages_and_services(file):
    kept = FileDescriptorProto(package=file.package, message_type=file.message_type, service=file.service)
    for message in kept.message_type:
        for field in message.field:
            field.ClearField("json_name")  # protoc leaves it out where it follows from the name.
    return kept


@pytest.fixture
async def authority(mesh):
    mesh.identity("weatherlight")
    config = IdentityServerConfig(
        identity_dir=mesh.identity_dir("weatherlight"), pki_dir=mesh.directory / "pki", tokens_dir=mesh.directory / "t"
    )
    server = IdentityServer(config)
    await server.start()
    yield server
    await server.drain()


async def test_a_role_of_ones_own_renews_its_certificate(mesh, authority):
    identity = mesh.identity("counter")
    renewer = CertificateRenewer(
        identity, address=authority.members.address, clock=lambda: identity.not_after  # Long due.
    )  # fmt: skip
    await renewer.check()
    renewed = Identity.load(identity.directory)
    assert renewed.spiffe_id == SpiffeId("counter", "local")
    assert renewed.key_pem != identity.key_pem
