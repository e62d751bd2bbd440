from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest

from esper_rpc.errors import FailedPrecondition, NotFound
from esper_rpc.journal import Journal, Record
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import (
    ExplainDecisionResponse,
)
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.records.decisions import KIND, STRUCTURE, DecisionLog
from esper_servers.tamiyo.records.replay import Replay
from esper_servers.tamiyo.risk.config import RiskConfig

OWNER = "spiffe://esper/trainer/local"


def a_germination(controller):
    return controller.train(80, stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT)[0]


def a_seed_operation(controller):
    return controller.train(3, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)[-1]


def a_pause(controller):
    controller.train(60)
    return controller.step(61, loss=math.nan)


def an_adjustment(controller):
    controller.train(120)
    return controller.step(121, loss=0.72)


DECISIONS = [a_germination, a_seed_operation, a_pause, an_adjustment]


@pytest.mark.parametrize("decide", DECISIONS, ids=lambda decide: decide.__name__)
def test_a_decision_is_replayed_bit_for_bit(controller, decide):
    command_id = decide(controller)
    assert controller.replay.differences(command_id) == []


@pytest.mark.parametrize("decide", DECISIONS, ids=lambda decide: decide.__name__)
def test_a_decision_is_replayed_bit_for_bit_after_a_restart(tmp_path, start, decide):
    before = start(Policy.initial())
    command_id = decide(before)
    before.journal.close()
    journal = Journal(tmp_path / "journal.sqlite")
    assert Replay(DecisionLog(journal), Policy.initial).differences(command_id) == []
    journal.close()


def test_every_decision_of_a_long_run_is_replayed_on_another_thread(controller):
    commands = controller.train(150, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    assert len(commands) == 150
    found = []
    thread = threading.Thread(target=lambda: found.extend(controller.replay.differences(c) for c in commands[::10]))
    thread.start()
    more = controller.train(20, stage=Stage.SEED_LIFECYCLE_STAGE_TRAINING)
    thread.join()
    assert found == [[]] * 15
    assert [controller.replay.differences(c) for c in more] == [[]] * len(more)


def test_a_replay_touches_nothing_live(controller):
    command_id = a_germination(controller)
    run = controller.pipeline.runs.find("run")

    def seen():
        features = {kind: array.tobytes() for kind, array in run.graph.copy_features().items()}
        remembered = (dataclasses.asdict(run.risk), dict(run.planted), dict(run.graph.norms.moments))
        return run.steps, run.mode.enabled, *remembered, features

    before = seen()
    controller.replay.differences(command_id)
    assert seen() == before


def test_settings_of_then_are_used_not_those_of_now(start, policy):
    then = start(Policy.initial(prior_config=PriorConfig(warm_up_steps=5)), risk_config=RiskConfig(loss_spike=3.0))
    command_id = a_germination(then)
    then.policy = policy
    assert then.replay.differences(command_id) == []
    assert then.decisions.explain(command_id).evidence.settings["prior.warm_up_steps"] == 5


def test_another_policy_is_named_and_the_recorded_outputs_stand(controller):
    command_id = a_germination(controller)
    controller.policy = Policy.initial(seed=1)
    (difference,) = controller.replay.differences(command_id)
    assert difference.startswith("evidence.policy_digest: recorded ")
    assert controller.policy.digest.hex() in difference


def spoil_packet(record):
    record.packet.seed_states[0].stage = Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED


def spoil_features(record):
    values = np.frombuffer(record.evidence.features["global"].values, "<f4").copy()
    values[0] += 1
    record.evidence.features["global"].values = values.tobytes()


def spoil_memory(record):
    record.evidence.memory["steps"] = 3


def spoil_target(record):
    record.command.target_seed_id = "seed-3"


def spoil_reason(record):
    record.reason = "because"


def spoil_verdict(record):
    record.evidence.verdict.allowed_kinds.remove("pause")


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (spoil_packet, {"evidence.features.seed"}),
        (spoil_features, {"evidence.features.global"}),
        (spoil_memory, {"evidence.signals.steps"}),
        (spoil_target, {"command.target_seed_id"}),
        (spoil_reason, {"reason"}),
        (spoil_verdict, {"evidence.verdict.allowed_kinds"}),
    ],
)
def test_what_was_changed_is_named(controller, spoil, names):
    command_id = a_germination(controller)
    controller.change(command_id, spoil)
    found = controller.replay.differences(command_id)
    assert names <= {line.partition(":")[0] for line in found}, found


def test_a_difference_tells_both_values_and_where(controller):
    command_id = a_germination(controller)
    recorded = np.frombuffer(controller.decisions.explain(command_id).evidence.features["global"].values, "<f4")[0]
    controller.change(command_id, spoil_features)
    told = f"recorded {recorded + np.float32(1)}, now {recorded}"
    assert controller.replay.differences(command_id) == [
        f"evidence.features.global: 1 of 16 values, first at [0, 0]: {told}"
    ]


def test_a_command_that_would_not_be_given_now_is_told(controller):
    command_id = a_germination(controller)

    def calm(record):
        for state in record.packet.seed_states:
            state.stage = Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED

    controller.change(command_id, calm)
    found = controller.replay.differences(command_id)
    assert "command.command_type: recorded COMMAND_TYPE_SEED, now COMMAND_TYPE_UNSPECIFIED" in found
    assert "reason: recorded 'policy', now 'nominal'" in found


def test_another_runtime_alone_is_no_difference(controller):
    command_id = a_germination(controller)

    def elsewhere(record):
        record.evidence.runtime = "torch 1.0"

    controller.change(command_id, elsewhere)
    assert controller.replay.differences(command_id) == []
    controller.change(command_id, spoil_reason)
    found = controller.replay.differences(command_id)
    assert [line.partition(":")[0] for line in found] == ["reason", "evidence.runtime"]


def test_what_cannot_be_replayed_says_why(controller):
    with pytest.raises(NotFound):
        controller.replay.differences("unknown")
    controller.journal.append(KIND, "old", ExplainDecisionResponse(reason="policy").SerializeToString())
    with pytest.raises(FailedPrecondition, match="earlier version"):
        controller.replay.differences("old")
    command_id = a_germination(controller)

    def lose_structure(record):
        record.evidence.structure_digest = bytes(32)

    controller.change(command_id, lose_structure)
    with pytest.raises(FailedPrecondition, match="no longer holds the structure"):
        controller.replay.differences(command_id)


def test_a_decision_of_a_policy_with_other_heads_cannot_be_replayed_by_this_one(controller):
    command_id = a_germination(controller)
    controller.policy = Policy.initial(seed=1)  # So that what was recorded stands for it.

    def of_an_earlier_version(record):
        del record.evidence.outputs["parameters"]

    controller.change(command_id, of_an_earlier_version)
    with pytest.raises(FailedPrecondition, match=r"other heads \(parameters\)") as refused:
        controller.replay.differences(command_id)
    assert refused.value.reason == "NOT_REPLAYABLE"


def test_a_structure_is_kept_once_however_often_the_run_is_opened(controller):
    for _ in range(3):
        controller.train(5, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
        controller.open()
    controller.journal.flush()
    assert len(list(controller.journal.read(STRUCTURE))) == 1


def test_a_structure_is_kept_once_also_when_the_disk_is_behind(controller):
    released = threading.Event()
    controller.journal.append_made(lambda: [Record("first", "1", b"")] * released.wait(60))
    controller.train(5, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    released.set()
    controller.journal.flush()
    assert len(list(controller.journal.read(STRUCTURE))) == 1


def test_a_structure_that_the_journal_dropped_is_written_again(controller, monkeypatch):
    controller.train(2, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    controller.journal.flush()
    monkeypatch.setattr(controller.journal, "holds", lambda *_: False)
    controller.train(1, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    controller.journal.flush()
    assert len(list(controller.journal.read(STRUCTURE))) == 2


def test_the_record_has_the_whole_ledger_and_what_the_policy_saw(controller):
    record = controller.decisions.explain(a_germination(controller))
    assert record.ledger.total_us > record.ledger.inference_us > 0
    assert set(record.evidence.features) == {"layer", "seed", "activation", "parameter", "blueprint", "global"}
    assert {"steps", "loss_trend", "loss_volatility"} <= set(record.evidence.signals)
    heads = {"kind", "operation", "blueprint", "schedule", "value", "risk", "parameters"}
    assert set(record.evidence.outputs) == heads
    assert record.evidence.verdict.allowed_kinds == ["none", "seed", "optimizer", "pause"]


def test_a_record_that_cannot_be_made_is_counted_and_the_journal_goes_on(controller):
    def fails():
        raise RuntimeError("no")

    controller.journal.append_made(fails)
    controller.journal.append_made(lambda: [Record("k", "after", b"")])
    controller.journal.flush()
    assert controller.journal.dropped == 1
    assert controller.journal.holds("k", "after")


def test_a_command_is_recorded_when_its_answer_has_left(controller, monkeypatch):
    handed = []
    monkeypatch.setattr(controller.decisions, "record", lambda evidence: handed.append(evidence.command.command_id))
    metrics = {"loss": 0.6, "gradient_norm": 0.9, "samples_per_s": 4000.0, "hook_latency_ms": 1.5}
    command_id = controller.answer(1, controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED, **metrics))
    assert handed == []
    controller.pipeline.report()
    assert command_id
    assert handed == [command_id]
