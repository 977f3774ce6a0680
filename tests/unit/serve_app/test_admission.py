from __future__ import annotations

import asyncio
import random

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


async def test_a_flooding_key_delays_another_by_one_turn():
    admission, release, order = Admission(slots=2, queue=100), asyncio.Event(), []

    async def work(key: str, name: str) -> None:
        async with admission.admit(1, key):
            order.append(name)
            await asyncio.sleep(0)

    async def first(key: str) -> None:
        async with admission.admit(1, key):
            await release.wait()

    tasks = [asyncio.create_task(first("flood")) for _ in range(2)]
    await settle()
    tasks += [asyncio.create_task(work("flood", f"f{i}")) for i in range(60)]
    await settle()
    tasks += [asyncio.create_task(work("other", f"o{i}")) for i in range(3)]
    await settle()
    release.set()
    await asyncio.gather(*tasks)
    last = max(order.index(f"o{i}") for i in range(3))
    assert last <= 6, order[:10]
    assert (admission.running, admission.waiting) == (0, 0)


class Ticks:
    """Time that the test moves on."""

    def __init__(self) -> None:
        self.now = 0
        self._due: dict[int, list[asyncio.Future[None]]] = {}

    async def wait(self, ticks: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._due.setdefault(self.now + ticks, []).append(future)
        await future

    async def run(self, until: asyncio.Future) -> None:
        while not until.done():
            self.now += 1
            for future in self._due.pop(self.now, []):
                future.set_result(None)
            await settle()


@pytest.mark.parametrize("flooding", [0, 100])
async def test_a_hundred_requests_of_one_key_cost_another_little_time(flooding: int):
    """O7: one key sends 100 times as much; the 95th percentile of the other grows by half at most."""
    admission, ticks = Admission(slots=8, queue=1000), Ticks()
    lasts, took = random.Random(0), []

    async def flood() -> None:
        while True:
            async with admission.admit(1, "flood"):
                await ticks.wait(lasts.randint(15, 25))

    async def ask() -> None:
        for _ in range(60):
            begun = ticks.now
            async with admission.admit(1, "other"):
                await ticks.wait(20)
            took.append(ticks.now - begun)

    floods = [asyncio.create_task(flood()) for _ in range(flooding)]
    await settle()
    await ticks.run(asyncio.create_task(ask()))
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    assert sorted(took)[int(0.95 * len(took))] <= 1.5 * 20


async def test_a_full_queue_refuses_the_longest_line():
    admission, release, refused = Admission(slots=1, queue=4), asyncio.Event(), []

    async def work(key: str, name: str) -> None:
        try:
            async with admission.admit(1, key):
                await release.wait()
        except ApiError as error:
            refused.append((name, error.status_code))

    tasks = []
    for key, name in [("a", f"a{i}") for i in range(5)] + [("b", "b0"), ("b", "b1"), ("a", "a5"), ("b", "b2")]:
        tasks.append(asyncio.create_task(work(key, name)))
        await settle()
    # a0 runs, a1-a4 wait; b0 and b1 take the places of a4 and a3; then both wait for two, and newcomers are refused.
    assert refused == [(name, 429) for name in ("a4", "a3", "a5", "b2")]
    release.set()
    await asyncio.gather(*tasks)
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
async def test_any_traffic_of_keys_keeps_the_books(seed: int):
    rng = random.Random(seed)
    admission, most, statuses = Admission(slots=4, queue=8), 0, set()

    async def client(key: str) -> None:
        nonlocal most
        for _ in range(20):
            try:
                async with admission.admit(rng.randint(1, 3), key):
                    most = max(most, admission.running)
                    for _ in range(rng.randint(0, 3)):
                        await asyncio.sleep(0)
            except ApiError as error:
                statuses.add(error.status_code)
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(client(f"k{i % 3}")) for i in range(12)]
    for task in rng.sample(tasks, 4):
        for _ in range(rng.randint(1, 6)):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 4
    assert statuses == {429}
    assert (admission.running, admission.waiting) == (0, 0)
    await asyncio.wait_for(admission.drain(), 1)


async def test_nobody_is_let_go_for_a_newcomer_who_is_refused_all_the_same():
    admission = Admission(slots=1, queue=4)
    async with admission.admit(1, "running"):
        waiting = [asyncio.create_task(_hold(admission, "a")) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError):
            async with admission.admit(3, "b"):
                pass
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert admission.waiting == 4
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_check_says_what_admission_would_and_changes_nothing():
    admission = Admission(slots=2, queue=1)
    admission.check(2, "a")
    with pytest.raises(ApiError) as refused:
        admission.check(3, "a")
    assert refused.value.status_code == 400
    async with admission.admit(2, "a"):
        admission.check(1, "a")
        with pytest.raises(ApiError) as refused:
            admission.check(2, "a")
        assert refused.value.status_code == 429
        assert (admission.running, admission.waiting) == (2, 0)
    await admission.drain()
    with pytest.raises(ApiError) as refused:
        admission.check(1, "a")
    assert refused.value.status_code == 503


async def test_slots_follow_the_replicas():
    admission = Admission(slots=4, queue=4)
    admission.resize(1)
    async with admission.admit(1, "a"):
        second = asyncio.create_task(_hold(admission, "a"))
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 1)
        admission.resize(2)
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (2, 0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
    admission.check(4, "a")


async def _hold(admission: Admission, key: str) -> None:
    async with admission.admit(1, key):
        await asyncio.Event().wait()
