"""The demo model, for tests that need a real one."""

from __future__ import annotations

import pytest

from engine.errors import ModelNotFoundError
from engine.model_source import ModelSource, resolve


def demo_source() -> ModelSource:
    """The demo model in the user's cache; the test that asks is skipped where it has not been fetched."""
    try:
        return resolve("demo")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
