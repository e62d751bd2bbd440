from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from esper_rpc.envelope import sign
from esper_rpc.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    ResourceExhausted,
    Unavailable,
)
from esper_rpc.proto.leyline.v1 import CircuitState, PolicyUpdate
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import IngestPolicyUpdateRequest
from esper_rpc.steady_clock import SteadyClock
from esper_rpc.testing import TemporaryMesh
from esper_servers.policy import checkpoint
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.plans.plan_switch import PlanConfig, PlanSwitch
from esper_servers.tamiyo.policy_updates.assembly import updates_of
from esper_servers.tamiyo.policy_updates.verification import UPDATE_TYPE

FAILURES = 5
"""That open the breaker around inference."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    return TemporaryMesh(tmp_path_factory.mktemp("mesh"))


class Here:
    """Runs in this process what the admin process would run; `error` is raised instead."""

    def __init__(self):
        self.error = None

    async def run(self, _seconds, function, *arguments):
        if self.error is not None:
            raise self.error
        return function(*arguments)


@pytest.fixture
def here():
    return Here()


@pytest.fixture
def controller(start, policy):
    return start(policy)


@pytest.fixture
def updates(controller, mesh, here, tmp_path):
    return updates_for(controller, mesh, here, tmp_path)


def updates_for(controller, mesh, here, directory):
    """As a controller has them that starts."""
    controller.pipeline.take_up(controller.policy)
    made = updates_of(
        controller.pipeline, directory=directory / "policies", journal=directory / "journal.sqlite",
        keyring=mesh.keyring("tamiyo"), prior=PriorConfig(), aside=here,
        plans=PlanSwitch(controller.pipeline.policy, directory, PlanConfig(compile=False)),
    )  # fmt: skip
    made.resume()
    return made


@pytest.fixture(scope="module")
def payload():
    """The file of a policy with weights of its own."""
    made = Policy.initial(seed=5, prior_config=PriorConfig())

    def write(version):
        made.version = version
        return checkpoint.write(made)

    return write


@pytest.fixture
def request_for(mesh, payload):
    def make(version, *, shadow=False):
        update = PolicyUpdate(version=1, tamiyo_policy_version=version, payload=payload(version))
        envelope = sign(
            update.SerializeToString(), payload_type=UPDATE_TYPE, keyring=mesh.keyring("simic"), audience="tamiyo",
            issued_at_ns=SteadyClock()(), nonce=version,
        )  # fmt: skip
        return IngestPolicyUpdateRequest(update=envelope, shadow=shadow).SerializeToString()

    return make


def test_an_update_is_live_from_the_next_step_on(controller, updates, request_for):
    before = controller.step(1, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.5)
    answer = asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    assert (answer.applied, answer.policy_version, controller.pipeline.policy.version) == (True, "gnn_v1-2", "gnn_v1-2")
    assert updates.previous == ["gnn_v1-heuristic-1"]
    after = [c for c in controller.train(5, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED) if c]
    assert controller.decisions.explain(after[-1]).policy_version == "gnn_v1-2"
    assert not before or controller.decisions.explain(before).policy_version == "gnn_v1-heuristic-1"


def test_after_a_restart_it_is_live_still(controller, updates, request_for, mesh, here, tmp_path):
    asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    again = updates_for(controller, mesh, here, tmp_path)
    assert controller.pipeline.policy.version == "gnn_v1-2"
    assert again.previous == ["gnn_v1-heuristic-1"]


def test_what_an_update_left_behind_is_removed_at_the_next_start(
    controller, updates, request_for, mesh, here, tmp_path
):
    asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    (tmp_path / "policies" / "half-way.safetensors").touch()
    again = updates_for(controller, mesh, here, tmp_path)
    assert list((tmp_path / "policies").glob("*.safetensors")) == [again.live_file]


def test_an_update_that_comes_twice_at_once_is_taken_once(updates, request_for):
    async def twice():
        return await asyncio.gather(*[updates.ingest(request_for("gnn_v1-2")) for _ in range(2)])

    assert sorted(answer.applied for answer in asyncio.run(twice())) == [False, True]
    assert updates.previous == ["gnn_v1-heuristic-1"]


def test_a_policy_whose_file_is_lost_or_spoilt_leaves_the_one_before(
    controller, updates, request_for, mesh, here, tmp_path
):
    for version in ("gnn_v1-2", "gnn_v1-3"):
        asyncio.run(updates.ingest(request_for(version)))
    newest = updates._store.path_of(updates._lineage.live)
    newest.write_bytes(newest.read_bytes()[:-100])
    updates_for(controller, mesh, here, tmp_path)
    assert controller.pipeline.policy.version == "gnn_v1-2"
    for path in (tmp_path / "policies").glob("*.safetensors"):
        path.unlink()
    updates_for(controller, mesh, here, tmp_path)
    assert controller.pipeline.policy.version == "gnn_v1-heuristic-1"


def test_a_rollback_returns_to_the_policy_before_and_no_further(controller, updates, request_for):
    asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    assert asyncio.run(updates.roll_back("test")) == "gnn_v1-heuristic-1"
    assert controller.pipeline.policy is controller.policy
    with pytest.raises(FailedPrecondition, match="No policy was live before"):
        asyncio.run(updates.roll_back("test"))
    assert asyncio.run(updates.ingest(request_for("gnn_v1-2"))).reason.startswith("version_not_above")


def test_what_becomes_of_policies_is_told_with_reason_and_priority(updates, here, request_for):
    with structlog.testing.capture_logs() as logs:
        asyncio.run(updates.ingest(request_for("gnn_v1-2")))
        asyncio.run(updates.ingest(request_for("gnn_v1-2")))
        asyncio.run(updates.roll_back("test"))
        here.error = Unavailable("died")
        with pytest.raises(Unavailable):
            asyncio.run(updates.ingest(request_for("gnn_v1-3")))
    assert [(e["event"], e["reason"], e["priority"]) for e in logs if e["event"].startswith("policy_")] == [
        ("policy_update_applied", "applied", "NORMAL"),
        ("policy_update_rejected", "version_not_above", "NORMAL"),
        ("policy_rolled_back", "test", "HIGH"),
        ("policy_update_failed", "Unavailable", "HIGH"),
    ]


def test_a_rollback_that_is_only_validated_answers_as_one_and_changes_nothing(controller, updates, request_for):
    with pytest.raises(FailedPrecondition, match="No policy was live before"):
        asyncio.run(updates.roll_back("test", validate_only=True))
    for version in ("gnn_v1-2", "gnn_v1-3"):
        asyncio.run(updates.ingest(request_for(version)))
    live, written = controller.pipeline.policy, updates._store.read()
    for _ in range(2):
        assert asyncio.run(updates.roll_back("test", validate_only=True)) == "gnn_v1-2"
    assert (controller.pipeline.policy, updates._store.read()) == (live, written)
    updates._store.path_of(written.entries[-2]).unlink()
    with pytest.raises(DataLoss, match="gnn_v1-2 cannot be loaded"):
        asyncio.run(updates.roll_back("test", validate_only=True))


@pytest.mark.parametrize("error", [DeadlineExceeded("hangs"), Unavailable("died"), OSError(28, "No space left")])
def test_an_update_that_could_not_be_judged_changes_nothing_and_may_come_again(
    controller, updates, here, request_for, error
):
    here.error = error
    with pytest.raises(ResourceExhausted if isinstance(error, OSError) else type(error)):
        asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    assert controller.pipeline.policy is controller.policy
    assert not list(updates._store._directory.glob("*.safetensors"))
    here.error = None
    assert asyncio.run(updates.ingest(request_for("gnn_v1-2"))).applied


def test_updates_that_keep_failing_are_held_off_for_a_while(updates, here, request_for):
    here.error = Unavailable("died")
    for _ in range(3):
        with pytest.raises(Unavailable, match="died"):
            asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    with pytest.raises(Unavailable, match="too often"):
        asyncio.run(updates.ingest(request_for("gnn_v1-2")))
    assert updates.breaker.state == CircuitState.CIRCUIT_STATE_OPEN


def test_a_request_that_is_none_does_not_count_against_updates(updates):
    for _ in range(5):
        with pytest.raises(InvalidRequest):
            asyncio.run(updates.ingest(b"\xff\xff"))
    assert updates.breaker.state == CircuitState.CIRCUIT_STATE_CLOSED


class Broken:
    """A policy whose outputs are of no use."""

    def __init__(self, policy):
        self._policy = policy

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def evaluate(self, *_arguments):
        raise RuntimeError("no output")


def test_a_policy_that_fails_in_service_gives_way_to_the_last_good_one(controller, updates, request_for):
    async def failing():
        await updates.ingest(request_for("gnn_v1-2"))
        controller.pipeline.policy = Broken(controller.pipeline.policy)
        for sequence in range(1, FAILURES + 1):
            packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
            await controller.pipeline.evaluate_in_band(controller.request(sequence, packet), controller.owner)
        await updates._retreat

    asyncio.run(failing())
    assert controller.pipeline.policy is controller.policy
    assert controller.pipeline.breaker.state == CircuitState.CIRCUIT_STATE_CLOSED
    assert updates.previous == []


def test_a_policy_that_is_distrusted_twice_at_once_gives_way_once(controller, updates, request_for):
    for version in ("gnn_v1-2", "gnn_v1-3"):
        asyncio.run(updates.ingest(request_for(version)))

    async def distrust():
        updates.distrust()
        updates.distrust()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(distrust())
    assert controller.pipeline.policy.version == "gnn_v1-2"


def test_a_shadow_counts_how_often_it_would_act_otherwise(controller, updates, request_for):
    async def following():
        assert (await updates.ingest(request_for("gnn_v1-2", shadow=True))).shadowed
        deadline = time.monotonic() + 20
        sequence = 0
        while updates.shadow.compared < 5 and time.monotonic() < deadline:
            sequence += 1
            packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
            await controller.pipeline.evaluate_in_band(controller.request(sequence, packet), controller.owner)
            controller.pipeline.report()
            await asyncio.sleep(0)

    asyncio.run(following())
    assert updates.shadow.compared >= 5
    assert 0 <= updates.shadow.disagreed <= updates.shadow.compared
    assert controller.pipeline.policy is controller.policy


def test_a_shadow_with_the_live_weights_agrees(controller, updates, mesh):
    async def following():
        made = Policy.initial(prior_config=PriorConfig())
        made.version = "gnn_v1-2"
        update = PolicyUpdate(version=1, tamiyo_policy_version=made.version, payload=checkpoint.write(made))
        envelope = sign(
            update.SerializeToString(), payload_type=UPDATE_TYPE, keyring=mesh.keyring("simic"), audience="tamiyo",
            issued_at_ns=SteadyClock()(), nonce="n",
        )  # fmt: skip
        await updates.ingest(IngestPolicyUpdateRequest(update=envelope, shadow=True).SerializeToString())
        for sequence, stage in enumerate(
            (Stage.SEED_LIFECYCLE_STAGE_GERMINATED, Stage.SEED_LIFECYCLE_STAGE_DORMANT), 1
        ):
            packet = controller.packet(stage)
            await controller.pipeline.evaluate_in_band(controller.request(sequence, packet), controller.owner)
            controller.pipeline.report()
            await updates.shadow._running

    asyncio.run(following())
    assert (updates.shadow.compared, updates.shadow.disagreed) == (2, 0)


def test_a_caller_that_goes_away_leaves_no_policy_half_taken_up(controller, updates, request_for):
    async def going_away():
        asked = asyncio.create_task(updates.ingest(request_for("gnn_v1-2")))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, *updates._working, return_exceptions=True)

    asyncio.run(going_away())
    assert updates._store.read().live.version == controller.pipeline.policy.version == "gnn_v1-2"
