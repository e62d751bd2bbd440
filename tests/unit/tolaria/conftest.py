from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from esper_client.halt import HaltSwitch
from esper_rpc.envelope import RootKeys
from esper_rpc.envelope.emergency import seal
from esper_rpc.envelope.trust import keyring_for
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import EmergencySignal
from esper_rpc.telemetry.events import listen
from esper_rpc.testing import FakeClock
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.emergency.emergencies import Emergencies
from esper_servers.tolaria.emergency.escalation import EmergencyConfig
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore
from esper_servers.tolaria.state.snapshot_cache import SnapshotCache
from esper_servers.tolaria.state.training_state import TrainingState

TRAINER = SpiffeId("trainer", "test")
ROOTS = RootKeys(active_key_id="k1", roots={"k1": bytes(range(32))})
RUN = "run-1"
NOW_NS = 1_800_000_000 * 10**9


def keyring_of(role, instance="test"):
    return keyring_for(ROOTS, SpiffeId(role, instance))


@dataclass
class Ward:
    """The emergencies of one run, its clocks, and those who signal."""

    config: EmergencyConfig = field(default_factory=EmergencyConfig)
    shared: object = None
    problem: str = ""

    def __post_init__(self):
        self.clock = FakeClock()
        self.wall_ns = NOW_NS
        self.halt, self.mode = HaltSwitch(), ConservativeMode()
        self.announced = []
        self.emergencies = Emergencies(
            run_id=RUN, keyring=keyring_of("trainer"), audience=str(TRAINER), halt=self.halt, mode=self.mode,
            config=self.config, shared=self.shared, problem=self.problem, now_ns=lambda: self.wall_ns,
            clock=self.clock,
        )  # fmt: skip
        self.emergencies.listen(self.announced.append)

    def sealed(self, level, *, role="operator", lowers=False, audience=str(TRAINER), **changes):
        signal = EmergencySignal(version=1, level=level, reason="test", origin=role)
        if lowers:
            signal.attributes["lowers"] = "true"
        for name in ("version", "run_id"):
            if f"signal_{name}" in changes:
                setattr(signal, name, changes.pop(f"signal_{name}"))
        options = {"run_id": RUN, "issued_at_ns": self.wall_ns} | changes
        return seal(signal, keyring=keyring_of(role), audience=audience, **options)

    def signal(self, level, *, peer="spiffe://esper/operator/test", **options):
        return self.emergencies.receive(self.sealed(level, **options), peer=peer)


@pytest.fixture
def ward():
    return Ward()


@pytest.fixture
def make_ward():
    return Ward


@pytest.fixture
def told():
    """The events that are told, as pairs of name and attributes."""
    found = []
    stop = listen(lambda packet: found.extend((e.description, dict(e.attributes)) for e in packet.events))
    yield found
    stop()


@pytest.fixture
def keyring():
    return keyring_of


class Training:
    """A small training whose every source of state is registered."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.state = TrainingState(self.model, self.optimizer)
        self.state.register("scheduler", self.scheduler)

    def train(self, steps=3):
        for _ in range(steps):
            self.optimizer.zero_grad()
            # Data and dropout come from the generator of torch, so that it counts too.
            self.model(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def picture(self):
        return repr(flat(self.state.capture()))


def flat(state):
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in flat(each)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


@pytest.fixture
def training():
    return Training()


@pytest.fixture
def make_training():
    return Training


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def cache():
    return SnapshotCache()


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")
