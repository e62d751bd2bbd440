"""Settings from one TOML file and the environment, checked against declared ranges."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The inclusive bounds of a number."""

    least: float
    most: float


def load(
    config_class: type[Config],
    section: str,
    *,
    path: Path | None,
    environ: Mapping[str, str],
    base: Config | None = None,
) -> Config:
    """Read `[section]` of a TOML file, then `ESPER_<SECTION>_<KEY>`, which wins; the rest is as in `base`.

    Raises:
        ConfigError: Naming the key, its value and what is allowed.
    """
    hints = {k: hint for k, hint in typing.get_type_hints(config_class).items() if not dataclasses.is_dataclass(hint)}
    settings = dict(read_section(path, section)) if path is not None else {}
    for key in hints:
        name = f"ESPER_{section}_{key}".upper()
        if name in environ:
            settings[key] = environ[name]
    unknown = sorted(set(settings) - set(hints))
    if unknown:
        raise ConfigError(f"[{section}] has no setting {unknown[0]!r}; it has {', '.join(sorted(hints))}.")
    values = {key: _convert(section, key, value, hints[key]) for key, value in settings.items()}
    try:
        return config_class(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ConfigError as error:
        raise ConfigError(f"[{section}] {error.message}") from error


def validate(config: Any) -> None:
    """Check every `Annotated[..., Range]` field of a dataclass; for use in __post_init__."""
    for key, hint in typing.get_type_hints(type(config), include_extras=True).items():
        for bounds in getattr(hint, "__metadata__", ()):
            value = getattr(config, key)
            if isinstance(bounds, Range) and not bounds.least <= value <= bounds.most:
                raise ConfigError(f"{key} = {value} is out of range; allowed is {bounds.least:g} to {bounds.most:g}.")


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Read `[section]` of a TOML file, empty when the file or the section is missing; raises ConfigError."""
    if not path.exists():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get(section, {})
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    # Text that is not UTF-8 is a ValueError too; a parser that recurses too deep is not.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{section} in {path} must be a table, [{section}].")
    return found


def _convert(section: str, key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(section, key, value, typing.get_args(hint))
    kind = next((k for k in (bool, int, float, Path, str) if k is hint or k in typing.get_args(hint)), None)
    if kind is None:
        return value
    if kind is bool and isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    accepted = isinstance(value, bool) if kind is bool else not isinstance(value, bool)
    try:
        if accepted:
            return kind(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"[{section}] {key} = {value!r} is not a {kind.__name__}.")


def _convert_tuple(section: str, key: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != len(kinds):
        raise ConfigError(f"[{section}] {key} = {value!r} must have {len(kinds)} values.")
    return tuple(_convert(section, key, part, kind) for part, kind in zip(parts, kinds, strict=True))
