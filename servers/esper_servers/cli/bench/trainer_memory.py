"""Trains a model and prints the most memory that took; asked for `attached`, under the mesh of ESPER_HOME.

A process of its own. Without a mesh it imports nothing of this product, for that takes memory, too.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEPTH, BATCH = 6, 32
_CONNECT_SECONDS = 30.0


def main() -> None:
    """Train as the arguments say, `plain` or `attached`, steps and width; print one JSON object."""
    kind, steps, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    session = _attached(model, optimizer) if kind == "attached" else None
    inputs, labels = torch.randn(BATCH, width), torch.randint(10, (BATCH,))
    for _ in _steps(session, steps):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if session is not None:
            session.step(loss)
    print(json.dumps({
        "peak_mb": _peak_mb(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "answered": sum(session.reasons.values()) - session.reasons["mesh_unreachable"] if session else 0,
    }))  # fmt: skip


def _peak_mb() -> float:
    # ru_maxrss begins with what the process had that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def _attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    import esper_client

    return esper_client.attach(model, optimizer)


def _steps(session: Any, steps: int) -> Iterator[int]:
    """Count the steps, from when the mesh is there."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while session is not None and not session.is_connected and time.monotonic() < deadline:
        yield -1
    yield from range(steps)


if __name__ == "__main__":
    main()
