from __future__ import annotations

import functools

from esper_rpc.proto.tamiyo.v1 import RiskVerdict, SignalReading
from esper_servers.policy import schema
from esper_servers.tamiyo.risk.engine import Verdict
from esper_servers.tamiyo.risk.reading import DEMAND_NAMES

from .fields import write_double, write_entry

_KEPT = 4096
_NO_SCORE = write_double(SignalReading.SCORE_FIELD_NUMBER, 0.0)


def write_verdict(verdict: Verdict) -> bytes:
    """Write a RiskVerdict, as fields.py does."""
    head = _head(verdict.allowed, verdict.forced, verdict.reason, verdict.demand, verdict.holds)
    written = [head, write_double(RiskVerdict.SCORE_FIELD_NUMBER, verdict.score)]
    for name, (demand, score, reason) in verdict.readings.items():
        written += _before_score(name, demand, reason), write_double(SignalReading.SCORE_FIELD_NUMBER, score)
    return b"".join(written)


@functools.lru_cache(_KEPT)
def _head(allowed: tuple[bool, ...], forced: int | None, reason: str, demand: int, holds: bool) -> bytes:
    kinds = schema.KIND_NAMES
    return RiskVerdict(
        allowed_kinds=[name for name, is_allowed in zip(kinds, allowed, strict=True) if is_allowed],
        forced_kind="" if forced is None else kinds[forced],
        reason=reason,
        demand=DEMAND_NAMES[demand],
        holds=holds,
    ).SerializeToString()


@functools.lru_cache(_KEPT)
def _before_score(name: str, demand: int, reason: str) -> bytes:
    head = SignalReading(demand=DEMAND_NAMES[demand], reason=reason).SerializeToString()
    return write_entry(RiskVerdict.READINGS_FIELD_NUMBER, name, head + _NO_SCORE)[: -len(_NO_SCORE)]
