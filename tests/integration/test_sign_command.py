"""`esper sign` against a seed host that trains."""

from __future__ import annotations

import json
import subprocess
import threading

import pytest
import torch
from torch import nn

from esper_client.discovery import MeshAddress
from esper_rpc.proto.leyline.v1 import CircuitState, CommandOutcome, EmergencyLevel, SignedEnvelope
from esper_servers.cli.home import Home
from esper_servers.cli.processes import cli_command
from esper_servers.trainer import attach


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    return home


@pytest.fixture
def session(home):
    """A model that trains on a thread of its own, under a Tamiyo that is away."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    address = MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=home.identity_dir("trainer"))
    stop = threading.Event()

    def train(running):
        while not stop.wait(0.002):
            loss = model(torch.ones(2, 4)).sum()
            loss.backward()
            running.step(loss)

    with attach(model, optimizer, environ={"ESPER_HOME": str(home.directory)}, mesh=address) as running:
        thread = threading.Thread(target=train, args=(running,))
        thread.start()
        yield running
        stop.set()
        thread.join()


def sign(home, session, *options):
    command = [*cli_command(), "sign", "--home", str(home.directory), "--address", session.kasmina_address, "--json"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)


def settled(session, document):
    for _ in range(1000):
        found = {o.command_id: o for o in list(session.outcomes)}
        if document["command_id"] in found:
            break
        threading.Event().wait(0.01)
    return found[document["command_id"]]


def test_a_command_signed_by_an_operator_is_verified_and_reaches_the_training_thread(home, session):
    signed = sign(home, session, "--seed", "seed-0", "--operation", "cull", "--apply")
    assert signed.returncode == 0, signed.stderr
    document = json.loads(signed.stdout)
    assert document["result"] == "RESULT_QUEUED"
    # A dormant seed cannot be culled: the command arrived, was carried to the safe point, and was judged there.
    assert settled(session, document).reason == "illegal_transition"


def test_an_emergency_and_the_move_of_a_breaker_reach_what_orchestrates_the_run(home, session):
    assert {"emergency", "circuit_breaker"} <= set(session.features)
    raised = sign(home, session, "--emergency", "elevated", "--apply", "--reason", "data looks wrong")
    assert raised.returncode == 0, raised.stderr
    assert settled(session, json.loads(raised.stdout)).result == CommandOutcome.RESULT_APPLIED
    signal, _ = session.tolaria.emergencies.in_force
    assert (signal.level, signal.reason) == (EmergencyLevel.EMERGENCY_LEVEL_ELEVATED, "data looks wrong")
    moved = sign(home, session, "--breaker", "kernel_loading", "--state", "open", "--apply")
    assert settled(session, json.loads(moved.stdout)).result == CommandOutcome.RESULT_APPLIED
    assert session.host.breakers["kernel_loading"].state == CircuitState.CIRCUIT_STATE_OPEN


def test_an_envelope_that_is_written_down_is_not_applied(home, session, tmp_path):
    signed = sign(home, session, "--seed", "seed-0", "--operation", "cull", "--output", str(tmp_path / "envelope"))
    assert signed.returncode == 0, signed.stderr
    envelope = SignedEnvelope.FromString((tmp_path / "envelope").read_bytes())
    assert envelope.nonce == json.loads(signed.stdout)["command_id"]
    assert all(outcome.command_id != envelope.nonce for outcome in list(session.outcomes))


def test_keys_that_the_host_does_not_trust_are_refused_with_the_reason(home, session, tmp_path):
    stranger = Home(tmp_path / "stranger")
    stranger.prepare()
    own, foreign = home.identity_dir("operator"), stranger.identity_dir("operator")
    (own / "keyring.json").write_bytes((foreign / "keyring.json").read_bytes())
    signed = sign(home, session, "--seed", "seed-0", "--operation", "cull", "--apply")
    assert signed.returncode == 1
    assert json.loads(signed.stdout)["reason"] == "unknown_key"
    assert session.host.verifier.rejections["unknown_key"] == 1
