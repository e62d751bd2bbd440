"""Each example of a training runs under a real mesh, briefly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def environ(shared_mesh):
    # Answers may come late on a busy machine; how many came is not what is tested here.
    return {
        **os.environ, "ESPER_HOME": str(shared_mesh.home.directory), "ESPER_SESSION_STEP_BUDGET_MS": "50",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def run(environ, *command):
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=environ,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def number_after(word, output):
    return float(re.findall(rf"{word} ([\d.]+)", output)[-1])


def test_a_convolutional_network(environ):
    assert number_after("accuracy", run(environ, EXAMPLES / "train_cnn.py", "--epochs", "1")) > 0.5


def test_a_transformer_goes_on_from_its_checkpoint(environ, tmp_path):
    command = EXAMPLES / "train_transformer.py", "--steps", "60", "--checkpoint", tmp_path / "verses.pt"
    first, second = run(environ, *command), run(environ, *command)
    assert number_after("loss", second) < number_after("step 0 loss", first)
    assert number_after("step 0 loss", second) < number_after("step 0 loss", first)


def test_lightning(environ):
    pytest.importorskip("lightning")
    assert number_after("accuracy", run(environ, EXAMPLES / "train_lightning.py", "--epochs", "2")) > 0.5


def test_hugging_face(environ):
    pytest.importorskip("transformers")
    # Below what knowing nothing costs: the logarithm of how many letters there are.
    assert number_after("loss", run(environ, EXAMPLES / "train_huggingface.py", "--steps", "60")) < 4.0


def test_ranks_under_torchrun_end_with_the_same_weights(environ):
    output = run(environ, *TORCHRUN, EXAMPLES / "train_ddp.py", "--epochs", "2")
    weights = re.findall(r"weights (\w+)", output)
    assert len(weights) == 2
    assert len(set(weights)) == 1
    assert number_after("accuracy", output) > 0.5
