"""The SDK on the oldest dependencies it promises, against servers on the newest: `make floor`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from esper_client import RunDescription, SessionConfig, TrainingSession, UrzaClient
from esper_rpc import errors
from esper_rpc.envelope import Keyring, Verifier
from esper_rpc.identity import Identity
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.urza.v1 import GetBlueprintRequest, ListBlueprintsRequest
from esper_rpc.server import MeshServer, ServerConfig

PEER = Path(__file__).with_name("peer.py")


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mesh")
    python = os.environ.get("PEER_PYTHON", sys.executable)
    with subprocess.Popen(
        [python, str(PEER), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield directory, json.loads(process.stdout.readline())
        process.stdin.close()


class VerifyingHost:
    """Verifies what comes, and has no seeds."""

    receiver_epoch = bytes(range(16))
    last_sequence = 0

    def __init__(self, directory):
        keyring = Keyring.load(directory / "keyring.json")
        self.verifier = Verifier(
            keyring=keyring, audience=str(Identity.load(directory).spiffe_id), receiver_epoch=self.receiver_epoch
        )
        self.accepted = 0

    def describe(self):
        return RunDescription((), (), b"{}")

    def submit(self, envelope, *, expected_sequence=None, request_digest=None):
        self.verifier.verify(envelope, expected_sequence=expected_sequence, expected_digest=request_digest)
        self.accepted += 1
        return CommandOutcome(command_id=envelope.nonce, result=CommandOutcome.RESULT_QUEUED)

    def set_clock_offset(self, offset_ns):
        self.verifier.set_clock_offset(offset_ns)

    def apply_pending(self):
        return []

    def export_seed_states(self):
        return []

    def finalize_step(self, step_index):
        return []

    def observe(self, loss, global_step):
        pass

    def advance_alphas(self):
        pass

    def close(self):
        pass


def test_a_session_gets_and_verifies_commands(peer):
    directory, addresses = peer
    identity_dir = directory / "identities" / "trainer-local"
    host = VerifyingHost(identity_dir)
    with TrainingSession(
        host=host, identity=Identity.load(identity_dir), tamiyo_address=addresses["tamiyo"],
        config=SessionConfig(step_budget_ms=50),
    ) as session:  # fmt: skip
        deadline = time.monotonic() + 30
        while host.accepted < 20:
            assert time.monotonic() < deadline, session.reasons
            session.step(0.5)
            time.sleep(0.001)
    assert "internal_error" not in session.reasons


def test_calls_and_their_errors_come_through(peer):
    directory, addresses = peer

    async def ask():
        identity = Identity.load(directory / "identities" / "operator-local")
        async with UrzaClient(addresses["urza"], identity=identity) as client:
            assert not (await client.list_blueprints(ListBlueprintsRequest())).blueprints
            with pytest.raises(errors.NotFound) as caught:
                await client.get_blueprint(GetBlueprintRequest(blueprint_id="b"))
            assert caught.value.metadata == {"blueprint_id": "b"}
            with pytest.raises(errors.InvalidRequest) as refused:
                await client.get_blueprint(GetBlueprintRequest())
            assert refused.value.violations[0].field == "blueprint_id"

    asyncio.run(ask())


@pytest.mark.skipif(tuple(map(int, grpc.__version__.split(".")[:2])) >= (1, 85), reason="this grpcio can serve")
def test_a_grpc_that_cannot_tell_the_tls_version_refuses_to_serve(peer):
    directory, _ = peer

    async def serve():
        MeshServer(config=ServerConfig(), identity=Identity.load(directory / "identities" / "trainer-local"))

    with pytest.raises(errors.ConfigError, match=r"grpcio 1\.85"):
        asyncio.run(serve())
