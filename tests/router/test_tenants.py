from pathlib import Path

import pytest

from router.errors import InvalidArgumentError, RouterStartError
from router.tenant_config import TenantConfig, problem_of
from router.tenants import Tenants


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_a_key_tells_the_tenant_and_the_call_cannot(tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("alpha team-a\n\n  beta\n")
    tenants = Tenants.load(str(keys))
    assert tenants.of(bearer("alpha")) == "team-a"
    assert tenants.of((*bearer("beta"), ("pdserve-tenant", "team-a"))) == "default"
    assert tenants.knows_key(bearer("alpha"))
    assert not tenants.knows_key(bearer("team-a"))
    assert not tenants.knows_key(bearer("alpha team-a"))
    assert not tenants.knows_key((("authorization", "Basic alpha"),))
    assert not tenants.knows_key(None)


def test_without_keys_a_call_names_its_tenant():
    tenants = Tenants.load(None)
    assert tenants.of(None) == "default"
    assert tenants.of((("pdserve-tenant", "team-b"),)) == "team-b"


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "bell\x07"])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(InvalidArgumentError, match="pdserve-tenant must have"):
        Tenants().of((("pdserve-tenant", name),))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("secret-key a b\n", "line 1: 3 words"),
        ("k\nsecret-key " + "x" * 65, "line 2: the tenant's name must have 1 to 64 characters, got 65"),
        ("\n \n", "has no keys"),
    ],
)
def test_a_file_that_is_wrong_is_told_without_its_keys(tmp_path: Path, text: str, told: str):
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(RouterStartError, match=told) as caught:
        Tenants.load(str(keys))
    assert "secret-key" not in str(caught.value)


def test_what_a_tenant_may_have_is_checked():
    assert problem_of("team-a") == ""
    with pytest.raises(ValueError, match=r"weight must be between 0.001 and 1000, got 0"):
        TenantConfig(weight=0.0)
    with pytest.raises(ValueError, match="max_queued must be at least 0"):
        TenantConfig(max_queued=-1)
