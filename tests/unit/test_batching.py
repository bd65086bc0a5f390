"""`app.batching`: what arrives together travels together, and nobody pays for another."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.batching import Batcher, Bounds
from app.errors import Overloaded

pytestmark = pytest.mark.anyio

BOUNDS = Bounds(batches=1, items=100, share=100, size=1000, waiting_items=100, waiting_size=1000)


@dataclass
class Work:
    """Notes each batch, answers `item * 2`, and waits at a gate where one is set."""

    batches: list[list[int]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    under_way: int = 0
    most_under_way: int = 0
    fails: Callable[[list[int]], Exception | None] = lambda _: None

    async def __call__(self, items: list[int]) -> list[Any]:
        self.batches.append(items)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.gate is not None:
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            if (failure := self.fails(items)) is not None:
                raise failure
            return [item * 2 for item in items]
        finally:
            self.under_way -= 1


def bounds(**changes: int) -> Bounds:
    return Bounds(
        **{name: changes.get(name, getattr(BOUNDS, name)) for name in Bounds.__slots__}  # type: ignore[arg-type]
    )


async def let_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_arrives_in_one_turn_of_the_loop_is_one_batch() -> None:
    work = Work()
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS)

    results = await asyncio.gather(*(batcher.submit(item) for item in range(5)))

    assert results == [0, 2, 4, 6, 8]
    assert work.batches == [[0, 1, 2, 3, 4]]


async def test_what_arrives_while_a_batch_is_under_way_goes_into_the_next_one_together() -> None:
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS)
    calls = [asyncio.create_task(batcher.submit(0))]
    await let_run()
    for item in (1, 2, 3):
        calls.append(asyncio.create_task(batcher.submit(item)))
        await let_run()

    before = list(work.batches)
    work.gate.set()
    await asyncio.gather(*calls)

    assert before == [[0]]
    assert work.batches == [[0], [1, 2, 3]]


async def test_one_alone_waits_for_no_timer() -> None:
    work = Work()
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS)
    call = asyncio.create_task(batcher.submit(1))

    # Turns of the loop, in which no time need pass.
    await let_run()

    assert call.done()


async def test_batches_under_way_and_their_sizes_are_bounded() -> None:
    work = Work()
    batcher: Batcher[int, int] = Batcher(
        work, bounds=bounds(batches=2, items=3, size=50), size=lambda item: item
    )

    await asyncio.gather(*(batcher.submit(item) for item in [1, 2, 3, 4, 30, 30, 70, 5]))

    assert work.batches == [[1, 2, 3], [4, 30], [30], [70], [5]]
    assert work.most_under_way == 2


async def test_many_are_divided_among_the_free_places_and_few_are_not() -> None:
    """Those that are answered together come back together: in one batch again, the other place would stay empty."""
    work = Work()
    batcher: Batcher[int, int] = Batcher(work, bounds=bounds(batches=2, share=4))

    async def caller(item: int) -> None:
        for _ in range(2):
            await batcher.submit(item)

    await asyncio.gather(*map(caller, range(12)))
    many = [len(batch) for batch in work.batches]
    work.batches.clear()
    await asyncio.gather(*map(caller, range(4)))

    assert many[:2] == [6, 6]
    assert sum(many) == 24
    assert work.most_under_way == 2
    assert [len(batch) for batch in work.batches] == [4, 4]


async def test_items_of_one_key_never_meet_and_keep_their_order_and_keys_take_turns() -> None:
    work = Work()
    batcher: Batcher[int, int] = Batcher(work, bounds=bounds(batches=2, items=2), key=lambda item: item // 10)

    await asyncio.gather(*(batcher.submit(item) for item in [10, 11, 12, 13, 20, 30, 40]))

    assert all(len({item // 10 for item in batch}) == len(batch) for batch in work.batches)
    order = [item for batch in work.batches for item in batch]
    assert [item for item in order if item < 20] == [10, 11, 12, 13]
    # One session that has much to say comes last, not first.
    assert order.index(40) < order.index(12)


async def test_a_key_is_free_again_after_its_last_item() -> None:
    work = Work()
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS, key=lambda item: item)

    for _ in range(3):
        assert await batcher.submit(7) == 14
    await batcher.close()

    assert batcher._behind == {}


async def test_equal_keys_that_wait_share_one_result() -> None:
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS, key=lambda item: item, shares=True)
    calls = [asyncio.create_task(batcher.submit(item)) for item in (1, 1, 2)]
    await let_run()
    # The first batch has departed: who comes now must not be given what it read.
    late = asyncio.create_task(batcher.submit(1))
    await let_run()

    work.gate.set()

    assert await asyncio.gather(*calls, late) == [2, 2, 4, 2]
    assert work.batches == [[1, 2], [1]]


async def test_one_bad_item_fails_alone() -> None:
    work = Work(fails=lambda items: ValueError("13") if 13 in items else None)
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS, concerns_all=lambda _: False)

    results = await asyncio.gather(*(batcher.submit(item) for item in range(10, 18)), return_exceptions=True)

    assert [result for result in results if not isinstance(result, Exception)] == [20, 22, 24, 28, 30, 32, 34]
    assert isinstance(results[3], ValueError)


async def test_an_outage_is_everybodys_and_is_not_tried_again() -> None:
    work = Work(fails=lambda _: OSError("out"))
    batcher: Batcher[int, int] = Batcher(
        work, bounds=BOUNDS, concerns_all=lambda exc: isinstance(exc, OSError)
    )

    results = await asyncio.gather(*(batcher.submit(item) for item in range(4)), return_exceptions=True)

    assert [type(result) for result in results] == [OSError] * 4
    assert len(work.batches) == 1


async def test_a_result_may_be_an_exception_for_one() -> None:
    async def run(items: list[int]) -> list[int | Exception]:
        return [KeyError(item) if item == 1 else item for item in items]

    batcher: Batcher[int, int] = Batcher(run, bounds=BOUNDS)

    results = await asyncio.gather(*(batcher.submit(item) for item in range(3)), return_exceptions=True)

    assert [type(result) for result in results] == [int, KeyError, int]


async def test_a_caller_that_goes_away_harms_nobody_and_what_has_departed_runs_to_its_end() -> None:
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS, key=lambda item: item // 10)
    first, second = (asyncio.create_task(batcher.submit(item)) for item in (10, 20))
    await let_run()
    waiting, behind = (asyncio.create_task(batcher.submit(item)) for item in (11, 12))
    await let_run()

    first.cancel()
    waiting.cancel()
    work.gate.set()

    assert await second == 40
    assert await behind == 24
    # 11 had not departed, and nobody waited for it any more.
    assert work.batches == [[10, 20], [12]]


@pytest.mark.parametrize("turns", [1, 2, 3, 4], ids=lambda turns: f"after-{turns}-turns")
async def test_a_batch_that_is_cancelled_leaves_nobody_waiting(turns: int) -> None:
    """Wherever it is: one that departed in this very turn of the loop has not made its first step."""
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=BOUNDS, key=lambda item: item)
    first = asyncio.create_task(batcher.submit(1))
    for _ in range(turns):
        await asyncio.sleep(0)
    for batch in batcher.under_way:
        batch.cancel()
    work.gate.set()

    done, _ = await asyncio.wait([first], timeout=5)
    assert done == {first}
    assert first.cancelled() or first.result() == 2
    # Its key is free again.
    async with asyncio.timeout(5):
        assert await batcher.submit(1) == 2


async def test_a_batch_with_too_few_results_is_an_error_of_all_who_wait_for_it() -> None:
    async def forgets_one(items: list[int]) -> list[int]:
        return items[1:]

    batcher: Batcher[int, int] = Batcher(forgets_one, bounds=BOUNDS)
    calls = [asyncio.create_task(batcher.submit(item)) for item in range(3)]

    done, _ = await asyncio.wait(calls, timeout=5)
    assert done == set(calls)
    assert isinstance(calls[-1].exception(), ValueError)


async def test_too_many_that_wait_are_refused_at_once_and_the_others_are_served() -> None:
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=bounds(waiting_items=3), key=lambda item: item)
    calls = [asyncio.create_task(batcher.submit(0))]
    await let_run()
    calls += [asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)]
    await let_run()

    with pytest.raises(Overloaded) as refused:
        await batcher.submit(4)
    work.gate.set()

    assert refused.value.retry_after_seconds >= 1
    assert await asyncio.gather(*calls) == [0, 2, 4, 6]
    assert await batcher.submit(4) == 8


async def test_too_many_bytes_that_wait_are_refused_and_one_item_of_any_size_is_not() -> None:
    work = Work(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(work, bounds=bounds(waiting_size=100), size=lambda item: item)
    calls = [asyncio.create_task(batcher.submit(1))]
    await let_run()
    calls.append(asyncio.create_task(batcher.submit(5000)))
    await let_run()

    with pytest.raises(Overloaded):
        await batcher.submit(1)
    work.gate.set()

    assert await asyncio.gather(*calls) == [2, 10000]
