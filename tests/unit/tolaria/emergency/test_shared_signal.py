from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.envelope import Keyring
from esper_servers.tolaria.emergency import shared_signal
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, HALT, NONE, NOTICE
from esper_servers.tolaria.emergency.shared_signal import (
    FILE_BYTES,
    RECORD_BYTES,
    RECORDS_AT,
    SharedSignal,
    place_for,
)

RUN = "run-1"
RECORD = 212
"""Bytes of a record with its MAC."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.signal"


@pytest.fixture
def opened(path, keyring):
    made = []

    def make(*, run_id=RUN, ring=None):
        made.append(SharedSignal(path, run_id=run_id, keyring=ring or keyring("trainer")))
        return made[-1]

    yield make
    for each in made:
        each.close()


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def test_what_one_writes_another_reads_once(opened):
    writer, reader = opened(), opened()
    assert reader.poll() is None
    written = writer.write(HALT, "stop, please: größer", raised_at_ns=7)
    found = reader.poll()
    assert found == written
    assert (found.level, found.reason, found.raised_at_ns) == (HALT, "stop, please: größer", 7)
    assert reader.poll() is None


def test_who_comes_later_reads_what_is_in_force(opened):
    opened().write(CONSERVATIVE, "before")
    assert opened().poll().level == CONSERVATIVE


def test_levels_follow_each_other_and_any_process_may_write(opened):
    one, other = opened(), opened()
    for level in (NOTICE, HALT, NONE, CONSERVATIVE):
        one.write(level, "why")
        assert other.poll().level == level
        other.write(NOTICE, "answer")
        assert one.poll().level == NOTICE


@given(reason=st.text(max_size=300), level=st.sampled_from([NONE, NOTICE, CONSERVATIVE, HALT]))
def test_any_reason_is_cut_to_its_room(tmp_path_factory, reason, level):
    ring = Keyring(role="trainer", active_key_id="k", issuer_keys={"k": bytes(32)}, received={})
    shared = SharedSignal(tmp_path_factory.mktemp("s") / "f", run_id=RUN, keyring=ring)
    other = SharedSignal(shared.path, run_id=RUN, keyring=ring)
    shared.write(level, reason)
    found = other.poll()
    assert found.level == level
    assert reason.startswith(found.reason.rstrip("\ufffd")) or "\0" in reason
    shared.close()
    other.close()


@pytest.mark.parametrize("place", [RECORDS_AT, RECORDS_AT + RECORD_BYTES], ids=["even", "odd"])
@pytest.mark.parametrize("torn_at", [0, 1, 8, 12, 20, 52, 100, 180, RECORD - 1])
def test_a_record_that_is_torn_anywhere_leaves_the_one_in_force(opened, path, place, torn_at):
    writer, reader = opened(), opened()
    writer.write(CONSERVATIVE, "first")
    if place == RECORDS_AT + RECORD_BYTES:
        writer.write(CONSERVATIVE, "second")
    in_force = reader.poll()
    # What a writer leaves that is killed while it fills the record that is not in force.
    overwrite(path, place, os.urandom(torn_at))
    assert reader.poll() is None
    assert opened().poll() == in_force
    writer.write(HALT, "third")
    assert reader.poll().reason == "third"


@pytest.mark.parametrize("offset", [0, 8, 12, 20, 52, 180, RECORD - 1])
def test_a_record_in_force_that_was_changed_is_passed_over(opened, path, offset):
    writer, reader = opened(), opened()
    writer.write(NOTICE, "well")
    reader.poll()
    writer.write(HALT, "stop")
    place = RECORDS_AT + offset
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))
    assert (reader.poll(), reader.current.level, reader.ignored) == (None, NOTICE, 1)
    assert reader.poll() is None
    assert reader.ignored == 1


def test_who_lacks_the_key_forges_nothing_and_reads_nothing(opened, keyring):
    reader = opened()
    foreign = Keyring(role="trainer", active_key_id="k1", issuer_keys={"k1": bytes(32)}, received={})
    for stranger in (opened(ring=foreign), opened(run_id="run-2"), opened(ring=keyring("operator"))):
        stranger.write(HALT, "forged")
        assert (reader.poll(), reader.current.level) == (None, NONE)
    assert reader.ignored == 3


def test_an_old_record_that_is_put_back_is_passed_over(opened, path):
    writer, reader = opened(), opened()
    writer.write(NOTICE, "well")
    before = path.read_bytes()
    writer.write(NOTICE, "still")
    writer.write(HALT, "stop")
    reader.poll()
    path.write_bytes(before)
    assert (reader.poll(), reader.current.level) == (None, HALT)


def test_after_a_rotation_both_keys_are_read(opened, keyring):
    old, new = bytes(32), bytes(range(32))
    both = {"old": old, "new": new}
    writer = opened(ring=Keyring(role="trainer", active_key_id="new", issuer_keys=both, received={}))
    reader = opened(ring=Keyring(role="trainer", active_key_id="old", issuer_keys=both, received={}))
    writer.write(HALT, "stop")
    assert reader.poll().level == HALT


def test_readers_acknowledge_what_they_have_seen(opened):
    writer, reader = opened(), opened()
    first = writer.write(NOTICE, "one")
    reader.poll()
    reader.acknowledge("rank-3")
    (ack,) = writer.acks(first.generation)
    assert (ack.name, ack.process_id, ack.generation) == ("rank-3", os.getpid(), first.generation)
    assert ack.seen_at_ns >= first.raised_at_ns
    assert writer.acks(writer.write(HALT, "two").generation) == []


def test_the_place_of_a_process_that_ended_is_used_again(opened, path, monkeypatch):
    monkeypatch.setattr(shared_signal, "ACKS", 1)
    writer, reader = opened(), opened()
    generation = writer.write(HALT, "stop").generation
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    overwrite(path, shared_signal.ACKS_AT, shared_signal._ACK.pack(ended.pid, 1, 1, b"gone"))
    reader.poll()
    reader.acknowledge("here")
    assert [ack.name for ack in writer.acks(generation)] == ["here"]


def test_the_file_is_of_its_owner_alone(opened, path):
    opened()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == FILE_BYTES


def test_a_file_that_others_may_open_is_refused(path, opened):
    path.touch(mode=0o644)
    with pytest.raises(OSError, match="of this user alone"):
        opened()


def test_a_link_is_not_followed(path, opened, tmp_path):
    (tmp_path / "target").touch(mode=0o600)
    path.symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"symbolic|levels|loop"):
        opened()


def test_a_full_memory_is_told_at_the_start(path, opened, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        opened()


def test_a_file_that_is_cut_short_raises_instead_of_ending_the_process(opened, path):
    reader = opened()
    os.truncate(path, 3)
    with pytest.raises(OSError, match="cut short"):
        reader.poll()


def test_a_file_that_was_spoiled_is_told_to_those_who_have_it_open_and_made_anew_by_the_next(opened, path):
    before = opened()
    before.write(HALT, "old")
    path.write_bytes(b"\xa5" * FILE_BYTES)
    with pytest.raises(OSError, match="no shared signal"):
        before.poll()
    writer, reader = opened(), opened()
    assert reader.poll() is None
    writer.write(HALT, "new")
    assert reader.poll().reason == "new"


def test_the_place_is_in_memory_in_a_folder_of_this_user_alone(tmp_path):
    memory, home = tmp_path / "shm", tmp_path / "home"
    memory.mkdir()
    place = place_for(RUN, home=home, memory=memory)
    assert place.parent == memory / f"esper-{os.geteuid()}"
    assert place != place_for("run-2", home=home, memory=memory)
    place.parent.chmod(0o755)  # As somebody else could have made it beforehand.
    assert place_for(RUN, home=home, memory=memory).is_relative_to(home)


def test_without_such_memory_the_place_is_below_the_home(tmp_path):
    assert place_for(RUN, home=tmp_path, memory=tmp_path / "none").is_relative_to(tmp_path)


WRITER = """
import os, signal, sys
from pathlib import Path
from esper_rpc.envelope import Keyring
from esper_servers.tolaria.emergency import shared_signal
ring = Keyring(role="trainer", active_key_id="k", issuer_keys={"k": bytes(32)}, received={})
shared = shared_signal.SharedSignal(Path(sys.argv[1]), run_id="run-1", keyring=ring)
left = int(sys.argv[2])

def write(descriptor, content, place):
    global left
    os.pwrite(descriptor, content[:left], place)
    if left < len(content):
        os.kill(os.getpid(), signal.SIGKILL)
    left -= len(content)

shared_signal._write = write
shared.write(4, "killed while it wrote this")
"""


@pytest.mark.parametrize("bytes_written", [0, 10, 100, 211, 212])
def test_a_writer_that_is_killed_leaves_the_record_in_force_and_no_lock(path, bytes_written):
    ring = Keyring(role="trainer", active_key_id="k", issuer_keys={"k": bytes(32)}, received={})
    reader = SharedSignal(path, run_id=RUN, keyring=ring)
    reader.write(CONSERVATIVE, "before")
    root = Path(__file__).resolve().parents[4]
    environ = {**os.environ, "PYTHONPATH": f"{root}:{root / 'servers'}:{root / 'clients'}"}
    killed = subprocess.run([sys.executable, "-c", WRITER, str(path), str(bytes_written)], env=environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert reader.poll() is None
    late = SharedSignal(path, run_id=RUN, keyring=ring)
    assert late.poll().reason == "before"
    late.write(HALT, "after")
    assert reader.poll().reason == "after"
    reader.close()
    late.close()


def test_a_reader_beside_a_busy_writer_sees_only_whole_records_in_order(opened):
    writer, reader, seen, wrote = opened(), opened(), [], threading.Event()

    def write():
        for number in range(300):
            writer.write(HALT if number % 2 else NOTICE, f"number {number}")
        wrote.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not wrote.is_set():
        if (found := reader.poll()) is not None:
            seen.append(found)
    thread.join()
    if (found := reader.poll()) is not None:
        seen.append(found)
    assert seen[-1].reason == "number 299"
    assert [each.generation for each in seen] == sorted(each.generation for each in seen)
    assert all(each.reason == f"number {each.generation - 1}" for each in seen)
