"""Every mode in a convolutional network, a transformer and a perceptron, as a model runs it and as a command asks."""

from __future__ import annotations

import copy
import io
import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from esper_rpc.blending import BLEND_MODES, BLENDING_METHODS
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedLifecycleStage, TelemetryLevel
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina import lifecycle, seed_slot
from esper_servers.kasmina.blending.alpha import gradient_clip
from esper_servers.kasmina.export import without_sites
from esper_servers.kasmina.gates.config import GateConfig
from esper_servers.kasmina.seed_slot import CLIP_NORM, SeedSlot
from esper_servers.trainer import wrap_sites

FACTORIES = load_factories()
modes = pytest.mark.parametrize("mode", BLEND_MODES)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width):
        super().__init__()
        self.before, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.feed = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)),
        )

    def forward(self, x):
        queries, keys, values = self.mix(self.before(x)).chunk(3, dim=-1)
        x = x + self.out(functional.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        return x + self.feed(self.between(x))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def transformer():
    return nn.Sequential(nn.Embedding(11, 8), Block(8), Block(8), nn.LayerNorm(8), nn.Linear(8, 11))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


MODELS = {
    "cnn": (cnn, "3", "depthwise_conv", lambda g: torch.randn(4, 3, 6, 6, generator=g)),
    "transformer": (transformer, "2", "attention_adapter", lambda g: torch.randint(0, 11, (4, 7), generator=g)),
    "mlp": (mlp, "2", "residual_mlp", lambda g: torch.randn(4, 6, generator=g)),
    "head": (mlp, "4", "residual_mlp", lambda g: torch.randn(4, 6, generator=g)),
}
models = pytest.mark.parametrize("kind", MODELS)
VECTORS = {"cnn": [0.1, 0.9, 0.5, 0.2], "head": [0.1, 0.6, 0.8, 0.2, 1.0]}


def annotations_of(mode, kind="mlp"):
    vector = VECTORS.get(kind, [0.0, 0.2, 0.4, 0.6, 0.8, 0.7, 0.5, 1.0])
    found = {"blend_mode": mode, "blend_mode_source": "override", "gate_k": "5", "gate_tau": "0.25"}
    return found | {"alpha_vec": json.dumps(vector), "alpha_vec_len": str(len(vector))}


class Grown:
    """A model with one seed that blends."""

    def __init__(self, kind, mode, *, alpha=0.6):
        make, name, blueprint, draw = MODELS[kind]
        torch.manual_seed(0)
        self.model = make()
        self.x = draw(torch.Generator().manual_seed(1))
        self.site = wrap_sites(self.model, [name])[name]
        self.slot = SeedSlot(seed_id="s", site_id=name, site=self.site, depth=0)
        self.model(self.x)
        self.slot.move(lifecycle.GERMINATED)
        self.slot.plant(FACTORIES[blueprint].build({}, self.site.output_shape), blueprint, b"")
        self.slot.move(lifecycle.TRAINING)
        self.slot.move(lifecycle.BLENDING)
        assert self.slot.blend_as(annotations_of(mode, kind)) == ""
        self.site.alpha = alpha

    def to(self, *stages):
        for stage in stages:
            self.slot.move(stage)
        return self

    def loss(self, model=None):
        return (model or self.model)(self.x).float().square().sum()


@models
@modes
def test_a_seed_learns_in_every_mode_and_nothing_before_the_site_does(kind, mode):
    grown = Grown(kind, mode)
    grown.loss().backward()
    host = list(grown.site.host.parameters())
    assert all(p.grad is None for p in host)
    assert any(bool(p.grad.any()) for p in grown.site.seed.parameters() if p.grad is not None)
    assert all(torch.isfinite(p.grad).all() for p in grown.model.parameters() if p.grad is not None)


@models
def test_the_modes_differ(kind):
    outputs = [Grown(kind, mode).model(torch.as_tensor(Grown(kind, mode).x)) for mode in BLEND_MODES]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


@models
@modes
def test_names_parameters_and_buffers_of_the_model_stay_as_they_were(kind, mode):
    plain, grown = MODELS[kind][0](), Grown(kind, mode)
    for listed in ("named_parameters", "named_buffers", "named_modules"):
        names = [name for name, _ in getattr(plain, listed)()]
        assert [name for name, _ in getattr(grown.model, listed)()] == names
    assert list(grown.model.state_dict()) == list(plain.state_dict())


def test_alpha_is_a_buffer_that_changes_in_place():
    site = Grown("mlp", "CONVEX").site
    blend = site._blend
    before, place = dict(blend.named_buffers())["alpha"], blend.alpha.data_ptr()
    site.alpha = 0.75
    assert blend.alpha is before
    assert blend.alpha.data_ptr() == place
    assert float(before) == site.alpha == 0.75
    assert not list(blend.parameters())


@models
@modes
def test_alpha_may_change_between_a_forward_and_its_backward_pass(kind, mode):
    expected, grown = Grown(kind, mode), Grown(kind, mode)
    expected.loss().backward()
    loss = grown.loss()
    grown.site.alpha = 0.9
    loss.backward()
    for one, other in zip(expected.site.seed.parameters(), grown.site.seed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class Named(nn.Module):
    """A host with parameters that are named like what a site knows of itself."""

    def __init__(self):
        super().__init__()
        self.alpha, self.stage = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.alpha + self.stage


def test_a_host_may_have_a_parameter_that_is_called_alpha():
    model = nn.Sequential(Named(), nn.Linear(4, 2))
    expected = copy.deepcopy(model)(torch.ones(3, 4))
    site = wrap_sites(model, ["0"])["0"]
    site.alpha = 0.3
    assert torch.equal(model(torch.ones(3, 4)), expected)
    assert sorted(model.state_dict()) == ["0.alpha", "0.stage", "1.bias", "1.weight"]


# Dynamo looks at .grad of every graph input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@models
def test_neither_alpha_nor_the_mode_compiles_anything_anew(kind):
    compilations = []

    def count(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    grown = Grown(kind, "CONVEX")
    compiled = torch.compile(grown.model, backend=count)
    compiled(grown.x)
    before = len(compilations)
    for step in range(1, 9):
        grown.site.alpha = step / 8
        grown.slot.blend_as(annotations_of(BLEND_MODES[step % 4], kind))
        assert torch.equal(compiled(grown.x), grown.model(grown.x))
    assert before > 0
    assert len(compilations) == before


# Dynamo looks at .grad of every graph input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_thousand_alphas_compile_nothing():
    torch._dynamo.reset()
    grown = Grown("mlp", "CONFIDENCE")
    compiled = torch.compile(grown.model, backend="eager")
    compiled(grown.x)
    counters = torch._dynamo.utils.counters["stats"]
    before = dict(counters)
    for step in range(1000):
        grown.site.alpha = (step + 1) / 1000
        if step % 20 == 0:
            compiled(grown.x)
    assert before["unique_graphs"] > 0
    assert counters["unique_graphs"] == before["unique_graphs"]
    assert counters["calls_captured"] == before["calls_captured"]


@models
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_trains_under_autocast(kind, mode, dtype):
    grown = Grown(kind, mode)
    with torch.autocast("cpu", dtype=dtype):
        out = grown.model(grown.x)
    out.float().square().sum().backward()
    assert grown.site.failure == ""
    assert not grown.site.gave_non_finite()
    assert out.dtype == dtype
    assert any(bool(p.grad.any()) for p in grown.site.seed.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_runs_in_the_type_of_a_model_that_was_cast(kind, mode, dtype):
    grown = Grown(kind, mode)
    expected = grown.model.eval()(grown.x)
    out = grown.model.to(dtype)(grown.x.to(dtype))
    assert grown.site.failure == ""
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@models
@modes
def test_a_fossil_and_its_export_give_what_stood_on_probation(kind, mode):
    grown = Grown(kind, mode, alpha=0.99)
    grown.to(lifecycle.SHADOWING, lifecycle.PROBATIONARY).model.eval()
    on_trial = grown.model(grown.x)
    grown.to(lifecycle.FOSSILIZED)
    fossil = grown.model(grown.x)
    exported = without_sites(grown.model, [grown.site])
    torch.testing.assert_close(fossil, on_trial, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exported(grown.x), fossil, rtol=1e-6, atol=1e-6)
    assert not any(type(each).__module__.startswith("esper") for each in exported.modules())


def test_exported_fossils_load_where_this_package_is_not(tmp_path):
    saved = []
    for mode in BLEND_MODES:
        grown = Grown("cnn", mode).to(lifecycle.SHADOWING, lifecycle.PROBATIONARY, lifecycle.FOSSILIZED)
        exported = without_sites(grown.model.eval(), [grown.site])
        saved.append((exported, grown.x, exported(grown.x)))
    torch.save(saved, tmp_path / "exported.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['esper_servers'] = sys.modules['esper_rpc'] = None\n"
        f"saved = torch.load({str(tmp_path / 'exported.pt')!r}, weights_only=False)\n"
        "assert [bool(torch.equal(model(x), expected)) for model, x, expected in saved] == [True] * 4\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@models
@modes
def test_a_fossil_and_its_host_are_live(kind, mode):
    grown = Grown(kind, mode).to(lifecycle.SHADOWING, lifecycle.PROBATIONARY, lifecycle.FOSSILIZED)
    grown.loss().backward()
    assert any(bool(p.grad.any()) for p in grown.site.host.parameters())
    assert any(bool(p.grad.any()) for p in grown.site.seed.parameters() if p.grad is not None)


def test_what_stands_in_the_shadow_has_all_of_its_alpha():
    grown = Grown("mlp", "RESIDUAL", alpha=0.985).to(lifecycle.SHADOWING)
    assert grown.site.alpha == 1.0


def test_what_left_blending_before_the_end_of_its_schedule_keeps_all_of_its_alpha(make_rig):
    rig = make_rig(options={"gates": GateConfig(output_drift=10.0)})
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    rig.order(rig.command("START_GRAFTING", blending_method_index=BLENDING_METHODS.index("sigmoid")))
    rig.train(18)
    assert 0.98 < rig.slot.site.alpha < 1.0
    assert rig.do("STABILIZE").result == CommandOutcome.RESULT_APPLIED
    rig.train()
    assert rig.slot.site.alpha == 1.0


@pytest.mark.parametrize(
    ("kind", "is_classifier"), [("cnn", False), ("transformer", False), ("mlp", False), ("head", True)]
)
def test_only_the_last_layer_is_taken_for_a_classifier(kind, is_classifier):
    assert Grown(kind, "CONFIDENCE").site.is_classifier == is_classifier


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    ("host", "shape", "channels"),
    [
        (nn.Conv2d(3, 8, 1), (2, 3, 5, 5), 8),
        (nn.Conv1d(3, 8, 1), (2, 3, 5), 8),
        (nn.Linear(3, 8), (2, 3), 8),
        (nn.Linear(3, 8), (2, 5, 3), 8),
        (nn.Linear(3, 8), (2, 5, 5, 3), 8),
        (nn.BatchNorm1d(3), (2, 3), 3),
        (nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2)), (2, 3, 4, 4), 8),
        (nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), Turned(), nn.LayerNorm(8)), (2, 3, 4, 6), 8),
        (nn.MaxPool2d(2), (2, 3, 4, 4), 3),
        (nn.Identity(), (2, 5, 7), 7),
    ],
    ids=[
        "conv2d",
        "conv1d",
        "rows",
        "sequence",
        "image of features",
        "batch norm",
        "flat image",
        "patches",
        "pool",
        "unknown",
    ],
)
def test_channels_are_found(host, shape, channels):
    site = wrap_sites(nn.Sequential(host), ["0"])["0"]
    site(torch.zeros(shape))
    assert site.seed_channels == channels


def graft(rig, **annotations):
    """Bring the rig's seed to blending by a command with these annotations."""
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    command = rig.command("START_GRAFTING")
    command.annotations.update(annotations)
    return rig.order(command)


def events_of(rig):
    rig.step_index += 1
    packets = rig.host.finalize_step(rig.step_index)
    events = [event for packet in packets for event in packet.events]
    told = ("fallback_applied", "blend_config")
    return [(each.description, each.level, dict(each.attributes)) for each in events if each.description in told]


@modes
def test_a_command_says_the_mode_and_a_packet_tells_it(rig, mode):
    outcome = graft(rig, **annotations_of(mode))
    assert outcome.result == CommandOutcome.RESULT_APPLIED
    assert rig.slot.blend.mode == mode
    [(name, level, attributes)] = events_of(rig)
    assert (name, level) == ("blend_config", TelemetryLevel.TELEMETRY_LEVEL_INFO)
    assert int(attributes.pop("step_index")) in (rig.step_index - 1, rig.step_index)
    length = "8" if mode == "CHANNEL" else "0"
    assert attributes == {
        "mode": mode, "source": "override", "alpha_vec_len": length, "seed_id": rig.seed_id, "reason": "commanded",
        "priority": "NORMAL",
    }  # fmt: skip
    assert events_of(rig) == []


def test_a_mode_that_cannot_be_is_convex_with_a_warning_and_the_command_is_carried_out(rig):
    outcome = graft(rig, blend_mode="CHANNEL", blend_mode_source="heuristic", alpha_vec="[0.1, 0.2, 0.3]")
    assert outcome.result == CommandOutcome.RESULT_APPLIED
    assert (rig.slot.stage, rig.slot.blend.mode) == (lifecycle.BLENDING, "CONVEX")
    warned, told = events_of(rig)
    assert (warned[0], warned[1]) == ("fallback_applied", TelemetryLevel.TELEMETRY_LEVEL_WARNING)
    assert warned[2]["reason"] == "invalid_blend_config"
    assert "8 channels" in warned[2]["problem"]
    assert (told[0], told[2]["mode"], told[2]["source"]) == ("blend_config", "CONVEX", "heuristic")


def test_a_command_without_a_mode_is_convex_and_nothing_is_wrong(rig):
    graft(rig)
    assert [name for name, _, _ in events_of(rig)] == ["blend_config"]
    assert rig.slot.blend.mode == "CONVEX"


def test_the_next_seed_of_a_site_does_not_inherit_the_mode(rig):
    graft(rig, **annotations_of("RESIDUAL"))
    rig.do("CULL")
    assert rig.slot.blend.mode == "CONVEX"
    rig.train(110)
    rig.grow(lifecycle.BLENDING)
    assert (rig.slot.stage, rig.slot.blend.mode) == (lifecycle.BLENDING, "CONVEX")


@modes
def test_a_resumed_blend_goes_on_bit_for_bit(rig, make_rig, mode):
    graft(rig, **annotations_of(mode))
    rig.train(6)
    saved = io.BytesIO()
    torch.save([rig.model.state_dict(), rig.host.state_dict(), rig.optimizer.state_dict()], saved)
    saved.seek(0)
    model, host, optimizer = torch.load(saved, weights_only=True)
    again = make_rig()
    again.model.load_state_dict(model)
    again.host.load_state_dict(host)
    again.optimizer.load_state_dict(optimizer)
    again.step_index = rig.step_index
    assert again.slot.blend == rig.slot.blend
    for each in (rig, again):
        each.train(5)
    assert torch.equal(again.model(again.x), rig.model(rig.x))
    assert again.slot.alpha_band == rig.slot.alpha_band


def test_while_it_blends_the_gradient_is_clipped_by_alpha_and_else_as_ever(rig, monkeypatch):
    used = []
    real = seed_slot.clip_gradients

    def clip(parameters, most):
        used.append((rig.slot.stage, rig.slot.site.alpha, most))
        return real(parameters, most)

    monkeypatch.setattr(seed_slot, "clip_gradients", clip)
    graft(rig)
    rig.train(10)
    blending = [(alpha, most) for stage, alpha, most in used if stage == lifecycle.BLENDING]
    assert len(blending) > 5
    assert all(most == gradient_clip(alpha) for alpha, most in blending)
    assert {most for stage, _, most in used if stage == lifecycle.TRAINING} == {CLIP_NORM}


def test_a_state_tells_who_leads(rig):
    graft(rig)
    bands = []
    for _ in range(20):
        rig.train()
        metrics = next(s for s in rig.host.export_seed_states() if s.seed_id == rig.seed_id).metrics
        bands.append((round(metrics["alpha"], 2), metrics["alpha_band"]))
    assert dict(bands)[0.3] == 0.0
    assert dict(bands)[0.35] == 1.0
    assert dict(bands)[0.7] == 1.0
    assert dict(bands)[0.75] == 2.0
    assert rig.slot.stage == SeedLifecycleStage.SEED_LIFECYCLE_STAGE_BLENDING
