from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor


@pytest.fixture(scope="session")
def seeded_home(tmp_path_factory):
    """Makes homes whose library has every blueprint."""

    def make():
        home = Home(tmp_path_factory.mktemp("mesh"))
        home.prepare()
        seeded = CliRunner().invoke(app, ["urza", "seed", "--home", str(home.directory)], obj={})
        assert seeded.exit_code == 0, seeded.output
        return home

    return make


@pytest.fixture(scope="session")
def shared_mesh(seeded_home):
    """A mesh of processes for all files that leave it serving: other runs come and go, and Tamiyo may be restarted."""
    with Supervisor(seeded_home(), os.environ) as supervisor:
        yield supervisor
