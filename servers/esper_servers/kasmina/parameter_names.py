from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from esper_rpc.errors import NotFound

from .ownership import Ownership
from .seed_slot import SeedSlot


def foreign_parameters(
    seed_id: str, names: Sequence[str], *, model: nn.Module, seeds: Mapping[str, SeedSlot], ownership: Ownership
) -> list[tuple[str, str]]:
    """Return which of these parameters a seed must not write to, with their owners; without names, of its own.

    Raises:
        NotFound: When there is no such seed or parameter.
    """
    if seed_id not in seeds:
        raise NotFound(f"There is no seed {seed_id!r}.")
    known: dict[str, Tensor] = dict(model.named_parameters())
    for each in seeds.values():
        known |= _of_seed(each)
    wanted = names or list(_of_seed(seeds[seed_id]))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise NotFound(f"There is no parameter {unknown[0]!r}; one of a seed is called SEED/NAME.")
    owners = [(name, ownership.owner_of(known[name])) for name in wanted]
    return [(name, owner) for name, owner in owners if owner not in ("", seed_id)]


def _of_seed(slot: SeedSlot) -> dict[str, Tensor]:
    if slot.site.seed is None:
        return {}
    return {f"{slot.seed_id}/{name}": each for name, each in slot.site.seed.named_parameters()}
