"""What the measuring of gradients costs; how much that is, is not judged here."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from esper_servers.cli.bench import app, isolation


@pytest.mark.parametrize("model", ["cnn_1m", "transformer_1m"])
def test_an_overlap_is_found_where_the_seed_lies_in_the_memory_of_the_host_and_nowhere_else(model):
    scene = isolation.Scene(model)
    found = {}
    for kind in isolation.KINDS:
        scene.use(kind)
        measuring = [scene.step() for _ in range(3)]
        found[kind] = (scene.violations > 0, measuring[-1] > 0.0)
    assert found == {"bare": (False, False), "apart": (False, True), "shared": (True, True)}


def test_a_seed_trains_on_in_memory_of_its_own_behind_a_block_in_that_of_the_host():
    scene = isolation.Scene("cnn_1m")
    scene.use("shared")
    scene.step()
    scene.use("apart")
    before = [own.clone() for own in scene._own]
    scene.step(), scene.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, scene._own, strict=True))


def test_a_run_has_the_keys_that_are_documented(monkeypatch):
    monkeypatch.setattr(isolation, "BLOCK", 1)
    found = isolation.compared(isolation.Scene("cnn_1m"), 2)
    assert set(found) == {"parameters", *isolation.KINDS}
    assert found["parameters"] == 963_466
    assert set(found["bare"]) == {"step_ms"}
    assert set(found["apart"]) == {"step_ms", "added_ms", "measuring_mean_ms", "measuring_max_ms"}
    assert found["shared"]["measuring_max_ms"] >= found["shared"]["measuring_mean_ms"] > 0


def test_a_model_that_there_is_not_is_refused_with_those_there_are():
    result = CliRunner().invoke(app, ["isolation", "--model", "cnn_2m"])
    assert result.exit_code == 2
    assert "transformer_25m" in result.output
