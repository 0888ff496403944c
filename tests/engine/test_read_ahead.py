import threading

import pytest

from engine.read_ahead import Ahead, read_ahead

BOUND_S = 10.0
NAMES = [f"w{index}" for index in range(20)]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_items_come_in_order_though_they_are_read_out_of_it() -> None:
    later_ones = threading.Barrier(3)

    def read(name: str) -> str:
        if name in ("w0", "w2", "w3"):  # w0 cannot end before w2 and w3 have begun
            later_ones.wait(BOUND_S)
        return name.upper()

    items = list(read_ahead(read, dict.fromkeys(NAMES, 1), Ahead(threads=3, max_bytes=100)))
    assert items == [(name, name.upper()) for name in NAMES]
    assert reading_threads() == []


@pytest.mark.parametrize(("max_bytes", "most"), [(1000, 6), (40, 4), (9, 1)])
def test_no_more_is_read_ahead_than_was_allowed(max_bytes: int, most: int) -> None:
    begun: list[str] = []

    def read(name: str) -> str:
        begun.append(name)
        return name

    for taken, _ in enumerate(read_ahead(read, dict.fromkeys(NAMES, 10), Ahead(threads=3, max_bytes=max_bytes)), 1):
        assert len(begun) <= taken + most
    assert sorted(begun) == sorted(NAMES)


def test_reads_run_at_the_same_time_up_to_the_bound() -> None:
    together = threading.Barrier(3)

    def read(name: str) -> None:
        if name in NAMES[:3]:
            together.wait(BOUND_S)

    assert len(list(read_ahead(read, dict.fromkeys(NAMES, 10), Ahead(threads=3, max_bytes=30)))) == len(NAMES)


def test_an_error_comes_in_place_of_its_item() -> None:
    def read(name: str) -> str:
        if name == "w3":
            raise ValueError(name)
        return name

    items = read_ahead(read, dict.fromkeys(NAMES, 1), Ahead(threads=4, max_bytes=100))
    assert [next(items) for _ in range(3)] == [(name, name) for name in NAMES[:3]]
    with pytest.raises(ValueError, match="w3"):
        next(items)
    assert reading_threads() == []


def test_a_consumer_that_stops_early_leaves_nothing_behind() -> None:
    begun: list[str] = []
    items = read_ahead(begun.append, dict.fromkeys(NAMES, 1), Ahead(threads=2, max_bytes=100))
    assert next(items) == ("w0", None)
    assert reading_threads()
    items.close()
    assert reading_threads() == []
    assert len(begun) < len(NAMES)
