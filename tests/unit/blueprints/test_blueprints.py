from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_servers.blueprints.binding import ShapeMismatch, bind, fits
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.blueprints.kernel import KernelRejected, instantiate

FACTORIES = load_factories()
EXAMPLE = Path(__file__).parents[2] / "packages" / "esper_blueprint_example"


def build(name, shape, seed=0):
    manifest = FACTORIES[name].manifest()
    return instantiate(manifest, FACTORIES, feature_shape=shape, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_blueprint_keeps_the_shape_and_learns(name):
    shape = FACTORIES[name].example_shape()
    module = build(name, shape)
    x = torch.randn(3, *shape)
    y = module(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert any(float(p.grad.abs().sum()) > 0 for p in module.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_initialisation_is_drawn_from_the_seed_alone(name):
    shape = FACTORIES[name].example_shape()
    state = torch.random.get_rng_state()
    first, second = build(name, shape, seed=5), build(name, shape, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_initialisation_does_not_depend_on_the_default_device():
    first = build("residual_mlp", (4,), seed=5)
    with torch.device("meta"):
        second = build("residual_mlp", (4,), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_no_seed_is_kept_for_accelerators_that_may_appear():
    before = len(torch.cuda._queued_calls)
    build("residual_mlp", (4,), seed=5)
    assert len(torch.cuda._queued_calls) == before


def test_an_unknown_factory_and_a_wrong_dtype_are_rejected():
    manifest = FACTORIES["lora_linear"].manifest()
    with pytest.raises(KernelRejected, match="dtype_mismatch"):
        instantiate(manifest, FACTORIES, feature_shape=(4,), dtype=torch.int64)
    with pytest.raises(KernelRejected, match="unknown_factory"):
        instantiate(manifest, {}, feature_shape=(4,), dtype=torch.float32)


# Without its bounds each of these raises something else, or allocates without end.
@pytest.mark.parametrize(
    ("name", "config"),
    [("residual_mlp", '{"expansion": 1e9}'), ("residual_mlp", '{"expansion": 1e308}'), ("lora_linear", '{"rank": 1e8}'),
     ("squeeze_excite", '{"reduction": 0}'), ("bottleneck_adapter", '{"reduction": 0.0}'),
     ("attention_adapter", '{"heads": -1}'), ("depthwise_conv", '{"kernel_size": -7}')],
)  # fmt: skip
def test_a_setting_beyond_its_bounds_is_rejected_before_anything_is_built(name, config):
    manifest = FACTORIES[name].manifest()
    manifest.config_json = config
    with pytest.raises(KernelRejected, match=r"bad_config.*must be from"):
        instantiate(manifest, FACTORIES, feature_shape=FACTORIES[name].example_shape(), dtype=torch.float32)


@pytest.mark.parametrize("config", ["{", "[]", "null", '{"rank": "many"}', '{"rank": true}', '{"unknown": 1}'])
def test_a_bad_configuration_is_rejected(config):
    manifest = FACTORIES["lora_linear"].manifest()
    manifest.config_json = config
    with pytest.raises(KernelRejected, match="bad_config"):
        instantiate(manifest, FACTORIES, feature_shape=(4,), dtype=torch.float32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_star_takes_any_number_of_dimensions(shape):
    assert bind(("*", "F"), shape) == {"F": shape[-1]}


def test_a_name_is_bound_once():
    assert bind(("C", "H", "H"), (3, 8, 8)) == {"C": 3, "H": 8}
    with pytest.raises(ShapeMismatch, match="H is 8"):
        bind(("C", "H", "H"), (3, 8, 9))
    assert not fits(("4", "F"), (5, 2))


def test_a_package_of_its_own_adds_a_blueprint_by_entry_point(tmp_path):
    """Install the example's metadata beside its code, as an installer does, and look for it from a new process."""
    info = tmp_path / "esper_blueprint_example-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: esper-blueprint-example\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[esper.blueprints]\nexample_scale = esper_blueprint_example:FACTORY\n")
    script = (
        "from esper_servers.urza.seeding import installed_blueprints\n"
        "print([r.blueprint.descriptor.blueprint_id for r in installed_blueprints()])"
    )
    path = f"{tmp_path}:{EXAMPLE}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "example_scale" in result.stdout
