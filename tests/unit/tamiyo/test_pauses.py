from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from esper_rpc import page_token
from esper_rpc.errors import ConfigError, InvalidRequest, ResourceExhausted
from esper_rpc.journal import Journal
from esper_rpc.pause_quota import PauseConfig, PauseQuota
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.pauses.pauses import Pauses
from esper_servers.tamiyo.pauses.trail import PauseTrail

ONE, OTHER = "spiffe://esper/trainer/one", "spiffe://esper/trainer/other"
SECOND = 1_000_000_000


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def quota(clock):
    return PauseQuota(PauseConfig(), clock)


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "journal.sqlite")
    yield opened
    opened.close()


def take(quota, units, principal=ONE):
    return quota.take(principal, units).units


def spend_all(quota, principal=ONE):
    return [take(quota, 1000, principal) for _ in range(10)]


def test_a_window_holds_ten_requests_of_a_thousand_and_no_more(quota):
    assert spend_all(quota) == [1000] * 10
    assert (take(quota, 1), quota.remaining(ONE)) == (0, 0)


def test_what_is_left_is_granted_in_part(clock):
    quota = PauseQuota(PauseConfig(units_per_window=1500), clock)
    assert [take(quota, 1000), take(quota, 1000), take(quota, 1000)] == [1000, 500, 0]


def test_one_request_gets_its_share_at_most(quota):
    assert take(quota, 2**32 - 1) == 1000


def test_each_principal_has_a_quota_of_its_own(quota):
    spend_all(quota)
    assert take(quota, 1000, OTHER) == 1000
    assert (quota.remaining(ONE), quota.remaining(OTHER), quota.least_remaining()) == (0, 9000, 0)


def test_the_window_slides(quota, clock):
    for _ in range(10):
        take(quota, 1000)
        clock.advance(1)
    clock.advance(49.9)
    assert take(quota, 1) == 0
    clock.advance(0.1)
    assert quota.remaining(ONE) == 1000
    clock.advance(1)
    assert quota.remaining(ONE) == 2000


def test_a_principal_with_an_empty_window_is_forgotten(quota, clock):
    for number in range(10_000):
        take(quota, 1, f"spiffe://esper/trainer/t{number}")
    assert len(quota) == 10_000
    clock.advance(60)
    assert (len(quota), len(quota._spendings), quota.least_remaining()) == (0, 0, 10_000)


def test_what_is_given_back_can_be_granted_again_and_only_once(quota, clock):
    spend_all(quota)
    spending = quota.take(OTHER, 1000)
    quota.give_back(spending)
    quota.give_back(spending)
    assert quota.remaining(OTHER) == 10_000
    clock.advance(60)
    assert quota.remaining(ONE) == 10_000


def test_what_was_given_back_takes_nothing_with_it_when_it_leaves_the_window(quota, clock):
    spending = quota.take(ONE, 1000)
    take(quota, 1000)
    quota.give_back(spending)
    clock.advance(30)
    take(quota, 500)
    clock.advance(31)
    assert quota.remaining(ONE) == 9500


def test_what_counts_from_before_leaves_the_window_by_its_age_in_whatever_order_it_came(quota, clock):
    quota.restore([(ONE, 1000, 10.0), (ONE, 500, 50.0)])
    clock.advance(15)
    assert quota.remaining(ONE) == 9000


def test_a_quota_that_was_lowered_has_nothing_left_and_no_less(clock):
    quota = PauseQuota(PauseConfig(units_per_window=100), clock)
    quota.restore([(ONE, 1000, 0.0)])
    assert (quota.remaining(ONE), take(quota, 1)) == (0, 0)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="window_seconds"):
        PauseConfig(window_seconds=0)


def pauses(journal, clock, *, now_ns, config=None):
    return Pauses(PauseQuota(config or PauseConfig(), clock), PauseTrail(journal), clock_ns=lambda: now_ns)


async def ask(desk, units=1000, principal=ONE):
    answer = await desk.request(principal, "run", units, "why")
    return answer.granted_units, answer.remaining_units


async def test_everything_asked_for_stands_in_the_trail_oldest_first(journal, clock):
    desk = pauses(journal, clock, now_ns=7 * SECOND, config=PauseConfig(units_per_window=1500))
    for units in (1000, 900, 800):
        await ask(desk, units)
    lines, more = await desk.page(10, "")
    assert [(line.requested_units, line.granted_units) for line in lines] == [(1000, 1000), (900, 500), (800, 0)]
    assert {(line.principal, line.run_id, line.reason, line.granted_at.seconds) for line in lines} == {
        (ONE, "run", "why", 7)
    }
    assert more == ""


async def test_calls_at_the_same_time_share_one_quota(journal, clock):
    desk = pauses(journal, clock, now_ns=0)
    answers = await asyncio.gather(*(ask(desk, 700) for _ in range(30)))
    assert sum(granted for granted, _ in answers) == 10_000
    assert min(remaining for _, remaining in answers) == 0


async def test_what_was_granted_before_a_restart_still_counts(tmp_path):
    for age, left in ((0, 8000), (59, 8000), (60, 10_000)):
        path = tmp_path / f"{age}.sqlite"
        before = Journal(path)
        desk = pauses(before, FakeClock(5.0), now_ns=1000 * SECOND)
        await ask(desk)
        await ask(desk)
        before.close()
        after, clock = Journal(path), FakeClock(1.0)
        desk = pauses(after, clock, now_ns=(1000 + age) * SECOND)
        assert desk._quota.remaining(ONE) == left
        clock.advance(60 - age)
        assert desk._quota.remaining(ONE) == 10_000
        after.close()


async def test_a_wall_clock_that_was_set_back_gives_nobody_a_second_quota(journal):
    await ask(pauses(journal, FakeClock(), now_ns=1000 * SECOND))
    clock = FakeClock()
    quota = pauses(journal, clock, now_ns=10 * SECOND)._quota
    assert quota.remaining(ONE) == 9000
    clock.advance(60)
    assert quota.remaining(ONE) == 10_000


async def test_the_trail_is_read_page_by_page(journal, clock):
    desk = pauses(journal, clock, now_ns=0)
    for units in range(1, 8):
        await ask(desk, units)
        journal.append("decision", str(units), b"between")
    pages, token = [], ""
    while not pages or token:
        lines, token = await desk.page(3, token)
        pages.append([line.requested_units for line in lines])
    assert pages == [[1, 2, 3], [4, 5, 6], [7]]


TOKENS = ["x", "====", "\ud800", "1", page_token.write("report", 3), page_token.write("pause", 3)[:-4] + "!!!!"]


@pytest.mark.parametrize("token", [*TOKENS, page_token.write("pause", 10**18), page_token.write("pause", -1)])
async def test_a_token_from_elsewhere_is_refused_by_its_field(journal, clock, token):
    with pytest.raises(InvalidRequest) as refused:
        await pauses(journal, clock, now_ns=0).page(3, token)
    assert [violation.field for violation in refused.value.violations] == ["page_token"]


async def test_a_pause_that_cannot_be_written_down_is_not_granted(journal, clock, monkeypatch):
    desk = pauses(journal, clock, now_ns=0)
    monkeypatch.setattr(journal, "append", lambda *_: None)
    with pytest.raises(ResourceExhausted) as refused:
        await ask(desk)
    assert refused.value.reason == "STORAGE"
    assert desk._quota.remaining(ONE) == 10_000


def counted(result):
    return REGISTRY.get_sample_value("esper_pause_requests_total", {"result": result}) or 0.0


async def test_metrics_count_results_and_tell_what_is_left(journal, clock):
    before = {result: counted(result) for result in ("full", "partial", "denied")}
    desk = pauses(journal, clock, now_ns=0, config=PauseConfig(units_per_window=1500))
    for _ in range(3):
        await ask(desk)
        await desk.tell_remaining()
    assert {result: counted(result) - before[result] for result in before} == {"full": 1, "partial": 1, "denied": 1}
    assert REGISTRY.get_sample_value("esper_pause_quota_remaining") == 0
    clock.advance(60)
    await desk.tell_remaining()
    assert REGISTRY.get_sample_value("esper_pause_quota_remaining") == 1500
