"""Which blending methods a seed may use, by the capabilities that a topology and blueprints tell (requirements 2.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed

GROWN = frozenset({
    Stage.SEED_LIFECYCLE_STAGE_BLENDING, Stage.SEED_LIFECYCLE_STAGE_SHADOWING, Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY,
    Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED,
})  # fmt: skip
"""Where a seed is blended, or has been: it was allowed to."""

Methods = frozenset[str]
UNNAMED: Methods = frozenset()
"""It may blend, and nobody said how."""


def capabilities_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a document tells of allowances."""
    told = document.get("capabilities")
    return [told] if isinstance(told, Mapping) else []


def allowed_methods(seed: RunSeed, number: int, capabilities: Sequence[Mapping[str, Any]]) -> Methods | None:
    """Return how a seed may be blended, None when it may not.

    By a list of this very seed, else by its stage, else by what holds for all.
    """
    lists = (_list_of(told, seed.seed_id, number) for told in capabilities)
    own = next((methods for methods in lists if methods is not None), None)
    if own is not None:
        return _named(own) if own else None
    common = [each for told in capabilities if isinstance(each := told.get("allowed_blending_methods"), list) and each]
    if common:
        return frozenset().union(*map(_named, common))
    return UNNAMED if seed.stage in GROWN else None


def _list_of(capabilities: Mapping[str, Any], seed_id: str, number: int) -> list[Any] | None:
    for key, called in (("by_seed_id", seed_id), ("by_seed_index", str(number))):
        lists = capabilities.get(key)
        methods = lists.get(called) if isinstance(lists, Mapping) else None
        if isinstance(methods, list):
            return methods
    return None


def _named(methods: Sequence[Any]) -> Methods:
    return frozenset(method.lower() for method in methods if isinstance(method, str))
