from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esper_rpc.proto.leyline.v1 import AdaptationCommand, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    DecisionEvidence,
    ExplainDecisionResponse,
    OpenRunRequest,
    RiskVerdict,
    SignalReading,
    StepLedger,
)
from esper_servers.policy import schema
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import Masks
from esper_servers.policy.policy import Policy, PolicyOutput
from esper_servers.policy.prior import PriorConfig, RunSignals
from esper_servers.tamiyo.choosing import Decided
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.engine import Verdict
from esper_servers.tamiyo.risk.reading import DEMAND_NAMES, Reading
from esper_servers.tamiyo.run_state import RunState

from .arrays import Array, write_arrays
from .memory import Memory

_SIGNALS = tuple(field.name for field in dataclasses.fields(RunSignals))
_NO_ARRAYS = frozenset({"plan", "batch_size"})
OUTPUT_NAMES = frozenset(field.name for field in dataclasses.fields(PolicyOutput)) - _NO_ARRAYS
RUNTIME = f"torch {torch.__version__}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything that a step was decided on: references to what stays, copies of what the next step overwrites."""

    command: AdaptationCommand | None
    sequence: int
    packet: SystemStatePacket
    ledger: StepLedger
    decided: Decided
    verdict: Verdict
    policy_version: str
    policy_digest: bytes
    prior: PriorConfig
    risk: RiskConfig
    conservative: bool
    memory: Memory
    planted: Mapping[str, str]
    signals: RunSignals
    features: Mapping[str, Array]
    request: OpenRunRequest
    graph: RunGraph
    """For what it was built from; its features are those of a later step by the time this is read."""

    @classmethod
    def of(
        cls, command: AdaptationCommand | None, packet: SystemStatePacket, ledger: StepLedger, decided: Decided,
        verdict: Verdict, *, run: RunState, memory: Memory, policy: Policy, prior: PriorConfig, risk: RiskConfig,
        conservative: bool, sequence: int = 0,
    ) -> Evidence:  # fmt: skip
        """Gather it on the step path, before the command changes what the run remembers."""
        return cls(
            command=command, sequence=sequence, packet=packet, ledger=ledger, decided=decided, verdict=verdict,
            policy_version=policy.version, policy_digest=policy.digest, prior=prior, risk=risk,
            conservative=conservative, memory=memory, planted=run.planted.copy(), signals=run.signals(),
            features=run.graph.copy_features(), request=run.request, graph=run.graph,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """Under which its record is found."""
        return self.command.command_id if self.command else key_of_step(self.request.run_id, self.sequence)

    def record(self, structure_digest: bytes) -> ExplainDecisionResponse:
        """Write it down; takes too long for the step path."""
        evidence = DecisionEvidence(
            run_id=self.request.run_id,
            structure_digest=structure_digest,
            policy_digest=self.policy_digest,
            plan=self.decided.output.plan if self.decided.output else "",
            runtime=RUNTIME,
            conservative=self.conservative,
            settings=settings_of(self.risk, self.prior),
            memory=self.memory.numbers(),
            signals={name: float(getattr(self.signals, name)) for name in _SIGNALS},
            verdict=_verdict(self.verdict),
            features=write_arrays(self.features),
            masks=write_arrays(_fields(self.decided.masks)),
            outputs=write_arrays(_fields(self.decided.output)),
            batch_size=self.decided.batch_size,
            planted={seed_id: blueprint_id for seed_id, blueprint_id in self.planted.items() if blueprint_id},
        )
        return ExplainDecisionResponse(
            command=self.command, packet=self.packet, reason=self.decided.reason,
            policy_version=self.policy_version, ledger=self.ledger, evidence=evidence,
        )  # fmt: skip


def key_of_step(run_id: str, sequence: int) -> str:
    """Return the key of the record of a step without a command; no command is called so."""
    return f"{run_id}/{sequence}"


@functools.cache
def settings_of(risk: RiskConfig, prior: PriorConfig) -> Mapping[str, float]:
    """Name every threshold."""
    named = {"risk": dataclasses.asdict(risk), "prior": dataclasses.asdict(prior)}
    return {f"{section}.{key}": float(value) for section, values in named.items() for key, value in values.items()}


def _verdict(verdict: Verdict) -> RiskVerdict:
    kinds = schema.KIND_NAMES
    return RiskVerdict(
        allowed_kinds=[name for name, is_allowed in zip(kinds, verdict.allowed, strict=True) if is_allowed],
        forced_kind="" if verdict.forced is None else kinds[verdict.forced],
        reason=verdict.reason,
        demand=DEMAND_NAMES[verdict.demand],
        score=verdict.score,
        readings={name: _reading(reading) for name, reading in verdict.readings.items()},
        holds=verdict.holds,
    )


def _reading(reading: Reading) -> SignalReading:
    return SignalReading(demand=DEMAND_NAMES[reading.demand], score=reading.score, reason=reading.reason)


def _fields(value: Masks | PolicyOutput | None) -> dict[str, Any]:
    """The arrays of a dataclass by name; a number becomes an array too."""
    if value is None:
        return {}
    fields = (field.name for field in dataclasses.fields(value) if field.name not in _NO_ARRAYS)
    return {name: np.asarray(getattr(value, name)) for name in fields}
