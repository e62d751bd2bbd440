"""The scenarios of a distributed training; what a rank ends with goes into DIRECTORY/rank-N.pt."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import time
import uuid
from concurrent.futures import Future

import esper_client  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation
from esper_rpc.proto.tolaria.v1 import RollbackTier
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import fake_mesh
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.cli.bench import ddp
from esper_servers.cli.home import Home
from esper_servers.kasmina.kernels.library import Kernel
from esper_servers.kasmina.ranks import lockstep
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.optim.schedules import Cosine
from esper_servers.tolaria.emergency.levels import HALT, NOTICE
from esper_servers.trainer import orchestrate

PATIENCE_SECONDS = 60.0
LIFE = {
    2: "GERMINATE", 4: "START_TRAINING", 8: "START_GRAFTING", 12: "PAUSE", 14: "OPTIMIZER", 40: "STABILIZE",
    42: "EVALUATE", 44: "FOSSILIZE",
}  # fmt: skip


class Training:
    """A classifier under DistributedDataParallel; every rank draws images of its own."""

    def __init__(self, rank, address, schedule=None, run_id="ranks", **options):
        torch.manual_seed(0)
        self.rank = rank
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        if schedule is not None:
            options["learning_rate"] = UnifiedLRController(self.optimizer, schedule=schedule)
        self.session = esper_client.attach(
            self.model, self.optimizer, mesh=address, run_id=run_id, sites=["0", "3"], **options
        )
        self.session_step = self.session.step
        self.wrapped = DistributedDataParallel(self.model)
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.outcomes = []
        self.steps_done = 0

    def step(self):
        x = torch.randn(8, 1, 4, 4, generator=self.generator)
        loss = nn.functional.cross_entropy(self.wrapped(x), (x.sum((1, 2, 3)).sign() + 1).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.outcomes += self.session_step(loss)
        self.steps_done += 1

    def save(self, directory, **more):
        torch.save(
            {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "session": self.session.state_dict(), "generator": self.generator.get_state(),
                "results": [o.result for o in self.outcomes], "reasons": [o.reason for o in self.outcomes], **more,
            },
            directory / f"rank-{self.rank}.pt",
        )  # fmt: skip

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.session.load_state_dict(saved["session"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])


class Numbers:
    """The generator of a rank's data, as a part of its checkpoints."""

    def __init__(self, generator):
        self.generator = generator

    def state_dict(self):
        return {"numbers": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["numbers"])


class Orders:
    """Commands at fixed steps, given to the first rank as an operator gives them; no clock decides anything."""

    def __init__(self, training, mesh, orders, seed=0):
        self.training, self.mesh, self.orders = training, mesh, orders
        self.seed_id = list(training.session.host.seeds)[seed]
        self.sequence = 10_000
        if mesh is not None:
            for factory in load_factories().values():
                kernel = Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest()))
                training.session.host._library.add(kernel)

    def run(self, steps, blueprint="residual_mlp"):
        for _ in range(steps):
            name = self.orders.get(self.training.steps_done)
            if name and self.mesh is not None:
                self.give(name, blueprint)
            self.training.step()

    def give(self, name, blueprint, pause_ms=1):
        command = AdaptationCommand(version=1, command_id=str(uuid.UUID(int=self.sequence)))
        if name == "ROLLBACK":
            command.command_type = CommandType.COMMAND_TYPE_ROLLBACK
            command.rollback_payload.update({"reason": "test"})
        elif name == "OPTIMIZER":
            command.command_type = CommandType.COMMAND_TYPE_OPTIMIZER
            command.optimizer_adjustment.hyperparameters["learning_rate_multiplier"] = 0.7
        elif name == "PAUSE":
            command.command_type = CommandType.COMMAND_TYPE_PAUSE
            command.execution_deadline_ms = pause_ms
        else:
            command.command_type, command.target_seed_id = CommandType.COMMAND_TYPE_SEED, self.seed_id
            command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{name}")
            command.seed_operation.blueprint_id = blueprint if name == "GERMINATE" else ""
        host, tamiyo = self.training.session.host, self.mesh.tamiyo
        self.sequence += 1
        queued = host.submit(
            tamiyo.sign(command, host.verifier.audience, self.sequence, host.receiver_epoch, b"", "ranks")
        )
        assert queued.result == CommandOutcome.RESULT_QUEUED, queued
        # Its module is built beside the training; so that no clock says in which step it is planted.
        while name == "GERMINATE" and not is_built(host, host.seeds[self.seed_id], command):
            time.sleep(0.001)


def is_built(host, slot, command):
    nursery = host._surgeon._nursery
    return nursery.module_for(slot, command, nursery.kernel_for(command)) is not None


@contextlib.contextmanager
def mesh_of(rank, directory):
    """A mesh that says nothing, for the first rank: the others have none, nor an identity."""
    if rank:
        yield None, None
        return
    with fake_mesh(directory / "fake") as fake:
        yield fake, esper_client.find_mesh(fake.environ)


def stages(training):
    return [slot.stage for slot in training.session.host.seeds.values()]


def life(rank, directory, seed=1, schedule=None):
    """A seed is born, trains, blends and is kept."""
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address, schedule)
        Orders(training, fake, LIFE, seed).run(60)
        plain = training.session.export()
        training.save(directory, stages=stages(training), exported=plain(torch.ones(2, 1, 4, 4)))
        training.session.close()


def convolution(rank, directory):
    """The same for a seed at a convolution, whose host is the first layer."""
    life(rank, directory, seed=0)


def controlled(rank, directory):
    """The same where a controller sets the rates."""
    life(rank, directory, schedule=Cosine(total_steps=100))


def operator(rank, directory):
    """Somebody moves an alpha by hand, and somebody ends a step, by the first rank's KasminaService."""
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address)
        orders = Orders(training, fake, LIFE, 1)
        orders.run(20)
        host, said = training.session.host, ""
        if rank == 0:
            moved = host.at_safe_point(lambda: host.advance_alpha("seed-3"))
            ended = host.at_safe_point(host.apply_pending)
        training.step()
        if rank == 0:
            assert moved.result() > 0
            error = ended.exception()
            said = f"{type(error).__name__}: {error}"
            # A clock that stands still, so that the pause outlasts its step on any machine.
            host._pauses._clock = lambda: 0.0
            orders.give("PAUSE", "", pause_ms=600)
        training.step()
        training.save(directory, said=said, paused=[slot.site.paused for slot in host.seeds.values()])
        training.session.close()


def unbroken(rank, directory):
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address)
        orders = Orders(training, fake, LIFE, 1)
        orders.run(20)
        (directory / "middle").mkdir(exist_ok=True)
        training.save(directory / "middle")
        orders.orders = {}
        orders.run(10)
        training.save(directory)
        training.session.close()


def resumed(rank, directory):
    """Goes on from where `unbroken` was after 20 steps."""
    with mesh_of(rank, directory) as (_, address):
        training = Training(rank, address)
        training.load(torch.load(directory.parent / "unbroken" / "middle" / f"rank-{rank}.pt", weights_only=False))
        for _ in range(10):
            training.step()
        training.save(directory)
        training.session.close()


def restored_on_one(rank, directory):
    """A checkpoint that only the first rank restores."""
    with mesh_of(rank, directory) as (_, address):
        training = Training(rank, address)
        if rank == 0:
            training.load(torch.load(directory.parent / "unbroken" / "middle" / "rank-0.pt", weights_only=False))
        said = ""
        try:
            training.step()
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        torch.save({"said": said}, directory / f"rank-{rank}.pt")


# No clock decides whether a rollback is in time.
UNHURRIED = {
    "ESPER_ROLLBACK_PREPARE_MS": "60000", "ESPER_ROLLBACK_COMMIT_MS": "60000", "ESPER_ROLLBACK_CONFIRM_MS": "60000",
}  # fmt: skip


def checkpointed(rank, address, directory, **settings):
    """A training whose first rank keeps a checkpoint of step 10."""
    kept = {"ESPER_CHECKPOINTS_SNAPSHOT_EVERY_STEPS": "10", **UNHURRIED, **settings}
    os.environ.update(kept, ESPER_HOME=str(directory))
    training = Training(rank, address)
    training.session.checkpoints.register("numbers", Numbers(training.generator))
    return training


def picture(training):
    return copy.deepcopy({
        "model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(),
        "session": training.session.state_dict(), "numbers": training.generator.get_state(),
        "steps": training.session.global_step,
    })  # fmt: skip


def wait_for_disk(session):
    while session.checkpoints.is_writing:
        time.sleep(0.001)


def rolled_back(rank, directory):
    """A command, while a seed blends; every rank has data and random numbers of its own."""
    with mesh_of(rank, directory) as (fake, address):
        training = checkpointed(rank, address, directory)
        orders = Orders(training, fake, {2: "GERMINATE", 4: "START_TRAINING", 8: "START_GRAFTING", 16: "ROLLBACK"}, 1)
        orders.run(14)
        once = picture(training)
        blending = stages(training)
        orders.run(3)
        back = training.session.global_step
        orders.run(4)
        training.save(directory, once=once, again=picture(training), back=back, blending=blending)
        training.session.close()


def operator_rolls_back(rank, directory):
    """An operator, to the disk of the first rank, when the run has halted at the end of a step."""
    with mesh_of(rank, directory) as (_, address):
        settings = {"ESPER_CHECKPOINTS_SAVE_EVERY_STEPS": "10", "ESPER_CHECKPOINTS_SNAPSHOT_EVERY_STEPS": "0"}
        training = checkpointed(rank, address, directory, **settings)
        session, done = training.session, Future()
        if rank == 0:
            keeper = session.tolaria.checkpoints

            def halt_and_ask():
                if session.global_step == 12:
                    wait_for_disk(session)
                    session.halt.engage("test")
                    tier = RollbackTier.ROLLBACK_TIER_FULL
                    asked = session.checkpoints.step_end.submit(lambda: keeper.rollback("", tier, "test"))
                    asked.add_done_callback(
                        lambda asked: (session.halt.release("test"), done.set_result(asked.result()))
                    )

            session.host.between_steps(halt_and_ask)
        training.session_step = orchestrate(session, training.optimizer).step
        for _ in range(10):
            training.step()
        kept = picture(training)
        for _ in range(2):
            training.step()
        tier = done.result(0).tier if rank == 0 else None
        training.save(directory, kept=kept, again=picture(training), tier=tier)
        session.close()


def emergency(rank, directory):
    """A loss that is no number, on the second rank alone has no say; on the first all go back, and an epoch may too."""
    with mesh_of(rank, directory) as (_, address):
        training = checkpointed(rank, address, directory, ESPER_CHECKPOINTS_SAVE_EVERY_STEPS="10")
        trainer = orchestrate(training.session, training.optimizer)
        training.session_step = trainer.step
        for _ in range(10):
            training.step()
        kept = picture(training)
        if rank == 0:
            wait_for_disk(training.session)
        for _ in range(3):
            training.step()
        trainer.step(math.nan if rank == 0 else 1.0)
        exploded = picture(training)
        trainer.end_epoch(accuracy=0.9)
        training.step()
        trainer.end_epoch(accuracy=0.1)
        later = picture(training)
        training.step()
        training.save(directory, kept=kept, exploded=exploded, later=later, again=picture(training))
        training.session.close()


def halted(rank, directory):
    """A HALT while both are amid a step: each stands still before its next update, and both go on when it ends."""
    lockstep.BEAT_SECONDS = 0.01
    with mesh_of(rank, directory) as (_, address):
        nobody = "127.0.0.1:1"
        identity_dir = directory / "fake" / "identities" / "trainer-local"
        address = address or esper_client.MeshAddress(tamiyo=nobody, urza=nobody, identity_dir=identity_dir)
        # Its name is that of a file which all tests of this machine share.
        training = Training(rank, address, run_id=f"halted-{uuid.uuid5(uuid.NAMESPACE_URL, str(directory))}")
        session = training.session
        trainer = orchestrate(session, training.optimizer)
        training.session_step = trainer.step
        updates, stood = [], []
        training.optimizer.register_step_post_hook(lambda *_: updates.append(training.steps_done))
        trainer.on_halt(lambda is_halted, _reason: stood.append((is_halted, len(updates))))
        beats, begin = [], session.host.ranks.begin_total
        session.host.ranks.begin_total = lambda told: beats.append(told) or begin(told)
        training.step()
        if rank == 0:
            session.tolaria.emergencies.alarm(HALT, "test")
            threading.Thread(target=lower_when_all_stand, args=(session.tolaria.emergencies, beats)).start()
        for _ in range(4):
            training.step()
        training.save(directory, stood=stood, beats=len(beats))
        session.close()


def lower_when_all_stand(emergencies, beats):
    """As an operator, when the other rank has seen it and this one has told often that it stands still."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not emergencies._shared.acks(emergencies._shared.current.generation) or len(beats) < 3:
        if time.monotonic() > deadline:
            os._exit(8)
        time.sleep(0.001)
    emergencies.lower(NOTICE, "test")


def dies_in_rollback(rank, directory):
    """The second rank is killed when it is asked whether it can go back."""
    with mesh_of(rank, directory) as (fake, address):
        training = checkpointed(rank, address, directory)
        orders = Orders(training, fake, {2: "GERMINATE", 4: "START_TRAINING", 8: "START_GRAFTING", 12: "ROLLBACK"}, 1)
        orders.run(12)
        if rank == 1:
            carry_out = training.session.host.carry_out
            training.session.host.carry_out = lambda order: (
                os._exit(9) if order["do"] == "prepare" else carry_out(order)
            )
        said, before = "", training.session.global_step
        try:
            orders.run(1)
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        torch.save(
            {"said": said, "steps": training.session.global_step - before, "stages": stages(training)},
            directory / f"rank-{rank}.pt",
        )


def fails_on_second(rank, directory):
    """A seed that raises on one rank only."""
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address)
        orders = Orders(training, fake, LIFE, 1)
        orders.run(20)
        slot = training.session.host.seeds["seed-3"]
        before = slot.stage
        if rank == 1:
            slot.site.seed.forward = lambda _h: 1 / 0
        orders.orders = {}
        orders.run(2)
        training.save(directory, before=before, stages=stages(training))
        training.session.close()


def not_installed_on_second(rank, directory):
    """A blueprint that only the first rank has."""
    if rank == 1:
        from esper_servers.trainer import attaching

        attaching.load_factories = dict
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address)
        orders = Orders(training, fake, {2: "GERMINATE", 5: "GERMINATE"}, 1)
        orders.run(3)
        planted = stages(training)
        orders.run(4)
        training.save(directory, planted=planted, stages=stages(training))
        training.session.close()


def broken_on_first(rank, directory):
    """Whatever fails on the first rank, the others do not wait for it."""
    with mesh_of(rank, directory) as (fake, address):
        training = Training(rank, address)
        Orders(training, fake, LIFE, 1).run(10)
        session, host = training.session, training.session.host

        def breaks(*_, **__):
            raise LookupError("a fault of ours")

        for owner, name in [("_questions", "packet"), ("_answers", "receive"), ("_safe_point", "reach"),
                            ("", "_learning_rate"), ("_upkeep", "finalize")]:  # fmt: skip
            if rank == 0:
                place = getattr(session if hasattr(session, owner) else host, owner) if owner else host
                whole = getattr(place, name)
                setattr(place, name, breaks)
                training.step()
                setattr(place, name, whole)
            else:
                training.step()
        training.session.step("no loss at all")
        for _ in range(5):
            training.step()
        training.save(directory, failures=training.session.reasons["internal_error"])
        training.session.close()


def dies(rank, directory):
    """The second rank is killed amid the training; the first must end, by torch's error or ours."""
    with mesh_of(rank, directory) as (_, address):
        training = Training(rank, address)
        said = ""
        try:
            for _ in range(1000):
                training.step()
                if rank == 1 and training.steps_done == 5:
                    os._exit(9)
        except RuntimeError as error:
            said = str(error)
        torch.save({"said": said, "steps": training.steps_done}, directory / f"rank-{rank}.pt")


def dies_in_step(rank, directory):
    """The second rank is killed where the first waits for it in the step of the mesh."""
    with mesh_of(rank, directory) as (_, address):
        training = Training(rank, address)
        training.step()
        said = ""
        try:
            if rank == 1:
                training.session.host.step = lambda *_: os._exit(9)
            training.step()
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        torch.save({"said": said}, directory / f"rank-{rank}.pt")


def without_mesh(rank, directory):
    os.environ["ESPER_HOME"] = str(directory)
    training = Training(rank, None)
    training.step()
    torch.save({"kind": type(training.session).__name__}, directory / f"rank-{rank}.pt")


def bad_address(rank, directory):
    """The first rank cannot attach: all are told."""
    os.environ["ESPER_HOME"] = str(directory)
    if rank == 0:
        (directory / "mesh.toml").write_text("[mesh]\ntamiyo = '127.0.0.1:1'\n")
    said = ""
    try:
        Training(rank, None)
    except Exception as error:  # noqa: BLE001  # What it is goes into the file.
        said = f"{type(error).__name__}: {error}"
    torch.save({"said": said}, directory / f"rank-{rank}.pt")


def alone(rank, directory):
    """Each rank has a run of its own when it is told so."""
    with fake_mesh(directory / f"fake-{rank}") as fake:
        training = Training(rank, esper_client.find_mesh(fake.environ), distributed=False)
        training.step()
        torch.save({"kind": type(training.session).__name__}, directory / f"rank-{rank}.pt")
        training.session.close()


def real(rank, directory):
    """A mesh of processes decides, until a seed learns; then its controller is stopped, and all go on."""
    address = esper_client.find_mesh({"ESPER_HOME": str(directory.parent / "mesh")}) if rank == 0 else None
    training = Training(rank, address, step_budget_ms=50)
    deadline, wanted = time.monotonic() + PATIENCE_SECONDS, torch.zeros(1)
    while not wanted.item():
        training.step()
        grown = any(slot.updates > 3 for slot in training.session.host.seeds.values())
        wanted = torch.tensor([float(grown or time.monotonic() > deadline)])
        dist.broadcast(wanted, src=0)
    (directory / f"grown-{rank}").touch()
    while not (directory / "stopped").exists():
        time.sleep(0.01)
    before = training.steps_done
    for _ in range(30):
        training.step()
    training.save(
        directory, stages=stages(training), steps=training.steps_done - before,
        connections=len([t for t in __import__("threading").enumerate() if t.name.startswith("esper")]),
        address=training.session.kasmina_address,
    )  # fmt: skip
    training.session.close()


def measured(rank, directory):
    """The benchmark of ranks, of the first rank beside the mesh of `real`."""
    torch.save(ddp.compare(Home(directory.parent / "mesh"), 2, range(2)), directory / f"rank-{rank}.pt")
