from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys

import pytest

from esper_rpc.journal import Journal

KILLS = 50
WRITER = """
import os
import sys
from pathlib import Path
from esper_rpc.journal import Journal

# One process for each line, forked: to import takes far longer than to write.
for line in sys.stdin:
    path, first = line.split()
    if pid := os.fork():
        os.waitpid(pid, 0)
        print("killed", flush=True)
        continue
    print(os.getpid(), flush=True)
    journal, number = Journal(Path(path)), int(first)
    while True:
        for _ in range(7):
            journal.append("decision", str(number), b"x" * 300)
            number += 1
        journal.flush()
        print(number, flush=True)
"""


@pytest.fixture
def writers():
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.stdin.close()


def test_what_was_acknowledged_survives_a_kill_at_any_moment(writers, tmp_path):
    path, dice, acknowledged = tmp_path / "journal.sqlite", random.Random(7), 0
    for _ in range(KILLS):
        acknowledged = write_until_killed(writers, path, acknowledged, dice)
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
    journal = Journal(path)
    numbers = {int(record.key) for record in journal.read("decision")}
    journal.close()
    assert set(range(acknowledged)) <= numbers


def write_until_killed(writers, path, start, dice):
    writers.stdin.write(f"{path} {start}\n")
    writers.stdin.flush()
    pid, acknowledged = int(writers.stdout.readline()), start
    # A random number of acknowledgements, and then somewhere inside the next batch.
    for _ in range(dice.randint(1, 20)):
        acknowledged = int(writers.stdout.readline())
    os.kill(pid, signal.SIGKILL)
    while (line := writers.stdout.readline()) != "killed\n":
        acknowledged = int(line)
    return acknowledged
