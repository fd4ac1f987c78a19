import asyncio
from contextlib import suppress

from tuneloop_operator.runtime.informer import end_all_others


async def stubborn(cancellations: int) -> None:
    """Ends only when it is cancelled once more than this."""
    for _ in range(cancellations):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


def test_tasks_that_take_a_cancellation_for_something_else_are_ended_all_the_same() -> None:
    async def run() -> list[bool]:
        tasks = [asyncio.create_task(stubborn(cancellations)) for cancellations in range(3)]
        await asyncio.sleep(0)
        await end_all_others()
        return [task.cancelled() for task in tasks]

    assert asyncio.run(run()) == [True, True, True]
