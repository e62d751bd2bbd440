"""In which mode a seed is blended, said with the command that begins it."""

from __future__ import annotations

import pytest

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation
from esper_rpc.proto.tamiyo.v1 import RunSite
from esper_servers.kasmina.blending.config import read_blend_config
from esper_servers.policy import sample, schema
from esper_servers.policy.masks import Choice
from esper_servers.tamiyo.blend_modes import KEYS, BlendModeConfig, blend_annotations

GRAFT = SeedOperation.SEED_OPERATION_START_GRAFTING
PASS_THROUGH = {"gate_k": "1.0", "gate_tau": "1.0", "alpha_lo": "0.0", "alpha_hi": "1.0"}


@pytest.fixture
def written(controller):
    """What is written for the first seed, with a blueprint in it and a site of some kind."""

    def write(mode, *, planted="residual_mlp", kind="Linear", shape=(6,), operation=GRAFT):
        site = RunSite(site_id=sample.sample_sites()[0].site_id, module_kind=kind, output_shape=shape, dtype="F32")
        controller.open("other", sites=[site], seeds=sample.sample_seeds()[:1])
        run = controller.pipeline.runs.find("other")
        run.planted[run.graph.seed_ids[0]] = planted
        choice = Choice(kind=schema.KIND_SEED, seed=0, operation=operation)
        return blend_annotations(run, choice, BlendModeConfig(mode=mode))

    return write


def test_nothing_is_said_unless_it_is_asked_for(written):
    assert written(BlendModeConfig().mode) == {}


@pytest.mark.parametrize("operation", [o for o in SeedOperation.values() if o != GRAFT], ids=SeedOperation.Name)
def test_no_other_command_says_it(written, operation):
    assert written("heuristic", operation=operation) == {}


@pytest.mark.parametrize("mode", ["convex", "residual"])
def test_a_mode_is_taken_for_every_seed(written, mode):
    assert written(mode) == {"blend_mode": mode.upper(), "blend_mode_source": "override", **PASS_THROUGH}


@pytest.mark.parametrize(("planted", "mode"), [("norm_affine", "CONVEX"), ("attention_adapter", "CONFIDENCE")])
def test_the_heuristic_gates_what_is_risky(written, planted, mode):
    found = written("heuristic", planted=planted, shape=(9, 6))
    assert (found["blend_mode"], found["blend_mode_source"]) == (mode, "heuristic")


def test_an_unknown_blueprint_is_convex(written):
    assert written("heuristic", planted="")["blend_mode"] == "CONVEX"


@pytest.mark.parametrize(
    ("kind", "shape", "channels"),
    [("Linear", (6,), 6), ("Linear", (9, 6), 6), ("Conv2d", (8, 5, 5), 8), ("LayerNorm", (9, 6), 6)],
)
def test_channels_get_a_vector_where_they_are_known_and_few(written, kind, shape, channels):
    found = written("channel", kind=kind, shape=shape)
    assert found["blend_mode"] == "CHANNEL"
    assert found["alpha_vec_len"] == str(channels)
    assert len(found) == len(KEYS)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("Linear", (65,)), ("Conv2d", (128, 5, 5)), ("MyBlock", (6,)), ("Linear", ())],
    ids=["many", "many of an image", "unknown module", "unknown shape"],
)
def test_without_a_vector_channel_is_convex(written, kind, shape):
    found = written("channel", kind=kind, shape=shape)
    assert (found["blend_mode"], found["blend_mode_source"]) == ("CONVEX", "override")
    assert "alpha_vec" not in found


@pytest.mark.parametrize("mode", ["heuristic", "convex", "residual", "channel", "confidence"])
def test_a_seed_host_takes_what_is_written_as_it_stands(written, mode):
    found = written(mode)
    config, problem = read_blend_config(found, 6)
    assert problem == ""
    assert (config.mode, config.source) == (found["blend_mode"], found["blend_mode_source"])
    if mode == "confidence":
        assert (config.gate_k, config.gate_tau) == (float(found["gate_k"]), float(found["gate_tau"]))
    if mode == "channel":
        assert config.alpha_vec == (0.8,) * 6


def test_an_unknown_mode_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'delta'.*confidence"):
        BlendModeConfig(mode="delta")


def a_graft(controller):
    """Ask about seeds that have trained for long, until one is grafted."""
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.6, gradient_norm=0.9, samples_per_s=4000.0,
                               hook_latency_ms=1.5)  # fmt: skip
    for state in packet.seed_states:
        state.metrics["steps_in_stage"] = 500.0
    for sequence in range(1, 100):
        command_id = controller.ask(sequence, packet)
        if command_id and controller.decisions.explain(command_id).command.seed_operation.operation == GRAFT:
            return command_id
    raise AssertionError("no seed was grafted")


@pytest.mark.parametrize("mode", ["channel", "heuristic", "off"])
def test_a_decision_says_it_and_replays(start, policy, mode):
    controller = start(policy, blending=BlendModeConfig(mode=mode))
    command_id = a_graft(controller)
    command = controller.decisions.explain(command_id).command
    assert ("blend_mode" in command.annotations) == (mode != "off")
    assert controller.replay.differences(command_id) == []
