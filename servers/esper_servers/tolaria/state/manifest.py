from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
FILE: Final = "manifest.json"
STRUCTURE: Final = "structure.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a checkpoint."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint says of itself."""

    name: str
    epoch: int
    step: int
    created_unix: float
    torch_version: str
    parts: tuple[Part, ...]
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """What its files take."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 over all that it says, and so over all files: it names the checkpoint."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def write(manifest: Manifest) -> bytes:
    """Return the content of its file."""
    return json.dumps({**dataclasses.asdict(manifest), "digest": manifest.digest}, indent=1).encode()


def read(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint; raises ValueError with a stable word."""
    try:
        document = json.loads((directory / FILE).read_bytes())
        manifest = _manifest_of(document)
    except FileNotFoundError:
        raise ValueError("manifest_missing") from None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("manifest_unreadable") from None
    if manifest.format != FORMAT:
        raise ValueError("unknown_format")
    # One that was abandoned has another name now.
    if document["digest"] != manifest.digest or not directory.name.startswith(manifest.name):
        raise ValueError("manifest_damaged")
    return manifest


def _manifest_of(document: dict[str, Any]) -> Manifest:
    parts = tuple(Part(str(p["file"]), int(p["size_bytes"]), str(p["sha256"])) for p in document["parts"])
    if any(Path(part.file).name != part.file for part in parts):
        raise ValueError("a part outside")
    return Manifest(
        name=str(document["name"]),
        epoch=int(document["epoch"]),
        step=int(document["step"]),
        created_unix=float(document["created_unix"]),
        torch_version=str(document["torch_version"]),
        parts=parts,
        format=int(document["format"]),
    )
