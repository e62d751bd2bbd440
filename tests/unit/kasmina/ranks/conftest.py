"""Ranks of one training as threads of this process: they meet where those of gloo would, and may be lost."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esper_client.follower_session import FollowerSession
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.ranks.following_host import FollowingSeedHost
from esper_servers.kasmina.ranks.leading_host import LeadingSeedHost
from esper_servers.kasmina.ranks.ranks import together
from esper_servers.optim.controller import LearningRateConfig, UnifiedLRController
from esper_servers.tolaria.checkpoints.assembly import keep_checkpoints
from esper_servers.tolaria.checkpoints.schedule import CheckpointConfig
from esper_servers.tolaria.rollback.rollback import RollbackConfig
from esper_servers.tolaria.state.snapshot_cache import CacheConfig
from esper_servers.trainer import wrap_sites
from esper_servers.trainer.checkpoints import follow_checkpoints, others_of

PATIENCE_SECONDS = 60.0
# No clock decides anything here.
UNHURRIED = RollbackConfig(
    prepare_ms=60_000, commit_ms=60_000, confirm_ms=60_000, full_prepare_ms=60_000, full_commit_ms=60_000,
    full_seconds=600,
)  # fmt: skip


class Room:
    """Where they meet."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self.given = [None] * size


class Pending:
    """What `begin_total` returns."""

    def __init__(self, future):
        self._future = future

    @property
    def is_done(self):
        return self._future.done()

    def wait(self):
        self._future.result()


class ThreadRanks:
    """A rank as `Ranks` is, but a thread."""

    def __init__(self, room, rank):
        self._room, self.rank, self.size, self.is_first = room, rank, room.size, rank == 0
        self._beside = ThreadPoolExecutor(1)

    def _meet(self, value):
        with together():
            self._room.given[self.rank] = value
            self._room.barrier.wait()
            found = list(self._room.given)
            self._room.barrier.wait()
        return found

    def total(self, values):
        return [sum(each) for each in zip(*self._meet(list(values)), strict=True)]

    def begin_total(self, values):
        return Pending(self._beside.submit(self.total, values))

    def each(self, value):
        return self._meet(value)

    def collect(self, content):
        return self._meet(content)

    def share(self, content=b""):
        return self._meet(content)[0]

    def hand_out(self, tensor):
        first = self._meet(tensor)[0]
        tensor.copy_(first)
        self._meet(None)

    def average(self, flat):
        return sum(self._meet(flat.clone())) / self.size

    def leave(self):
        """End as a killed process does: the others find that out when they meet."""
        self._room.barrier.abort()


class Counting:
    """The session of the first rank, as far as its checkpoints need it."""

    is_connected = True

    def __init__(self, host):
        self.host, self.epoch, self.global_step = host, 0, 0

    def open_again(self):
        pass

    def state_dict(self):
        return {"epoch": self.epoch, "global_step": self.global_step, "host": self.host.state_dict()}

    def load_state_dict(self, state):
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        self.host.load_state_dict(state["host"])


class First:
    """The first rank."""

    def __init__(self, ranks, make_rig, directory=None, **rig):
        self.ranks = ranks
        self.rig = make_rig(make_host=partial(LeadingSeedHost, ranks=ranks), **rig)
        self.model, self.optimizer, self.host = self.rig.model, self.rig.optimizer, self.rig.host
        self.session = Counting(self.host)
        self.authority = self.rig.authority
        self.checkpoints = keep_checkpoints(
            self.model, self.optimizer, session=self.session, host=self.host, rollback=UNHURRIED,
            directory=directory, config=CheckpointConfig(directory=str(directory or "")),
            others=partial(others_of, self.host, self.session),
        )  # fmt: skip
        self.host.between_steps(self.checkpoints.step_end.reach)
        self.host.before_parting = self.checkpoints.settle
        self.x = self.rig.x

    def between_steps(self, work):
        """Have work done at the end of the next step."""
        return self.checkpoints.step_end.submit(work)

    def keep(self):
        self.between_steps(lambda: self.checkpoints.snapshot(epoch=self.session.epoch, step=self.session.global_step))

    def roll_back(self, **options):
        options = {"latest_step": 10**6, "reason": "test", **options}
        return self.between_steps(lambda: self.checkpoints.roll_back(**options))

    def end_step(self, loss):
        self.session.global_step += 1
        self.host.observe(loss, self.session.global_step)
        self.outcomes = self.host.apply_pending()
        self.host.advance_alphas()
        self.host.finalize_step(self.session.global_step)


class Other:
    """Every other one."""

    def __init__(self, ranks, model, factories=None, authority=OptimizerAuthority):
        self.ranks, self.model = ranks, model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.sites = wrap_sites(model, ["0", "2"])
        self.authority = authority(self.optimizer)
        self.host = FollowingSeedHost(
            model=model, sites=self.sites, factories=load_factories() if factories is None else factories,
            learning_rate=self.authority, ranks=ranks,
        )  # fmt: skip
        self.session = FollowerSession(self.host, "run")
        follow_checkpoints(model, self.optimizer, self.session, self.host, CacheConfig())
        self.checkpoints = self.session.checkpoints
        self.x = torch.randn(16, 6, generator=torch.Generator().manual_seed(ranks.rank + 1))
        self.model(self.x)

    def end_step(self, loss):
        self.session.step(loss)


class Crew:
    """All ranks of a training."""

    def __init__(self, make_rig, model, size=2, other=None, **first):
        room = Room(size)
        self.first = First(ThreadRanks(room, 0), make_rig, **first)
        self.others = [Other(ThreadRanks(room, rank), model(), **(other or {})) for rank in range(1, size)]
        self.ranks = [self.first, *self.others]
        for rank in self.ranks:
            for site in rank.host._sites.values():
                site.keeps_graph = True

    @property
    def other(self):
        return self.others[0]

    @property
    def slots(self):
        return [rank.host.seeds["seed-2"] for rank in self.ranks]

    def all_do(self, work):
        """Have every rank do something at once; returns what each returned or raised."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(work, rank) for rank in self.ranks]
            return [future.exception() or future.result() for future in futures]

    def step(self):
        """Train one step on all ranks; returns what each raised."""
        return [found for found in self.all_do(self._step) if found is not None]

    def train(self, steps=1):
        for _ in range(steps):
            assert not self.step()

    def _step(self, rank):
        rank.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(rank.model(rank.x), self.first.rig.y)
        loss.backward()
        for parameter in rank.optimizer.param_groups[0]["params"]:  # As DistributedDataParallel does.
            if parameter.grad is not None:
                parameter.grad = rank.ranks.average(parameter.grad)
        rank.optimizer.step()
        rank.end_step(loss.item())

    def order(self, command):
        """Give a command to the first rank, and train the step in which it is carried out; returns the outcome."""
        first = self.first
        # Seeds are drawn from it: the same ones in every run of a test.
        command.command_id = str(uuid.UUID(int=first.rig.sequence + 1))
        queued = first.host.submit(first.rig.envelope(command))
        assert queued.result == CommandOutcome.RESULT_QUEUED, queued
        self.train()
        return next(each for each in first.outcomes if each.command_id == command.command_id)

    def do(self, operation, **options):
        return self.order(self.first.rig.command(operation, **options))

    def grow(self, *operations):
        for operation in operations:
            blueprint = "residual_mlp" if operation == "GERMINATE" else ""
            outcome = self.do(operation, blueprint=blueprint)
            assert outcome.result == CommandOutcome.RESULT_APPLIED, outcome
            self.train(22 if operation == "START_GRAFTING" else 3)

    def pictures(self):
        """What each rank has, but for random numbers: as text, for what is not a number is not equal to itself."""
        return [repr(_flat(self._parts(rank))) for rank in self.ranks]

    def assert_alike(self):
        first, *others = self.pictures()
        assert all(first == other for other in others)
        return first

    @staticmethod
    def _parts(rank):
        return [rank.model.state_dict(), rank.optimizer.state_dict(), rank.session.state_dict()]


def controlled(schedule):
    """Return what makes the controller of a rank."""

    def make(optimizer):
        controller = UnifiedLRController(
            optimizer, schedule=schedule, config=LearningRateConfig(warm_up_epochs=4, warm_up_factor=0.5)
        )
        controller.serve_ranks()
        return controller

    return make


def _flat(state):
    if isinstance(state, dict):
        return [leaf for key in state for leaf in _flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in _flat(each)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


@pytest.fixture
def make_crew(make_rig, make_plain_model):
    return partial(Crew, make_rig, make_plain_model)


@pytest.fixture
def make_controlled(make_crew):
    """A function of a schedule; another one may be for the others."""

    def make(schedule, of_others=None, **options):
        other = {"authority": controlled(schedule if of_others is None else of_others)}
        return make_crew(make_authority=controlled(schedule), other=other, **options)

    return make


@pytest.fixture
def crew(make_crew):
    return make_crew()


@pytest.fixture
def rooms():
    """A function that returns ranks alone."""

    def make(size):
        room = Room(size)
        return [SimpleNamespace(ranks=ThreadRanks(room, rank)) for rank in range(size)]

    return make
