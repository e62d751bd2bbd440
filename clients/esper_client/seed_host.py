from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedState, SignedEnvelope, TelemetryPacket
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What OpenRun says of a model."""

    sites: tuple[RunSite, ...]
    seeds: tuple[RunSeed, ...]
    host_topology: bytes
    """JSON in the extras schema."""


class OutOfStep(RuntimeError):
    """The ranks of a distributed training have come apart: one is gone, or holds another model.

    No fault of the mesh, and the one error that a session passes on: a rank that went on would wait for ever.
    """


class SeedHost(Protocol):
    """Carries out commands on a live model. `submit` may be called from any thread, the rest from the trainer's.

    A step is observe, export_seed_states, submit, apply_pending, advance_alphas, finalize_step, in this order. A host
    may put the changes of a step off until finalize_step; their outcomes then come with the next apply_pending.
    """

    @property
    def receiver_epoch(self) -> bytes:
        """The 16 random bytes that every command must carry; other ones tell that the host was started anew."""
        ...

    @property
    def last_sequence(self) -> int:
        """The last sequence accepted from the controller; a session numbers its requests on from there."""
        ...

    def describe(self) -> RunDescription:
        """Describe the model as it is at present. Called from the session's loop."""
        ...

    def submit(
        self,
        envelope: SignedEnvelope,
        *,
        expected_sequence: int | None = None,
        request_digest: bytes | None = None,
    ) -> CommandOutcome:
        """Verify a command and queue it for the next safe point; a refusal is an outcome."""
        ...

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss of the step that just ended."""
        ...

    def apply_pending(self) -> list[CommandOutcome]:
        """Carry out what is queued. This is the safe point: call it after optimizer.step()."""
        ...

    def advance_alphas(self) -> None:
        """Move every blending seed one step on."""
        ...

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """Step the seeds' optimizers and flush one packet per active seed and a global one with what was rejected."""
        ...

    def export_seed_states(self) -> list[SeedState]:
        """Return the state of every seed."""
        ...

    def update_epoch(self, epoch: int) -> None:
        """Note that an epoch begins."""
        ...

    def set_clock_offset(self, offset_ns: int) -> None:
        """Set the issuer's wall clock minus the local monotonic clock."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...

    def export(self) -> Any:
        """Return the model without the mesh: fossilised seeds kept, the rest gone."""
        ...

    def close(self) -> None:
        """End what the host runs beside the loop."""
        ...
