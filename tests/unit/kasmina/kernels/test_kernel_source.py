from __future__ import annotations

import hashlib

import pytest

from esper_rpc.errors import DataLoss, Unavailable
from esper_rpc.proto.urza.v1 import FetchKernelResponse, GetBlueprintResponse, KernelHeader, ListBlueprintsResponse
from esper_servers.kasmina.kernels import source as kernel_source
from esper_servers.kasmina.kernels.library import Kernel, KernelConfig, KernelLibrary
from esper_servers.kasmina.kernels.source import MOST_PAGES, RETRY_SECONDS, KernelSource


class FakeUrza:
    """Stands in for the client: it knows pages of blueprints and the chunks of one kernel."""

    def __init__(self):
        self.pages, self.asked, self.problem, self.blueprint, self.chunks = [[]], [], None, None, []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def list_blueprints(self, request, *, timeout):
        if self.problem:
            raise self.problem
        self.asked.append(request.page_token)
        number = int(request.page_token or 0)
        more = str(number + 1) if number + 1 < len(self.pages) else ""
        return ListBlueprintsResponse(blueprints=self.pages[number], next_page_token=more)

    async def get_blueprint(self, request, *, timeout):
        return GetBlueprintResponse(blueprint=self.blueprint)

    async def fetch_kernel(self, request, *, timeout):
        yield FetchKernelResponse(header=KernelHeader(blueprint_id="a", size_bytes=6))
        for chunk in self.chunks:
            yield FetchKernelResponse(chunk=chunk)


class Enough(Exception):
    """Ends what never ends."""


@pytest.fixture
def urza(monkeypatch):
    fake = FakeUrza()
    monkeypatch.setattr(kernel_source, "UrzaClient", lambda address, identity: fake)
    return fake


@pytest.fixture
def library():
    return KernelLibrary(None, lambda work: work.close(), config=KernelConfig(ttl_seconds=3600))


async def keep(library, urza, *, rounds=1, between=lambda: None):
    """Keep the catalogue for some rounds; returns how long it slept after each."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        between()
        if len(pauses) == rounds:
            raise Enough

    with pytest.raises(Enough):
        await KernelSource("urza", None).keep_catalogue(library, sleep=sleep)
    return pauses


def named(make_kernel, name, **manifest):
    blueprint = make_kernel("residual_mlp", None, **manifest).blueprint
    blueprint.descriptor.blueprint_id = name
    return blueprint


async def test_every_page_of_the_catalogue_is_taken_but_for_kernels_with_weights(urza, library, make_kernel):
    urza.pages = [[named(make_kernel, "a")], [named(make_kernel, "b"), named(make_kernel, "c", weights_sha256=b"x")]]
    await keep(library, urza)
    assert [isinstance(library.get(name), Kernel) for name in "abc"] == [True, True, False]


async def test_the_catalogue_is_taken_again_before_it_expires(urza, library):
    assert await keep(library, urza, rounds=3) == [1800, 1800, 1800]
    assert urza.asked == ["", "", ""]


async def test_a_library_that_is_away_is_asked_again_soon(urza, library):
    urza.problem = Unavailable("away")
    pauses = await keep(library, urza, rounds=2, between=lambda: setattr(urza, "problem", None))
    assert pauses == [RETRY_SECONDS, 1800]


async def test_a_catalogue_without_an_end_is_left_after_so_many_pages(urza, library):
    urza.pages = [[] for _ in range(MOST_PAGES + 5)]
    await keep(library, urza)
    assert len(urza.asked) == MOST_PAGES


async def test_a_kernel_is_fetched_with_its_weights_and_one_that_ends_early_is_damaged(urza, make_kernel):
    urza.blueprint = named(make_kernel, "a", weights_sha256=hashlib.sha256(b"abcdef").digest())
    urza.chunks = [b"abc", b"def"]
    assert (await KernelSource("urza", None).fetch("a")).weights == b"abcdef"
    urza.chunks = [b"abc"]
    with pytest.raises(DataLoss):
        await KernelSource("urza", None).fetch("a")
