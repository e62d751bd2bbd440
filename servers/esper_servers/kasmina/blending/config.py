from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import orjson

from esper_rpc.blending import (
    BLEND_MODES,
    BLEND_SOURCES,
    CHANNEL,
    CONVEX,
    GATE_K,
    GATE_K_RANGE,
    GATE_TAU,
    GATE_TAU_RANGE,
    MAP_CEILING,
    MAP_ROOM,
)

_UNIT = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    """How the outputs of a seed and its host are mixed."""

    mode: str = CONVEX
    source: str = ""
    """Who chose the mode; empty when nobody did."""
    gate_k: float = GATE_K
    """How steep the gate of CONFIDENCE is."""
    gate_tau: float = GATE_TAU
    """The signal at which that gate is half open."""
    alpha_lo: float = 0.0
    alpha_hi: float = 1.0
    """The bounds of that gate."""
    alpha_vec: tuple[float, ...] = ()
    """The share of the seed at full alpha, by channel or by group of as many neighbouring channels each."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """Restore what `dataclasses.asdict` gave."""
        return cls(**{**saved, "alpha_vec": tuple(saved.get("alpha_vec", ()))})


def read_blend_config(annotations: Mapping[str, str], channels: int) -> tuple[BlendConfig, str]:
    """Read how a command wants a site of so many channels to be blended, and why that cannot be done.

    Numbers out of their range are clamped, swapped bounds are ordered. Anything that cannot be read makes it CONVEX.
    """
    if "blend_mode" not in annotations:
        return BlendConfig(), ""
    source = annotations.get("blend_mode_source", "")
    try:
        return _read(annotations, source, channels), ""
    except ValueError as error:
        return BlendConfig(source=source if source in BLEND_SOURCES else ""), str(error)


def _read(annotations: Mapping[str, str], source: str, channels: int) -> BlendConfig:
    mode = annotations["blend_mode"]
    if mode not in BLEND_MODES:
        raise ValueError(f"blend_mode {mode[:32]!r} is none of {', '.join(BLEND_MODES)}")
    if source not in ("", *BLEND_SOURCES):
        raise ValueError(f"blend_mode_source {source[:32]!r} is none of {', '.join(BLEND_SOURCES)}")
    bounds = sorted((_number(annotations, "alpha_lo", 0.0, _UNIT), _number(annotations, "alpha_hi", 1.0, _UNIT)))
    alpha_vec = _vector(annotations)
    if mode == CHANNEL:
        _require_fit(alpha_vec, channels)
    return BlendConfig(
        mode=mode,
        source=source,
        gate_k=_number(annotations, "gate_k", GATE_K, GATE_K_RANGE),
        gate_tau=_number(annotations, "gate_tau", GATE_TAU, GATE_TAU_RANGE),
        alpha_lo=bounds[0],
        alpha_hi=bounds[1],
        alpha_vec=_capped(alpha_vec) if mode == CHANNEL else (),
    )


def _number(annotations: Mapping[str, str], key: str, default: float, bounds: tuple[float, float]) -> float:
    return _clamped(_parsed(key, annotations[key]), bounds) if key in annotations else default


def _parsed(key: str, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{key} holds {str(text)[:32]!r}, which is not a number")
    return value


def _clamped(value: float, bounds: tuple[float, float]) -> float:
    return min(bounds[1], max(bounds[0], value))


def _vector(annotations: Mapping[str, str]) -> tuple[float, ...]:
    text = annotations.get("alpha_vec", "")
    values = tuple(_clamped(_parsed("alpha_vec", each), _UNIT) for each in _elements(text))
    told = annotations.get("alpha_vec_len")
    if told is not None and _parsed("alpha_vec_len", told) != len(values):
        raise ValueError(f"alpha_vec has {len(values)} elements, and alpha_vec_len is {told[:32]}")
    return values


def _elements(text: str) -> list[Any]:
    """JSON, or else numbers with commas between them."""
    if not text.strip():
        return []
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text.split(",")
    return found if isinstance(found, list) else [text]


def _require_fit(alpha_vec: tuple[float, ...], channels: int) -> None:
    if not channels:
        raise ValueError("the site has not run yet, so its channels are not known")
    if not alpha_vec or channels % len(alpha_vec):
        raise ValueError(f"an alpha_vec of {len(alpha_vec)} does not divide {channels} channels")


def _capped(values: tuple[float, ...]) -> tuple[float, ...]:
    """Lower what passes the ceiling but for the greatest ones, as many as there is room for."""
    above = sorted((i for i, value in enumerate(values) if value > MAP_CEILING), key=lambda i: -values[i])
    lowered = set(above[len(values) // MAP_ROOM :])
    return tuple(MAP_CEILING if i in lowered else value for i, value in enumerate(values))
