"""What the table of conversations says."""

from benchmarks.multi_turn import POLICIES, Figures, table
from cluster.load_report import Spread
from router.config import RouterConfig


def test_a_row_for_each_policy():
    figures = Figures(12.0, 4000, 900, 300, Spread.of([0.1, 0.2, 0.3]), Spread.of([0.01]))
    lines = table({"kv_aware": figures, "round_robin": figures}).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| kv_aware | 12.0 | 4,000 | 900 | 300 | 200.0 / 298.0 | 10.0 / 10.0 |"


def test_the_policies_are_the_routers():
    for settings in POLICIES.values():
        plain = {name: value for name, value in settings.items() if name != "local_prefill"}
        assert RouterConfig(**plain).policy == settings["policy"]
