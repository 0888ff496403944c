"""The cost of a choice is measured on choices that are made."""

from benchmarks import router_decisions
from benchmarks.router_decisions import measure, table


def test_a_row_for_each_kind_of_prompt(monkeypatch):
    monkeypatch.setattr(router_decisions, "NUM_CHOICES", 20)
    row = measure(num_workers=40, num_blocks=2000)
    assert row.num_workers == 40
    assert 1000 < row.num_blocks <= 2000, "some are held by two"
    assert [choices.what for choices in row.choices] == [
        "nothing held",
        "system prompt held",
        "all but the last block held",
    ]
    assert all(0 < choices.p50 <= choices.p99 for choices in row.choices)
    assert len(list(table([(4, 200)]))) == 2 + 3
