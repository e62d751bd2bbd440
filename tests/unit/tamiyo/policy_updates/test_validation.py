from __future__ import annotations

import pytest
import torch

from esper_rpc.proto.leyline.v1 import CommandType, SeedOperation
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy import checkpoint
from esper_servers.policy.checkpoint import NOT_FINITE, CheckpointRejected
from esper_servers.policy.network import PolicyNetwork
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.policy.registries import Registries
from esper_servers.tamiyo.policy_updates import recent_decisions, validation
from esper_servers.tamiyo.policy_updates.validation import REGISTRY_MISMATCH, VERSION_MISMATCH, validate

OURS = Registries.load(None).policy_digests()


@pytest.fixture
def check(tmp_path, controller, policy):
    """Validate a policy that was trained with some registries, as the one of an update."""

    def make(registries=OURS, *, tried=policy, version=policy.version):
        path = tmp_path / "policy.safetensors"
        path.write_bytes(checkpoint.write(tried, registries=registries))
        return validate(path, version, OURS, PriorConfig(), tmp_path / "journal.sqlite")

    return make


@pytest.fixture(params=["value_head", "blueprint_head", "schedule_head", "parameter_head"])
def overflowing(request, policy):
    """A policy of finite weights whose outputs are not."""
    network = PolicyNetwork()
    with torch.no_grad():
        getattr(network, request.param).weight.fill_(torch.finfo(torch.float32).max)
    return Policy(network, version=policy.version, origin="trained", prior_config=PriorConfig())


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


def test_a_policy_is_of_the_version_that_the_update_says(check):
    with pytest.raises(CheckpointRejected) as refused:
        check(version="gnn_v1-2")
    assert refused.value.reason == VERSION_MISMATCH


def test_a_policy_that_overflows_is_refused_on_the_golden_graphs(check, overflowing):
    with pytest.raises(CheckpointRejected) as refused:
        check(tried=overflowing)
    assert (refused.value.reason, refused.value.detail) == (NOT_FINITE, "its outputs on a golden graph")


def test_a_policy_that_overflows_only_on_what_really_happened_is_refused(check, overflowing, controller, monkeypatch):
    monkeypatch.setattr(validation, "check_golden", lambda _policy: None)
    assert controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    controller.decisions.flush()
    with pytest.raises(CheckpointRejected) as refused:
        check(tried=overflowing)
    assert (refused.value.reason, refused.value.detail) == (NOT_FINITE, "its outputs on a recent decision")


def test_the_recent_decisions_are_made_again(check, controller):
    made = controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    controller.decisions.flush()
    found = check()
    assert (found.compared, found.disagreed) == (len(made), 0)


@pytest.fixture
def check_after(check, controller, monkeypatch):
    """Spoil the record of a decision, which makes it the newest, and validate by the newest alone."""
    monkeypatch.setattr(recent_decisions, "MOST", 1)

    def spoil(edit):
        controller.change(controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)[0], edit)
        controller.decisions.flush()
        found = check()
        return found.compared, found.disagreed

    return spoil


@pytest.mark.parametrize(
    "edit",
    [
        lambda command: setattr(command, "command_type", CommandType.COMMAND_TYPE_PAUSE),
        lambda command: setattr(command, "target_seed_id", "another"),
        lambda command: setattr(command.seed_operation, "operation", SeedOperation.SEED_OPERATION_CULL),
        lambda command: setattr(command.seed_operation, "blueprint_id", "another"),
    ],
    ids=["kind", "seed", "operation", "blueprint"],
)
def test_a_decision_that_would_be_another_now_is_counted(check_after, edit):
    assert check_after(lambda record: edit(record.command)) == (1, 1)


def test_a_decision_whose_structure_the_journal_dropped_is_left_out(check_after):
    assert check_after(lambda record: setattr(record.evidence, "structure_digest", bytes(32))) == (0, 0)
