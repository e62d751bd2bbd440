from __future__ import annotations

import asyncio
import hashlib

import pytest

from esper_rpc.errors import DataLoss, NotFound, Unavailable
from esper_rpc.proto.leyline.v1 import CircuitState
from esper_rpc.testing import FakeClock
from esper_servers.kasmina.kernels.library import DIGESTED_AT_ONCE, Kernel, KernelConfig, KernelLibrary


class Library:
    """A kernel library, what it was fed with, and what it tells."""

    def __init__(self, make_kernel, **config):
        self.clock = FakeClock()
        self.answers = {}
        self.fetched = []
        self.told = []
        self.make_kernel = make_kernel
        self.library = KernelLibrary(self.fetch, self.run, config=KernelConfig(**config), clock=self.clock)
        self.library.report_to(lambda name, level, *, reason, **details: self.told.append((name, reason)))

    async def fetch(self, blueprint_id):
        self.fetched.append(blueprint_id)
        answer = self.answers.get(blueprint_id) or self.kernel(blueprint_id)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @staticmethod
    def run(work):
        asyncio.run(work)

    def kernel(self, blueprint_id, weights=None, **manifest):
        kernel = self.make_kernel("residual_mlp", weights, **manifest)
        kernel.blueprint.descriptor.blueprint_id = blueprint_id
        return kernel

    def ask(self, blueprint_id):
        self.library.request(blueprint_id)
        return self.library.get(blueprint_id)

    def metric(self, name, **attributes):
        points = [p for p in self.library.metrics() if p.name == name and dict(p.attributes) == attributes]
        return points[0].value


@pytest.fixture
def make(make_kernel):
    return lambda **config: Library(make_kernel, **config)


def test_a_kernel_is_fetched_once_and_again_when_it_has_expired(make):
    shelf = make(ttl_seconds=60)
    assert isinstance(shelf.ask("a"), Kernel)
    shelf.clock.advance(59)
    assert isinstance(shelf.ask("a"), Kernel)
    assert shelf.fetched == ["a"]
    shelf.clock.advance(1)
    assert isinstance(shelf.ask("a"), Kernel)
    assert shelf.fetched == ["a", "a"]
    assert shelf.metric("kasmina.cache.hit_rate") == pytest.approx(1 / 3)


def test_what_expires_between_its_request_and_its_use_is_on_its_way_again(make):
    shelf = make(ttl_seconds=60)
    shelf.library.request("a")
    shelf.clock.advance(60)
    waiting = []
    shelf.library._spawn = waiting.append
    assert shelf.library.get("a") is None
    assert shelf.library.get("a") is None
    assert len(waiting) == 1
    shelf.run(waiting.pop())
    assert isinstance(shelf.library.get("a"), Kernel)


def test_kernels_are_bounded_in_number_and_in_bytes(make):
    shelf = make(entries=2)
    for name in "abc":
        shelf.ask(name)
    assert shelf.metric("kasmina.cache.evictions") == 1
    assert [shelf.library._kernels.get(name) is not None for name in "abc"] == [False, True, True]
    big = make(megabytes=100)
    for name in "ab":
        weights = bytes(60 * 2**20)
        big.library.add(big.kernel(name, weights))
    assert big.metric("kasmina.cache.evictions") == 1
    assert (big.library.clear(), big.library.clear()) == (1, 0)


@pytest.mark.parametrize("size", [10, DIGESTED_AT_ONCE + 1], ids=["small", "big"])
@pytest.mark.parametrize("damage", ["other weights", "no weights", "none"])
def test_the_digest_of_weights_is_checked_when_they_arrive(make, size, damage):
    shelf, weights = make(), bytes(size)
    digest = hashlib.sha256(weights).digest()
    arrived = {"other weights": b"1" * size, "no weights": None, "none": weights}[damage]
    shelf.answers["a"] = shelf.kernel("a", arrived, weights_sha256=digest)
    found = shelf.ask("a")
    assert isinstance(found, Kernel) if damage == "none" else found == "checksum_mismatch"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotFound("none"), "unknown_blueprint"),
        (DataLoss("cut short"), "checksum_mismatch"),
        (Unavailable("away"), "library_unavailable"),
        (ValueError("a bug"), "library_unavailable"),
    ],
)
def test_what_fails_has_a_reason_until_it_is_asked_for_again(make, error, reason):
    shelf = make()
    shelf.answers["a"] = error
    assert shelf.ask("a") == reason
    del shelf.answers["a"]
    assert shelf.library.get("a") == reason
    assert isinstance(shelf.ask("a"), Kernel)


def test_ten_failures_open_the_breaker_which_one_real_fetch_probes_after_its_rest(make):
    shelf = make()
    shelf.answers = {str(number): Unavailable("away") for number in range(12)}
    for number in range(12):
        assert shelf.ask(str(number)) == "library_unavailable"
    assert len(shelf.fetched) == 10
    assert shelf.told == [("breaker_open", "kernel_loading")]
    assert shelf.metric("kasmina.breaker.state", breaker="kernel_loading") == CircuitState.CIRCUIT_STATE_OPEN
    shelf.clock.advance(30)
    assert all(isinstance(shelf.ask(name), Kernel) for name in ("good", "better", "best"))
    assert [name for name, _ in shelf.told] == ["breaker_open", "breaker_half_open", "breaker_closed"]


def test_a_library_that_knows_no_such_blueprint_works(make):
    shelf = make()
    for number in range(20):
        shelf.answers[str(number)] = NotFound("none")
        assert shelf.ask(str(number)) == "unknown_blueprint"
    assert shelf.library.breaker.state == CircuitState.CIRCUIT_STATE_CLOSED


def test_a_cached_kernel_needs_no_breaker(make):
    shelf = make()
    shelf.ask("here")
    for number in range(10):
        shelf.answers[str(number)] = Unavailable("away")
        shelf.ask(str(number))
    assert isinstance(shelf.ask("here"), Kernel)


async def test_no_more_kernels_are_fetched_at_once_than_the_setting_says(make_kernel):
    running, most, go_on, tasks = [0], [0], asyncio.Event(), []

    async def fetch(blueprint_id):
        running[0] += 1
        most[0] = max(most[0], running[0])
        await go_on.wait()
        running[0] -= 1
        return make_kernel("residual_mlp")

    library = KernelLibrary(fetch, lambda work: tasks.append(asyncio.ensure_future(work)))
    for number in range(20):
        library.request(str(number))
    await asyncio.sleep(0)
    assert running[0] == 8
    go_on.set()
    await asyncio.gather(*tasks)
    assert most[0] == 8


def test_kernels_on_their_way_are_bounded(make):
    shelf, waiting = make(entries=3), []
    shelf.library._spawn = waiting.append
    for number in range(5):
        shelf.library.request(str(number))
    assert len(waiting) == 3
    assert shelf.library.get("4") == "library_unavailable"
    for work in waiting:
        work.close()


def test_the_latency_of_fetches_is_told_by_quantile(make):
    shelf = make()

    async def fetch(blueprint_id):
        shelf.clock.advance(float(blueprint_id) / 1e3)
        return shelf.kernel(blueprint_id)

    shelf.library._fetch = fetch
    for milliseconds in range(1, 101):
        shelf.ask(str(milliseconds))
    assert shelf.metric("kasmina.kernel.fetch_latency_ms", quantile="0.5") == pytest.approx(50)
    assert shelf.metric("kasmina.kernel.fetch_latency_ms", quantile="0.95") == pytest.approx(95)
