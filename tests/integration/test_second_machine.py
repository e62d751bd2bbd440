"""A new machine gets a certificate for a token, and renews it where `esper up` was told to serve renewals."""

from __future__ import annotations

import asyncio

import pytest
from typer.testing import CliRunner

from esper_client.renewal import CertificateRenewer
from esper_rpc.envelope import Keyring
from esper_rpc.identity import Identity
from esper_servers.cli import app
from esper_servers.cli.authority_thread import AuthorityThread
from esper_servers.cli.home import Home


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    return home


@pytest.fixture
def authority(home):
    thread = AuthorityThread(home, {}, address="localhost:0", enrolment_address="localhost:0")
    thread.start()
    home.write_mesh(thread.addresses)
    yield thread
    thread.stop()


def esper(home, *arguments, given=""):
    result = CliRunner().invoke(app, arguments, obj={"ESPER_HOME": str(home.directory)}, input=given)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_second_machine_enrols_with_a_token_and_renews_its_certificate(home, authority, tmp_path):
    token = esper(home, "pki", "token", "trainer", "gpu-3")
    other = Home(tmp_path / "other")
    esper(other, "pki", "enroll", "-", given=token)
    identity = other.identity("trainer", "gpu-3")
    assert Keyring.load(identity.directory / "keyring.json").role == "trainer"

    assert authority.addresses["weatherlight"].startswith("localhost:")
    renewer = CertificateRenewer(
        identity, address=authority.addresses["weatherlight"], clock=lambda: identity.not_after
    )
    asyncio.run(renewer.check())
    assert Identity.load(identity.directory).key_pem != identity.key_pem
