"""The certificates of the members on this machine, when its clock was set back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from esper_rpc.identity import Authority, Identity
from esper_servers.cli.home import Home


@pytest.fixture
def home(tmp_path):
    """The clock was thirty hours ahead when the leaf of the trainer was issued."""
    home = Home(tmp_path)
    home.prepare()
    ahead = Authority.load(home.pki, clock=lambda: datetime.now(UTC) + timedelta(hours=30))
    Identity.of(ahead.issue(home.identity("trainer").spiffe_id)).save(home.identity_dir("trainer"))
    return home


def has_begun(home):
    return home.identity("trainer").not_before <= datetime.now(UTC)


def test_a_leaf_that_has_not_begun_is_issued_again_while_the_mesh_runs(home):
    assert not has_begun(home)
    assert home.renew_leaves() == ["trainer"]
    assert has_begun(home)
    assert home.renew_leaves() == []


def test_a_leaf_that_has_not_begun_is_issued_again_at_the_start(home):
    home.prepare()
    assert has_begun(home)
