"""One question at a time: how long its answer is of use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from esper_client.step_exchange import LEADS, LONGEST_BUDGET_SECONDS, StepExchange
from esper_rpc.breaker import BreakerConfig
from esper_rpc.proto.tamiyo.v1 import NoAction, StepDecision

BUDGET = 0.005


class Loop:
    """Answers every step as soon as it is sent."""

    def __init__(self) -> None:
        self.now = 100.0
        self.exchange = StepExchange(
            thread=SimpleNamespace(loop=self, spawn=lambda _work: None),
            budget_seconds=BUDGET,
            breaker=BreakerConfig(),
            clock=lambda: self.now,
        )
        self.exchange.start(SimpleNamespace(is_open=True, run=lambda: None, send=self.answer))

    def call_soon_threadsafe(self, work, *arguments):
        work(*arguments)

    def answer(self, sequence, _raw):
        self.exchange.take(StepDecision(sequence=sequence, no_action=NoAction(reason="nominal")))

    def ask(self, *, busy):
        assert self.exchange.send(self.exchange.last_answered + 1, b"") == ""
        self.now += busy
        assert self.exchange.receive() is not None


@pytest.fixture
def loop():
    return Loop()


def test_an_answer_is_of_use_for_the_budget_of_a_step_that_waits(loop):
    for _ in range(2 * LEADS):
        loop.ask(busy=0.0)
    assert loop.exchange.useful_seconds == BUDGET


def test_an_answer_is_of_use_while_the_loop_is_busy(loop):
    for _ in range(LEADS):
        loop.ask(busy=0.03)
    assert loop.exchange.useful_seconds == pytest.approx(0.03)


def test_one_step_is_not_enough_to_know_how_long_a_loop_is_busy(loop):
    for _ in range(LEADS - 1):
        loop.ask(busy=0.03)
    assert loop.exchange.useful_seconds == BUDGET


def test_the_shortest_of_the_last_steps_counts(loop):
    for busy in (0.03, 0.02, *[0.03] * (LEADS - 2)):
        loop.ask(busy=busy)
    assert loop.exchange.useful_seconds == pytest.approx(0.02)


def test_a_loop_that_waits_again_has_its_budget_and_no_more(loop):
    for busy in (*[0.03] * LEADS, 0.0):
        loop.ask(busy=busy)
    assert loop.exchange.useful_seconds == BUDGET


def test_tamiyo_is_never_given_longer_than_the_longest_budget(loop):
    for _ in range(LEADS):
        loop.ask(busy=10.0)
    assert loop.exchange.useful_seconds == LONGEST_BUDGET_SECONDS
