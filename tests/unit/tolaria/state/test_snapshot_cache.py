from __future__ import annotations

import pytest
import torch

from esper_servers.tolaria.state.snapshot_cache import CacheConfig, SnapshotCache

MIB = 2**20


def state_of(step, size=8):
    return {"model": {"weight": torch.full((size,), float(step))}}


def fill(cache, *steps):
    return [cache.take(state_of(step), epoch=0, step=step) for step in steps]


def steps_in(cache):
    return sorted(snapshot.step for snapshot in cache._snapshots)


def test_the_newest_up_to_a_step_is_found(cache):
    fill(cache, 10, 20, 30)
    assert cache.find(29).step == 20
    assert cache.find(30).step == 30
    assert cache.find(9) is None


def test_the_least_recently_used_goes_first(cache):
    fill(cache, 1, 2, 3, 4, 5)
    assert cache.find(1).step == 1
    fill(cache, 6)
    assert steps_in(cache) == [1, 3, 4, 5, 6]


def test_a_new_one_is_copied_over_the_one_that_goes(cache):
    first = fill(cache, 1, 2, 3, 4, 5)[0]
    place = first.state["model"]["weight"].data_ptr()
    last = fill(cache, 6)[0]
    assert last.state["model"]["weight"].data_ptr() == place
    assert last.state["model"]["weight"].tolist() == [6.0] * 8


def test_nothing_is_copied_over_one_that_is_on_its_way_to_the_disk(cache):
    first = fill(cache, 1, 2, 3, 4, 5)[0]
    first.is_being_written = True
    fill(cache, 6)
    assert first.state["model"]["weight"].tolist() == [1.0] * 8
    assert len(cache) == 5


def test_the_memory_is_bounded():
    cache = SnapshotCache(CacheConfig(memory_mb=3))
    for step in range(1, 5):
        assert cache.take(state_of(step, MIB // 4), epoch=0, step=step)
    assert (steps_in(cache), cache.size_bytes) == ([2, 3, 4], 3 * MIB)
    assert cache.take(state_of(5, MIB // 2), epoch=0, step=5)
    assert (steps_in(cache), cache.size_bytes) == ([4, 5], 3 * MIB)


@pytest.mark.parametrize("config", [CacheConfig(memory_mb=1), CacheConfig(snapshots=0)])
def test_what_has_no_room_is_not_taken_and_what_is_there_stays(config):
    cache = SnapshotCache(config)
    fill(cache, 1)
    before = steps_in(cache)
    assert cache.take(state_of(2, MIB), epoch=0, step=2) is None
    assert steps_in(cache) == before


def test_what_is_later_than_a_step_is_forgotten(cache):
    fill(cache, 10, 20, 30)
    cache.forget_after(20)
    assert steps_in(cache) == [10, 20]


def test_what_is_trained_on_does_not_change_a_snapshot(cache):
    state = state_of(1)
    snapshot = cache.take(state, epoch=0, step=1)
    state["model"]["weight"] += 1
    assert snapshot.state["model"]["weight"].tolist() == [1.0] * 8
