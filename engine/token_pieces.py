"""What each token of a vocabulary stands for, worked out when it is first met and kept for all streams."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from engine.gguf_tokenizer import byte_alphabet

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """One token."""

    data: bytes
    """Its bytes, where the vocabulary spells them: all of a byte-level token, one of a SentencePiece byte token."""
    text: str | None
    """What it reads as where no character before it is unfinished; None if it does not end a character itself."""


NOTHING = Piece(b"", "")
"""A token that stands for no text: special, or outside the vocabulary."""


class Pieces(dict[int, Piece]):
    """By token id; holds at most the vocabulary."""

    def __init__(self, backend: Backend, special_token_ids: Set[int], *, byte_level: bool) -> None:
        super().__init__()
        self._backend = backend
        self._special = special_token_ids
        self._make = _byte_level if byte_level else _sentence_piece

    def __missing__(self, token_id: int) -> Piece:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is None:
            return NOTHING
        piece = self[token_id] = self._make(token)
        return piece


_BYTES_OF = {character: byte for byte, character in byte_alphabet().items()}


def _byte_level(token: str) -> Piece:
    try:
        data = bytes([_BYTES_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        data = token.encode()
    try:
        return Piece(data, data.decode())
    except UnicodeDecodeError:
        return Piece(data, None)


def _sentence_piece(token: str) -> Piece:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte is not None:
        return Piece(bytes([int(byte[1], 16)]), None)
    return Piece(b"", token.replace("▁", " "))
