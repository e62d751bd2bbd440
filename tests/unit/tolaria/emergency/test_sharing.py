"""Two processes of one run on a host: what one raises, the other stands still for."""

from __future__ import annotations

import os
import threading

import pytest
from prometheus_client import REGISTRY

from esper_servers.tolaria.emergency.emergencies import SWITCHED_OFF
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, HALT, NONE, NOTICE
from esper_servers.tolaria.emergency.shared_signal import SharedSignal


def shown_as_degraded():
    return REGISTRY.get_sample_value("esper_tolaria_emergency_shared_signal_degraded")


@pytest.fixture
def pair(tmp_path, make_ward, keyring):
    """Two wards of the same run with one shared file."""
    made = [SharedSignal(tmp_path / "s", run_id="run-1", keyring=keyring("trainer")) for _ in range(2)]
    return [make_ward(shared=each) for each in made]


def test_a_halt_of_one_process_halts_the_other_at_its_next_look_and_is_acknowledged(pair):
    one, other = pair
    one.emergencies.alarm(HALT, "stop")
    assert not other.halt.is_engaged
    assert other.halt.check()
    assert (other.halt.reason, other.emergencies.level) == ("stop", HALT)
    assert [ack.process_id for ack in one.shared.acks(1)] == [os.getpid()]


def test_the_calm_of_either_ends_it_in_both(pair):
    one, other = pair
    one.emergencies.alarm(HALT, "stop")
    other.halt.check()
    other.emergencies.lower(NOTICE, "well")
    assert not one.halt.check()
    assert one.emergencies.level == NOTICE


def test_a_lower_alarm_does_not_cover_what_another_process_raised_meanwhile(pair):
    one, other = pair
    one.emergencies.alarm(HALT, "stop")
    other.emergencies.alarm(CONSERVATIVE, "slow")
    assert (one.halt.check(), other.halt.check()) == (True, True)


def test_a_new_start_of_the_run_forgets_what_an_earlier_one_left(pair):
    one, other = pair
    one.emergencies.alarm(HALT, "stop")
    other.emergencies.begin()
    assert not other.halt.check()
    assert (one.halt.check(), one.emergencies.level) == (False, NONE)


def test_a_thread_that_holds_goes_on_when_another_process_lowers_the_level(pair):
    one, other = pair
    one.emergencies.alarm(HALT, "stop")
    went_on = []
    thread = threading.Thread(target=lambda: went_on.append(other.halt.hold()))
    thread.start()
    one.emergencies.lower(NOTICE, "well")
    thread.join(30)
    assert went_on == [True]


def test_without_shared_memory_this_process_is_told_and_the_metric_says_so(make_ward):
    ward = make_ward(problem="No space left on device")
    assert (ward.emergencies.is_degraded, shown_as_degraded()) == (True, 1.0)
    ward.emergencies.alarm(HALT, "stop")
    assert ward.halt.is_engaged


def test_without_a_wish_for_it_nothing_is_degraded(make_ward):
    ward = make_ward(problem=SWITCHED_OFF)
    assert (ward.emergencies.is_degraded, shown_as_degraded()) == (False, 0.0)


def test_shared_memory_that_fails_later_is_told_once_and_done_without(pair, told):
    one, _ = pair
    os.truncate(one.shared.path, 3)
    one.emergencies.alarm(HALT, "stop")
    one.emergencies.poll()
    assert one.halt.is_engaged
    assert (one.emergencies.is_degraded, shown_as_degraded()) == (True, 1.0)
    assert [name for name, _ in told].count("shared_signal_degraded") == 1
