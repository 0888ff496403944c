"""Where the kernels' tests run: on a GPU if there is one, else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter")
language = pytest.importorskip("triton.language")


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> Iterator[None]:
    """Two defects of Triton 3.6's interpreter.

    It takes int() of an array with one element, which numpy 2.4 refuses, and multiplies the bits of bfloat16 matrices.
    """
    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(builder, _widened(a), _widened(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", widened_dot)
        yield


def _widened(handle: Any) -> Any:
    """The same numbers in float32, if they are bfloat16."""
    if handle.dtype != language.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, language.float32)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind
