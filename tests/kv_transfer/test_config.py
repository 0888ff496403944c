from __future__ import annotations

from typing import get_args

import pytest

from kv_transfer.config import EXPECTED_GB_S, TransferConfig, TransportName


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ticket_lease_s": 0}, "ticket_lease_s must be above 0"),
        ({"settle_timeout_s": float("nan")}, "settle_timeout_s must be above 0"),
        ({"heartbeat_s": 1.5, "peer_timeout_s": 2.0}, "heartbeat_s"),
        ({"piece_mib": 0}, "piece_mib must be at least 1"),
        ({"piece_mib": 40, "staging_mib": 79}, "at least two pieces"),
        ({"piece_mib": 4, "staging_mib": 7}, r"staging_mib \(7\) must hold at least two pieces of piece_mib \(4\)"),
        ({"staging_mib": 0}, "staging_mib must be at least 1"),
        ({"max_ctas": 0}, "max_ctas must be at least 1"),
        ({"max_pairs": 0}, "max_pairs must be at least 1"),
        ({"digest_share": 0}, "digest_share must be above 0"),
        ({"digest_share": 1.5}, "digest_share must be above 0 and at most 1"),
        ({"expected_gb_s": 0}, "expected_gb_s must be above 0"),
        ({"host": ""}, "address of one interface"),
        ({"host": "0.0.0.0"}, "address of one interface"),
        ({"host": "::"}, "address of one interface"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferConfig(**fields)


def test_every_transport_has_an_expected_rate() -> None:
    assert set(EXPECTED_GB_S) == set(get_args(TransportName)) - {"auto"}
