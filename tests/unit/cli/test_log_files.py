from __future__ import annotations

import shutil

import pytest

from esper_servers.cli.home import Home
from esper_servers.cli.log_files import rotate, rotated
from esper_servers.cli.logs import followed, merged
from esper_servers.cli.processes import ServicePlan, Supervisor


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "tamiyo.log"
    file.write_text('{"event": "first", "timestamp": "1"}\n')
    return file


def events(entries):
    return [entry["event"] for entry in entries]


def test_a_small_log_is_left_alone_and_a_missing_one_too(log):
    assert not rotate(log, most_bytes=1000)
    assert not rotate(log.with_name("urza.log"), most_bytes=0)
    assert not rotated(log).exists()


def test_a_large_log_is_copied_aside_and_whoever_has_it_open_writes_on_from_its_start(log):
    with log.open("a") as service:
        assert rotate(log, most_bytes=10)
        service.write('{"event": "second", "timestamp": "2"}\n')
    assert log.read_text() == '{"event": "second", "timestamp": "2"}\n'
    assert rotated(log).read_text() == '{"event": "first", "timestamp": "1"}\n'
    assert events(merged({"tamiyo": log})) == ["first", "second"]
    assert rotate(log, most_bytes=10)
    assert events(merged({"tamiyo": log})) == ["second"]
    assert sorted(file.name for file in log.parent.iterdir()) == ["tamiyo.log", "tamiyo.log.1"]


def test_without_room_for_a_copy_nothing_is_lost(log, monkeypatch):
    before = log.read_text()

    def fill_up(_source, target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    with pytest.raises(OSError, match="No space"):
        rotate(log, most_bytes=10)
    assert log.read_text() == before
    assert [file.name for file in log.parent.iterdir()] == ["tamiyo.log"]


def test_whoever_follows_a_log_goes_on_when_it_was_emptied(log, monkeypatch):
    lines = iter(['{"event": "second", "timestamp": "2"}\n', None, '{"event": "third"}\n'])

    def write_instead_of_waiting(_seconds):
        line = next(lines)
        if line is None:
            rotate(log, most_bytes=10)
        else:
            with log.open("a") as service:
                service.write(line)

    monkeypatch.setattr("esper_servers.cli.logs.time.sleep", write_instead_of_waiting)
    entries = followed({"tamiyo": log})
    assert (next(entries)["event"], next(entries)["event"]) == ("second", "third")


def test_a_supervisor_bounds_the_logs_of_its_services(tmp_path, monkeypatch):
    monkeypatch.setattr("esper_servers.cli.processes.MOST_LOG_BYTES", 10)
    supervisor = Supervisor(Home(tmp_path), {}, [ServicePlan(name="urza")])
    supervisor.services["urza"] = None
    file = supervisor.home.log_file("urza")
    file.parent.mkdir()
    file.write_text("x" * 11)
    supervisor.rotate_logs()
    assert rotated(file).read_text() == "x" * 11
