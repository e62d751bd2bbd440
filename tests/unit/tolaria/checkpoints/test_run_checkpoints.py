"""The checkpoints of a run as operators and emergencies use them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from esper_rpc.errors import DataLoss, FailedPrecondition, NotFound
from esper_rpc.proto.tolaria.v1 import RollbackTier
from esper_servers.tolaria.checkpoints.checkpoints import Checkpoints
from esper_servers.tolaria.checkpoints.run_checkpoints import RunCheckpoints
from esper_servers.tolaria.rollback.participants import TrainingParticipant
from esper_servers.tolaria.rollback.rollback import Rollback, RollbackConfig, Vote
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore
from esper_servers.tolaria.state.snapshot_cache import CacheConfig, SnapshotCache

ANY, FAST, FULL = (
    RollbackTier.ROLLBACK_TIER_UNSPECIFIED, RollbackTier.ROLLBACK_TIER_FAST, RollbackTier.ROLLBACK_TIER_FULL,
)  # fmt: skip


@pytest.fixture
def run():
    return SimpleNamespace(global_step=0, epoch=0)


@pytest.fixture
def keep(training, tmp_path, run):
    made = []

    def keep(*, has_store=True, snapshots=5, members=(), **timing):
        cache = SnapshotCache(CacheConfig(snapshots=snapshots))
        store = CheckpointStore(tmp_path / "checkpoints") if has_store else None
        rollback = Rollback([TrainingParticipant(training.state), *members], cache=cache, store=store, **timing)
        made.append(Checkpoints(training.state, cache=cache, store=store, rollback=rollback))
        return RunCheckpoints(made[-1], run)

    yield keep
    for each in made:
        each.close()


def train(training, run, steps=2):
    training.train(steps)
    run.global_step += steps


def test_what_was_created_is_listed_oldest_first_as_it_was_told(keep, training, run):
    keeper = keep()
    made = []
    for _ in range(2):
        train(training, run)
        made.append(keeper.create_checkpoint("operator"))
    assert keeper.checkpoints() == made
    assert [each.global_step for each in made] == [2, 4]
    assert all(each.size_bytes > 0 and len(each.digest) == 32 for each in made)


@pytest.mark.parametrize(("wanted", "tier"), [(ANY, FAST), (FAST, FAST), (FULL, FULL)])
def test_a_rollback_restores_what_was_there_by_the_tier_that_is_told(keep, training, run, wanted, tier):
    keeper = keep()
    train(training, run)
    made, before = keeper.create_checkpoint("operator"), training.picture()
    train(training, run)
    assert training.picture() != before
    done = keeper.rollback("", wanted, "operator")
    assert training.picture() == before
    assert (done.tier, done.checkpoint.global_step, done.seconds > 0) == (tier, made.global_step, True)


class Slow:
    """A participant of a rollback that takes its time to confirm it."""

    name = "slow"

    def __init__(self, clock, seconds):
        self._clock, self._seconds = clock, seconds

    def prepare(self, _order):
        return Vote(self.name, agrees=True)

    def commit(self, _order):
        pass

    def confirm(self, _order):
        self._clock.advance(self._seconds)

    def abort(self):
        pass


@pytest.mark.parametrize(
    ("wanted", "seconds", "is_late"),
    [(FAST, 0.5, False), (FAST, 0.51, True), (FULL, 1.0, False), (FULL, 1.01, True)],
)
def test_a_rollback_is_late_by_the_settings_of_the_run(keep, training, run, clock, wanted, seconds, is_late):
    config = RollbackConfig(confirm_ms=10_000, full_seconds=1.0)
    keeper = keep(members=[Slow(clock, seconds)], clock=clock, config=config)
    train(training, run)
    keeper.create_checkpoint("operator")
    done = keeper.rollback("", wanted, "operator")
    assert (done.tier, done.is_late) == (wanted, is_late)


def test_a_named_checkpoint_is_returned_to_though_there_are_newer_ones(keep, training, run):
    keeper = keep()
    train(training, run)
    first, before = keeper.create_checkpoint("operator"), training.picture()
    train(training, run)
    keeper.create_checkpoint("operator")
    assert keeper.rollback(first.name, ANY, "operator").checkpoint.name == first.name
    assert training.picture() == before


def test_without_a_directory_checkpoints_are_in_memory(keep, training, run):
    keeper = keep(has_store=False)
    train(training, run)
    made, before = keeper.create_checkpoint("operator"), training.picture()
    train(training, run)
    assert (made.size_bytes, list(keeper.checkpoints())) == (0, [])
    assert keeper.rollback(made.name, ANY, "operator").tier == FAST
    assert training.picture() == before


def test_with_nothing_to_return_to_nothing_changes_and_it_is_said(keep, training):
    before = training.picture()
    for keeper in (keep(), keep(has_store=False)):
        with pytest.raises(NotFound, match="There is no checkpoint to return to"):
            keeper.rollback("", ANY, "operator")
    with pytest.raises(NotFound, match="'elsewhere'"):
        keep().rollback("elsewhere", ANY, "operator")
    assert training.picture() == before


def test_a_checkpoint_that_cannot_be_made_says_why(keep, training):
    with pytest.raises(FailedPrecondition, match="no room in memory"):
        keep(has_store=False, snapshots=0).create_checkpoint("operator")
    with torch.no_grad():
        training.model[0].weight[0, 0] = torch.nan
    for keeper in (keep(), keep(has_store=False)):
        with pytest.raises(FailedPrecondition, match="no number"):
            keeper.create_checkpoint("operator")


def test_a_checkpoint_of_another_model_is_data_loss(keep, make_training, training, run, tmp_path):
    train(training, run)
    keep().create_checkpoint("operator")
    other = make_training()
    other.state.register("scaler", torch.amp.GradScaler("cpu", enabled=False))
    store, cache = CheckpointStore(tmp_path / "checkpoints"), SnapshotCache()
    rollback = Rollback([TrainingParticipant(other.state)], cache=cache, store=store)
    checkpoints = Checkpoints(other.state, cache=cache, store=store, rollback=rollback)
    before = other.picture()
    with pytest.raises(DataLoss, match="No checkpoint could be used"):
        RunCheckpoints(checkpoints, run).rollback("", ANY, "operator")
    assert other.picture() == before
    checkpoints.close()
