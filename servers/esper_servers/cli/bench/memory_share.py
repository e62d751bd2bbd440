from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_rpc.errors import Unavailable
from esper_servers.cli.home import Home
from esper_servers.cli.processes import child_environ

_TRAINER = Path(__file__).with_name("trainer_memory.py")
_LONGEST_SECONDS = 300.0
STEPS, WIDTH = 60, 2048


def memory_share(home: Home, environ: Mapping[str, str], *, steps: int = STEPS, width: int = WIDTH) -> dict[str, Any]:
    """Return what a mesh adds to the most resident memory of a trainer; raises Unavailable when one ends early."""
    plain, attached = (_train(home, environ, kind, str(steps), str(width)) for kind in ("plain", "attached"))
    added = attached["peak_mb"] - plain["peak_mb"]
    return {
        "plain_mb": plain["peak_mb"],
        "added_mb": round(added, 1),
        "percent": round(100 * added / plain["peak_mb"], 2),
        "parameters": plain["parameters"],
        "answered": attached["answered"],
    }


def _train(home: Home, environ: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    # -P: the folder of the benches is no place to import from.
    command = [sys.executable, "-P", str(_TRAINER), *arguments]
    try:
        ran = subprocess.run(
            command, env=child_environ(home, environ), capture_output=True, check=True, timeout=_LONGEST_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or b"").decode(errors="replace")
        raise Unavailable(f"The trainer whose memory is measured ended early:\n{said}") from error
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
