"""Sessions that ask nobody: a loop that is written for a mesh runs without one, and on every rank."""

from __future__ import annotations

import re

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from esper_client import FollowerSession, TrainingSession
from esper_rpc.errors import InvalidRequest
from esper_rpc.testing import TemporaryMesh
from esper_servers.trainer import DetachedSession

INNER = {
    "after_step", "ask_epoch", "close_with", "describe_epoch", "features", "host", "move", "open_again", "spawn",
    "take_epoch",
}  # fmt: skip
"""What the trainer runtime uses, and no loop."""


@pytest.fixture
def session(rig, tmp_path):
    """A session with a mesh that is not there."""
    identity = TemporaryMesh(tmp_path).identity("trainer")
    with TrainingSession(host=rig.host, identity=identity, tamiyo_address="127.0.0.1:1", run_id="run") as running:
        yield running


@pytest.mark.parametrize("quiet", [DetachedSession(nn.Linear(1, 1)), FollowerSession(None, "run")], ids=type)
def test_whatever_a_loop_may_look_at_is_there_in_every_session(session, quiet):
    names = {name for name in dir(session) if not name.startswith("_")} - INNER
    assert [name for name in sorted(names) if not hasattr(quiet, name)] == []
    assert (quiet.halted, quiet.hold(), quiet.timings.summary(), quiet.guard.misses) == (False, True, {}, 0)
    quiet.listen(print)


def test_a_step_in_two_halves_is_one_and_one_that_was_not_finished_is_finished_first():
    session = DetachedSession(nn.Linear(1, 1))
    session.begin_step(0.5)
    session.begin_step(0.5)
    session.finish_step()
    session.finish_step()
    session.step(0.5)
    assert session.global_step == 3


def test_a_run_begun_without_a_mesh_goes_on_with_one_and_back(rig, session):
    alone = DetachedSession(rig.model)
    alone.start_epoch(2)
    alone.step(0.5)
    before = rig.host.state_dict()
    session.load_state_dict(alone.state_dict())
    assert (session.epoch, session.global_step) == (2, 1)
    assert rig.host.state_dict()["digests"] == before["digests"]
    session.step(0.4)
    alone.load_state_dict(session.state_dict())
    assert (alone.epoch, alone.global_step) == (2, 2)


def test_the_empty_state_is_that_of_a_new_run(session):
    session.load_state_dict({})
    assert (session.epoch, session.global_step) == (0, 0)


@pytest.mark.parametrize("state", [None, "state", torch.optim.SGD([torch.zeros(1)]).state_dict(), {"epoch": 1}])
def test_what_is_no_state_is_refused_and_changes_nothing(session, state):
    with pytest.raises(InvalidRequest, match="no state of a session"):
        session.load_state_dict(state)
    assert (session.epoch, session.global_step) == (0, 0)


def test_a_state_that_the_host_refuses_changes_nothing(session):
    state = {"epoch": 7, "global_step": 70, "host": session.host.state_dict() | {"version": 1}}
    with pytest.raises(InvalidRequest, match="version 1"):
        session.load_state_dict(state)
    assert (session.epoch, session.global_step) == (0, 0)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"loss": None}, "loss must be a number"),
        ({"loss": torch.tensor([1.0, 2.0])}, "loss must be a number"),
        ({"samples": "many"}, "samples must be a number"),
        ({"gradient_norm": "big"}, "gradient_norm must be a number"),
        ({"metrics": {"accuracy": "good"}}, r"metrics\['accuracy'\] must be a number"),
        ({"metrics": [1.0]}, "metrics must be a mapping of names to numbers, not a list"),
        ({"metrics": {1: 1.0}}, "metrics must be named by strings"),
    ],
)
def test_what_is_no_number_is_told_once_in_one_line_and_the_step_ends(session, given, problem):
    with capture_logs() as logged:
        for _ in range(3):
            assert session.step(**({"loss": 0.5} | given)) == []
    assert (session.reasons, session.global_step) == ({"bad_argument": 3}, 3)
    [entry] = [entry for entry in logged if entry["event"] == "session_step_failed"]
    assert re.match(problem, entry["problem"])
    assert entry.get("exc_info") is None


@pytest.mark.parametrize("given", ["x", None, 1.5, -1, 2**32, torch.tensor([1, 2])])
@pytest.mark.parametrize("kind", ["with a mesh", "without"])
def test_what_is_no_number_of_an_epoch_is_told_at_once_and_the_epoch_goes_on(session, kind, given):
    running = session if kind == "with a mesh" else DetachedSession(nn.Linear(1, 1))
    running.start_epoch(torch.tensor(3))
    running.step("none")
    with capture_logs() as logged:
        running.start_epoch(given)
    assert running.epoch == 3
    assert running.reasons["bad_argument"] >= 1
    [entry] = [entry for entry in logged if entry["event"] == "session_step_failed"]
    assert re.match("epoch must be a whole number from 0", entry["problem"])
    running.start_epoch(4)
    assert running.epoch == 4


def test_an_epoch_that_the_host_cannot_begin_never_reaches_the_loop(session, monkeypatch):
    monkeypatch.setattr(session.host, "update_epoch", lambda _epoch: 1 / 0)
    session.start_epoch(1)
    assert (session.epoch, session.reasons["internal_error"]) == (1, 1)
