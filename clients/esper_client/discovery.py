from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper_rpc.config import read_section
from esper_rpc.errors import ConfigError

MESH_FILE = "mesh.toml"
SETTINGS_FILE = "esper.toml"
KEYS = ("tamiyo", "urza", "identity", "weatherlight", "deny_list")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshAddress:
    """Where the mesh is, and who we are in it."""

    tamiyo: str
    urza: str
    identity_dir: Path
    """Holds cert.pem, key.pem, ca.pem and keyring.json."""
    weatherlight: str | None = None
    """Who renews certificates; without it they are renewed by hand."""
    deny_list: Path | None = None


def find_mesh(environ: Mapping[str, str]) -> MeshAddress | None:
    """Look in the environment (ESPER_TAMIYO, _URZA, _IDENTITY, _WEATHERLIGHT), then in $ESPER_HOME/mesh.toml.

    Raises:
        ConfigError: When something is there, but not whole.
    """
    if "ESPER_TAMIYO" in environ:
        return _whole({k: environ.get(f"ESPER_{k.upper()}") for k in KEYS}, "the environment")
    path = home_directory(environ) / MESH_FILE
    return _whole(read_section(path, "mesh"), str(path)) if path.exists() else None


def home_directory(environ: Mapping[str, str]) -> Path:
    """Where a mesh on this machine keeps its files: ESPER_HOME, else ~/.esper."""
    return Path(environ.get("ESPER_HOME") or Path.home() / ".esper")


def _whole(settings: Mapping[str, object], source: str) -> MeshAddress:
    tamiyo, urza, identity, weatherlight, deny_list = (
        value if isinstance(value := settings.get(key), str) else "" for key in KEYS
    )
    if not (tamiyo and urza and identity):
        raise ConfigError(f"{source} must name tamiyo, urza and identity; `esper up` writes all three.")
    return MeshAddress(
        tamiyo=tamiyo,
        urza=urza,
        identity_dir=Path(identity),
        weatherlight=weatherlight or None,
        deny_list=Path(deny_list) if deny_list else None,
    )
