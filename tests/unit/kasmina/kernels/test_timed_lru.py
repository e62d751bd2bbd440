from __future__ import annotations

import pytest

from esper_rpc.testing import FakeClock
from esper_servers.kasmina.kernels.timed_lru import TimedLru


@pytest.fixture
def clock():
    return FakeClock()


def test_what_was_used_longest_ago_makes_room(clock):
    cache = TimedLru(entries=2, ttl_seconds=60, clock=clock)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    assert (len(cache), cache.evictions) == (2, 1)


def test_bytes_are_bounded_and_counted(clock):
    cache = TimedLru(entries=10, ttl_seconds=60, clock=clock, size_bytes=10)
    for key, size in (("a", 4), ("b", 4), ("a", 6), ("c", 4)):
        cache.put(key, key, size)
    assert [cache.get(key) for key in "abc"] == ["a", None, "c"]
    assert cache.size_bytes == 10
    cache.remove("a")
    cache.remove("a")
    assert cache.size_bytes == 4
    assert cache.clear() == 1
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_an_entry_expires_however_often_it_is_used_and_lives_anew_when_it_is_put_again(clock):
    cache = TimedLru(entries=10, ttl_seconds=60, clock=clock)
    cache.put("used", 1)
    cache.put("renewed", 2)
    clock.advance(59)
    assert cache.get("used") == 1
    cache.put("renewed", 3)
    clock.advance(1)
    assert (cache.get("used"), cache.get("renewed")) == (None, 3)
    clock.advance(59)
    assert (cache.purge(), len(cache)) == (1, 0)
    assert cache.evictions == 0


def test_looking_costs_no_more_among_many_than_among_few():
    # Counted in looks at the clock and at entries, not in time.
    for entries in (10, 10_000):
        clock = CountingClock()
        cache = TimedLru(entries=entries, ttl_seconds=60, clock=clock)
        for number in range(entries):
            cache.put(str(number), number)
        cache._by_use, looked = CountingDict(cache._by_use), clock.looks
        cache.get("3")
        assert clock.looks - looked == 1
        assert cache._by_use.looks <= 3


class CountingClock(FakeClock):
    looks = 0

    def __call__(self):
        self.looks += 1
        return super().__call__()


class CountingDict:
    """The dictionary of a cache, counting what is asked of it."""

    def __init__(self, inner):
        self.inner, self.looks = inner, 0

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, key):
        self.looks += 1
        return self.inner[key]

    def get(self, key):
        self.looks += 1
        return self.inner.get(key)

    def move_to_end(self, key):
        self.looks += 1
        self.inner.move_to_end(key)
