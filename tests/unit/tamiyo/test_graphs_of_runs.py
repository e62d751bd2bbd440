"""Graphs change between steps, and are laid out beside them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse
from esper_servers.policy import sample
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


async def test_what_grows_in_a_seed_comes_into_the_graph_when_a_packet_tells_that_it_does(pipeline, run, controller):
    async def layers_after(stage):
        run.observe(controller.packet(stage), pipeline._risk)
        await pipeline.renew_graphs()
        return run.graph.counts["layer"]

    host = run.graph.counts["layer"]
    run.planted["seed-0"] = "residual_mlp"
    assert await layers_after(Stage.SEED_LIFECYCLE_STAGE_DORMANT) == host
    grown = await layers_after(Stage.SEED_LIFECYCLE_STAGE_TRAINING)
    assert grown > host
    assert run.graph.attached == {"seed-0": "residual_mlp"}
    laid_out = run.graph
    assert await layers_after(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED) == grown
    run.observe(SystemStatePacket(), pipeline._risk)  # It tells of no seed.
    await pipeline.renew_graphs()
    assert run.graph is laid_out
    assert await layers_after(Stage.SEED_LIFECYCLE_STAGE_CULLED) == host


async def test_the_first_step_on_a_graph_finds_the_policy_prepared_for_it(pipeline, run, monkeypatch):
    threads = []
    prepare = pipeline.policy.prepare
    monkeypatch.setattr(
        pipeline.policy, "prepare", lambda inputs: threads.append(threading.get_ident()) or prepare(inputs)
    )
    pipeline._blueprints.replace_with([], BatchGetExtrasResponse())
    await pipeline.renew_graphs()
    assert run.graph.inputs in pipeline.policy._eager._layouts
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_run_that_is_opened_with_grown_seeds_has_them_in_its_graph(run, controller):
    seeds = sample.sample_seeds()
    seeds[0].blueprint_id, seeds[0].stage = "residual_mlp", Stage.SEED_LIFECYCLE_STAGE_BLENDING
    seeds[1].blueprint_id = "residual_mlp"
    controller.open("grown", seeds=seeds)
    graph = controller.pipeline.runs.find("grown").graph
    assert graph.attached == {"seed-0": "residual_mlp"}
    assert graph.counts["layer"] > run.graph.counts["layer"]


def test_a_decision_on_what_grows_is_replayed_bit_for_bit(run, controller):
    seeds = sample.sample_seeds()
    seeds[0].blueprint_id, seeds[0].stage = "residual_mlp", Stage.SEED_LIFECYCLE_STAGE_BLENDING
    controller.open("run", seeds=seeds)
    commands = [command for command in controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED) if command]
    assert len(commands) > 0
    assert [controller.replay.differences(command) for command in commands] == [[]] * len(commands)


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
