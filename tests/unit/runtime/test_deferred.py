from __future__ import annotations

import asyncio

from esper_rpc.deferred import Deferred


async def test_work_that_is_asked_for_again_and_again_is_done_once_and_later_anew():
    done = asyncio.Queue()
    work = Deferred(0.0, lambda: done.put_nowait(None))
    for _ in range(3):
        work.ask()
    assert done.empty()
    await asyncio.wait_for(done.get(), 10)
    work.ask()
    await asyncio.wait_for(done.get(), 10)
    assert done.empty()


async def test_work_that_fails_is_done_when_it_is_asked_for_again():
    failures = asyncio.Queue()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.put_nowait(context["exception"]))

    def fail():
        raise RuntimeError("work")

    work = Deferred(0.0, fail)
    for _ in range(2):
        work.ask()
        assert str(await asyncio.wait_for(failures.get(), 10)) == "work"
