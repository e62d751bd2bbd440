from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from esper_rpc.errors import ConfigError
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.secret_files import read_secret, write_secret, write_secrets


@contextmanager
def room(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_secret_without_room_is_an_error_that_names_it_and_leaves_nothing(tmp_path):
    with room(0), pytest.raises(ConfigError, match=r"key\.pem cannot be written .*free space"):
        write_secret(tmp_path / "key.pem", b"secret")
    assert not list(tmp_path.iterdir())


def test_a_secret_that_cannot_take_its_place_leaves_nothing(tmp_path):
    (tmp_path / "key.pem").mkdir()
    with pytest.raises(ConfigError, match=r"key\.pem cannot be written"):
        write_secret(tmp_path / "key.pem", b"secret")
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_secrets_that_belong_together_stay_as_they_were_when_one_has_no_room(tmp_path):
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    write_secrets({key: b"1", chain: b"1"})
    with room(1000), pytest.raises(ConfigError, match=r"cert\.pem"):
        write_secrets({key: b"2", chain: bytes(2000)})
    assert (read_secret(key), read_secret(chain)) == (b"1", b"1")


def test_an_identity_outlives_a_renewal_without_room(tmp_path):
    authority = Authority.create(tmp_path / "pki")
    name = SpiffeId("trainer", "a")
    before = Identity.of(authority.issue(name)).save(tmp_path / "trainer")
    with room(700), pytest.raises(ConfigError):
        Identity.of(authority.issue(name)).save(tmp_path / "trainer")
    assert Identity.load(tmp_path / "trainer") == before


def test_a_secret_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be read"):
        read_secret(tmp_path)
