from __future__ import annotations

import random
import sqlite3
import subprocess
import sys

from esper_rpc.journal import Journal

KILLS = 50
WRITER = """
import sys
from pathlib import Path
from esper_rpc.journal import Journal

journal = Journal(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    for _ in range(7):
        journal.append("decision", str(number), b"x" * 300)
        number += 1
    journal.flush()
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path):
    path, dice, acknowledged = tmp_path / "journal.sqlite", random.Random(7), 0
    for _ in range(KILLS):
        acknowledged = write_until_killed(path, acknowledged, dice)
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
    journal = Journal(path)
    numbers = {int(record.key) for record in journal.read("decision")}
    journal.close()
    assert set(range(acknowledged)) <= numbers


def write_until_killed(path, start, dice):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)], stdout=subprocess.PIPE, text=True)
    acknowledged = start
    # A random number of acknowledgements, and then somewhere inside the next batch.
    for _ in range(dice.randint(1, 20)):
        acknowledged = int(process.stdout.readline())
    process.kill()
    for line in process.communicate()[0].splitlines():
        acknowledged = int(line) if line.isdigit() else acknowledged
    return acknowledged
