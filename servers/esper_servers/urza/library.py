from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson
from sqlalchemy import (
    Column,
    Engine,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from esper_rpc.database import unopenable
from esper_rpc.disk import require_writable, write_whole
from esper_rpc.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
)
from esper_rpc.proto.urza.v1 import Blueprint

_metadata = MetaData()
_blueprints = Table(
    "blueprint",
    _metadata,
    Column("blueprint_id", String, primary_key=True),
    Column("content", LargeBinary, nullable=False),
    Column("content_digest", LargeBinary, nullable=False),
    Column("extras", LargeBinary, nullable=False),
    Column("kernel_digest", LargeBinary),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A blueprint with its extras."""

    blueprint: Blueprint
    extras_json: bytes


class BlueprintLibrary:
    """Keeps blueprints in SQLite and kernels as files named by their SHA-256. Safe to call from any thread.

    A blueprint is immutable, so what has been read once is served from memory.
    """

    def __init__(self, directory: Path) -> None:
        require_writable(directory)
        self._kernels = directory / "kernels"
        self._engine = _open(directory / "library.sqlite")
        self._cache: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    def cached(self, blueprint_id: str) -> Entry | None:
        """Return an entry that is in memory, without waiting for the disk."""
        return self._cache.get(blueprint_id)

    def get(self, blueprint_id: str) -> Entry:
        """Return an entry; raises NotFound."""
        cached = self._cache.get(blueprint_id)
        if cached is not None:
            return cached
        with self._engine.connect() as connection:
            row = connection.execute(select(_blueprints).where(_blueprints.c.blueprint_id == blueprint_id)).first()
        if row is None:
            raise NotFound(f"There is no blueprint {blueprint_id!r}.", metadata={"blueprint_id": blueprint_id})
        entry = Entry(Blueprint.FromString(row.content), row.extras)
        with self._lock:
            return self._cache.setdefault(blueprint_id, entry)

    def list_from(self, after: str, limit: int) -> Sequence[Blueprint]:
        """Return blueprints with greater identifiers than `after`, in their order."""
        query = select(_blueprints.c.content).where(_blueprints.c.blueprint_id > after)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_blueprints.c.blueprint_id).limit(limit)).all()
        return [Blueprint.FromString(row.content) for row in rows]

    def save(self, blueprint: Blueprint, extras_json: bytes) -> tuple[Blueprint, bool]:
        """Save a blueprint; returns it as saved, and whether it is new.

        Raises:
            AlreadyExists: When the identifier is known with other content.
            InvalidRequest: When the extras are not a JSON object.
        """
        extras = _checked_extras(extras_json)
        saved = Blueprint()
        saved.CopyFrom(blueprint)
        saved.extras_digest = hashlib.sha256(extras).digest()
        saved.ClearField("saved_at")
        digest = hashlib.sha256(saved.SerializeToString(deterministic=True) + extras).digest()
        saved.saved_at.FromDatetime(datetime.now(UTC))
        row = {
            "blueprint_id": saved.descriptor.blueprint_id, "content": saved.SerializeToString(),
            "content_digest": digest, "extras": extras,
        }  # fmt: skip
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_blueprints).values(**row))
        except IntegrityError:
            return self._same_as_before(saved.descriptor.blueprint_id, digest), False
        except OperationalError as error:
            raise _no_room(str(error.orig)) from error
        return saved, True

    def attach_kernel(self, blueprint_id: str, content: bytes, digest: bytes) -> str:
        """Store the kernel of a blueprint whose manifest names this digest; returns its reference."""
        manifest = self.get(blueprint_id).blueprint.manifest
        if hashlib.sha256(content).digest() != digest:
            raise InvalidRequest("The chunks do not match the header's SHA-256; nothing was kept.")
        if manifest.weights_sha256 != digest:
            raise FailedPrecondition("The manifest of this blueprint names another SHA-256, or no weights.")
        path = self._path_of(digest)
        try:
            write_whole(path, content)
            with self._engine.begin() as connection:
                changed = update(_blueprints).where(_blueprints.c.blueprint_id == blueprint_id)
                connection.execute(changed.values(kernel_digest=digest))
        except OperationalError as error:
            raise _no_room(str(error.orig)) from error
        except OSError as error:
            raise _no_room(error.strerror or str(error)) from error
        return artifact_ref(digest)

    def read_kernel(self, blueprint_id: str) -> bytes:
        """Return a kernel, checked again; raises NotFound or DataLoss."""
        digest = self.get(blueprint_id).blueprint.manifest.weights_sha256
        try:
            content = self._path_of(digest).read_bytes() if digest else None
        except FileNotFoundError:
            content = None
        if content is None:
            raise NotFound(f"Blueprint {blueprint_id!r} has no kernel.", reason="NO_KERNEL")
        if hashlib.sha256(content).digest() != digest:
            raise DataLoss(f"The kernel of {blueprint_id!r} is damaged on the disk; upload it again.")
        return content

    def _same_as_before(self, blueprint_id: str, digest: bytes) -> Blueprint:
        with self._engine.connect() as connection:
            query = select(_blueprints.c.content_digest).where(_blueprints.c.blueprint_id == blueprint_id)
            known = connection.execute(query).scalar_one()
        if known != digest:
            raise AlreadyExists(
                f"Blueprint {blueprint_id!r} exists with other content; save it under a new identifier."
            )
        return self.get(blueprint_id).blueprint

    def _path_of(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._kernels / name[:2] / name


def _open(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", _sync_fully)
    try:
        _metadata.create_all(engine)
    except (DBAPIError, sqlite3.Error) as error:
        engine.dispose()
        cause = error.orig if isinstance(error, DBAPIError) else error
        assert isinstance(cause, sqlite3.Error)
        raise unopenable(path, cause) from error
    return engine


def _no_room(cause: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"The library cannot be written ({cause}); free space on its disk and try again. Nothing was kept.",
        reason="STORAGE",
    )


def artifact_ref(digest: bytes) -> str:
    """Name a kernel by its content."""
    return f"sha256:{digest.hex()}"


def _checked_extras(extras_json: bytes) -> bytes:
    try:
        document = orjson.loads(extras_json or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"extras_json is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidRequest("extras_json must be a JSON object.")
    return extras_json or b"{}"


def _sync_fully(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]  # A DB-API connection.
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()
