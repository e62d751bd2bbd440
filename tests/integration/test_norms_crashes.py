from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from structlog.testing import capture_logs

from esper_servers.policy.norms import PRIORS
from esper_servers.policy.norms_store import FILE_NAME, NormsStore, read_experience

KILLS = 25
WRITER = """
import os
import sys
from pathlib import Path
from esper_servers.policy.norms import PRIORS, Experience
from esper_servers.policy.norms_store import NormsStore

# One process for each line, forked: to import takes far longer than to write.
for line in sys.stdin:
    path, first = line.split()
    if pid := os.fork():
        os.waitpid(pid, 0)
        print("killed", flush=True)
        continue
    print(os.getpid(), flush=True)
    store, number = NormsStore(Path(path)), int(first)
    while True:
        # All four inputs have the same moments, so that a mixture of two saves would show.
        store.save([Experience(dict.fromkeys(PRIORS, (float(number), float(number))), 1)])
        print(number, flush=True)
        number += 1
"""


@pytest.fixture
def writers():
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.stdin.close()


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_norms_or_the_new_ones(writers, tmp_path):
    path, dice, saved = tmp_path / FILE_NAME, random.Random(7), 0
    for _ in range(KILLS):
        saved = write_until_killed(writers, path, saved, dice)
        found = read_experience(path.read_bytes()).moments
        mean = found["loss"][0]
        assert found == dict.fromkeys(PRIORS, (mean, mean))
        assert mean in {saved, saved + 1}
    with capture_logs() as logs:
        assert NormsStore.load(tmp_path).begin().moments == found
    assert logs == []


def write_until_killed(writers, path, start, dice):
    writers.stdin.write(f"{path} {start + 1}\n")
    writers.stdin.flush()
    pid, saved = int(writers.stdout.readline()), start
    for _ in range(dice.randint(1, 20)):
        saved = int(writers.stdout.readline())
    time.sleep(dice.random() * 0.002)  # Somewhere inside the saves that follow.
    os.kill(pid, signal.SIGKILL)
    while (line := writers.stdout.readline()) != "killed\n":
        saved = int(line)
    return saved
