from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from esper_rpc.blending import (
    BLEND_MODES,
    CHANNEL,
    CONFIDENCE,
    CONVEX,
    GATE_K,
    GATE_TAU,
    HEURISTIC,
    MAP_CEILING,
    OVERRIDE,
)
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SeedOperation
from esper_rpc.proto.tamiyo.v1 import RunSite
from esper_servers.policy.masks import Choice

from .run_state import RunState

OFF = "off"
KEYS = (
    "blend_mode", "blend_mode_source", "gate_k", "gate_tau", "alpha_lo", "alpha_hi", "alpha_vec", "alpha_vec_len",
)  # fmt: skip
CAUTIOUS_RISK = 0.2
"""A blueprint at more risk is let in only where it shows itself stable."""
MOST_CHANNELS = 64
_CHOICES = (OFF, HEURISTIC, *(mode.lower() for mode in BLEND_MODES))
_CHANNELS_FIRST = ("Conv", "BatchNorm", "InstanceNorm", "GroupNorm")
_CHANNELS_LAST = ("Linear", "LayerNorm", "RMSNorm", "Embedding")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendModeConfig:
    """Whether commands say in which mode a seed is blended."""

    mode: str = OFF
    """off says nothing; heuristic goes by the risk of the blueprint; else this mode for all."""

    def __post_init__(self) -> None:
        if self.mode not in _CHOICES:
            raise ConfigError(f"mode = {self.mode!r} is unknown; choose {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}.")


def blend_annotations(run: RunState, choice: Choice, config: BlendModeConfig) -> dict[str, str]:
    """Write how the seed of a choice is to be blended; nothing unless it begins to be."""
    if config.mode == OFF or choice.operation != SeedOperation.SEED_OPERATION_START_GRAFTING:
        return {}
    seed_id = run.graph.seed_ids[choice.seed]
    if config.mode == HEURISTIC:
        return _written(_by_risk(run, seed_id), HEURISTIC, 0)
    channels = _channels(run, seed_id)
    mode = config.mode.upper()
    # Without a vector for it, CHANNEL would be refused there.
    if mode == CHANNEL and not 0 < channels <= MOST_CHANNELS:
        mode = CONVEX
    return _written(mode, OVERRIDE, channels)


def annotations_of(recorded: Mapping[str, str]) -> dict[str, str]:
    """Return what a command was told of blending: neither the setting nor the shapes of its sites are recorded."""
    return {key: recorded[key] for key in KEYS if key in recorded}


def _written(mode: str, source: str, channels: int) -> dict[str, str]:
    gate = (GATE_K, GATE_TAU) if mode == CONFIDENCE else (1.0, 1.0)
    found = {
        "blend_mode": mode,
        "blend_mode_source": source,
        "gate_k": str(gate[0]),
        "gate_tau": str(gate[1]),
        "alpha_lo": "0.0",
        "alpha_hi": "1.0",
    }
    if mode == CHANNEL:
        # Nothing is known of single channels, so all get what all may have.
        found["alpha_vec"] = orjson.dumps([MAP_CEILING] * channels).decode()
        found["alpha_vec_len"] = str(channels)
    return found


def _by_risk(run: RunState, seed_id: str) -> str:
    blueprint = run.graph.blueprint_of.get(run.planted.get(seed_id, ""))
    return CONFIDENCE if blueprint is not None and blueprint.risk > CAUTIOUS_RISK else CONVEX


def _channels(run: RunState, seed_id: str) -> int:
    """How many channels the site of a seed puts out, 0 where that is not known."""
    site = next((each for each in run.request.sites if each.site_id == run.graph.site_of[seed_id]), RunSite())
    if not site.output_shape:
        return 0
    if site.module_kind.startswith(_CHANNELS_FIRST):
        return site.output_shape[0]
    return site.output_shape[-1] if site.module_kind.startswith(_CHANNELS_LAST) else 0
