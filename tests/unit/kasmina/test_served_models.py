"""What the host of a model that a loop in another process drives carries out beside what is for its seeds."""

from __future__ import annotations

import time
import uuid

import pytest
import torch
from torch import nn

from esper_client import MeshAddress
from esper_rpc.envelope import sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CircuitState, CommandOutcome, CommandType
from esper_rpc.testing import TemporaryMesh
from esper_servers.trainer import serve

OPEN = CircuitState.CIRCUIT_STATE_OPEN


@pytest.fixture
def order(tmp_path):
    mesh, model = TemporaryMesh(tmp_path), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mesh.identity("trainer")
    mesh.keyring("trainer")
    address = MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=mesh.identity_dir("trainer"))
    sequence = iter(range(1, 100))
    with serve(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=address, sites=["0"]) as served:

        def order(kind, **fields):
            command = AdaptationCommand(version=1, command_id=str(uuid.uuid4()), command_type=kind, **fields)
            queued = served.host.submit(
                sign(
                    command.SerializeToString(), payload_type=COMMAND_TYPE, keyring=mesh.keyring("operator"),
                    audience=served.host.verifier.audience, issued_at_ns=time.time_ns(), nonce=command.command_id,
                    receiver_epoch=served.host.receiver_epoch, sequence=next(sequence),
                )
            )  # fmt: skip
            return next(iter(served.host.apply_pending()), queued)

        order.host = served.host
        yield order


def test_an_operator_opens_and_closes_its_breakers(order):
    move = {"desired_state": OPEN, "rationale": "kernels look wrong"}
    moved = order(
        CommandType.COMMAND_TYPE_CIRCUIT_BREAKER, circuit_breaker=move, annotations={"breaker": "kernel_loading"}
    )
    assert (moved.result, order.host.breakers["kernel_loading"].state) == (CommandOutcome.RESULT_APPLIED, OPEN)


def test_the_breakers_of_the_trainer_are_not_there_and_an_emergency_is_not_for_it(order):
    missing = order(CommandType.COMMAND_TYPE_CIRCUIT_BREAKER, circuit_breaker={"desired_state": OPEN})
    assert (missing.result, missing.reason) == (CommandOutcome.RESULT_FAILED, "unknown_breaker")
    refused = order(CommandType.COMMAND_TYPE_EMERGENCY, annotations={"emergency_level": "NOTICE"})
    assert (refused.result, refused.reason) == (CommandOutcome.RESULT_REJECTED, "unsupported")
