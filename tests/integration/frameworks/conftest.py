from __future__ import annotations

import time
import uuid

import pytest
import torch

import esper_client
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SeedOperation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import fake_mesh
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.kernels.library import Kernel


class Orders:
    """Commands for one seed at fixed steps, so that what happens depends on no clock."""

    def __init__(self, mesh, orders):
        self.mesh = mesh
        self.orders = dict(orders)
        self.sequence = 0

    def give(self, session, step):
        """Have what is due at a step signed and queued; the next session.step carries it out."""
        operation = self.orders.get(step)
        if operation is None:
            return
        host = session.host
        if operation == "GERMINATE":
            factory = load_factories()["residual_mlp"]
            kernel = Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest()))
            host._library.add(kernel)
        command = AdaptationCommand(
            version=1, command_id=str(uuid.UUID(int=step)), target_seed_id=next(iter(host.seeds)),
            command_type=CommandType.COMMAND_TYPE_SEED,
        )  # fmt: skip
        command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{operation}")
        command.seed_operation.blueprint_id = "residual_mlp" if operation == "GERMINATE" else ""
        # Far above what the steps of a test count to: the fence of an issuer only rises.
        self.sequence += 1
        sequence = 10_000 + self.sequence
        host.submit(
            self.mesh.tamiyo.sign(command, host.verifier.audience, sequence, host.receiver_epoch, b"", session.run_id)
        )
        # Its module is built beside the training; so that no clock says in which step it is planted.
        slot = next(iter(host.seeds.values()))
        while operation == "GERMINATE" and not _is_built(host._surgeon._nursery, slot, command):
            time.sleep(0.001)


def _is_built(nursery, slot, command):
    kernel = nursery.kernel_for(command)
    return kernel is not None and nursery.module_for(slot, command, kernel) is not None


@pytest.fixture
def fake(tmp_path):
    with fake_mesh(tmp_path / "fake") as running:
        yield running


@pytest.fixture
def make_orders(fake):
    return lambda orders: Orders(fake, orders)


@pytest.fixture
def address(fake):
    return esper_client.find_mesh(fake.environ)


@pytest.fixture(scope="session")
def real_address(shared_mesh):
    """Of a mesh of processes."""
    return esper_client.find_mesh({"ESPER_HOME": str(shared_mesh.home.directory)})


def _differences(left, right, path):
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        return [each for key in left for each in _differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        return [
            each for i, pair in enumerate(zip(left, right, strict=True)) for each in _differences(*pair, f"{path}.{i}")
        ]
    return [] if left == right or (left != left and right != right) else [path]


@pytest.fixture
def differences():
    return lambda left, right: _differences(left, right, "")
