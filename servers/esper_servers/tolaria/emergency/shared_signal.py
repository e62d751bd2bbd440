"""The emergency in force, in memory that every process of a run on this host can read.

One file of 16 KiB for each run, in /dev/shm where there is one. It is read and written with pread and pwrite and never
mapped: a mapping of a file that somebody cuts short, or that a full memory cannot hold, ends the process with SIGBUS.

    0    magic 8, generation u64: how many records were written
    64   two records of 256 bytes, written in turn; that of the generation g lies at 64 + 256 * (g % 2)
    1024 acknowledgements of 64 bytes, one for each process that reads

A record is generation u64, level u32, monotonic nanoseconds u64, key id 32, reason 128, then HMAC-SHA256 over these.
The writer fills the record that is not in force, and then changes the generation. Killed in between, it leaves the
record in force whole; a record that is torn, or that nobody of the run signed, has a wrong MAC and is passed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import EmergencyLevel

MAGIC = b"esper\x00s1"
FILE_BYTES = 16 * 1024
RECORDS_AT, RECORD_BYTES = 64, 256
ACKS_AT, ACK_BYTES = 1024, 64
ACKS = (FILE_BYTES - ACKS_AT) // ACK_BYTES
MEMORY = Path("/dev/shm")  # noqa: S108  # A folder of our own in it, and checked.
_HEADER = struct.Struct("<8sQ")
_BODY = struct.Struct("<QIQ32s128s")
_ACK = struct.Struct("<QQQ32s")
_MAC_BYTES = 32


@dataclass(frozen=True, slots=True)
class SharedRecord:
    """What stands in the file."""

    generation: int
    level: EmergencyLevel.ValueType
    raised_at_ns: int
    """On the monotonic clock, which is one for the whole host."""
    reason: str


@dataclass(frozen=True, slots=True)
class Ack:
    """That a process has seen a record."""

    process_id: int
    generation: int
    seen_at_ns: int
    name: str


class SharedSignal:
    """Writes and reads the emergency of one run. Any process of the run may do both.

    Looking costs one read of 16 bytes until something changes. The key is that of the trainer's role for this run:
    other users cannot open the file, and whoever can without the keyring forges nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        run_id: str,
        keyring: Keyring,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Open the file, or make it; raises OSError when that is impossible, or the file is not ours alone."""
        self.path = path
        self._audience = f"shared-signal/{run_id}"
        self._keyring = keyring
        self._clock_ns = clock_ns
        self._keys: dict[str, bytes] = {}
        self._seen = 0
        self._ack_at: int | None = None
        self.ignored = 0
        """Records that were torn, or signed by nobody of this run."""
        self._descriptor = _open(path)
        self.current = SharedRecord(0, EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED, 0, "")

    def close(self) -> None:
        """Close the file and leave it: others may still read it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close the file and remove it: the run is over."""
        self.close()
        self.path.unlink(missing_ok=True)

    def write(self, level: EmergencyLevel.ValueType, reason: str, *, raised_at_ns: int | None = None) -> SharedRecord:
        """Put a record in force; raises OSError."""
        at = self._clock_ns() if raised_at_ns is None else raised_at_ns
        with self._locked():
            generation = max(self._generation(), self.current.generation) + 1
            body = self._body(generation, level, at, reason)
            _write(self._descriptor, body, _place_of(generation))
            _write(self._descriptor, _HEADER.pack(MAGIC, generation), 0)
        self._seen = generation
        self.current = SharedRecord(generation, level, at, reason)
        return self.current

    def poll(self) -> SharedRecord | None:
        """Return the record in force when it is another one than was seen last; raises OSError.

        A record that cannot be believed is passed over, and that of before stays.
        """
        generation = self._generation()
        if generation == self._seen:
            return None
        self._seen = generation
        found = self._read(generation)
        # Writers only count up: a lower one is an old record that somebody put back.
        if found is None or found.generation < self.current.generation:
            self.ignored += 1
            return None
        self.current = found
        return found

    def acknowledge(self, name: str) -> None:
        """Note that this process has seen the record in force, and when."""
        if self._ack_at is None:
            self._ack_at = self._claim()
        if self._ack_at is not None:
            ack = _ACK.pack(os.getpid(), self.current.generation, self._clock_ns(), name.encode()[:32])
            _write(self._descriptor, ack, self._ack_at)

    def acks(self, generation: int) -> list[Ack]:
        """Who has seen this record or a later one; not signed, for measuring only."""
        found = (Ack(p, g, at, name.rstrip(b"\0").decode(errors="replace")) for p, g, at, name in self._all_acks())
        return [ack for ack in found if ack.process_id and ack.generation >= generation > 0]

    def _generation(self) -> int:
        header = os.pread(self._descriptor, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise OSError(f"{self.path} was cut short")
        magic, generation = _HEADER.unpack(header)
        if magic != MAGIC:
            raise OSError(f"{self.path} is no shared signal")
        return int(generation)

    def _read(self, generation: int) -> SharedRecord | None:
        raw = os.pread(self._descriptor, _BODY.size + _MAC_BYTES, _place_of(generation))
        if len(raw) < _BODY.size + _MAC_BYTES:
            return None
        body, mac = raw[: _BODY.size], raw[_BODY.size :]
        found, level, at, key_id, reason = _BODY.unpack(body)
        key = self._key(key_id.rstrip(b"\0").decode(errors="replace"))
        if key is None or found != generation or not hmac.compare_digest(hmac.digest(key, body, "sha256"), mac):
            return None
        if level not in EmergencyLevel.values():
            return None
        return SharedRecord(generation, level, at, reason.rstrip(b"\0").decode(errors="replace"))

    def _body(self, generation: int, level: int, at: int, reason: str) -> bytes:
        key_id = self._keyring.active_key_id
        key = self._key(key_id)
        if key is None:
            raise ConfigError("This keyring cannot sign; run `esper keys issue` for this identity.")
        body = _BODY.pack(generation, level, at, key_id.encode(), reason.encode()[:128])
        return body + hmac.digest(key, body, "sha256")

    def _key(self, key_id: str) -> bytes | None:
        if key_id not in self._keys:
            key = self._keyring.own_key(key_id, self._audience)
            if key is None:
                return None
            self._keys[key_id] = key
        return self._keys[key_id]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock of the kernel: it ends with whoever holds it, also with one that is killed.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _claim(self) -> int | None:
        with self._locked():
            for index, (process_id, *_) in enumerate(self._all_acks()):
                if process_id in (0, os.getpid()) or not _is_alive(process_id):
                    place = ACKS_AT + index * ACK_BYTES
                    _write(self._descriptor, _ACK.pack(os.getpid(), 0, 0, b""), place)
                    return place
        return None

    def _all_acks(self) -> Iterator[tuple[int, int, int, bytes]]:
        raw = os.pread(self._descriptor, ACKS * ACK_BYTES, ACKS_AT)
        for place in range(0, len(raw) - ACK_BYTES + 1, ACK_BYTES):
            yield _ACK.unpack_from(raw, place)


def place_for(run_id: str, *, home: Path, memory: Path = MEMORY) -> Path:
    """Where the file of a run lies: in the memory of the host, in a folder of this user, else below the home."""
    name = hashlib.sha256(run_id.encode()).hexdigest()[:32] + ".signal"
    folder = memory / f"esper-{os.geteuid()}"
    if memory.is_dir():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(os.lstat(folder), stat.S_ISDIR):
                return folder / name
    return home / "run" / "signals" / name


def _place_of(generation: int) -> int:
    return RECORDS_AT + RECORD_BYTES * (generation % 2)


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if not _is_ours(os.fstat(descriptor), stat.S_ISREG):
            raise OSError(f"{path} is not a file of this user alone")
        _prepare(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _prepare(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        if os.fstat(descriptor).st_size < FILE_BYTES:
            os.posix_fallocate(descriptor, 0, FILE_BYTES)
        # New, or spoiled by somebody: no reader takes anything from it then, and none would until it was removed.
        if os.pread(descriptor, len(MAGIC), 0) != MAGIC:
            _write(descriptor, _HEADER.pack(MAGIC, 0).ljust(FILE_BYTES, b"\0"), 0)
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_ours(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    others = stat.S_IRWXG | stat.S_IRWXO
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & others


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write(descriptor: int, content: bytes, place: int) -> None:
    if os.pwrite(descriptor, content, place) != len(content):
        raise OSError("the shared signal was not written whole")
