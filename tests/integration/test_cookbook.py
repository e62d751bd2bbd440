"""Every command of docs/cookbook.md does what the page says, against a real mesh with a training run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from esper_client import attach
from esper_client.discovery import find_mesh
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.cli.processes import Supervisor

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Recipe(NamedTuple):
    script: str
    expected: tuple[str, ...]

    @property
    def exit_code(self):
        found = re.search(r"^# exits with (\d+)$", self.script, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def name(self):
        return re.findall(r"--list-\w+|\w+(?=\"(?:\)|\s|$))", self.script)[-1]


def read_recipes(text):
    """Pair each `sh` block with the `text` block after it; the first one prepares the shell."""
    blocks = [(kind, body) for kind, body in BLOCK.findall(text) if kind in ("sh", "text")]
    assert [kind for kind, _ in blocks] == ["sh", *("sh", "text") * ((len(blocks) - 1) // 2)]
    bodies = [body for _, body in blocks]
    return bodies[0], [Recipe(*pair) for pair in zip(bodies[1::2], map(_lines, bodies[2::2]), strict=True)]


def _lines(body):
    return tuple(line.strip() for line in body.splitlines())


def matches(expected, line):
    """Whether a line of output is the expected one; JSON may or may not go on with a comma, or differ in spaces."""
    pattern = ".*".join(re.escape(part) for part in _plain(expected).split("…"))
    return re.fullmatch(pattern, _plain(line)) is not None


def _plain(line):
    return re.sub(r"\s+", " ", line).strip().rstrip(",")


PREPARATION, RECIPES = read_recipes((ROOT / "docs" / "cookbook.md").read_text())


@pytest.fixture(scope="module")
def home(seeded_home):
    return seeded_home()


@pytest.fixture(scope="module")
def mesh(home):
    with Supervisor(home, dict(os.environ)) as supervisor:
        yield supervisor


@pytest.fixture(scope="module")
def training(home, mesh):
    """A run that has carried out a command."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    address = find_mesh({"ESPER_HOME": str(home.directory)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(model, optimizer, mesh=address, run_id="cookbook", step_budget_ms=50.0) as session:
        deadline, outcomes = time.monotonic() + PATIENCE_SECONDS, []
        while not any(outcome.result == CommandOutcome.RESULT_APPLIED for outcome in outcomes):
            assert time.monotonic() < deadline, dict(session.reasons)
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            outcomes += session.step(loss.detach())
        yield session


def run(recipe, home, kasmina):
    environ = {
        **os.environ, "ESPER_HOME": str(home.directory), "kasmina": kasmina,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = f"{PREPARATION}\n{recipe.script}"
    command = ["bash", "-eu", "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_gives_the_output_that_the_page_shows(recipe, home, training):
    result = run(recipe, home, training.kasmina_address)
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == recipe.exit_code, output
    missing = [line for line in recipe.expected if not any(matches(line, found) for found in output.splitlines())]
    assert not missing, output


def test_every_call_by_buf_stands_in_a_block_that_is_run():
    run_by_tests = PREPARATION + "".join(recipe.script for recipe in RECIPES)
    blocks = BLOCK.findall((ROOT / "docs" / "cookbook.md").read_text())
    others = "".join(body for kind, body in blocks if kind not in ("sh", "text"))
    assert "buf curl" in run_by_tests
    assert not re.search(r"\bbuf curl\b|\bask ", others)


def test_every_service_and_method_of_the_grpcurl_section_is_one_that_is_called():
    section = (ROOT / "docs" / "cookbook.md").read_text().partition("## The same with grpcurl")[2]
    calls = [line for line in section.splitlines() if re.search(r"\$\w+ [\w.]+/\w+$", line)]
    called = {shlex.split(line)[-1] for line in calls}
    assert len(called) >= 8
    assert all(f"/{method}" in "".join(recipe.script for recipe in RECIPES) for method in called)
