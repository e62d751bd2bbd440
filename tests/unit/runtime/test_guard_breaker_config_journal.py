from __future__ import annotations

import itertools
import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.config import load, read_section
from esper_rpc.disk import require_writable
from esper_rpc.errors import ConfigError
from esper_rpc.guard import StepGuard
from esper_rpc.journal import Forgotten, ForgottenBefore, Journal, JournalConfig, Record
from esper_rpc.proto.leyline.v1 import CircuitState
from esper_rpc.testing import FakeClock

CLOSED, OPEN, HALF_OPEN = (
    CircuitState.CIRCUIT_STATE_CLOSED, CircuitState.CIRCUIT_STATE_OPEN, CircuitState.CIRCUIT_STATE_HALF_OPEN,
)  # fmt: skip


def test_an_answer_in_time_is_handed_over():
    guard = StepGuard()
    started = guard.arm(1)
    threading.Thread(target=guard.resolve, args=(1, "yes")).start()
    assert guard.wait(started, 5.0) == "yes"


def test_a_late_answer_is_counted_and_never_handed_to_the_next_step():
    guard = StepGuard()
    assert guard.wait(guard.arm(1), 0.001) is None
    started = guard.arm(2)
    assert not guard.resolve(1, "late")
    assert guard.wait(started, 0.001) is None
    assert (guard.late_answers, guard.misses) == (1, 2)


def test_an_answer_given_twice_counts_once():
    guard = StepGuard()
    started = guard.arm(1)
    assert guard.resolve(1, "a")
    assert not guard.resolve(1, "b")
    assert guard.wait(started, 0.001) == "a"


def test_a_breaker_opens_probes_once_and_closes_after_successes():
    clock, moves = FakeClock(), []
    config = BreakerConfig(failures=2, cool_down_seconds=10, successes=2)
    breaker = CircuitBreaker(config=config, clock=clock, on_transition=lambda a, b: moves.append((a, b)))
    for _ in range(2):
        assert breaker.allow()
        breaker.record_failure()
    assert not breaker.allow()
    clock.advance(10)
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.record_success()
    assert breaker.allow()
    breaker.record_success()
    assert moves == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]


def test_failures_count_only_in_a_row():
    breaker = CircuitBreaker(config=BreakerConfig(failures=2), clock=FakeClock())
    for _ in range(3):
        breaker.record_failure()
        breaker.record_success()
    assert breaker.state == CLOSED


def test_a_probe_that_fails_after_a_good_one_opens_again_and_all_of_them_are_to_succeed_anew():
    clock = FakeClock()
    breaker = CircuitBreaker(config=BreakerConfig(failures=2, cool_down_seconds=1, successes=2), clock=clock)
    breaker.record_failure()
    breaker.record_failure()
    for probes in ("good", "bad"), ("good",):
        clock.advance(1)
        for probe in probes:
            assert breaker.allow()
            breaker.record_success() if probe == "good" else breaker.record_failure()
        assert breaker.state == (OPEN if "bad" in probes else HALF_OPEN)


def test_a_failed_probe_opens_again():
    clock = FakeClock()
    breaker = CircuitBreaker(config=BreakerConfig(failures=1, cool_down_seconds=1), clock=clock)
    breaker.record_failure()
    clock.advance(1)
    assert breaker.allow()
    breaker.record_failure()
    assert breaker.state == OPEN


def test_a_probe_that_is_let_go_counts_for_nothing_and_another_may_follow():
    clock = FakeClock()
    breaker = CircuitBreaker(config=BreakerConfig(failures=1, cool_down_seconds=1, successes=1), clock=clock)
    breaker.record_failure()
    clock.advance(1)
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.let_go()
    assert (breaker.state, breaker.consecutive_failures) == (HALF_OPEN, 1)
    assert breaker.allow()


def test_the_environment_wins_over_the_file(tmp_path):
    path = tmp_path / "mesh.toml"
    path.write_text("[breaker]\nfailures = 7\ncool_down_seconds = 3\n")
    config = load(BreakerConfig, "breaker", path=path, environ={"ESPER_BREAKER_FAILURES": "9"})
    assert (config.failures, config.cool_down_seconds) == (9, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[breaker]\nfailures = 0", "failures = 0 is out of range; allowed is 1 to 1000"),
        ("[breaker]\nfailures = 'many'", r"\[breaker\] failures = 'many' is not a int"),
        ("[breaker]\nfailuers = 3", "has no setting 'failuers'"),
        ("[breaker", "is not valid TOML"),
    ],
)
def test_a_bad_setting_names_its_key_and_what_is_allowed(tmp_path, text, message):
    path = tmp_path / "mesh.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(BreakerConfig, "breaker", path=path, environ={})


def test_a_journal_returns_what_was_flushed_after_a_restart(tmp_path):
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    for i in range(1000):
        journal.append("decision", f"d{i}", str(i).encode())
    journal.flush()
    again = Journal(path)
    assert [r.key for r in again.read("decision")] == [f"d{i}" for i in range(1000)]
    assert again.find("decision", "d7").body == b"7"
    journal.close()
    again.close()


@pytest.fixture
def operations(monkeypatch):
    """Counts the operations of SQLite's virtual machine that a read takes."""
    connect = sqlite3.connect

    def count_of(read):
        counted = itertools.count()

        def connect_counting(*arguments, **options):
            connection = connect(*arguments, **options)
            connection.set_progress_handler(lambda: next(counted) < 0, 1)
            return connection

        with monkeypatch.context() as patched:
            patched.setattr(sqlite3, "connect", connect_counting)
            read()
        return next(counted)

    return count_of


def test_a_record_is_found_as_quickly_among_many_as_among_few(tmp_path, operations):
    journal = Journal(tmp_path / "journal.sqlite")

    def cost():
        return [
            operations(lambda: journal.find("k", "7")),
            operations(lambda: journal.find_all("k", ["3", "7"])),
            operations(lambda: journal.page("k", after=3, limit=2)),
        ]

    def write(numbers):
        for number in numbers:
            journal.append("k", str(number), b"")
        journal.flush()

    write(range(10))
    among_few = cost()
    write(range(10, 5000))
    assert all(many < 2 * few for few, many in zip(among_few, cost(), strict=True))
    journal.append("k", "7", b"newer")
    journal.flush()
    assert journal.find_all("k", ["3", "7"])["7"].body == b"newer"
    journal.close()


def test_a_full_queue_drops_what_comes_and_counts_it(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite", config=JournalConfig(queue_records=2))
    begun, may_go = threading.Event(), threading.Event()

    def hold_up():
        begun.set()
        assert may_go.wait(10)
        return ()

    before = lost_in_the_queue()
    journal.append_made(hold_up)
    assert begun.wait(10)
    for number in range(5):
        journal.append("k", str(number), b"")
    journal.append_made(list)
    assert journal.queued == 2
    may_go.set()
    journal.flush()
    assert (journal.dropped, lost_in_the_queue() - before, journal.queued) == (4, 4, 0)
    assert [record.key for record in journal.read("k")] == ["0", "1"]
    journal.close()


def lost_in_the_queue():
    return REGISTRY.get_sample_value("esper_journal_records_lost_total", {"cause": "queue"})


def test_a_full_journal_drops_its_oldest_tenth(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", config=JournalConfig(max_bytes=65_536, commit_records=1))
    for i in range(40):
        journal.append("k", str(i), bytes(4096))
    journal.flush()
    keys = [int(r.key) for r in journal.read("k")]
    assert keys == list(range(keys[0], 40))
    assert keys[0] > 0
    journal.close()


def test_a_full_journal_drops_no_record_of_a_kind_that_is_kept(tmp_path):
    config = JournalConfig(max_bytes=65_536, commit_records=1)
    journal = Journal(tmp_path / "j.sqlite", config=config, kept={"dear"})
    for i in range(64):
        journal.append("dear", str(i), bytes(16))
        journal.append("k", str(i), bytes(4096))
    journal.flush()
    assert [int(r.key) for r in journal.read("dear")] == list(range(64))
    left = [int(r.key) for r in journal.read("k")]
    assert 0 < len(left) < 32
    assert left == sorted(left)
    assert left[-1] == 63
    journal.close()


def test_what_is_forgotten_is_what_was_written_before(tmp_path):
    journal = Journal(tmp_path / "j.sqlite")
    journal.append("k", "a", b"1")
    journal.append_made(lambda: [Forgotten("k", "a"), Record("k", "a", b"2"), Record("k", "b", b"3")])
    journal.append_made(lambda: [Forgotten("k", "b"), Forgotten("other", "a")])
    journal.flush()
    assert [(r.key, r.body) for r in journal.read("k")] == [("a", b"2")]
    assert journal.find_all("k", ["a", "b"]) == {"a": Record("k", "a", b"2")}
    assert (journal.count("k"), journal.count("other")) == (1, 0)
    journal.close()


def test_what_stands_before_a_position_is_forgotten_of_its_kind_only(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    for key in "abca":
        journal.append("k", key, b"")
        journal.append("other", key, b"")
    journal.flush()
    before = journal.position("k", "c")
    journal.append_made(lambda: [ForgottenBefore("k", before)])
    journal.flush()
    assert [record.key for record in journal.read("k")] == ["c", "a"]
    assert [record.key for record in journal.read("other")] == ["a", "b", "c", "a"]
    journal.close()


def test_a_position_is_that_of_the_newest_record_of_a_key(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    for key in "aba":
        journal.append("k", key, b"")
    journal.flush()
    assert [position for position, _ in journal.page("k", after=0, limit=9)][-1] == journal.position("k", "a")
    assert journal.position("k", "c") is None
    journal.close()


def test_a_flush_beside_a_close_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("esper_rpc.journal.FLUSH_LOOK_SECONDS", 0.01)
    journal = Journal(tmp_path / "j.sqlite")
    journal.close()
    journal.flush()


def test_a_full_device_is_a_clear_error_at_start():
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(Path("/dev/full/state"))


def test_a_state_directory_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "state")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_state_directory_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "state")


BROKEN_TOML = [b"\xff", b"a = " + b"[" * 100_000, b"mesh = 1", b"mesh = [1]", b"mesh = 1979-05-27", b"[mesh"]


@pytest.mark.parametrize("content", BROKEN_TOML, ids=lambda content: content[:12])
def test_a_broken_file_is_a_clear_error(tmp_path, content):
    path = tmp_path / "mesh.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mesh\.toml"):
        read_section(path, "mesh")


def test_a_directory_in_the_place_of_a_file_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_section(tmp_path, "mesh")


@dataclass(frozen=True)
class Counted:
    max_queue: int = 1


def test_an_infinite_number_of_things_is_a_clear_error(tmp_path):
    path = tmp_path / "esper.toml"
    path.write_text("[journal]\nmax_queue = inf\n")
    with pytest.raises(ConfigError, match="is not a int"):
        load(Counted, "journal", path=path, environ={})
