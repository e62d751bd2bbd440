"""What the first of several ranks orders the others for a rollback, and how a state gets from it to them.

KEEP has every rank copy its own state; PREPARE asks whether it can go back; COMMIT does it; CONFIRM compares. Random
numbers and data loaders are each rank's own, so each goes back to its own copy, and tells the first rank what is its
own. One that has no copy gets that of the first rank, with what it told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import structlog
import torch
from torch import Tensor

from esper_client.seed_host import OutOfStep
from esper_rpc.errors import EsperError, FailedPrecondition
from esper_servers.tolaria.state import state_document, tensor_file

log = structlog.get_logger(__name__)

KEEP, PREPARE, COMMIT, CONFIRM, ABORT, COMPARE = "keep", "prepare", "commit", "confirm", "abort", "compare"
READY, LACKING, UNABLE = 0.0, 1.0, 2.0
BROKEN: Final = -1.0
"""In the place of a fingerprint: this rank could not go back."""
APART = "After a rollback that failed the ranks hold different weights: end them, and go on from a checkpoint."


class Ranks(Protocol):
    """The processes that train one model together; each rank makes every call, in the same order."""

    rank: int
    is_first: bool

    def collect(self, content: bytes) -> list[bytes]:
        """Return what all ranks give."""
        ...

    def each(self, value: float) -> list[float]:
        """Return the values of all ranks."""
        ...

    def share(self, content: bytes = b"") -> bytes:
        """Return what the first rank gives."""
        ...

    def hand_out(self, tensor: Tensor) -> None:
        """Fill a tensor of the other ranks with that of the first."""
        ...


def compare(ranks: Ranks, own: int) -> None:
    """Raise OutOfStep when another rank has another fingerprint."""
    if set(ranks.each(own)) != {own}:
        raise OutOfStep(APART)


def unable(answers: Sequence[float]) -> str:
    """Name the ranks that are not ready; empty when all are."""
    return ", ".join(str(rank) for rank, answer in enumerate(answers) if answer != READY)


def require_all(answers: Sequence[float]) -> None:
    """Raise FailedPrecondition when a rank is not ready."""
    if found := unable(answers):
        raise FailedPrecondition(f"Rank {found} cannot resume from the checkpoint; its log says why.")


def send(ranks: Ranks, state: Mapping[str, Any] | None) -> None:
    """Hand out a state, or say that there is none to be had; any other failure would leave the others waiting."""
    try:
        structure, tensors = state_document.flatten("state", state or {})
    except EsperError as error:
        log.error("state_not_handed_out", error=error.message)
        state = None
    if state is None:
        ranks.share()
        return
    try:
        described = {name: [_name_of(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        ranks.share(json.dumps([structure, described]).encode())
        for tensor in tensors.values():
            ranks.hand_out(tensor.detach().cpu().contiguous())
    except Exception as error:
        raise OutOfStep(f"The state of the first rank did not reach the others: {error}") from error


def receive(ranks: Ranks) -> dict[str, Any] | None:
    """Return what the first rank handed out, None when it has nothing."""
    told = ranks.share()
    if not told:
        return None
    structure, described = json.loads(told)
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in described.items()}
    for tensor in tensors.values():
        ranks.hand_out(tensor)
    state: dict[str, Any] = state_document.rebuild(structure, tensors)
    return state


def pack(state: Mapping[str, Any]) -> bytes:
    """Return a state as bytes; raises InvalidRequest when it holds more than tensors and plain values."""
    structure, tensors = state_document.flatten("own", state)
    return json.dumps(structure).encode() + b"\n" + tensor_file.pack(tensors)


def unpack(packed: Tensor) -> dict[str, Any]:
    """Return the state that `pack` was given."""
    structure, _, content = packed.numpy().tobytes().partition(b"\n")
    tensors = tensor_file.parse(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    state: dict[str, Any] = state_document.rebuild(json.loads(structure), tensors)
    return state


def collect(ranks: Ranks, own: bytes) -> dict[str, Tensor]:
    """Return what each other rank that has something told, by its number."""
    told = enumerate(ranks.collect(own))
    return {str(rank): torch.frombuffer(bytearray(each), dtype=torch.uint8) for rank, each in told if rank and each}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
