"""Turns a growing list of token ids into text that may be sent as it comes, and finds stop strings in it.

`StreamDecoder` holds back the bytes of a character that is not complete; all it emits, put together, equals
`Tokenizer.decode` of all the tokens. Per token it looks only at that token.

`StopStrings` holds back text only while it could be the beginning of a stop string. It is the automaton of
Aho and Corasick (CACM 18(6), 1975), so its work per character does not grow with the number of stops.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import InvalidRequestError
from engine.token_pieces import NOTHING, Piece
from engine.tokenizer import Spelling, Tokenizer

MAX_STOPS = 32
MAX_STOP_CHARS = 256
TAIL_TOKENS = 16


class StreamDecoder:
    """The text of one answer, a few tokens at a time.

    The answer's first token may depend on the end of the prompt: SentencePiece drops one leading space at the very
    beginning of a text only, and a prompt of token ids may end in the middle of a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        """`prompt_token_ids`: the prompt or its tail; without it the answer is decoded as a text of its own."""
        self._pieces = pieces = tokenizer.pieces
        self._text = _text_of(tokenizer.spelling)
        tail = [pieces[token_id] for token_id in prompt_token_ids[-TAIL_TOKENS:]]
        if any(piece is not NOTHING for piece in tail):
            self._text.follow(tail)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        pieces = self._pieces
        return self._text.push([pieces[token_id] for token_id in token_ids])

    def flush(self) -> str:
        """What is left at the end: a replacement character for each piece of an unfinished character."""
        return self._text.flush()


class _Text(Protocol):
    """Collects what tokens stand for and gives out text."""

    def follow(self, pieces: Sequence[Piece]) -> None:
        """Start behind these tokens, whose text has been seen."""

    def push(self, pieces: Sequence[Piece]) -> str:
        """The text these tokens complete."""

    def flush(self) -> str:
        """The rest."""


def _text_of(spelling: Spelling) -> _Text:
    match spelling:
        case Spelling.BYTE_LEVEL:
            return _ByteLevel()
        case Spelling.SENTENCE_PIECE:
            return _SentencePiece(strip=False)
        case Spelling.SENTENCE_PIECE_STRIPPED:
            return _SentencePiece(strip=True)


class _ByteLevel:
    """Tokens are bytes; the bytes are UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole = True
        """Whether no character is unfinished: then most tokens read as they do alone."""

    def follow(self, pieces: Sequence[Piece]) -> None:
        self.push(pieces)

    def push(self, pieces: Sequence[Piece]) -> str:
        if self._is_whole and len(pieces) == 1 and (text := pieces[0].text) is not None:
            return text
        text = self._utf8.decode(b"".join([piece.data for piece in pieces]))
        self._is_whole = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        self._is_whole = True
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """A token is text, or one byte. A run of byte tokens is decoded when it ends."""

    def __init__(self, *, strip: bool) -> None:
        self._strip = strip
        self._run = bytearray()

    def follow(self, pieces: Sequence[Piece]) -> None:
        self.push(pieces)
        self._strip = False
        self._run = self._run[_complete_bytes(self._run) :]

    def push(self, pieces: Sequence[Piece]) -> str:
        texts = []
        for piece in pieces:
            if piece.text is None:
                self._run += piece.data
            elif piece is not NOTHING:
                texts += [self._end_run(), piece.text]
        return self._without_first_space("".join(texts))

    def flush(self) -> str:
        return self._without_first_space(self._end_run())

    def _end_run(self) -> str:
        """The run's text; if any of it is not UTF-8, one replacement character for each byte."""
        if not self._run:
            return ""
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _without_first_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _complete_bytes(run: bytes | bytearray) -> int:
    """How many of these bytes are whole characters (or can never be one)."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(bytes(run))
    return len(run) - len(utf8.getstate()[0])


@dataclass(slots=True)
class _State:
    """What has been matched so far: the longest end of the text that begins some stop string."""

    depth: int
    follow: dict[str, _State] = field(default_factory=dict)
    fallback: _State | None = None
    """The next shorter end that begins some stop string; None for the empty one."""
    match: str | None = None
    """The longest stop string that ends here."""


class StopStrings:
    """Watches a stream of text for the first place where a stop string is complete.

    Of several that are complete at the same character, the longest counts. The answer does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InvalidRequestError for an empty stop string, too many, or too long ones."""
        if len(stops) > MAX_STOPS:
            raise InvalidRequestError(f"at most {MAX_STOPS} stop strings are allowed, got {len(stops)}", field="stop")
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"a stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}", field="stop"
                )
        self._root = _automaton(stops)
        self._state = self._root
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is now certain to come before any stop string, and the stop string once it is met.

        After a match nothing more comes out.
        """
        if self._matched is not None:
            return "", self._matched
        state = self._state
        for index, character in enumerate(text):
            while state.fallback is not None and character not in state.follow:
                state = state.fallback
            state = state.follow.get(character, self._root)
            if state.match is not None:
                self._matched = state.match
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(state.match)], state.match
        self._state = state
        seen = self._held + text
        certain = len(seen) - state.depth
        self._held = seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        """The text held back, when the stream ends without a stop string."""
        held, self._held = self._held, ""
        self._state = self._root
        return held


def _automaton(stops: Sequence[str]) -> _State:
    root = _State(depth=0)
    for stop in stops:
        state = root
        for character in stop:
            state = state.follow.setdefault(character, _State(depth=state.depth + 1))
        state.match = stop
    waiting = deque(root.follow.values())
    for state in waiting:
        state.fallback = root
    while waiting:
        state = waiting.popleft()
        for character, child in state.follow.items():
            shorter = state.fallback
            while shorter is not None and character not in shorter.follow:
                shorter = shorter.fallback
            child.fallback = root if shorter is None else shorter.follow[character]
            child.match = child.match or child.fallback.match
            waiting.append(child)
    return root
