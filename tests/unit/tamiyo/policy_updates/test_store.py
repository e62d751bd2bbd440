from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_servers.tamiyo.policy_updates.store import MOST_KEPT, Entry, Lineage, PolicyStore

START = Lineage((Entry("shipped-1"),), 1)


@pytest.fixture
def store(tmp_path):
    return PolicyStore(tmp_path, START)


def test_before_anything_was_written_the_shipped_policy_is_live(store):
    assert store.read() == START


def test_what_was_written_is_read_again(store, tmp_path):
    entry = store.keep("v-2", b"weights")
    store.write(START.grown(entry, 2))
    found = PolicyStore(tmp_path, START).read()
    assert (found.live, found.highest) == (entry, 2)
    assert store.path_of(found.live).read_bytes() == b"weights"


def test_after_a_rollback_the_highest_version_stands(store):
    lineage = START.grown(store.keep("v-5", b"weights"), 5).shortened()
    store.write(lineage)
    assert (store.read().live, store.read().highest) == (START.live, 5)


def test_a_shipped_policy_above_every_version_that_was_accepted_is_the_highest(store, tmp_path):
    store.write(START.grown(store.keep("v-5", b"weights"), 5))
    assert PolicyStore(tmp_path, Lineage((Entry("shipped-9"),), 9)).read().highest == 9


@given(st.lists(st.one_of(st.integers(2, 50), st.none()), max_size=40))
def test_whatever_comes_the_shipped_policy_stays_and_the_highest_never_falls(steps):
    lineage, highest = START, START.highest
    for number in steps:
        grown = lineage.shortened() if number is None else lineage.grown(Entry(f"v-{number}", "file"), number)
        assert grown.highest >= highest
        assert grown.entries[0] == START.entries[0]
        assert len(grown.entries) <= MOST_KEPT
        lineage, highest = grown, grown.highest


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"highest": 3}', b'{"highest": "x", "entries": []}',
                b'{"highest": 3, "entries": [{"version": "v", "file": "../../etc/passwd"}]}',
                b'{"highest": 3, "entries": [{"version": "v", "file": ""}]}', b'{"highest": 3, "entries": 7}'],
)  # fmt: skip
def test_a_lineage_that_cannot_be_read_leaves_the_shipped_policy(store, tmp_path, content):
    (tmp_path / "lineage.json").write_bytes(content)
    assert store.read() == START


def test_files_that_no_lineage_names_are_removed(store, tmp_path):
    kept, dropped = store.keep("v-2", b"kept"), store.keep("v-3", b"dropped")
    store.sweep([kept])
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [kept.file]
    assert not store.path_of(dropped).exists()


SWAP = """
import os, signal, sys
from pathlib import Path

from esper_servers.tamiyo.policy_updates.store import Entry, Lineage, PolicyStore

left = int(sys.argv[2])

def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

for name in ("open", "fsync", "close"):
    setattr(os, name, counted(getattr(os, name)))
for name in ("open", "replace", "unlink"):
    setattr(Path, name, counted(getattr(Path, name)))
store = PolicyStore(Path(sys.argv[1]), Lineage((Entry("shipped-1"),), 1))
lineage = store.read()
entry = store.keep("v-3", b"new weights")
store.write(lineage.grown(entry, 3))
store.sweep([entry])
print("done")
"""


def test_a_kill_at_any_point_of_a_swap_leaves_the_old_policy_or_the_new_one(tmp_path):
    ended = False
    for kill_at in range(1, 40):
        directory = tmp_path / str(kill_at)
        before = PolicyStore(directory, START)
        before.write(START.grown(before.keep("v-2", b"old weights"), 2))
        swap = subprocess.run(
            [sys.executable, "-c", SWAP, str(directory), str(kill_at)], capture_output=True, text=True, check=False
        )
        after = PolicyStore(directory, START)
        lineage = after.read()
        content = after.path_of(lineage.live).read_bytes()
        assert (lineage.live.version, lineage.highest, content) in {
            ("v-2", 2, b"old weights"), ("v-3", 3, b"new weights"),
        }  # fmt: skip
        ended = swap.stdout == "done\n"
        if ended:
            break
    assert ended
    assert lineage.live.version == "v-3"
