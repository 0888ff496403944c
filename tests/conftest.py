"""Fixtures for all tests: tiny checkpoints, and the demo model where it has been fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.real_valkey import RealValkey

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton; see tests/engine/kernels


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[RealValkey]:
    """A Valkey server with a password, empty."""
    server = RealValkey(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few layers with a real tokenizer and chat template."""
    # transformers is not installed on every machine that runs some of the tests
    from tests.engine.checkpoints import CheckpointFamily, make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny-llama"), CheckpointFamily.LLAMA, tied=True)
