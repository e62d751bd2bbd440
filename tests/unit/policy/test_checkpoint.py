from __future__ import annotations

import dataclasses
import pickle

import orjson
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_servers.policy import checkpoint, sample
from esper_servers.policy.checkpoint import CheckpointRejected
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig

NORMS = {"loss": (0.5, 0.01)}


@pytest.fixture(scope="module")
def policy():
    made = Policy.initial(seed=3, prior_config=PriorConfig(weight=0.25))
    made.version, made.norms = "gnn_v1-7", NORMS
    return made


@pytest.fixture
def file(tmp_path, policy):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(checkpoint.write(policy, parent="gnn_v1-6", registries={"layer_type": "ab"}))
    return path


def rewrite(path, *, change_weights=lambda weights: weights, **manifest):
    """Write a file anew with other weights or another manifest."""
    weights = change_weights(dict(safetensors.torch.load(path.read_bytes())))
    document = dataclasses.asdict(checkpoint.read_manifest(path)) | manifest
    path.write_bytes(safetensors.torch.save(weights, metadata={"manifest": orjson.dumps(document).decode()}))


def rejected(path):
    with pytest.raises(CheckpointRejected) as caught:
        checkpoint.load(path, PriorConfig())
    return caught.value.reason


def test_a_policy_comes_back_as_it_was_written(file, policy):
    found = checkpoint.load(file, PriorConfig(training_steps=9))
    assert (found.version, found.digest, found.norms) == ("gnn_v1-7", policy.digest, NORMS)
    assert found.prior == PriorConfig(training_steps=9, weight=0.25)
    inputs = RunGraph({}, [], [], []).inputs
    assert all(torch.equal(a, b) for a, b in zip(policy.compute(inputs), found.compute(inputs), strict=True))


@pytest.mark.parametrize("length", range(0, 64, 8))
def test_a_policy_computes_the_same_bits_wherever_its_weights_lie_in_the_file(tmp_path, policy, length):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(checkpoint.write(policy, parent="x" * length))
    inputs = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), []).inputs
    found = checkpoint.load(path, PriorConfig())
    assert all(torch.equal(a, b) for a, b in zip(policy.compute(inputs), found.compute(inputs), strict=True))


def test_the_manifest_says_where_a_policy_comes_from(file):
    found = checkpoint.read_manifest(file)
    assert (found.architecture, found.parent, found.registries) == ("gnn_v1", "gnn_v1-6", {"layer_type": "ab"})


def without_first(weights):
    weights.pop(min(weights))
    return weights


def with_first(change):
    def apply(weights):
        name = min(weights)
        return weights | {name: change(weights[name])}

    return apply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_first, checkpoint.SHAPE_MISMATCH),
        (lambda weights: weights | {"stranger": torch.zeros(1)}, checkpoint.SHAPE_MISMATCH),
        (with_first(lambda weight: weight[:-1].clone()), checkpoint.SHAPE_MISMATCH),
        (with_first(lambda weight: weight.half()), checkpoint.SHAPE_MISMATCH),
        (with_first(lambda weight: weight * torch.nan), checkpoint.NOT_FINITE),
        (with_first(lambda weight: weight + torch.inf), checkpoint.NOT_FINITE),
        (with_first(lambda weight: weight + 1), checkpoint.CHECKSUM_MISMATCH),
    ],
)
def test_other_weights_are_rejected(file, change, reason):
    rewrite(file, change_weights=change)
    if reason == checkpoint.SHAPE_MISMATCH and "F16" not in str(file.read_bytes()[:4096]):
        weights = safetensors.torch.load(file.read_bytes())
        rewrite(file, digest=checkpoint.digest_of(weights).hex())
    assert rejected(file) == reason


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({"architecture": "ffn_v0"}, checkpoint.WRONG_ARCHITECTURE),
        ({"digest": "00" * 32}, checkpoint.CHECKSUM_MISMATCH),
        ({"prior_weight": 2}, checkpoint.UNREADABLE),
        ({"prior_weight": "much"}, checkpoint.UNREADABLE),
        ({"norms": {"loss": [0.5]}}, checkpoint.UNREADABLE),
        ({"norms": {"loss": [0.5, -1.0]}}, checkpoint.UNREADABLE),
        ({"registries": 7}, checkpoint.UNREADABLE),
        ({"version": None}, checkpoint.UNREADABLE),
    ],
)
def test_a_manifest_that_does_not_fit_is_rejected(file, manifest, reason):
    rewrite(file, **manifest)
    assert rejected(file) == reason


def test_a_policy_of_before_a_head_is_rejected_and_the_head_named(file):
    rewrite(file, change_weights=lambda weights: {n: w for n, w in weights.items() if "parameter_head" not in n})
    rewrite(file, digest=checkpoint.digest_of(safetensors.torch.load(file.read_bytes())).hex())
    with pytest.raises(CheckpointRejected) as caught:
        checkpoint.load(file, PriorConfig())
    assert (caught.value.reason, caught.value.detail) == (checkpoint.SHAPE_MISMATCH, "parameter_head.bias is missing")


def test_weights_without_a_manifest_are_rejected(file):
    file.write_bytes(safetensors.torch.save(safetensors.torch.load(file.read_bytes())))
    assert rejected(file) == checkpoint.UNREADABLE


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "policy.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    assert rejected(path) == checkpoint.UNREADABLE
    assert not (tmp_path / "exploded").exists()


@given(st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_file_that_was_damaged_anywhere_is_rejected(file, data):
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    spot = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(whole) - 1)))
    damaged = data.draw(st.sampled_from([whole[:spot], whole[:spot] + bytes([whole[spot] ^ 255]) + whole[spot + 1 :]]))
    path = file.with_name("damaged.safetensors")
    path.write_bytes(damaged)
    try:
        found = checkpoint.load(path, PriorConfig())
    except CheckpointRejected:
        return
    # What the digest does not cover says only where the policy comes from.
    assert found.digest == checkpoint.load(file, PriorConfig()).digest


@given(st.binary(max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_rejected(tmp_path, content):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(content)
    assert rejected(path) == checkpoint.UNREADABLE
