"""A controller without sockets, for tests of what it keeps of its decisions."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib

import numpy as np
import orjson
import pytest
import torch

from esper_rpc.envelope import Keyring
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsResponse, OpenRunRequest, Step
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, Blueprint, BlueprintExtras
from esper_rpc.testing import TemporaryMesh
from esper_servers.policy import sample
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.records.decisions import KIND, DecisionLog
from esper_servers.tamiyo.records.replay import Replay
from esper_servers.tamiyo.run_state import Runs
from esper_servers.urza.seeding import installed_blueprints

OWNER = "spiffe://esper/trainer/local"


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """As a controller has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory) -> Keyring:
    return TemporaryMesh(tmp_path_factory.mktemp("mesh")).keyring("tamiyo")


@pytest.fixture(scope="module")
def policy():
    return Policy.initial()


class Controller:
    """A pipeline with a journal, and a replay beside it."""

    owner = OWNER

    def __init__(self, directory, keyring, policy, runs=None, **settings):
        self.policy = policy
        self.last_command = ""
        self.journal = Journal(directory / "journal.sqlite")
        self.decisions = DecisionLog(self.journal)
        self.pipeline = StepPipeline(
            policy=policy, runs=Runs() if runs is None else runs, blueprints=BlueprintCache(), keyring=keyring,
            decisions=self.decisions, mode=ConservativeMode(), **settings,
        )  # fmt: skip
        self.replay = Replay(self.decisions, lambda: self.policy)
        self.fill_catalogue()
        self.open()

    def fill_catalogue(self, **sheet):
        """Fill it with the installed blueprints; `sheet` goes into the extras of each."""
        blueprints, extras = [], []
        for seed in installed_blueprints():
            document = orjson.dumps(orjson.loads(seed.extras_json or b"{}") | sheet)
            blueprints.append(Blueprint())
            blueprints[-1].CopyFrom(seed.blueprint)
            blueprints[-1].extras_digest = hashlib.sha256(document).digest()
            name = seed.blueprint.descriptor.blueprint_id
            extras.append(BlueprintExtras(blueprint_id=name, extras_json=document))
        self.pipeline._blueprints.replace_with(blueprints, BatchGetExtrasResponse(extras=extras))
        asyncio.run(self.pipeline.renew_graphs())

    def open(self, run_id="run", **fields):
        defaults = {
            "protocol_versions": [2], "receiver_epoch": bytes(16), "features": ["seed", "pause", "optimizer"],
            "sites": sample.sample_sites(), "seeds": sample.sample_seeds(),
            "host_topology": orjson.dumps(sample.sample_topology()),
        }  # fmt: skip
        request = OpenRunRequest(run_id=run_id, **(defaults | fields))
        blueprints = self.pipeline._blueprints
        self.pipeline.runs.open(request, OWNER, blueprints.candidates(request.sites), blueprints.version)

    def step(self, sequence, *, stage=Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, **metrics):
        """Ask one step; returns the identifier of its command, empty for NoAction."""
        return self.ask(sequence, self.packet(stage, **metrics))

    @staticmethod
    def packet(stage, **metrics):
        return SystemStatePacket(training_metrics=metrics, seed_states=sample.sample_states(stage))

    def request(self, sequence, packet):
        """The bytes that ask about a packet, and tell of the command before as a trainer does."""
        told = [CommandOutcome(command_id=self.last_command, result=CommandOutcome.RESULT_QUEUED)]
        outcomes = told if self.last_command else []
        step = Step(run_id="run", sequence=sequence, budget_us=5_000_000, packet=packet, outcomes=outcomes)
        return EvaluateStepRequest(step=step).SerializeToString()

    def ask(self, sequence, packet):
        """Ask one step about a packet, and let what the answer did not wait for be done."""
        command_id = self.answer(sequence, packet)
        self.pipeline.report()
        return command_id

    def send(self, request):
        """Ask a request, and let what the answer did not wait for be done; returns the identifier of the command."""
        command_id = self._answered(request.SerializeToString())
        self.pipeline.report()
        return command_id

    def answer(self, sequence, packet):
        """Ask one step about a packet, up to its answer."""
        return self._answered(self.request(sequence, packet))

    def _answered(self, request):
        raw = asyncio.run(self.pipeline.evaluate_in_band(request, self.owner))
        self.last_command = EvaluateStepsResponse.FromString(raw).decision.command.nonce
        return self.last_command

    def train(self, steps, **arguments):
        """Take steps with a noisy loss; returns the identifiers of the commands."""
        noise = np.random.default_rng(7)
        first = self.pipeline.runs.find("run").last_sequence + 1
        losses = 0.6 + 0.01 * noise.standard_normal(steps)
        rest = {"gradient_norm": 0.9, "samples_per_s": 4000.0, "hook_latency_ms": 1.5}
        found = [self.step(first + i, loss=float(loss), **rest, **arguments) for i, loss in enumerate(losses)]
        return [command_id for command_id in found if command_id]

    def change(self, command_id, edit):
        """Write the record of a decision anew, as a disk or a person might spoil it."""
        record = self.decisions.explain(command_id)
        edit(record)
        self.journal.append(KIND, command_id, record.SerializeToString())


@pytest.fixture
def start(tmp_path, keyring):
    """Start controllers with settings."""
    with contextlib.ExitStack() as stack:

        def begin(policy, directory=tmp_path, **settings):
            made = Controller(directory, keyring, policy, **settings)
            stack.callback(made.journal.close)
            return made

        yield begin


@pytest.fixture
def controller(start, policy):
    return start(policy)
