from __future__ import annotations

import random
import subprocess
import sys
import time

from structlog.testing import capture_logs

from esper_servers.policy.norms import PRIORS
from esper_servers.policy.norms_store import FILE_NAME, NormsStore, read_experience

KILLS = 25
WRITER = """
import sys
from pathlib import Path
from esper_servers.policy.norms import PRIORS, Experience
from esper_servers.policy.norms_store import NormsStore

store = NormsStore(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    # All four inputs have the same moments, so that a mixture of two saves would show.
    store.save([Experience(dict.fromkeys(PRIORS, (float(number), float(number))), 1)])
    print(number, flush=True)
    number += 1
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_norms_or_the_new_ones(tmp_path):
    path, dice, saved = tmp_path / FILE_NAME, random.Random(7), 0
    for _ in range(KILLS):
        saved = write_until_killed(path, saved, dice)
        found = read_experience(path.read_bytes()).moments
        mean = found["loss"][0]
        assert found == dict.fromkeys(PRIORS, (mean, mean))
        assert mean in {saved, saved + 1}
    with capture_logs() as logs:
        assert NormsStore.load(tmp_path).begin().moments == found
    assert logs == []


def write_until_killed(path, start, dice):
    command = [sys.executable, "-c", WRITER, str(path), str(start + 1)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    saved = start
    for _ in range(dice.randint(1, 20)):
        saved = int(process.stdout.readline())
    time.sleep(dice.random() * 0.002)  # Somewhere inside the saves that follow.
    process.kill()
    for line in process.communicate()[0].splitlines():
        saved = int(line) if line.isdigit() else saved
    return saved
