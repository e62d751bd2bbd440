"""The files in which the metrics of a process lie for another one to render."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
KINDS = ("counter", "histogram", "gauge_livemostrecent")
FILE_BYTES = 4 * 1024 * 1024


def reserve(environ: MutableMapping[str, str]) -> None:
    """Give the files of this process their room on the disk; without any, metrics stay in its memory.

    prometheus_client maps files with holes. On a full disk the write that fills a hole ends the process with SIGBUS.
    """
    directory = environ.get(DIRECTORY_VARIABLE)
    if not directory:
        return
    files = [Path(directory) / f"{kind}_{os.getpid()}.db" for kind in KINDS]
    try:
        for file in files:
            _allocate(file)
    except OSError as error:
        _release(files)
        del environ[DIRECTORY_VARIABLE]
        sys.stderr.write(f"The metrics of this process are not shared: {directory}: {error.strerror}.\n")


def trim(directory: Path, pid: int) -> None:
    """Take back what an ended process did not use of its room: one that is started again and again fills no disk."""
    for path in directory.glob(f"*_{pid}.db"):
        with path.open("r+b") as file:
            # The first four bytes say how many are in use.
            file.truncate(max(8, int.from_bytes(file.read(4), sys.byteorder)))


def _allocate(path: Path) -> None:
    with path.open("ab") as file:
        if sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)


def _release(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            path.unlink()
