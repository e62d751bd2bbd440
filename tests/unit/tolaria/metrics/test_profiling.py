"""Traces of training steps, on request."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from esper_servers.tolaria.metrics.profiling import StepProfiler


@pytest.fixture
def profiler(tmp_path):
    return StepProfiler(tmp_path / "traces")


def train(profiler, steps):
    model = nn.Linear(4, 2)
    for _ in range(steps):
        with profiler.step(), torch.profiler.record_function("training_step"):
            model(torch.randn(8, 4)).sum().backward()


def steps_in(path):
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == "training_step" and event.get("cat") == "user_annotation" for event in events)


def test_nothing_is_traced_unless_asked_for(profiler, tmp_path):
    train(profiler, 3)
    assert not profiler.is_tracing
    assert not (tmp_path / "traces").exists()


def test_as_many_steps_are_traced_as_were_asked_for(profiler):
    path = profiler.request(steps=2)
    train(profiler, 1)
    assert profiler.is_tracing
    assert not path.exists()
    train(profiler, 3)
    assert not profiler.is_tracing
    assert steps_in(path) == 2


def test_a_trace_that_is_cut_short_is_written_at_the_end(profiler):
    path = profiler.request(steps=100)
    train(profiler, 3)
    profiler.close()
    assert steps_in(path) == 3


def test_a_step_that_raises_ends_its_trace_and_raises_its_own_error(profiler):
    path = profiler.request(steps=1)
    with pytest.raises(KeyError), profiler.step():
        raise KeyError("user")
    assert path.exists()


def test_a_trace_that_cannot_be_written_costs_nothing_but_itself(tmp_path):
    (tmp_path / "traces").write_text("a file is in the way")
    profiler = StepProfiler(tmp_path / "traces")
    profiler.request(steps=1)
    train(profiler, 2)
    assert not profiler.is_tracing


def test_while_the_user_profiles_the_training_goes_on(profiler):
    path = profiler.request(steps=1)
    with torch.profiler.profile():
        train(profiler, 2)
    train(profiler, 1)
    assert not profiler.is_tracing
    assert not path.with_suffix(".part").exists()


@pytest.mark.parametrize("asked", [{"steps": 0}, {"steps": 1001}, {"name": "../elsewhere"}, {"name": "a/b"}])
def test_a_request_that_makes_no_sense_is_refused(profiler, asked):
    with pytest.raises(ValueError, match="choose"):
        profiler.request(**asked)


def test_a_loop_that_can_put_nothing_around_its_steps_says_when_one_ends(profiler):
    path = profiler.request(steps=2)
    model = nn.Linear(4, 2)
    for is_there in (False, False, True, True):
        profiler.next_step()
        assert path.exists() is is_there
        with torch.profiler.record_function("training_step"):
            model(torch.randn(8, 4)).sum().backward()
    assert steps_in(path) == 2
