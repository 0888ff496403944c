from __future__ import annotations

import pytest

from kv_transfer.config import TransferConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ticket_lease_s": 0}, "ticket_lease_s must be above 0"),
        ({"settle_timeout_s": float("nan")}, "settle_timeout_s must be above 0"),
        ({"heartbeat_s": 1.5, "peer_timeout_s": 2.0}, "heartbeat_s"),
        ({"piece_mib": 0}, "piece_mib must be at least 1"),
        ({"piece_mib": 40}, "at least two pieces"),
        ({"host": ""}, "address of one interface"),
        ({"host": "0.0.0.0"}, "address of one interface"),
        ({"host": "::"}, "address of one interface"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferConfig(**fields)


def test_auto_stands_for_gloo_with_digests() -> None:
    assert TransferConfig().transport_name == "gloo"
    assert TransferConfig().digest_name == "xxh3-64"
    assert TransferConfig(digest="none").digest_name == "none"
