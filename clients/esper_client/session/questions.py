from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from esper_client.packet import build_packet
from esper_client.seed_host import SeedHost
from esper_rpc.proto.leyline.v1 import MetricPoint, SystemStatePacket, TelemetryPacket
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, EvaluateStepsRequest, OpenRunRequest, Step
from esper_rpc.telemetry.tracing import current_traceparent

from .config import SessionConfig
from .loss import BadArgument, Loss, read_loss, read_number
from .untold_outcomes import UntoldOutcomes

PROTOCOL_VERSIONS = (1, 2)
ISOLATION_BREAKER = "gradient_isolation"


class Measured(NamedTuple):
    """What the loop told of a step."""

    loss: float
    samples: float | None
    gradient_norm: float | None
    metrics: Mapping[str, float]


def measure(
    loss: Loss,
    samples: float | None = None,
    gradient_norm: float | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Measured:
    """Read what a loop tells; raises BadArgument for what is no number."""
    return Measured(
        read_loss(loss),
        None if samples is None else read_number("samples", samples),
        None if gradient_norm is None else read_number("gradient_norm", gradient_norm),
        {name: read_number(f"metrics[{name!r}]", value) for name, value in _named(metrics).items()},
    )


def _named(metrics: Mapping[str, float] | None) -> Mapping[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise BadArgument(f"metrics must be a mapping of names to numbers, not a {type(metrics).__name__}.")
    if metrics and not all(isinstance(name, str) for name in metrics):
        raise BadArgument("metrics must be named by strings.")
    return metrics or {}


class Questions:
    """Words what a session asks Tamiyo, and numbers it: a run, its steps, the ends of its epochs."""

    def __init__(self, *, run_id: str, host: SeedHost, config: SessionConfig) -> None:
        self.sequence = 0
        self.untold = UntoldOutcomes()
        self.hook_latency_ms = 0.0
        self.tamiyo_latency_ms: float | None = None
        """How long the loop waited for Tamiyo in the step before; None when it could not be asked."""
        self._run_id = run_id
        self._host = host
        self._config = config
        self._told_epoch = b""
        self._last_step_at: float | None = None
        self._of_host: dict[str, float] = {}

    @property
    def is_host_told(self) -> bool:
        """Whether the host is still the one that the run was opened with."""
        return self._host.receiver_epoch == self._told_epoch

    def run(self, features: tuple[str, ...], *, last_sequence: int) -> OpenRunRequest:
        """Describe the run as it is at present."""
        model = self._host.describe()
        self._told_epoch = self._host.receiver_epoch
        return OpenRunRequest(
            run_id=self._run_id,
            protocol_versions=PROTOCOL_VERSIONS,
            features=features,
            receiver_epoch=self._told_epoch,
            host_topology=model.host_topology,
            sites=model.sites,
            seeds=model.seeds,
            optimizer_family=self._config.optimizer_family,
            world_size=self._config.world_size,
            step_budget_us=int(self._config.step_budget_ms * 1000),
            last_sequence=last_sequence,
        )

    def packet(self, measured: Measured, *, epoch: int, global_step: int) -> SystemStatePacket:
        """Build the state that a question is about."""
        known = {"hook_latency_ms": self.hook_latency_ms, **self._of_host, **measured.metrics}
        if self.tamiyo_latency_ms is not None:
            known["tamiyo_latency_ms"] = self.tamiyo_latency_ms
        if measured.gradient_norm is not None:
            known["gradient_norm"] = measured.gradient_norm
        now = time.monotonic()
        if measured.samples is not None and self._last_step_at is not None:
            known["samples_per_s"] = measured.samples / max(1e-9, now - self._last_step_at)
        self._last_step_at = now
        return build_packet(
            run_id=self._run_id,
            epoch=epoch,
            global_step=global_step,
            loss=measured.loss,
            metrics=known,
            seeds=self._host.export_seed_states(),
        )

    def learn(self, packets: Iterable[TelemetryPacket]) -> None:
        """Take what the host told of the step that ended; Tamiyo hears with the next step what it judges by."""
        points = [point for packet in packets for point in packet.metrics]
        self._of_host = {point.name: point.value for point in points if _is_for_tamiyo(point)}

    def step(self, packet: SystemStatePacket, *, budget_seconds: float) -> bytes:
        """Ask what to do after a step, and tell what became of commands."""
        self._number()
        step = Step(
            run_id=self._run_id,
            sequence=self.sequence,
            budget_us=round(budget_seconds * 1e6),
            traceparent=current_traceparent(),
            packet=packet,
            outcomes=self.untold,
        )
        return EvaluateStepsRequest(step=step).SerializeToString()

    def epoch(self, packet: SystemStatePacket) -> EvaluateEpochRequest:
        """Ask what to do at the end of an epoch."""
        self._number()
        return EvaluateEpochRequest(run_id=self._run_id, packet=packet, sequence=self.sequence)

    def _number(self) -> None:
        # A host in another process may have answered an earlier session of this run.
        self.sequence = max(self.sequence, self._host.last_sequence) + 1


def _is_for_tamiyo(point: MetricPoint) -> bool:
    if point.name == "kasmina.breaker.state":
        return point.attributes["breaker"] == ISOLATION_BREAKER
    return point.name == "kasmina.isolation.violations"
