from __future__ import annotations

from esper_rpc.proto.urza.v1 import Blueprint, ListBlueprintsRequest, ListBlueprintsResponse
from esper_servers.cli.pages import pages


async def test_every_page_is_asked_for_by_the_token_of_the_one_before():
    tokens, answers = [], iter(["second", "third", ""])

    async def ask(request):
        tokens.append(request.page_token)
        return ListBlueprintsResponse(blueprints=[Blueprint()] * len(tokens), next_page_token=next(answers))

    found = await pages(ask, ListBlueprintsRequest(page_size=3))
    assert tokens == ["", "second", "third"]
    assert [len(page.blueprints) for page in found] == [1, 2, 3]
