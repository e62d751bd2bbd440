"""The README's code and commands, and the examples, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
PREAMBLE = """
import torch
from torch import nn

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss()
loader = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(300)]
"""
EPILOGUE = """
print("answered", mesh.reasons["nominal"] + mesh.reasons["command"])
"""


def blocks(language, after=""):
    """The code blocks of a language behind a heading."""
    return re.findall(rf"```{language}\n(.*?)```", README.partition(after)[2] if after else README, re.DOTALL)


def commands(block):
    """What a console block tells the reader to type, without remarks."""
    joined = block.replace("\\\n", " ")
    return [line[2:].partition("  #")[0].strip() for line in joined.splitlines() if line.startswith("$ ")]


def shell(command, environ, timeout=120):
    finished = subprocess.run(
        ["bash", "-euc", command], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert finished.returncode == 0, f"{command}\n{finished.stderr[-2000:]}"
    return finished.stdout


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    home = tmp_path_factory.mktemp("readme") / "mesh"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "ESPER_HOME": str(home),
        "O": f"{home}/identities/operator-local",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def mesh(environ):
    """The section `A mesh of your own`, line by line; `esper up` stays in the background as a reader would have it."""
    lines = commands(blocks("console", "## A mesh of your own")[0])
    assert lines[0].startswith("export ESPER_HOME=")
    up = None
    try:
        for line in lines[1:]:
            if line == "esper up":
                up = subprocess.Popen(["esper", "up"], env=environ, stderr=subprocess.PIPE, text=True)
                assert any("wrote" in text for text in up.stderr)
            else:
                shell(line, environ)
        yield tomllib.loads((Path(environ["ESPER_HOME"]) / "mesh.toml").read_text())["mesh"]
    finally:
        if up is not None:
            up.terminate()
            up.communicate(timeout=30)


def test_the_loop_of_the_readme_gets_answers(mesh, environ):
    code = textwrap.dedent(PREAMBLE) + blocks("python")[0] + EPILOGUE
    answered = subprocess.run(
        [sys.executable, "-c", code], env={**environ, "ESPER_SESSION_STEP_BUDGET_MS": "100"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr[-2000:]
    assert int(answered.stdout.split()[-1]) > 0


def test_the_buf_curl_command_of_the_readme_answers(mesh, environ):
    lines = commands(blocks("console", "## Looking at a running mesh")[0])
    command = next(line for line in lines if line.startswith("buf curl"))
    assert '"policyVersion"' in shell(command.replace("127.0.0.1:PORT", mesh["tamiyo"]), environ)


def test_the_digits_example_trains_under_the_mesh(mesh, environ):
    output = shell(f"{sys.executable} examples/train_digits.py --epochs 2", environ)
    assert float(output.split()[-1]) > 0.5


def test_the_digits_example_trains_without_a_mesh(tmp_path, environ):
    output = shell(
        f"{sys.executable} -W ignore examples/train_digits.py --epochs 1", {**environ, "ESPER_HOME": str(tmp_path)}
    )
    assert "accuracy" in output
