"""A small model that is trained on a thread of its own, with Tolaria beside it."""

from __future__ import annotations

import copy
import hashlib
import threading
import time

import torch
from torch import nn

from esper_client.halt import HaltSwitch
from esper_rpc.errors import NotFound
from esper_rpc.proto.tolaria.v1 import Checkpoint, RollbackTier, tolaria_service_pb2
from esper_servers.kasmina.safe_point import SafePoint
from esper_servers.tolaria.checkpoints.keeper import RolledBack
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.emergency.emergencies import Emergencies
from esper_servers.tolaria.epoch_guard import EpochGuard
from esper_servers.tolaria.metrics.feed import MetricsFeed
from esper_servers.tolaria.service import TolariaServicer
from esper_servers.tolaria.trainer import Trainer

TOLARIA = tolaria_service_pb2.DESCRIPTOR.services_by_name["TolariaService"]
PAUSE_SECONDS = 0.002


class Checkpoints:
    """Copies of the weights, in memory."""

    def __init__(self, loop):
        self.loop, self.kept = loop, {}

    def checkpoints(self):
        return [made for made, _ in self.kept.values()]

    def create_checkpoint(self, _reason):
        state = copy.deepcopy(self.loop.model.state_dict())
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).digest()
        made = Checkpoint(
            name=f"checkpoint-{len(self.kept)}", digest=digest, global_step=self.loop.global_step,
            epoch=self.loop.epoch,
        )  # fmt: skip
        self.kept[made.name] = (made, state)
        return made

    def rollback(self, checkpoint, _tier, _reason):
        begun, name = time.perf_counter(), checkpoint or next(reversed(self.kept), "")
        if name not in self.kept:
            raise NotFound(f"There is no checkpoint {name!r}.")
        made, state = self.kept[name]
        self.loop.model.load_state_dict(state)
        return RolledBack(made, RollbackTier.ROLLBACK_TIER_FAST, time.perf_counter() - begun)


class TrainingLoop:
    """Trains until it is stopped. It stands for a session too: a mesh that never has an answer."""

    def __init__(self, identity, keyring, *, run_id="run", **options):
        self.run_id, self.global_step, self.epoch = run_id, 0, 0
        self.apply_ms = self.finalize_ms = 0.0
        self.halt, self.feed, mode = HaltSwitch(), MetricsFeed(), ConservativeMode()
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.emergencies = Emergencies(
            run_id=run_id, keyring=keyring, audience=str(identity.spiffe_id), halt=self.halt, mode=mode, **options
        )
        self.safe_point, self.checkpoints = SafePoint(has_training_thread=True), Checkpoints(self)
        self.halt.meanwhile(self.safe_point.reach)
        self.trainer = Trainer(
            session=self, optimizer=self.optimizer, emergencies=self.emergencies, mode=mode,
            checkpoints=self.checkpoints, guard=EpochGuard(mode=mode),
        )  # fmt: skip
        self.servicer = TolariaServicer(
            self, self.emergencies, at_safe_point=self.safe_point.submit, mode=mode, feed=self.feed,
            guard=self.trainer.guard, checkpoints=self.checkpoints,
        )  # fmt: skip
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._train, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self.halt.release("the end")
        self._thread.join()

    def begin_step(self, loss, *, samples=None, gradient_norm=None, metrics=None):
        self.global_step += 1
        self.feed.publish(self.global_step, self.epoch, {"loss": loss, **(metrics or {})})

    def finish_step(self):
        self.safe_point.reach()
        return []

    def start_epoch(self, epoch):
        self.epoch = epoch

    def _train(self):
        x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
        while not self._stopped.wait(PAUSE_SECONDS):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.trainer.step(loss)
