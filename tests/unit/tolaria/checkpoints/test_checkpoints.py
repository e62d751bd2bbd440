from __future__ import annotations

import errno
import threading

import pytest
import torch
from prometheus_client import REGISTRY

from esper_rpc.errors import FailedPrecondition, NotFound, ResourceExhausted
from esper_rpc.proto.leyline.v1 import EmergencyLevel, TelemetryLevel
from esper_rpc.telemetry.events import listen
from esper_servers.tolaria.checkpoints.checkpoints import Checkpoints
from esper_servers.tolaria.rollback.participants import TrainingParticipant
from esper_servers.tolaria.rollback.rollback import Rollback
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore
from esper_servers.tolaria.state.durable_files import DurableFiles
from esper_servers.tolaria.state.snapshot_cache import CacheConfig, SnapshotCache

WAIT = 60


class GatedFiles(DurableFiles):
    """Writes when it is let."""

    def __init__(self):
        self.gate, self.error = threading.Event(), None
        self.gate.set()

    def make_directory(self, path):
        assert self.gate.wait(WAIT)
        if self.error is not None:
            raise self.error
        super().make_directory(path)


@pytest.fixture
def files():
    return GatedFiles()


@pytest.fixture
def make(training, tmp_path, files, clock):
    made = []

    def make_checkpoints(training=training, *, memory_mb=64, has_store=True):
        cache = SnapshotCache(CacheConfig(memory_mb=memory_mb))
        store = CheckpointStore(tmp_path / "checkpoints", files=files) if has_store else None
        rollback = Rollback([TrainingParticipant(training.state)], cache=cache, store=store, clock=clock)
        made.append(Checkpoints(training.state, cache=cache, store=store, rollback=rollback, clock=clock))
        return made[-1]

    yield make_checkpoints
    files.gate.set()
    for each in made:
        each.close()


@pytest.fixture
def checkpoints(make):
    return make()


@pytest.fixture
def events():
    told = []
    stop = listen(told.append)
    yield lambda: [(e.description, p.level, e.attributes["reason"]) for p in told for e in p.events]
    stop()


def metric(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(checkpoints, training, files, events):
    before = metric("esper_checkpoint_seconds_count", tier="disk")
    files.gate.clear()
    training.train()
    saved = checkpoints.save(epoch=1, step=3)
    expected = training.picture()
    training.train()
    assert checkpoints.is_writing
    files.gate.set()
    manifest = saved.result(WAIT)
    assert (manifest.epoch, manifest.step) == (1, 3)
    training.state.restore(checkpoints._store.load().state)
    assert training.picture() == expected
    assert events() == [("checkpoint_saved", TelemetryLevel.TELEMETRY_LEVEL_INFO, "saved")]
    assert metric("esper_checkpoint_seconds_count", tier="disk") == before + 1


def test_what_has_no_room_in_memory_is_written_at_once(make, training):
    checkpoints = make(memory_mb=0)
    saved = checkpoints.save(epoch=0, step=1)
    assert saved.done()
    assert checkpoints.snapshot(epoch=0, step=1) is None
    assert checkpoints._store.names() == [saved.result().name]


def test_without_a_directory_nothing_can_be_saved(make):
    with pytest.raises(FailedPrecondition, match="no directory"):
        make(has_store=False).save(epoch=0, step=1).result()


@pytest.mark.parametrize("memory_mb", [0, 64])
def test_a_disk_that_is_full_is_told_and_training_goes_on(make, files, events, memory_mb):
    checkpoints, before = (
        make(memory_mb=memory_mb),
        metric("esper_checkpoint_failures_total", tier="disk", reason="storage"),
    )
    files.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResourceExhausted):
        checkpoints.save(epoch=0, step=1).result(WAIT)
    assert events() == [("checkpoint_failed", TelemetryLevel.TELEMETRY_LEVEL_ERROR, "storage")]
    assert metric("esper_checkpoint_failures_total", tier="disk", reason="storage") == before + 1


def test_of_a_model_that_is_broken_nothing_is_kept(checkpoints, training, events):
    assert checkpoints.snapshot(epoch=0, step=1)
    training.model[0].weight.data[0, 0] = torch.nan
    assert checkpoints.snapshot(epoch=0, step=2) is None
    with pytest.raises(FailedPrecondition):
        checkpoints.save(epoch=0, step=2).result()
    assert checkpoints._store.names() == []
    assert {event[::2] for event in events()} == {("checkpoint_not_taken", "not_finite")}
    assert checkpoints.roll_back(latest_step=2, reason="loss_not_finite").step == 1
    assert bool(torch.isfinite(training.model[0].weight).all())


def test_what_a_rollback_went_back_behind_is_not_found_again(checkpoints, training, events):
    checkpoints.save(epoch=0, step=1).result(WAIT)
    training.train()
    checkpoints.snapshot(epoch=0, step=2)
    expected = training.picture()
    training.train()
    checkpoints.save(epoch=0, step=3).result(WAIT)
    before = metric("esper_rollbacks_total", result="fast")
    assert checkpoints.roll_back(latest_step=2, reason="loss_spike").tier == "fast"
    assert training.picture() == expected
    assert checkpoints.roll_back(latest_step=9, reason="loss_spike").step == 2
    checkpoints.close()
    assert [name[-1] for name in checkpoints._store.names()] == ["1"]
    assert metric("esper_rollbacks_total", result="fast") == before + 2
    assert events()[-1] == ("fast_rollback_complete", TelemetryLevel.TELEMETRY_LEVEL_ERROR, "loss_spike")


def test_a_checkpoint_that_is_still_being_written_is_set_aside_too(checkpoints, training, files):
    checkpoints.snapshot(epoch=0, step=1)
    files.gate.clear()
    checkpoints.save(epoch=0, step=2)
    assert checkpoints.roll_back(latest_step=1, reason="loss_spike").step == 1
    files.gate.set()
    checkpoints.close()
    assert checkpoints._store.names() == []


def test_a_full_rollback_is_told_with_what_could_not_be_used(checkpoints, training, events):
    for step in (1, 2):
        training.train()
        checkpoints.save(epoch=0, step=step).result(WAIT)
    checkpoints._cache.forget_after(0)
    newest = checkpoints._store.directory / checkpoints._store.names()[0]
    (newest / "manifest.json").unlink()
    result = checkpoints.roll_back(latest_step=2, reason="loss_spike", severity=EmergencyLevel.EMERGENCY_LEVEL_HALT)
    assert (result.tier, result.step) == ("full", 1)
    assert checkpoints.last_rollback is result
    assert events()[-2:] == [
        ("checkpoint_skipped", TelemetryLevel.TELEMETRY_LEVEL_WARNING, "manifest_missing"),
        ("full_rollback_complete", TelemetryLevel.TELEMETRY_LEVEL_ERROR, "loss_spike"),
    ]


def test_a_rollback_without_anything_to_go_back_to_is_critical(checkpoints, training, events):
    before = training.picture()
    result = checkpoints.roll_back(latest_step=2, reason="loss_spike")
    assert (result.succeeded, result.needs_halt) == (False, True)
    assert training.picture() == before
    assert events() == [("rollback_failed", TelemetryLevel.TELEMETRY_LEVEL_CRITICAL, "loss_spike")]


def test_another_process_resumes_where_the_last_checkpoint_was(make, checkpoints, training, make_training):
    assert checkpoints.resume() is None
    training.train()
    checkpoints.save(epoch=1, step=3).result(WAIT)
    expected = training.picture()
    training.train()
    later, fresh = training.picture(), make_training()
    fresh.train(1)
    assert make(fresh).resume().step == 3
    assert fresh.picture() == expected
    fresh.train()
    assert fresh.picture() == later


def test_who_cannot_resume_is_told_and_nothing_changes(make, checkpoints, training, make_training):
    name = checkpoints.save(epoch=1, step=3).result(WAIT).name
    other = make_training()
    other.state.register("scaler", torch.amp.GradScaler("cpu"))
    before = other.picture()
    with pytest.raises(FailedPrecondition, match="scaler"):
        make(other).resume()
    assert other.picture() == before
    (checkpoints._store.directory / name / "manifest.json").unlink()
    with pytest.raises(NotFound, match="manifest_missing"):
        checkpoints.resume()


def test_other_threads_ask_for_what_is_done_between_two_steps(checkpoints, training):
    snapshot = checkpoints.step_end.submit(lambda: checkpoints.snapshot(epoch=0, step=1))
    broken = checkpoints.step_end.submit(lambda: 1 / 0)
    assert not snapshot.done()
    assert checkpoints.step_end.reach() is True
    assert snapshot.result().step == 1
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert checkpoints.step_end.reach() is False
    waiting = checkpoints.step_end.submit(training.train)
    checkpoints.close()
    assert waiting.cancelled()
