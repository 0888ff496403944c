"""Reads in other threads, in order, and only so far ahead of whoever consumes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """How far to read ahead, and with how many threads."""

    threads: int
    max_bytes: int
    """Most bytes that are being read or wait to be consumed; a single item may be larger."""


def read_ahead(read: Callable[[str], T], sizes: Mapping[str, int], ahead: Ahead) -> Generator[tuple[str, T]]:
    """Yield (name, read(name)) for each of `sizes` (name -> bytes), in its order.

    At most two items a thread are held here. What `read` raises is raised in place of its item. A consumer that
    stops early closes the iterator, which waits for the reads under way and ends the threads.
    """
    pending: deque[tuple[str, Future[T]]] = deque()
    waiting = deque(sizes)
    num_bytes = 0
    executor = ThreadPoolExecutor(ahead.threads, thread_name_prefix="read-ahead")
    try:
        while waiting or pending:
            while waiting and len(pending) < 2 * ahead.threads:
                if pending and num_bytes + sizes[waiting[0]] > ahead.max_bytes:
                    break
                name = waiting.popleft()
                num_bytes += sizes[name]
                pending.append((name, executor.submit(read, name)))
            name, future = pending.popleft()
            num_bytes -= sizes[name]
            item = future.result()
            del future
            yield name, item
            del item
    finally:
        executor.shutdown(cancel_futures=True)
