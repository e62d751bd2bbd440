"""What may wait for company is made and committed together with it, and never lost to whoever looks."""

from __future__ import annotations

import threading

import pytest

from esper_rpc.journal import Journal, JournalConfig, Record

COMPANY = 4


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "journal.sqlite", config=JournalConfig(company=COMPANY))
    yield made
    made.close()


class Maker:
    """Makes records, and knows how many were made."""

    def __init__(self, journal):
        self.journal = journal
        self.made = threading.Semaphore(0)

    def leave(self, *keys):
        for key in keys:
            self.journal.append_made(lambda key=key: self.make(key), may_wait=True)

    def make(self, key):
        self.made.release()
        return [Record("k", key, b"")]

    def wait_for(self, count):
        return all(self.made.acquire(timeout=10) for _ in range(count))


@pytest.fixture
def maker(journal):
    return Maker(journal)


def keys_in(journal):
    return [record.key for record in journal.read("k")]


def test_alone_it_waits(maker):
    maker.leave("a", "b", "c")
    assert not maker.made.acquire(timeout=0.1)


def test_in_company_enough_it_goes(maker):
    maker.leave("a", "b", "c", "d")
    assert maker.wait_for(COMPANY)


def test_it_goes_when_it_is_handed_over(journal, maker):
    maker.leave("a", "b")
    journal.hand_over()
    assert maker.wait_for(2)


def test_it_goes_before_whatever_is_queued_next(journal, maker):
    maker.leave("a", "b")
    journal.append("k", "c", b"")
    assert maker.wait_for(2)
    journal.flush()
    assert keys_in(journal) == ["a", "b", "c"]


def test_a_flush_waits_for_it_too(journal, maker):
    maker.leave("a", "b")
    journal.flush()
    assert keys_in(journal) == ["a", "b"]


def test_a_close_writes_it(journal, maker):
    maker.leave("a", "b")
    journal.close()
    assert keys_in(journal) == ["a", "b"]


def test_it_comes_in_company_into_one_commit(journal, maker, monkeypatch):
    sizes, commit = [], journal._commit
    monkeypatch.setattr(journal, "_commit", lambda records: (sizes.append(len(records)), commit(records)))
    held, may_go = threading.Event(), threading.Event()
    journal.append_made(lambda: (held.set(), may_go.wait(10), ())[-1])  # So that the writer does not outrun this.
    assert held.wait(10)
    maker.leave("a", "b", "c", "d")
    may_go.set()
    journal.flush()
    assert sizes == [COMPANY]
