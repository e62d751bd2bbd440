from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from esper_rpc.errors import ConfigError, EsperError, InvalidRequest, PermissionDenied, Unauthenticated
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.authority import check_signing_request
from esper_rpc.identity.deny_list import DenyList, read_denied, write_denied
from esper_rpc.identity.enrolment import EnrolmentTokens, Invitation
from esper_rpc.identity.peer import Peer, PeerTrust
from esper_rpc.identity.signing_request import new_signing_request

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ME = SpiffeId("trainer", "me")


class WallClock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


def test_a_peer_is_trusted_until_its_leaf_ends():
    clock = WallClock()
    trust = PeerTrust(clock=clock)
    peer = Peer(ME, NOW + timedelta(hours=1))
    trust.check(peer)
    clock.now += timedelta(hours=1)
    with pytest.raises(Unauthenticated, match="renew it"):
        trust.check(peer)


def test_a_denied_name_is_refused_as_soon_as_the_list_is_read_again(tmp_path):
    path = tmp_path / "denied.json"
    trust = PeerTrust(DenyList(path))
    trust.check(Peer(ME))
    write_denied(path, {str(ME): "key leaked"})
    trust.refresh()
    with pytest.raises(PermissionDenied, match="key leaked"):
        trust.check(Peer(ME))
    write_denied(path, {})
    trust.refresh()
    trust.check(Peer(ME))


@pytest.mark.parametrize("text", ["{", "[]", '{"trainer/local": "a name by hand"}'])
def test_a_spoilt_deny_list_keeps_what_was_denied(tmp_path, text):
    path = tmp_path / "denied.json"
    write_denied(path, {str(ME): "key leaked"})
    trust = PeerTrust(DenyList(path))
    path.write_text(text)
    trust.refresh()
    with pytest.raises(PermissionDenied):
        trust.check(Peer(ME))
    with pytest.raises(ConfigError, match="esper pki deny"):
        read_denied(path)


def test_a_key_of_another_leaf_is_noticed(mesh, tmp_path):
    one, other = mesh.identity("trainer", "one"), mesh.identity("trainer", "other")
    one.save(tmp_path / "mixed")
    (tmp_path / "mixed" / "key.pem").write_bytes(other.key_pem)
    with pytest.raises(ConfigError, match="is not the key of the certificate beside it"):
        Identity.load(tmp_path / "mixed")


def test_a_signing_request_carries_the_key_and_no_name(tmp_path):
    key_pem, csr_pem = new_signing_request()
    authority = Authority.create(tmp_path / "pki")
    leaf = authority.issue(ME, csr_pem=csr_pem)
    directory = tmp_path / "me"
    Identity(spiffe_id=ME, chain_pem=leaf.chain_pem, key_pem=key_pem, root_pem=leaf.root_pem).save(directory)
    assert Identity.load(directory).spiffe_id == ME
    with pytest.raises(InvalidRequest):
        check_signing_request(b"nonsense")


def test_a_token_is_good_once_even_for_two_at_the_same_moment(tmp_path):
    tokens = EnrolmentTokens(tmp_path)
    secret = tokens.create(ME, lifetime=timedelta(minutes=5), keyring_json="{}")

    def redeem(_):
        try:
            return tokens.redeem(secret).spiffe_id
        except PermissionDenied:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert [r for r in pool.map(redeem, range(8)) if r] == [ME]


def test_an_expired_and_an_unknown_token_get_the_same_words(tmp_path):
    clock = WallClock()
    tokens = EnrolmentTokens(tmp_path, clock)
    secret = tokens.create(ME, lifetime=timedelta(minutes=5), keyring_json="{}")
    clock.now += timedelta(minutes=6)
    words = set()
    for text in (secret, "unknown"):
        with pytest.raises(EsperError) as caught:
            tokens.redeem(text)
        words.add(caught.value.message)
    assert len(words) == 1


def test_a_used_token_leaves_no_key_behind(tmp_path):
    tokens = EnrolmentTokens(tmp_path)
    tokens.redeem(tokens.create(ME, lifetime=timedelta(minutes=5), keyring_json='{"secret": "needle"}'))
    assert [b"needle" in file.read_bytes() for file in tmp_path.iterdir()] == [False]


def test_an_invitation_survives_its_text_form_and_nonsense_is_refused():
    invitation = Invitation(secret="s", address="127.0.0.1:1", root_pem="pem")
    assert Invitation.decode(invitation.encode()) == invitation
    for text in ("", "esper-enrol-1.", "esper-enrol-1.AAAA", "other"):
        with pytest.raises(ConfigError, match="esper pki token"):
            Invitation.decode(text)
