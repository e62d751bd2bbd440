"""Graphs change between steps, and are laid out beside them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse
from esper_servers.tamiyo import pipeline as pipeline_module
from esper_servers.tamiyo.run_state import build_graph


@pytest.fixture
def pipeline(controller):
    return controller.pipeline


@pytest.fixture
def run(pipeline):
    return pipeline.runs.find("run")


def blueprints_of(run):
    return set(run.graph.blueprint_of)


async def test_a_catalogue_that_changes_gives_every_run_another_graph_laid_out_on_another_thread(
    pipeline, run, monkeypatch
):
    threads = []

    def build(*arguments):
        threads.append(threading.get_ident())
        return build_graph(*arguments)

    monkeypatch.setattr(pipeline_module, "build_graph", build)
    before, norms = blueprints_of(run), run.graph.norms
    await pipeline.renew_graphs()
    assert threads == []
    pipeline._blueprints.replace_with([], BatchGetExtrasResponse())
    await pipeline.renew_graphs()
    assert before
    assert blueprints_of(run) == set()
    assert run.graph.norms is norms
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_run_that_is_opened_again_meanwhile_keeps_the_graph_it_came_with(
    pipeline, run, controller, monkeypatch
):
    begun, may_finish = threading.Event(), threading.Event()

    def build(*arguments):
        begun.set()
        assert may_finish.wait(10)
        return build_graph(*arguments)

    monkeypatch.setattr(pipeline_module, "build_graph", build)
    pipeline._blueprints.replace_with([], BatchGetExtrasResponse())
    renewing = asyncio.create_task(pipeline.renew_graphs())
    await asyncio.to_thread(begun.wait, 10)
    controller.open(seeds=[])
    graph = run.graph
    may_finish.set()
    await renewing
    assert run.graph is graph


def test_a_step_ends_with_the_graph_it_began_with(run):
    first, second = run.graph, build_graph(OpenRunRequest(run_id="run"), [])
    run.begin_step()
    run.take_graph(second, 7)
    assert run.graph is first
    run.end_step()
    assert (run.graph, run.catalogue_version) == (second, 7)
    run.take_graph(first, 8)
    assert run.graph is first
