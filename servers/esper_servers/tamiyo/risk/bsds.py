"""What a blueprint's extras say of its safety data sheet; what is absent or odd is neutral (requirements 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from esper_rpc.proto.leyline.v1 import HandlingClass, HazardBand


class Sheet(NamedTuple):
    """The part of a BSDS that gates decisions."""

    hazard_band: HazardBand.ValueType = HazardBand.HAZARD_BAND_UNSPECIFIED
    handling_class: HandlingClass.ValueType = HandlingClass.HANDLING_CLASS_UNSPECIFIED
    risk_score: float | None = None


def read_sheet(extras: Mapping[str, Any]) -> Sheet:
    """Read `bsds: {hazard_band, ...}` or the flat `bsds_hazard_band`, ...; names or numbers of Leyline."""
    sheet = extras.get("bsds")
    nested = sheet if isinstance(sheet, Mapping) else {}

    def find(name: str) -> Any:
        return nested.get(name, extras.get(f"bsds_{name}"))

    risk = nested.get("risk_score", extras.get("bsds_risk"))
    return Sheet(
        HazardBand.ValueType(_number(HazardBand, "HAZARD_BAND_", find("hazard_band"))),
        HandlingClass.ValueType(_number(HandlingClass, "HANDLING_CLASS_", find("handling_class"))),
        float(risk) if isinstance(risk, int | float) and 0 <= risk <= 1 else None,
    )


def _number(enum: type[HazardBand | HandlingClass], prefix: str, value: Any) -> int:
    if isinstance(value, str):
        return dict(enum.items()).get(prefix + value.strip().upper().removeprefix(prefix), 0)
    return value if isinstance(value, int) and value in enum.values() else 0
