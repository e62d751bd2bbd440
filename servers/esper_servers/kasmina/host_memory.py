from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 2**62
"""The first version of control groups writes a number near the greatest instead of none."""


class _Layout(NamedTuple):
    """Where a version of control groups keeps what."""

    marker: str
    controller: str
    limit: str
    used: str
    reclaimable: str


_LAYOUTS = (
    _Layout("0::/", "", "memory.max", "memory.current", "inactive_file"),
    _Layout(":memory:/", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def used_share(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """Return the share in use of the memory that this process may take, None where the system does not tell.

    Of its control group where that is limited, and of the machine: the greater one counts.
    """
    shares = [_share_of_group(proc, cgroup, layout) for layout in _LAYOUTS]
    known = [share for share in (*shares, _share_of_machine(proc)) if share is not None]
    return max(known, default=None)


def _share_of_group(proc: Path, cgroup: Path, layout: _Layout) -> float | None:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line.partition(layout.marker)[2] for line in lines if layout.marker in line), "")
    root = cgroup / layout.controller
    # Within a container the path may be that of the machine, and the group lies at the root.
    for group in (root / own, root):
        try:
            limit, used = ((group / name).read_text().strip() for name in (layout.limit, layout.used))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit == "max" or int(limit) >= UNLIMITED:
                return None
            # Files that were read are given back when room is needed.
            return max(0, int(used) - int(statistics[layout.reclaimable])) / int(limit)
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            continue
    return None


def _share_of_machine(proc: Path) -> float | None:
    try:
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        return 1 - available / total
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        return None
