"""What the demo trains, with a mesh and without."""

from __future__ import annotations

import pytest
import torch

from esper_rpc.testing import fake_mesh
from esper_servers.cli.demo.training import TrainingConfig, train

STEPS = 24


@pytest.fixture
def environ(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    with fake_mesh(tmp_path) as mesh:
        for name, value in mesh.environ.items():
            monkeypatch.setenv(name, value)
        yield mesh


def run(**settings):
    events = []
    history = train(TrainingConfig(steps=STEPS, batch=32, report_every=8, **settings), events.append)
    return history, events


def test_a_mesh_that_answers_nothing_to_do_leaves_the_training_as_it_is(environ):
    with_mesh, events = run(mesh=True)
    without, _ = run(mesh=False)
    assert with_mesh.losses == without.losses
    assert len(with_mesh.mesh_ms) == len(with_mesh.work_ms) == STEPS
    assert without.mesh_ms == []
    assert sum(events[-1]["reasons"].values()) == STEPS


def test_progress_and_the_result_are_told_as_events(environ):
    _, events = run(mesh=True)
    assert [event.get("step") for event in events] == [8, 16, 24, None]
    assert events[-1]["event"] == "result"
    assert events[-1]["history"]["accuracies"]
