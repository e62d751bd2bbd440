from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_rpc.errors import DataLoss, FailedPrecondition, InvalidRequest
from esper_rpc.proto.urza.v1 import KernelManifest
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.kernel import KernelRejected, instantiate

from . import lifecycle
from .learning_rate import LearningRateAuthority
from .progress import Progress
from .seed_slot import SeedSlot

VERSION = 1


class Checkpoint:
    """Saves and restores seeds, their optimizers and what the learning-rate authority holds. All or nothing."""

    def __init__(
        self,
        *,
        seeds: Mapping[str, SeedSlot],
        factories: Mapping[str, BlueprintFactory],
        learning_rate: LearningRateAuthority,
        progress: Progress,
        on_restored: Callable[[], object] = lambda: None,
    ) -> None:
        self._seeds = seeds
        self._factories = factories
        self._learning_rate = learning_rate
        self._progress = progress
        self._on_restored = on_restored

    def save(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        seeds = {seed_id: slot.state_dict() for seed_id, slot in self._seeds.items()}
        return {
            "version": VERSION,
            "loss": self._progress.loss,
            "learning_rate": self._learning_rate.state_dict(),
            "seeds": seeds,
            "digests": {seed_id: digest(seed["module"] or {}) for seed_id, seed in seeds.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `save` returned; raises InvalidRequest, DataLoss or FailedPrecondition, and changes nothing."""
        self._check(state)
        modules = {seed_id: self._rebuild(self._seeds[seed_id], saved) for seed_id, saved in state["seeds"].items()}
        self._progress.loss = state["loss"]
        for seed_id, saved in state["seeds"].items():
            self._restore(self._seeds[seed_id], saved, modules[seed_id])
        self._learning_rate.load_state_dict(state["learning_rate"])
        self._on_restored()

    def _check(self, state: dict[str, Any]) -> None:
        if set(state["seeds"]) != set(self._seeds):
            raise InvalidRequest(f"The checkpoint holds the seeds {sorted(state['seeds'])}, not {sorted(self._seeds)}.")
        for seed_id, saved in state["seeds"].items():
            if digest(saved["module"] or {}) != state["digests"][seed_id]:
                raise DataLoss(f"The weights of {seed_id} are not those that were saved.")
            if self._seeds[seed_id].stage == lifecycle.FOSSILIZED:
                raise FailedPrecondition(f"{seed_id} is fossilised already; restore into a session of a fresh model.")

    def _rebuild(self, slot: SeedSlot, saved: dict[str, Any]) -> nn.Module | None:
        if saved["module"] is None:
            return None
        manifest = KernelManifest.FromString(bytes.fromhex(saved["manifest"]))
        # The weights come from the checkpoint.
        manifest.weights_sha256 = b""
        try:
            module = instantiate(
                manifest, self._factories, feature_shape=tuple(saved["feature_shape"]), dtype=slot.site.dtype,
                device=slot.site.device,
            )  # fmt: skip
        except KernelRejected as rejected:
            raise FailedPrecondition(f"{slot.seed_id} cannot be built: {rejected}.") from rejected
        module.load_state_dict(saved["module"])
        return module

    def _restore(self, slot: SeedSlot, saved: dict[str, Any], module: nn.Module | None) -> None:
        slot.load_state_dict(saved, module)
        if module is not None and slot.stage == lifecycle.FOSSILIZED:
            self._learning_rate.adopt(module)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        running.update(name.encode() + len(content).to_bytes(8, "little") + content)
    return running.hexdigest()
