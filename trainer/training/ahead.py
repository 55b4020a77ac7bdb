"""Work that threads do ahead of whoever takes its results, and results put together in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_ahead(
    items: Iterable[Item], work: Callable[[Item], Result], *, workers: int, ahead: int
) -> Generator[Result]:
    """`work` of each item, in the order of the items, done by threads.

    What a thread raises is raised here when its turn comes. Then, and when the caller closes the
    generator, what has not been begun is dropped and what has been is waited for.

    Args:
        items: taken as they are needed.
        work: called in several threads at once.
        workers: how many.
        ahead: so many results wait at most, so that memory does not grow with the items.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batches_of_alike(
    items: Iterable[Item], size: int, alike: Callable[[Item], object]
) -> Iterator[list[Item]]:
    """Neighbours of equal `alike`, `size` of them at most."""
    batch: list[Item] = []
    for item in items:
        if batch and alike(batch[0]) != alike(item):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
