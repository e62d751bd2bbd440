from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

_REFUSED = frozenset({errno.EINVAL, errno.ENOTSUP})


class DurableFile:
    """A new file each of whose writes is on the disk when it returns, or all of them when it is closed."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        # Not every system has O_DSYNC, and not every file system takes it.
        synchronous = getattr(os, "O_DSYNC", 0)
        self._is_synchronous = bool(synchronous)
        try:
            self._descriptor = os.open(path, flags | synchronous, 0o600)
        except OSError as error:
            if not synchronous or error.errno not in _REFUSED:
                raise
            self._is_synchronous = False
            self._descriptor = os.open(path, flags, 0o600)

    def write(self, contents: Sequence[memoryview]) -> None:
        """Write all of them, one behind the other; raises OSError."""
        left = [content for content in contents if content]
        while left:
            written = os.writev(self._descriptor, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def close(self) -> None:
        """Have on the disk what is not there yet; raises OSError."""
        try:
            if not self._is_synchronous:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def give_up(self) -> None:
        """Close a file that is not wanted any more."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


class DurableFiles:
    """What a checkpoint asks of the file system; a test takes its place to end the process at any of these calls."""

    def make_directory(self, path: Path) -> None:
        """Make a directory that is not there yet."""
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> DurableFile:
        """Begin a file that is not there yet."""
        return DurableFile(path)

    def rename(self, before: Path, after: Path) -> None:
        """Give a file or directory another name, at once or not at all."""
        before.rename(after)

    def sync_directory(self, path: Path) -> None:
        """Have the names in a directory on the disk: until then they may be lost with the power."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a directory and what is in it."""
        shutil.rmtree(path)
