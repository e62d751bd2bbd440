from __future__ import annotations

import pytest

from esper_servers.policy import checkpoint
from esper_servers.policy.checkpoint import CheckpointRejected
from esper_servers.policy.prior import PriorConfig
from esper_servers.policy.registries import Registries
from esper_servers.tamiyo.policy_updates.validation import REGISTRY_MISMATCH, validate

OURS = Registries.load(None).policy_digests()


@pytest.fixture
def check(tmp_path, controller, policy):
    """Validate a policy that was trained with some registries."""

    def make(registries):
        path = tmp_path / "policy.safetensors"
        path.write_bytes(checkpoint.write(policy, registries=registries))
        return validate(path, policy.version, OURS, PriorConfig(), tmp_path / "journal.sqlite")

    return make


@pytest.mark.parametrize("registries", [OURS, {}, {"schedule": OURS["schedule"]}], ids=["all", "none told", "one told"])
def test_a_policy_of_the_same_vocabularies_is_taken(check, registries):
    assert check(registries).manifest.registries == registries


@pytest.mark.parametrize("other", [{"layer_type": "ab" * 32}, {"colours": "ab" * 32}])
def test_a_policy_of_another_vocabulary_is_refused_and_the_registry_named(check, other):
    with pytest.raises(CheckpointRejected) as refused:
        check(OURS | other)
    assert refused.value.reason == REGISTRY_MISMATCH
    (name,) = other
    assert name in refused.value.detail
    assert not any(known in refused.value.detail for known in OURS.keys() - {name})
