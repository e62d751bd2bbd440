"""What the first rank tells the others at the end of a step, so that their seeds are as its own."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import structlog
import torch
from torch import nn

from esper_rpc.errors import DataLoss
from esper_rpc.proto.urza.v1 import KernelManifest
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.kernel import instantiate
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.blending.alpha import gradient_clip
from esper_servers.kasmina.checkpoint import digest
from esper_servers.kasmina.learning import clip_gradients, learn
from esper_servers.kasmina.learning_rate import LearningRateAuthority, RankAuthority
from esper_servers.kasmina.seed_slot import CLIP_NORM, SeedSlot

from .lockstep import Lockstep, sizes_of

log = structlog.get_logger(__name__)

HEADER_BYTES = 8
STANDING: Mapping[str, Any] = {"do": "stand"}
"""An order to wait for the next one: the first rank stands still."""
SCALE, ADOPT, RELEASE = "scale", "adopt", "release"
NOTHING_NEW: Mapping[str, Any] = {"is_last": True, "rates": [], "seeds": {}, "gone": [], "layout": {}}


class RecordedAuthority:
    """A learning-rate authority whose changes are noted, in their order, until they are told."""

    def __init__(self, authority: LearningRateAuthority) -> None:
        self._authority = authority
        self._done: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._authority, name)

    def scale(self, multiplier: float) -> bool:
        """Multiply every learning rate; what was refused is not noted."""
        if not self._authority.scale(multiplier):
            return False
        self._done.append((SCALE, multiplier))
        return True

    def adopt(self, module: nn.Module) -> None:
        """Train these parameters from here on."""
        self._authority.adopt(module)
        self._done.append((ADOPT, module))

    def release(self, module: nn.Module) -> None:
        """Train these parameters no longer."""
        self._authority.release(module)
        self._done.append((RELEASE, module))

    def take(self) -> list[tuple[str, Any]]:
        """Return what was done since the last call."""
        done, self._done = self._done, []
        return done


class Announcer:
    """Says what has changed since it spoke last: counters each step, a module when it is new."""

    def __init__(self, seeds: Mapping[str, SeedSlot], authority: RecordedAuthority, lockstep: Lockstep) -> None:
        self._seeds = seeds
        self._authority = authority
        self._lockstep = lockstep
        self._told: dict[str, tuple[dict[str, Any], nn.Module | None]] = {}
        self.settle()

    def settle(self) -> None:
        """Take the present state as known to all, as after a checkpoint that every rank restored."""
        self._told = {seed_id: (_plain(slot), slot.site.seed) for seed_id, slot in self._seeds.items()}
        self._authority.take()
        self._lockstep.measure()

    def compose(self, *, is_last: bool = True) -> bytes:
        """Return what the others need, nothing when nothing has changed and it is the last word of the step."""
        changed = {i: plain for i, slot in self._seeds.items() if (plain := self._changed(slot)) is not None}
        rates = [(kind, self._name(value) if kind != SCALE else value) for kind, value in self._authority.take()]
        if not changed and not rates and is_last:
            return b""
        fresh = [i for i in changed if self._seeds[i].site.seed is not self._told[i][1]]
        whole = {i: self._seeds[i].state_dict() for i in fresh if self._seeds[i].site.seed is not None}
        header = {
            "is_last": is_last, "rates": rates, "seeds": changed, "gone": [i for i in fresh if i not in whole],
            "layout": {i: sizes_of(self._seeds[i]) for i in whole},
            "digests": {i: digest(state["module"]) for i, state in whole.items()},
        }  # fmt: skip
        self._told |= {i: (plain, self._seeds[i].site.seed) for i, plain in changed.items()}
        self._lockstep.measure()
        return _pack(header, whole)

    def _changed(self, slot: SeedSlot) -> dict[str, Any] | None:
        plain, module = self._told[slot.seed_id]
        if slot.stage == plain["stage"] == lifecycle.DORMANT and module is None:
            # Most sites, most of the time.
            return None
        present = _plain(slot)
        return present if present != plain or slot.site.seed is not module else None

    def _name(self, module: nn.Module) -> str:
        # One that was taken out is known by where it was.
        return next(i for i, slot in self._seeds.items() if module in (slot.site.seed, self._told[i][1]))


class Mirror:
    """Carries out on this rank's seeds what the first rank tells."""

    def __init__(
        self,
        seeds: Mapping[str, SeedSlot],
        authority: RankAuthority,
        lockstep: Lockstep,
        factories: Mapping[str, BlueprintFactory],
    ) -> None:
        self._seeds = seeds
        self._authority = authority
        self._lockstep = lockstep
        self._factories = factories

    def follow(self, told: bytes) -> bool:
        """End the step as the first rank did: rates, adopted seeds, own optimizers, then what is new.

        Returns whether it has more to say.
        """
        header, whole = _unpack(told) if told else (NOTHING_NEW, {})
        for kind, value in header["rates"]:
            self._change_rate(kind, value)
        self._authority.step()
        for seed_id, plain in header["seeds"].items():
            self._learn(self._seeds[seed_id], plain)
        for slot in self._seeds.values():
            slot.clear_gradients()
        for seed_id in header["gone"]:
            self._seeds[seed_id].uproot()
            self._lockstep.layout.pop(seed_id, None)
        for seed_id, state in whole.items():
            self._lockstep.layout[seed_id] = header["layout"][seed_id]
            self._rebuild(self._seeds[seed_id], state, header["digests"][seed_id])
        # In the order of the first rank, whose layout follows that of the seeds.
        self._lockstep.layout = {i: self._lockstep.layout[i] for i in self._seeds if i in self._lockstep.layout}
        for slot in self._seeds.values():
            if slot.seed_id in header["seeds"]:
                _load_plain(slot, header["seeds"][slot.seed_id])
            else:
                slot.steps_in_stage += 1
        return not header["is_last"]

    def _change_rate(self, kind: str, value: Any) -> None:
        if kind == SCALE:
            self._authority.follow(value)
            return
        slot = self._seeds[value]
        if kind == RELEASE:
            if slot.site.seed is not None:
                self._authority.release(slot.site.seed)
            return
        slot.optimizer = None
        if slot.site.seed is not None:
            self._authority.adopt(slot.site.seed)

    def _learn(self, slot: SeedSlot, plain: dict[str, Any]) -> None:
        # The gradients are averaged already, so that the same is done to the same numbers.
        if slot.site.seed is not None and slot.optimizer is not None and plain["updates"] == slot.updates + 1:
            is_blending = plain["stage"] == lifecycle.BLENDING
            most = gradient_clip(plain["alpha"]) if is_blending else CLIP_NORM
            clip_gradients(slot.site.own_parameters, most)
            learn(slot.optimizer)

    def _rebuild(self, slot: SeedSlot, state: dict[str, Any], told_digest: str) -> None:
        """Build what the first rank has planted. What cannot be built here is missing, and culled on all ranks."""
        slot.uproot()
        try:
            if digest(state["module"]) != told_digest:
                raise DataLoss("its weights are not those that were sent")
            slot.load_state_dict(state, self._module(slot, state))
        except Exception as error:  # noqa: BLE001  # Whatever it is, the ranks must stay together.
            log.error("seed_not_built_on_this_rank", seed_id=slot.seed_id, error=str(error))
            slot.uproot()

    def _module(self, slot: SeedSlot, state: dict[str, Any]) -> nn.Module:
        manifest = KernelManifest.FromString(bytes.fromhex(state["manifest"]))
        # The weights come from the first rank.
        manifest.weights_sha256 = b""
        shape = tuple(state["feature_shape"])
        module = instantiate(
            manifest, self._factories, feature_shape=shape, dtype=slot.site.dtype, device=slot.site.device
        )
        module.load_state_dict(state["module"])
        return module


def _plain(slot: SeedSlot) -> dict[str, Any]:
    return {**slot.plain_state(), "paused": slot.site.paused}


def _load_plain(slot: SeedSlot, plain: dict[str, Any]) -> None:
    slot.load_plain_state(plain)
    slot.site.paused = plain["paused"]


def _pack(header: dict[str, Any], whole: dict[str, Any]) -> bytes:
    told = json.dumps(header).encode()
    weights = io.BytesIO()
    if whole:
        torch.save(whole, weights)
    return len(told).to_bytes(HEADER_BYTES, "little") + told + weights.getvalue()


def _unpack(told: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    end = HEADER_BYTES + int.from_bytes(told[:HEADER_BYTES], "little")
    weights = told[end:]
    whole = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True) if weights else {}
    return json.loads(told[HEADER_BYTES:end]), whole
