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

VERSION = 2
"""Of what `save` returns."""


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
        """Restore what `save` returned; raises InvalidRequest, DataLoss or FailedPrecondition, and changes nothing.

        What was saved without a mesh has no seeds; those of this host stay as they are.
        Seeds that fossilised since leave the user's optimizer, and those that had are put back in the order of then.
        """
        if not state.keys() - {"learning_rate"}:
            if state:
                self._learning_rate.load_state_dict(state["learning_rate"])
            return
        modules = self.check(state)
        self._release_fossils()
        self._progress.loss = state["loss"]
        for seed_id, saved in state["seeds"].items():
            self._seeds[seed_id].load_state_dict(saved, modules[seed_id])
        self._adopt_fossils()
        self._learning_rate.load_state_dict(state["learning_rate"])
        self._on_restored()

    def check(self, state: dict[str, Any]) -> dict[str, nn.Module | None]:
        """Return the modules that `restore` would plant; raises what it raises."""
        self._check_weights(state)
        self._learning_rate.check_state(state["learning_rate"])
        return {seed_id: self._rebuild(self._seeds[seed_id], saved) for seed_id, saved in state["seeds"].items()}

    def _check_weights(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            raise InvalidRequest(
                f"The checkpoint is of version {state.get('version')}, this host reads {VERSION};"
                " resume with the release that wrote it, or without the seeds."
            )
        if set(state["seeds"]) != set(self._seeds):
            raise InvalidRequest(f"The checkpoint holds the seeds {sorted(state['seeds'])}, not {sorted(self._seeds)}.")
        for seed_id, saved in state["seeds"].items():
            if digest(saved["module"] or {}) != state["digests"][seed_id]:
                raise DataLoss(f"The weights of {seed_id} are not those that were saved.")

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

    def _release_fossils(self) -> None:
        for _, module in self._fossils():
            self._learning_rate.release(module)

    def _adopt_fossils(self) -> None:
        # A group of an optimizer is found again by its place.
        for _, module in sorted(self._fossils(), key=lambda fossil: fossil[0]):
            self._learning_rate.adopt(module)

    def _fossils(self) -> list[tuple[int, nn.Module]]:
        slots = [slot for slot in self._seeds.values() if slot.stage == lifecycle.FOSSILIZED]
        return [(slot.adopted_as, slot.site.seed) for slot in slots if slot.site.seed is not None]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        running.update(name.encode() + len(content).to_bytes(8, "little") + content)
    return running.hexdigest()
