"""What a configuration refuses."""

from __future__ import annotations

import pytest

from router.config import RouterConfig


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"port": 70000}, "port must be between"),
        ({"policy": "fastest"}, "one of round_robin, least_loaded, kv_aware"),
        ({"tls_cert": "c"}, "together"),
        ({"max_attempts": 0}, "max_attempts must be at least 1"),
        ({"max_queued": -1}, "max_queued must be at least 0"),
        ({"reserve_timeout_s": 0.0}, "reserve_timeout_s must be more than 0"),
        ({"default_deadline_s": float("nan")}, "default_deadline_s must be more than 0"),
        ({"heartbeat_s": 3.0}, "heartbeat_s"),
    ],
)
def test_config_refuses(setting: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RouterConfig(**setting)  # type: ignore[arg-type]
