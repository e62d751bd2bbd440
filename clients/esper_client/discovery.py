from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper_rpc.config import read_section
from esper_rpc.errors import ConfigError

MESH_FILE = "mesh.toml"
_KEYS = ("tamiyo", "urza", "identity")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshAddress:
    """Where the mesh is, and who we are in it."""

    tamiyo: str
    urza: str
    identity_dir: Path
    """Holds cert.pem, key.pem, ca.pem and keyring.json."""


def find_mesh(environ: Mapping[str, str]) -> MeshAddress | None:
    """Look in the environment (ESPER_TAMIYO, ESPER_URZA, ESPER_IDENTITY), then in $ESPER_HOME/mesh.toml.

    Raises:
        ConfigError: When something is there, but not whole.
    """
    if "ESPER_TAMIYO" in environ:
        return _whole({k: environ.get(f"ESPER_{k.upper()}") for k in _KEYS}, "the environment")
    home = Path(environ.get("ESPER_HOME", Path.home() / ".esper"))
    path = home / MESH_FILE
    return _whole(read_section(path, "mesh"), str(path)) if path.exists() else None


def _whole(settings: Mapping[str, object], source: str) -> MeshAddress:
    tamiyo, urza, identity = (value if isinstance(value := settings.get(key), str) else "" for key in _KEYS)
    if not (tamiyo and urza and identity):
        raise ConfigError(f"{source} must name tamiyo, urza and identity; `esper up` writes all three.")
    return MeshAddress(tamiyo=tamiyo, urza=urza, identity_dir=Path(identity))
