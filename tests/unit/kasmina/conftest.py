from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from esper_rpc.envelope import Keyring, RootKeys, sign
from esper_rpc.envelope.trust import keyring_for
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import NotFound
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import FakeClock
from esper_servers.blueprints.catalogue import BlueprintFactory, ModuleFactory, load_factories
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.host_config import SeedHostConfig
from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import LearningRateAuthority, OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.trainer import wrap_sites

TRAINER = SpiffeId("trainer", "test")
ROOTS = RootKeys(active_key_id="k1", roots={"k1": bytes(range(32))})
FACTORIES = load_factories()


def make_model():
    torch.manual_seed(0)
    # In-place activations are what a view as a site's output would break.
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)
    )


def make_batch():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))


def run_now(work):
    """Carry out a fetch at once, as if it had come back already."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("the fetch of a test must not wait")


def kernel_of(name, weights=None, **manifest):
    blueprint = Blueprint(descriptor=FACTORIES[name].descriptor(), manifest=FACTORIES[name].manifest())
    for key, value in manifest.items():
        setattr(blueprint.manifest, key, value)
    return Kernel(blueprint, weights)


@dataclass
class Rig:
    """A small model, its optimizer and its seed host, with a Tamiyo that signs what a test asks for."""

    limits: LocalLimits = field(default_factory=LocalLimits)
    kernels: dict[str, Kernel] = field(default_factory=lambda: {name: kernel_of(name) for name in FACTORIES})
    model: nn.Module = field(default_factory=make_model)
    clock: FakeClock = field(default_factory=FakeClock)
    make_authority: Callable[[torch.optim.Optimizer], LearningRateAuthority] = OptimizerAuthority
    factories: dict[str, BlueprintFactory] = field(default_factory=lambda: dict(FACTORIES))
    options: dict[str, object] = field(default_factory=dict)
    """Parts of the host's configuration, and further arguments of the host."""
    site_names: tuple[str, str] = ("0", "2")
    batch: tuple[torch.Tensor, torch.Tensor] = field(default_factory=make_batch)
    make_host: Callable[..., InProcessSeedHost] = InProcessSeedHost

    def __post_init__(self):
        self.plain = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.sites = wrap_sites(self.model, self.site_names)
        self.authority = self.make_authority(self.optimizer)
        self.library = KernelLibrary(self._fetch, run_now)
        parts = {name: self.options[name] for name in ("gates", "pause", "memory") if name in self.options}
        further = {name: value for name, value in self.options.items() if name not in parts}
        self.host = self.make_host(
            model=self.model, sites=self.sites, keyring=keyring_for(ROOTS, TRAINER), audience=str(TRAINER),
            library=self.library, factories=self.factories, learning_rate=self.authority,
            config=SeedHostConfig(limits=self.limits, **parts), clock=self.clock, **further,
        )  # fmt: skip
        self.seed_ids = list(self.host.seeds)
        self.seed_id = self.seed_ids[1]
        self.slot = self.host.seeds[self.seed_id]
        self.tamiyo = self.keyring("tamiyo")
        self.sequence = 0
        self.step_index = 0
        self.x, self.y = self.batch
        self.run = self.model
        """What the loop calls: the model, or what was made of it."""
        self.model(self.x)

    async def _fetch(self, blueprint_id):
        if blueprint_id not in self.kernels:
            raise NotFound(f"There is no blueprint {blueprint_id!r}.")
        return self.kernels[blueprint_id]

    @staticmethod
    def keyring(role) -> Keyring:
        return Keyring.for_identity(ROOTS, SpiffeId(role, "test"), issuers=())

    def command(self, operation="", *, blueprint="", seed_id=None, **parameters):
        command = AdaptationCommand(
            version=1, command_id=str(uuid.uuid4()), target_seed_id=self.seed_id if seed_id is None else seed_id,
            command_type=CommandType.COMMAND_TYPE_SEED,
        )  # fmt: skip
        if operation:
            command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{operation}")
            command.seed_operation.blueprint_id = blueprint
            command.seed_operation.parameters.update(parameters)
        return command

    def pause(self, seed_id="", *, units=1000):
        command = self.command(seed_id=seed_id)
        command.command_type, command.execution_deadline_ms = CommandType.COMMAND_TYPE_PAUSE, units
        return command

    def install(self, name, module):
        """Install a blueprint that makes its modules by calling `module` with the feature shape."""
        factory = ModuleFactory(name=name, description=name, module=module, shape=("*", "F"), example=(8,))
        self.factories[name] = factory
        self.kernels[name] = Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest()))
        return name

    def events(self):
        """Return the events of the next global packet by name, each with its attributes."""
        self.step_index += 1
        packet = self.host.finalize_step(self.step_index)[-1]
        return [(event.description, dict(event.attributes)) for event in packet.events]

    def told(self, name):
        """Return the attributes of the events of a name in the next global packet."""
        return [attributes for event, attributes in self.events() if event == name]

    def optimizer_command(self, multiplier):
        command = self.command(seed_id="")
        command.command_type = CommandType.COMMAND_TYPE_OPTIMIZER
        command.optimizer_adjustment.hyperparameters["learning_rate_multiplier"] = multiplier
        return command

    def envelope(self, command, **changes):
        self.sequence += 1
        values = {
            "payload_type": COMMAND_TYPE, "keyring": self.tamiyo, "audience": str(TRAINER),
            "issued_at_ns": time.time_ns(), "nonce": command.command_id,
            "receiver_epoch": self.host.receiver_epoch, "sequence": self.sequence,
        }  # fmt: skip
        payload = changes.pop("payload", command.SerializeToString())
        return sign(payload, **{**values, **changes})

    def order(self, command) -> CommandOutcome:
        """Submit a command, reach the safe point, and return what became of it."""
        queued = self.host.submit(self.envelope(command))
        if queued.result != CommandOutcome.RESULT_QUEUED:
            return queued
        settled = {outcome.command_id: outcome for outcome in self.host.apply_pending()}
        return settled[command.command_id]

    def do(self, operation, **options) -> CommandOutcome:
        return self.order(self.command(operation, **options))

    def train(self, steps=1):
        """Train so many steps of fifty milliseconds; the host is served after each, as a session does it."""
        for _ in range(steps):
            self.clock.advance(0.05)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.run(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            self.step_index += 1
            self.host.observe(loss.item(), self.step_index)
            self.host.apply_pending()
            self.host.advance_alphas()
            self.host.finalize_step(self.step_index)

    def grow(self, stage, blueprint="residual_mlp"):
        """Bring the seed to a stage, as legally as a mesh would."""
        path = [
            (lifecycle.GERMINATED, "GERMINATE", 1), (lifecycle.TRAINING, "START_TRAINING", 2),
            (lifecycle.BLENDING, "START_GRAFTING", 21), (lifecycle.SHADOWING, "STABILIZE", 2),
            (lifecycle.PROBATIONARY, "EVALUATE", 2), (lifecycle.FOSSILIZED, "FOSSILIZE", 1),
        ]  # fmt: skip
        for after, operation, steps in path:
            outcome = self.do(operation, blueprint=blueprint if operation == "GERMINATE" else "")
            assert outcome.result == CommandOutcome.RESULT_APPLIED, outcome
            if after == stage:
                return
            self.train(steps)

    def picture(self):
        """All that a refused command must leave as it was."""
        return (
            [(slot.stage, slot.blueprint_id, slot.site.paused) for slot in self.host.seeds.values()],
            {key: value.clone() for key, value in self.model.state_dict().items()},
            [group["lr"] for group in self.optimizer.param_groups],
            self.host.queued_commands,
        )


@pytest.fixture
def rig():
    return Rig()


@pytest.fixture
def make_rig():
    return Rig


@pytest.fixture
def make_kernel():
    return kernel_of


def assert_same_picture(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
    assert before[2:] == after[2:]


@pytest.fixture
def unchanged():
    return assert_same_picture


@pytest.fixture
def make_plain_model():
    return make_model
