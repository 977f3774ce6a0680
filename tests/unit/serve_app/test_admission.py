from __future__ import annotations

import asyncio

import pytest

from serve_app.admission import Admission
from serve_app.errors import ApiError


async def hold(admission: Admission, choices: int, release: asyncio.Event, order: list[str], name: str) -> None:
    async with admission.admit(choices):
        order.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_are_granted_in_order_of_arrival_and_nobody_overtakes():
    admission, order = Admission(slots=4, queue=10), []
    releases = {name: asyncio.Event() for name in "abcd"}
    tasks = []
    for name, choices in (("a", 3), ("b", 4), ("c", 1), ("d", 1)):
        tasks.append(asyncio.create_task(hold(admission, choices, releases[name], order, name)))
        await settle()
    assert order == ["a"], "c fits beside a, but b came first"
    assert (admission.running, admission.waiting) == (3, 6)
    releases["a"].set()
    await settle()
    assert order == ["a", "b"]
    releases["b"].set()
    await settle()
    assert order == ["a", "b", "c", "d"]
    for release in releases.values():
        release.set()
    await asyncio.gather(*tasks)
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_full_queue_refuses_at_once():
    admission, release = Admission(slots=1, queue=1, retry_after_s=7), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, 1, release, [], name)) for name in "ab"]
    await settle()
    with pytest.raises(ApiError) as refused:
        async with admission.admit(1):
            pass
    assert refused.value.status_code == 429
    assert refused.value.headers == {"Retry-After": "7"}
    release.set()
    await asyncio.gather(*tasks)


async def test_a_request_that_never_fits_is_the_clients_error():
    with pytest.raises(ApiError) as refused:
        async with Admission(slots=2, queue=8).admit(3):
            pass
    assert (refused.value.status_code, refused.value.param) == (400, "n")


async def test_a_thousand_cancellations_leak_no_slot():
    admission, release, order = Admission(slots=2, queue=10_000), asyncio.Event(), []
    for _ in range(1000):
        tasks = [asyncio.create_task(hold(admission, 1, release, order, "x")) for _ in range(4)]
        await settle()
        tasks[3].cancel()
        tasks[0].cancel()
        tasks[2].cancel()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.running, admission.waiting) == (0, 0)
    async with admission.admit(2):
        assert admission.running == 2


async def test_cancelled_after_the_grant_gives_the_slot_on():
    admission, release, order = Admission(slots=1, queue=5), asyncio.Event(), []
    first, second, third = (asyncio.create_task(hold(admission, 1, release, order, name)) for name in "abc")
    await settle()
    first.cancel()
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await settle()
    assert order[-1] == "c"
    release.set()
    await third
    assert admission.running == 0


async def test_drain_refuses_newcomers_and_waits_for_the_rest():
    admission, release, order = Admission(slots=1, queue=5), asyncio.Event(), []
    tasks = [asyncio.create_task(hold(admission, 1, release, order, name)) for name in "ab"]
    await settle()
    drained = asyncio.create_task(admission.drain())
    await settle()
    with pytest.raises(ApiError) as refused:
        async with admission.admit(1):
            pass
    assert refused.value.status_code == 503
    assert "Retry-After" in refused.value.headers
    assert not drained.done()
    release.set()
    await asyncio.gather(*tasks, drained)
    assert order == ["a", "b"]
