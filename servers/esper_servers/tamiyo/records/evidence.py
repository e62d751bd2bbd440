from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch

from esper_rpc.proto.leyline.v1 import AdaptationCommand, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    DecisionEvidence,
    ExplainDecisionResponse,
    OpenRunRequest,
    StepLedger,
)
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import Masks
from esper_servers.policy.policy import Policy, PolicyOutput
from esper_servers.policy.prior import PriorConfig, RunSignals
from esper_servers.tamiyo.choosing import Decided
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.engine import Verdict
from esper_servers.tamiyo.run_state import RunState

from .arrays import Array, write_arrays
from .fields import write_field, write_numbers, write_texts
from .memory import Memory
from .verdicts import write_verdict

_SIGNALS = tuple(field.name for field in dataclasses.fields(RunSignals))
_MASKS = tuple(field.name for field in dataclasses.fields(Masks))
OUTPUT_NAMES = tuple(field.name for field in dataclasses.fields(PolicyOutput) if field.name not in {"plan", "batch_size"})
_read_signals = attrgetter(*_SIGNALS)
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
        """Return what is written down."""
        return ExplainDecisionResponse.FromString(self.write(structure_digest))

    def write(self, structure_digest: bytes) -> bytes:
        """Write it down as an ExplainDecisionResponse; takes too long for the step path."""
        head = ExplainDecisionResponse(reason=self.decided.reason, policy_version=self.policy_version)
        record = ExplainDecisionResponse
        return b"".join((
            head.SerializeToString(),
            write_field(record.COMMAND_FIELD_NUMBER, self.command.SerializeToString()) if self.command else b"",
            write_field(record.PACKET_FIELD_NUMBER, self.packet.SerializeToString()),
            write_field(record.LEDGER_FIELD_NUMBER, self.ledger.SerializeToString()),
            write_field(record.EVIDENCE_FIELD_NUMBER, self._evidence(structure_digest)),
        ))  # fmt: skip

    def _evidence(self, structure_digest: bytes) -> bytes:
        head = DecisionEvidence(
            run_id=self.request.run_id,
            structure_digest=structure_digest,
            policy_digest=self.policy_digest,
            plan=self.decided.output.plan if self.decided.output else "",
            runtime=RUNTIME,
            conservative=self.conservative,
            batch_size=self.decided.batch_size,
        )
        evidence = DecisionEvidence
        return b"".join((
            head.SerializeToString(),
            _settings(self.risk, self.prior),
            write_numbers(evidence.MEMORY_FIELD_NUMBER, self.memory.numbers().items()),
            write_numbers(evidence.SIGNALS_FIELD_NUMBER, zip(_SIGNALS, _read_signals(self.signals), strict=True)),
            write_field(evidence.VERDICT_FIELD_NUMBER, write_verdict(self.verdict)),
            write_arrays(evidence.FEATURES_FIELD_NUMBER, self.features.items()),
            write_arrays(evidence.MASKS_FIELD_NUMBER, _arrays_of(self.decided.masks, _MASKS)),
            write_arrays(evidence.OUTPUTS_FIELD_NUMBER, _arrays_of(self.decided.output, OUTPUT_NAMES)),
            write_texts(evidence.PLANTED_FIELD_NUMBER, {seed: name for seed, name in self.planted.items() if name}),
        ))  # fmt: skip


def key_of_step(run_id: str, sequence: int) -> str:
    """Return the key of the record of a step without a command; no command is called so."""
    return f"{run_id}/{sequence}"


@functools.cache
def settings_of(risk: RiskConfig, prior: PriorConfig) -> Mapping[str, float]:
    """Name every threshold."""
    named = {"risk": dataclasses.asdict(risk), "prior": dataclasses.asdict(prior)}
    return {f"{section}.{key}": float(value) for section, values in named.items() for key, value in values.items()}


@functools.cache
def _settings(risk: RiskConfig, prior: PriorConfig) -> bytes:
    return write_numbers(DecisionEvidence.SETTINGS_FIELD_NUMBER, settings_of(risk, prior).items())


def _arrays_of(value: Masks | PolicyOutput | None, names: tuple[str, ...]) -> list[tuple[str, Array]]:
    """The arrays of a dataclass by name; a number becomes an array too."""
    return [] if value is None else [(name, np.asarray(getattr(value, name))) for name in names]
