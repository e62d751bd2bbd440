from __future__ import annotations

import asyncio

import orjson
import pytest
from structlog.testing import capture_logs

from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest, RunSite
from esper_servers.policy import sample
from esper_servers.policy.norms import PRIORS, Experience, prior_moments
from esper_servers.policy.norms_store import FILE_NAME, write_experience
from esper_servers.tamiyo.lasting_state import LastingState
from esper_servers.tamiyo.run_state import Runs

OWNER = "spiffe://esper/trainer/local"
LEARNED = {
    "loss": (2.0, 0.25),
    "gradient_norm": (3.0, 1.0),
    "samples_per_s": (10.0, 4.0),
    "hook_latency_ms": (1.0, 0.5),
}


def open_run(runs, run_id="run", *, policy_norms=None, **fields):
    defaults = {"receiver_epoch": bytes(16), "sites": sample.sample_sites(), "seeds": sample.sample_seeds()}
    runs.open(OpenRunRequest(run_id=run_id, **(defaults | fields)), OWNER, [], 0, policy_norms=policy_norms)
    return runs.find(run_id)


def learn(run, moments=LEARNED, steps=100):
    run.graph.norms.moments.update(moments)
    run.steps = steps


def save(state):
    asyncio.run(state.save())


def test_a_run_starts_from_what_an_earlier_start_has_learned(tmp_path):
    before = LastingState(tmp_path)
    run = open_run(before.runs)
    assert run.graph.norms.moments == prior_moments()
    learn(run)
    save(before)
    run = open_run(LastingState(tmp_path).runs)
    for name, moments in LEARNED.items():
        assert run.graph.norms.moments[name] == pytest.approx(moments)


def test_while_nothing_was_learned_here_a_run_starts_from_the_norms_of_the_policy(tmp_path):
    trained = {"loss": (5.0, 2.0), "unknown": (1.0, 1.0), "gradient_norm": (1e300, 1.0)}
    state = LastingState(tmp_path)
    run = open_run(state.runs, policy_norms=trained)
    assert run.graph.norms.moments == prior_moments() | {"loss": (5.0, 2.0)}
    assert open_run(state.runs, policy_norms={"loss": (9.0, 9.0)}).graph.norms.moments["loss"] == (5.0, 2.0)
    learn(run, steps=1)
    save(state)
    for runs in (state.runs, LastingState(tmp_path).runs):
        started = open_run(runs, "next", policy_norms=trained)
        assert started.graph.norms.moments["loss"] == pytest.approx(LEARNED["loss"])


def test_a_run_that_is_closed_replaced_or_forgotten_is_learned_from(tmp_path):
    state = LastingState(tmp_path)
    for run_id, leave in (
        ("closed", lambda: state.runs.close("closed", OWNER)),
        ("replaced", lambda: open_run(state.runs, "replaced", receiver_epoch=bytes([1] * 16))),
    ):
        learn(open_run(state.runs, run_id))
        leave()
    save(state)
    assert orjson.loads((tmp_path / FILE_NAME).read_bytes())["steps"] == 200
    crowded = Runs(capacity=1, norms=state.norms)
    learn(open_run(crowded, "first"))
    open_run(crowded, "second")
    save(state)
    assert orjson.loads((tmp_path / FILE_NAME).read_bytes())["steps"] == 300


def test_a_run_that_is_opened_again_keeps_its_norms(tmp_path):
    runs = LastingState(tmp_path).runs
    learn(open_run(runs))
    assert open_run(runs).graph.norms.moments == LEARNED
    assert open_run(runs, receiver_epoch=bytes([1] * 16)).graph.norms.moments == prior_moments()


def test_a_run_that_cannot_be_opened_changes_nothing(tmp_path):
    state = LastingState(tmp_path)
    run = open_run(state.runs)
    learn(run)
    with pytest.raises(FailedPrecondition):
        open_run(state.runs, receiver_epoch=bytes([1] * 16), host_topology=b"{", seeds=[])
    assert state.runs.find("run") is run
    assert run.graph.norms.moments == LEARNED


def test_a_run_that_took_no_step_is_not_written(tmp_path):
    state = LastingState(tmp_path)
    open_run(state.runs)
    save(state)
    assert not (tmp_path / FILE_NAME).exists()


def test_seeds_and_blueprints_keep_their_numbers(tmp_path):
    before = LastingState(tmp_path)
    open_run(before.runs)
    numbers = {seed.seed_id: before.registries.seed.find(seed.seed_id) for seed in sample.sample_seeds()}
    assert list(numbers.values()) == [1, 2, 3, 4]
    save(before)
    after = LastingState(tmp_path)
    open_run(after.runs, seeds=list(reversed(sample.sample_seeds())))
    assert {name: after.registries.seed.find(name) for name in numbers} == numbers
    assert after.registries.digests() == before.registries.digests()


def test_without_room_a_save_is_told_of_once_and_done_when_there_is_room(tmp_path, monkeypatch):
    state = LastingState(tmp_path)
    learn(open_run(state.runs))

    def full(_parts):
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with capture_logs() as logs, monkeypatch.context() as patched:
            patched.setattr(state.norms, "save", full)
            save(state)
            save(state)
        assert [line["event"] for line in logs] == ["state_not_saved"]
        save(state)
    assert (tmp_path / FILE_NAME).exists()


def test_a_decision_from_learned_norms_is_replayed_bit_for_bit(tmp_path, start, policy):
    (tmp_path / FILE_NAME).write_bytes(write_experience(Experience(LEARNED, 500)))
    controller = start(policy, runs=LastingState(tmp_path).runs)
    assert controller.pipeline.runs.find("run").graph.norms.moments == LEARNED
    commands = controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    assert controller.decisions.explain(commands[0]).evidence.memory["norms.loss.mean"] == LEARNED["loss"][0]
    assert [controller.replay.differences(command) for command in commands] == [[], [], []]


def test_a_decision_is_replayed_with_the_allowances_of_its_graph(start, policy):
    controller = start(policy)
    seeds = sample.sample_seeds()
    seeds[1].stage = Stage.SEED_LIFECYCLE_STAGE_BLENDING
    shapeless = [RunSite(site_id=site.site_id) for site in sample.sample_sites()]  # Where no blueprint fits.
    topology = sample.sample_topology() | {"monitored_layers": [["seed-2", 3]], "capabilities": {}}
    controller.open(seeds=seeds, sites=shapeless, host_topology=orjson.dumps(topology))
    graph = controller.pipeline.runs.find("run").graph
    assert set(graph.edges["seed", "allowed", "parameter"][0].tolist()) == {1}
    commands = controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    assert [controller.replay.differences(command) for command in commands] == [[], [], []]


def test_a_new_catalogue_does_not_cost_a_run_its_norms(start, policy):
    controller = start(policy)
    controller.train(30)
    norms = controller.pipeline.runs.find("run").graph.norms
    controller.fill_catalogue(colour="red")
    controller.train(1)
    assert controller.pipeline.runs.find("run").graph.norms is norms
    assert norms.moments["loss"] != PRIORS["loss"]
