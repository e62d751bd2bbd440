from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import structlog
import torch
from torch import Tensor

from esper_rpc.config import Range, validate
from esper_rpc.disk import require_writable
from esper_rpc.errors import FailedPrecondition, InvalidRequest, NotFound, ResourceExhausted, Unavailable

from . import manifest as manifests
from . import state_document, tensor_file
from .durable_files import DurableFile, DurableFiles
from .manifest import Manifest, Part

log = structlog.get_logger(__name__)

ABANDONED: Final = ".abandoned"
"""Ends the name of a checkpoint that a rollback went back behind."""
_PARTIAL = ".partial-"
_LOCK = ".lock"
_NAME = re.compile(r"(\d{8,})-step-(\d+)(\.abandoned)?")
_STATE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """How many checkpoints there are, and in how large files."""

    keep: Annotated[int, Range(1, 1000)] = 3
    """Usable ones, and as many that were abandoned."""
    part_mb: Annotated[int, Range(1, 1_000_000)] = 1024
    """A file of tensors begins a new one beyond it; a tensor is never divided."""

    def __post_init__(self) -> None:
        validate(self)


class Skipped(NamedTuple):
    """A checkpoint that could not be used, and a stable word for why."""

    name: str
    reason: str


class Loaded(NamedTuple):
    """A checkpoint that was read and verified, and the newer ones that could not be used."""

    manifest: Manifest
    state: dict[str, Any]
    skipped: tuple[Skipped, ...]


def _whatever(_state: Mapping[str, Any]) -> str:
    return ""


class CheckpointStore:
    """Checkpoints of one run in a directory. One is there whole or not at all, whatever happens meanwhile.

    Writing goes on in a directory with a name of its own, which is renamed when all in it is on the disk. One process
    writes at a time, others read.
    """

    def __init__(
        self,
        directory: Path,
        config: StoreConfig | None = None,
        *,
        files: DurableFiles | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigError when the directory cannot be written."""
        require_writable(directory)
        self.directory = directory
        self._config = config or StoreConfig()
        self._files = files or DurableFiles()
        self._clock = clock
        self._writing = threading.Lock()
        self._scratch = ""

    def names(self) -> list[str]:
        """Every checkpoint that was not abandoned, newest first."""
        return [path.name for path in reversed(self._all()) if not path.name.endswith(ABANDONED)]

    def manifests(self) -> list[Manifest]:
        """Return what each of them says of itself, oldest first; those that say nothing readable are left out."""
        found = []
        for name in reversed(self.names()):
            with contextlib.suppress(ValueError):
                found.append(manifests.read(self.directory / name))
        return found

    def save(self, state: Mapping[str, Any], *, epoch: int, step: int) -> Manifest:
        """Write a checkpoint of what `state` holds by name, then remove those beyond `keep`.

        Raises:
            InvalidRequest: When it holds something else than tensors and plain values.
            FailedPrecondition: When another process writes here.
            ResourceExhausted: When the disk is full.
            Unavailable: When it cannot be written for another reason.
        """
        documents, parts = _divide(state, self._config.part_mb * 2**20)
        with self._lock():
            self._sweep()
            name = f"{self._last_serial() + 1:08d}-step-{step}"
            scratch = self.directory / f"{_PARTIAL}{name}"
            self._scratch = scratch.name
            try:
                manifest = self._write(scratch, name, documents, parts, epoch=epoch, step=step)
                self._files.rename(scratch, self.directory / name)
            except BaseException:
                self._discard(scratch)
                raise
            finally:
                self._scratch = ""
            self._files.sync_directory(self.directory)
            self._remove_oldest()
        return manifest

    def load(
        self,
        *,
        latest_step: int | None = None,
        accept: Callable[[Mapping[str, Any]], str] = _whatever,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> Loaded:
        """Read the newest checkpoint that is whole and, if a step is given, not of a later one.

        Args:
            latest_step: The latest step whose checkpoint is wanted.
            accept: Says why a state is not wanted, empty when it is.
            on_chunk: Called after every few megabytes; what it raises ends the reading.

        Raises:
            NotFound: When there is none, naming those that could not be used and why.
        """
        skipped = self._half_written()
        for name in self.names():
            if latest_step is not None and _step_of(name) > latest_step:
                continue
            try:
                manifest, state = self.read(name, on_chunk=on_chunk)
                if not (reason := accept(state)):
                    return Loaded(manifest, state, tuple(skipped))
            except ValueError as error:
                reason = str(error)
            skipped.append(Skipped(name, reason))
            log.warning("checkpoint_skipped", checkpoint=name, reason=reason)
        raise NotFound(self._none_found(skipped), reason="NO_CHECKPOINT")

    def read(self, name: str, *, on_chunk: Callable[[], None] = lambda: None) -> tuple[Manifest, dict[str, Any]]:
        """Read one checkpoint, abandoned or not; raises ValueError with a stable word when it is not whole."""
        if not _NAME.fullmatch(name):
            raise ValueError("not_a_checkpoint")
        directory = self.directory / name
        manifest = manifests.read(directory)
        tensors: dict[str, Tensor] = {}
        try:
            self._check_sizes(manifest, directory)
            for part in manifest.parts:
                if part.file != manifests.STRUCTURE:
                    tensors |= tensor_file.read(directory / part.file, part.size_bytes, part.sha256, on_chunk)
            return manifest, _rebuild(_read_structure(manifest, directory), tensors)
        except FileNotFoundError:
            raise ValueError("part_missing") from None
        except OSError as error:
            raise ValueError("unreadable") from error

    def abandon_after(self, step: int) -> list[str]:
        """Set aside what was written after a step that a rollback went back to; it can be read by its name.

        Raises FailedPrecondition, ResourceExhausted or Unavailable, as `save`.
        """
        with self._lock():
            later = [name for name in self.names() if _step_of(name) > step]
            for name in later:
                self._files.rename(self.directory / name, self.directory / f"{name}{ABANDONED}")
            if later:
                self._files.sync_directory(self.directory)
        return later

    def _write(
        self,
        scratch: Path,
        name: str,
        documents: dict[str, Any],
        parts: Mapping[str, Mapping[str, Tensor]],
        *,
        epoch: int,
        step: int,
    ) -> Manifest:
        self._files.make_directory(scratch)
        structure = json.dumps(documents, allow_nan=False).encode()
        contents: dict[str, Iterator[list[memoryview]]] = {
            file: tensor_file.chunks(held) for file, held in parts.items()
        }
        contents[manifests.STRUCTURE] = iter([[memoryview(structure)]])
        written = tuple(self._write_part(scratch / file, content) for file, content in contents.items())
        manifest = Manifest(
            name=name,
            epoch=epoch,
            step=step,
            created_unix=self._clock(),
            torch_version=str(torch.__version__),
            parts=written,
        )
        self._write_part(scratch / manifests.FILE, iter([[memoryview(manifests.write(manifest))]]))
        self._files.sync_directory(scratch)
        return manifest

    def _write_part(self, path: Path, content: Iterator[list[memoryview]]) -> Part:
        digest, size = hashlib.sha256(), 0
        file: DurableFile = self._files.create(path)
        try:
            for chunks in content:
                file.write(chunks)
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
        except BaseException:
            file.give_up()
            raise
        file.close()
        return Part(path.name, size, digest.hexdigest())

    def _check_sizes(self, manifest: Manifest, directory: Path) -> None:
        for part in manifest.parts:
            if (directory / part.file).stat().st_size != part.size_bytes:
                raise ValueError("size_mismatch")

    def _all(self) -> list[Path]:
        found = [path for path in self._entries() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: _serial_of(path.name))

    def _entries(self) -> list[Path]:
        # Somebody who needs room may remove it all; the next save makes it again.
        with contextlib.suppress(FileNotFoundError):
            return list(self.directory.iterdir())
        return []

    def _last_serial(self) -> int:
        return max((_serial_of(path.name) for path in self._all()), default=0)

    def _half_written(self) -> list[Skipped]:
        partial = sorted(path.name for path in self.directory.glob(f"{_PARTIAL}*"))
        return [Skipped(name.removeprefix(_PARTIAL), "half_written") for name in partial if name != self._scratch]

    def _none_found(self, skipped: list[Skipped]) -> str:
        if not skipped:
            return f"There is no checkpoint in {self.directory}."
        told = ", ".join(f"{each.name} ({each.reason})" for each in skipped)
        return f"No checkpoint in {self.directory} can be used: {told}."

    def _remove_oldest(self) -> None:
        everything = self._all()
        try:
            for are_abandoned in (False, True):
                for path in self._too_old([p for p in everything if p.name.endswith(ABANDONED) == are_abandoned]):
                    self._remove(path)
        except OSError as error:
            # The new one is there; the next save tries again.
            log.warning("checkpoints_not_removed", directory=str(self.directory), problem=error.strerror)

    def _too_old(self, paths: list[Path]) -> list[Path]:
        """Return those that are older than what is kept. What cannot be used does not count."""
        kept = [path for path in paths if self._looks_whole(path)][-self._config.keep :]
        return [path for path in paths if kept and _serial_of(path.name) < _serial_of(kept[0].name)]

    def _looks_whole(self, path: Path) -> bool:
        try:
            self._check_sizes(manifests.read(path), path)
        except (OSError, ValueError):
            return False
        return True

    def _remove(self, path: Path) -> None:
        """Rename first: what is half removed must not look like a checkpoint."""
        leaving = path.with_name(f"{_PARTIAL}{path.name}")
        self._files.rename(path, leaving)
        self._files.remove(leaving)

    def _sweep(self) -> None:
        """Remove what a process left that ended in the middle; nobody else writes while the lock is held."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            self._files.remove(path)

    def _discard(self, scratch: Path) -> None:
        with contextlib.suppress(OSError):
            if scratch.exists():
                self._files.remove(scratch)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other threads waiting and other processes out; the kernel lets go of it when this one ends."""
        with self._writing, self._telling_of_the_disk():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                self._claim(descriptor)
                yield
            finally:
                os.close(descriptor)

    def _claim(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"Another process writes checkpoints to {self.directory}; give each run a directory of its own.",
                reason="CHECKPOINT_LOCKED",
            ) from None

    @contextlib.contextmanager
    def _telling_of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = ResourceExhausted if error.errno in _FULL else Unavailable
            raise kind(
                f"The checkpoint cannot be written to {self.directory} ({error.strerror}); free space or permit"
                " writing. Earlier checkpoints are as they were.",
                reason="STORAGE",
            ) from error


def _serial_of(name: str) -> int:
    return int(name.partition("-")[0])


def _step_of(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[2]) if found else 0


def _divide(state: Mapping[str, Any], part_bytes: int) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the structure of each named state, and their tensors by the file that they go to."""
    documents: dict[str, Any] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, each in state.items():
        if not _STATE_NAME.fullmatch(name):
            raise InvalidRequest(f"{name!r} cannot name a state: lower-case letters, digits and _ only.")
        documents[name], tensors = state_document.flatten(name, each)
        for number, part in enumerate(_parts_of(tensors, part_bytes), 1):
            parts[f"{name}-{number:05d}.safetensors"] = part
    return documents, parts


def _parts_of(tensors: Mapping[str, Tensor], part_bytes: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > part_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _read_structure(manifest: Manifest, directory: Path) -> bytes:
    expected = next((part.sha256 for part in manifest.parts if part.file == manifests.STRUCTURE), None)
    content = (directory / manifests.STRUCTURE).read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError("checksum_mismatch")
    return content


def _rebuild(structure: bytes, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        return {name: state_document.rebuild(each, tensors) for name, each in json.loads(structure).items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("unreadable") from error
