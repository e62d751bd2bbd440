"""A rank beside the first one stands still with the run, by the memory that they share."""

from __future__ import annotations

import os

import pytest

from esper_client.halt import HaltSwitch
from esper_servers.tolaria.emergency.followed_halt import FollowedHalt
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, HALT, NOTICE
from esper_servers.tolaria.emergency.shared_signal import SharedSignal


@pytest.fixture
def run(tmp_path, keyring):
    """What the first rank writes."""
    return SharedSignal(tmp_path / "s", run_id="run-1", keyring=keyring("trainer"))


@pytest.fixture
def halt():
    return HaltSwitch()


@pytest.fixture
def followed(tmp_path, keyring, halt):
    return FollowedHalt(SharedSignal(tmp_path / "s", run_id="run-1", keyring=keyring("trainer")), halt, "rank 1")


def test_it_stands_still_at_its_next_look_and_says_so(run, halt, followed):
    run.write(HALT, "stop")
    assert not halt.is_engaged
    assert halt.check()
    assert halt.reason == "stop"
    assert [(ack.process_id, ack.name) for ack in run.acks(1)] == [(os.getpid(), "rank 1")]


@pytest.mark.parametrize("level", [NOTICE, CONSERVATIVE])
def test_it_goes_on_when_the_level_is_lowered(run, halt, followed, level):
    run.write(HALT, "stop")
    assert halt.check()
    run.write(level, "well")
    assert not halt.check()


def test_a_halt_ends_with_the_run_that_is_followed(run, halt, followed):
    run.write(HALT, "stop")
    assert halt.check()
    followed.close()
    assert not halt.check()


def test_memory_that_cannot_be_read_stops_nobody(run, halt, followed):
    run.write(HALT, "stop")
    assert halt.check()
    os.close(followed._shared._descriptor)
    assert not halt.check()
    run.write(HALT, "again")
    assert not halt.check()
