"""A database that cannot be opened ends a start in a sentence that says what to do."""

from __future__ import annotations

import functools
import os
import resource
import sqlite3

import pytest

from esper_rpc.database import unopenable
from esper_rpc.errors import ConfigError
from esper_rpc.journal import Journal
from esper_servers.urza.library import BlueprintLibrary

OPENINGS = {
    "journal.sqlite": lambda directory: Journal(directory / "journal.sqlite"),
    "library.sqlite": BlueprintLibrary,
}


@pytest.fixture(params=OPENINGS)
def database(request, tmp_path):
    return tmp_path / request.param


def says(database, advice):
    with pytest.raises(ConfigError, match=advice) as raised:
        OPENINGS[database.name](database.parent)
    assert str(database) in raised.value.message
    assert len(raised.value.message.splitlines()) == 1


def test_one_that_is_no_database_is_to_be_moved_away(database):
    database.write_bytes(b"no database" * 1000)
    says(database, "not a database.*move it away")


def test_a_torn_one_is_to_be_moved_away(database):
    OPENINGS[database.name](database.parent).close()
    content = database.read_bytes()
    database.write_bytes(content[:100] + bytes(len(content) - 100))
    says(database, "malformed.*move it away")


def test_one_of_another_program_is_to_be_moved_away(tmp_path):
    database = tmp_path / "journal.sqlite"
    connection = sqlite3.connect(database)
    connection.execute("CREATE VIEW record AS SELECT 1 AS something_else")
    connection.close()
    says(database, "move it away")


def test_a_locked_one_names_the_process_as_the_problem(database, monkeypatch):
    for module in (sqlite3, sqlite3.dbapi2):
        monkeypatch.setattr(module, "connect", functools.partial(sqlite3.connect, timeout=0))
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    says(database, "locked.*end the process")
    holder.close()


def test_one_that_is_a_directory_is_to_be_permitted(database):
    database.mkdir()
    says(database, "permit reading and writing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_one_is_to_be_permitted(database):
    sqlite3.connect(database).close()
    database.chmod(0o400)
    says(database, "permit reading and writing")


def test_a_journal_without_room_is_to_be_given_some(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(ConfigError, match="free space"):
            Journal(tmp_path / "journal.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_kind_of_error_is_found_behind_its_extensions():
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DIRECTORY
    assert "permit reading and writing" in unopenable("x", error).message
