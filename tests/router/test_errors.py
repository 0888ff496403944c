"""Errors as clients see them."""

from __future__ import annotations

import grpc

from router.errors import MAX_DETAIL_CHARS, InvalidArgumentError, RouterError


def test_long_messages_fit_into_a_header() -> None:
    error = InvalidArgumentError("x" * 100_000, field="text")
    assert len(error.message) == MAX_DETAIL_CHARS
    assert sum(len(value) for _, value in error.trailing_metadata()) < 4096
    assert RouterError("plain").trailing_metadata() == ()
    assert RouterError.code is grpc.StatusCode.INTERNAL
