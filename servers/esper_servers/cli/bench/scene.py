"""The run that the step benchmark describes: the graph that the figures are stated for."""

from __future__ import annotations

import math
import os
from collections import deque
from typing import Any

import orjson

from esper_client import RunDescription
from esper_rpc.envelope import Rejected, Verifier
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    SeedLifecycleStage,
    SeedOperation,
    SeedState,
    SignedEnvelope,
    TelemetryPacket,
)
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.cli.home import Home

LAYERS, ACTIVATIONS, PARAMETERS, SEEDS = 24, 8, 16, 4
WIDTH = 64
ALPHA_STEPS = 20.0
_REACH = 8
_STAGES = (
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_DORMANT,
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_TRAINING,
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_BLENDING,
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_PROBATIONARY,
)

_BLENDED = (
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_SHADOWING,
    SeedLifecycleStage.SEED_LIFECYCLE_STAGE_PROBATIONARY,
)


def topology(layer_count: int = LAYERS, seed_count: int = SEEDS) -> dict[str, Any]:
    """Describe a model with skip connections in the extras schema."""
    layers = [
        {
            "layer_id": f"block.{index}", "type": "Linear", "depth": index, "latency_ms": 0.4, "dropout_rate": 0.1,
            "parameter_count": WIDTH * WIDTH, "weight_norm": 5.0 + index / 10, "gradient_norm": 0.5,
            "activation": f"act.{index % ACTIVATIONS}",
        }
        for index in range(layer_count)
    ]  # fmt: skip
    activations = [
        {
            "activation_id": f"act.{index}", "type": "GELU", "saturation_rate": 0.1, "gradient_flow": 0.9,
            "computational_cost": 0.2, "nonlinearity_strength": 0.5,
        }
        for index in range(ACTIVATIONS)
    ]  # fmt: skip
    parameters = [
        {"name": f"parameter.{i}", "min": 0.0, "max": 1.0, "span": 1.0, "default": 0.5} for i in range(PARAMETERS)
    ]
    edges = [[a, b, 1.0 / (b - a)] for a in range(layer_count) for b in range(a + 1, min(layer_count, a + 1 + _REACH))]
    monitored = [
        [seed, layer] for seed in range(seed_count) for layer in range(seed % layer_count, layer_count, seed_count)
    ]
    return {
        "schema_version": "v1",
        "layers": layers,
        "activations": activations,
        "parameters": parameters,
        "adjacency": {"layer": edges},
        "monitored_layers": monitored,
    }


class BenchHost:
    """A seed host without a model: it verifies every command, settles it at once and reports its seeds."""

    def __init__(self, home: Home, *, layers: int = LAYERS, seeds: int = SEEDS) -> None:
        identity = home.identity("trainer")
        self._epoch = os.urandom(16)
        self.keyring = home.keyring("trainer")
        self._verifier = Verifier(keyring=self.keyring, audience=str(identity.spiffe_id), receiver_epoch=self._epoch)
        self._pending: deque[AdaptationCommand] = deque()
        self._loss, self._step = 2.3, 0
        self._topology = orjson.dumps(topology(layers, seeds))
        self._sites = [f"block.{i}" for i in range(min(layers, seeds))]
        self._stages, self._since = [_STAGES[i % len(_STAGES)] for i in range(seeds)], [0] * seeds

    @property
    def receiver_epoch(self) -> bytes:
        """The challenge of this start."""
        return self._epoch

    @property
    def last_sequence(self) -> int:
        """What the only session of this host has got to."""
        return self._verifier.fences().get("tamiyo", 0)

    def describe(self) -> RunDescription:
        """Describe the sites and their seeds: one each, while there are layers for it."""
        shape = (WIDTH,)
        sites = tuple(
            RunSite(site_id=site, module_kind="Linear", input_shape=shape, output_shape=shape, dtype="F32")
            for site in self._sites
        )
        seeds = tuple(
            RunSeed(seed_id=f"seed-{i}", site_id=self._sites[i % len(self._sites)], stage=stage)
            for i, stage in enumerate(self._stages)
        )
        return RunDescription(sites, seeds, self._topology)

    def submit(
        self, envelope: SignedEnvelope, *, expected_sequence: int | None = None, request_digest: bytes | None = None
    ) -> CommandOutcome:
        """Verify and queue, as a real host does."""
        try:
            accepted = self._verifier.verify(
                envelope, expected_sequence=expected_sequence, expected_digest=request_digest
            )
        except Rejected as rejected:
            return CommandOutcome(
                command_id=envelope.nonce, result=CommandOutcome.RESULT_REJECTED, reason=rejected.reason
            )
        self._pending.append(AdaptationCommand.FromString(accepted.payload))
        return CommandOutcome(command_id=accepted.nonce, result=CommandOutcome.RESULT_QUEUED)

    def observe(self, loss: float, global_step: int) -> None:
        """Note where the run stands."""
        self._loss, self._step = loss, global_step

    def apply_pending(self) -> list[CommandOutcome]:
        """Settle what is queued."""
        outcomes = []
        while self._pending:
            command = self._pending.popleft()
            if command.HasField("seed_operation"):
                self._advance(int(command.target_seed_id.removeprefix("seed-")), command.seed_operation.operation)
            outcomes.append(
                CommandOutcome(
                    command_id=command.command_id,
                    result=CommandOutcome.RESULT_APPLIED,
                    seed_id=command.target_seed_id,
                    operation=command.seed_operation.operation,
                    global_step=self._step,
                )
            )
        return outcomes

    def advance_alphas(self) -> None:
        """Nothing blends here."""

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """Nothing learns here."""
        return []

    def export_seed_states(self) -> list[SeedState]:
        """Report the seeds in four stages, with six metrics each."""
        return [self._seed_state(index) for index in range(len(self._stages))]

    def update_epoch(self, epoch: int) -> None:
        """Nothing ages here."""

    def set_clock_offset(self, offset_ns: int) -> None:
        """Judge the age of commands by the controller's clock."""
        self._verifier.set_clock_offset(offset_ns)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""

    def export(self) -> Any:
        """Return nothing: there is no model."""
        return None

    def close(self) -> None:
        """Nothing runs beside."""

    def _advance(self, index: int, operation: SeedOperation.ValueType) -> None:
        from esper_servers.kasmina import lifecycle

        target = lifecycle.target_of(operation, self._stages[index])
        if target is not None:
            # A seed that came to its end makes room for the next one, so that the run never grows quiet.
            is_over = target in (lifecycle.FOSSILIZED, lifecycle.CULLED)
            self._stages[index], self._since[index] = lifecycle.DORMANT if is_over else target, self._step

    def _alpha(self, index: int) -> float:
        stage, steps = self._stages[index], self._step - self._since[index]
        if stage == SeedLifecycleStage.SEED_LIFECYCLE_STAGE_BLENDING:
            return min(1.0, steps / ALPHA_STEPS)
        return 1.0 if stage in _BLENDED else 0.0

    def _seed_state(self, index: int) -> SeedState:
        alpha = self._alpha(index)
        metrics = {
            "alpha": alpha, "alpha_steps": ALPHA_STEPS * alpha, "alpha_total_steps": ALPHA_STEPS,
            "alpha_temperature": 1.0, "risk_tolerance": 0.5, "steps_in_stage": float(self._step - self._since[index]),
        }  # fmt: skip
        return SeedState(
            seed_id=f"seed-{index}", stage=self._stages[index], learning_rate=1e-3, layer_depth=index, metrics=metrics,
            gradient_norm=0.5 + 0.1 * math.sin(self._step), age_epochs=1, risk_score=0.2,
        )  # fmt: skip
