"""The bytes of a record are what protobuf would write of the same evidence, up to the order of fields."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import (
    DecisionEvidence,
    ExplainDecisionResponse,
    NumberArray,
    RiskVerdict,
    SignalReading,
)
from esper_servers.policy import schema
from esper_servers.policy.masks import Masks
from esper_servers.tamiyo.records.arrays import read_array, write_arrays
from esper_servers.tamiyo.records.evidence import RUNTIME, settings_of
from esper_servers.tamiyo.records.fields import write_field, write_numbers, write_texts
from esper_servers.tamiyo.risk.reading import DEMAND_NAMES

DIGEST = bytes(range(32))


@pytest.fixture
def recorded(controller, monkeypatch):
    """The evidence of every decision that is recorded."""
    found, record = [], controller.decisions.record
    monkeypatch.setattr(controller.decisions, "record", lambda evidence: (found.append(evidence), record(evidence)))
    return found


def array(values):
    values = np.asarray(values)
    name = {"float32": "F32", "float64": "F64", "bool": "BOOL"}[str(values.dtype)]
    return NumberArray(dtype=name, shape=values.shape, values=values.tobytes())


def verdict_of(verdict):
    return RiskVerdict(
        allowed_kinds=[name for name, allowed in zip(schema.KIND_NAMES, verdict.allowed, strict=True) if allowed],
        forced_kind="" if verdict.forced is None else schema.KIND_NAMES[verdict.forced],
        reason=verdict.reason, demand=DEMAND_NAMES[verdict.demand], score=verdict.score, holds=verdict.holds,
        readings={
            name: SignalReading(demand=DEMAND_NAMES[reading.demand], score=reading.score, reason=reading.reason)
            for name, reading in verdict.readings.items()
        },
    )  # fmt: skip


def by_protobuf(evidence):
    decided, output = evidence.decided, evidence.decided.output
    masks = [field.name for field in dataclasses.fields(Masks)] if decided.masks else []
    heads = ["kind", "operation", "blueprint", "schedule", "value", "risk"] if output else []
    return ExplainDecisionResponse(
        command=evidence.command, packet=evidence.packet, reason=decided.reason,
        policy_version=evidence.policy_version, ledger=evidence.ledger,
        evidence=DecisionEvidence(
            run_id=evidence.request.run_id, structure_digest=DIGEST, policy_digest=evidence.policy_digest,
            plan=output.plan if output else "", runtime=RUNTIME, conservative=evidence.conservative,
            settings=settings_of(evidence.risk, evidence.prior), memory=evidence.memory.numbers(),
            signals={name: float(value) for name, value in dataclasses.asdict(evidence.signals).items()},
            verdict=verdict_of(evidence.verdict), batch_size=decided.batch_size,
            features={name: array(values) for name, values in evidence.features.items()},
            masks={name: array(getattr(decided.masks, name)) for name in masks},
            outputs={name: array(getattr(output, name)) for name in heads},
            planted={seed: name for seed, name in evidence.planted.items() if name},
        ),
    )  # fmt: skip


def test_every_kind_of_decision_is_written_as_protobuf_would(controller, recorded):
    controller.train(100)
    controller.train(80, stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    controller.step(181, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.6)
    controller.step(182, loss=math.nan)
    kinds = {(each.command is not None, each.decided.output is not None) for each in recorded}
    assert kinds == {(True, True), (True, False), (False, True)}
    assert any(each.planted.values() for each in recorded if each.command)
    for evidence in recorded:
        assert evidence.record(DIGEST) == by_protobuf(evidence)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384])
def test_a_field_of_any_length_is_read(size):
    written = write_field(DecisionEvidence.RUN_ID_FIELD_NUMBER, b"x" * size)
    assert DecisionEvidence.FromString(written).run_id == "x" * size


def test_maps_are_read():
    numbers = {"": 0.0, "a": -0.5, "loss.slow": math.inf}
    texts = {"seed-0": "bp", "s": "x" * 300}
    written = write_numbers(DecisionEvidence.MEMORY_FIELD_NUMBER, numbers.items())
    written += write_texts(DecisionEvidence.PLANTED_FIELD_NUMBER, texts)
    assert DecisionEvidence.FromString(written) == DecisionEvidence(memory=numbers, planted=texts)


@pytest.mark.parametrize(
    "values",
    [np.arange(6, dtype="<f4").reshape(2, 3), np.arange(2, dtype=">f8"), np.zeros((0, 3), bool), np.float64(0.25)],
    ids=["rows", "other byte order", "empty", "number"],
)
def test_an_array_is_read_as_it_was(values):
    written = write_arrays(DecisionEvidence.OUTPUTS_FIELD_NUMBER, [("head", np.asarray(values))])
    found = read_array(DecisionEvidence.FromString(written).outputs["head"])
    assert found.shape == np.shape(values)
    assert found.tolist() == np.asarray(values).tolist()
