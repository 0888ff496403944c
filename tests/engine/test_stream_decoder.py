from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.model_source import resolve
from engine.stream_decoder import MAX_STOP_CHARS, MAX_STOPS, StopStrings, StreamDecoder
from engine.tokenizer import Spelling, Tokenizer
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.gguf_checkpoints import Vocabulary, make_gguf
from tests.engine.texts import awkward_texts

NUM_TOKENS = 403
"""A few ids beyond the vocabulary of the test models, which stand for nothing."""


@pytest.fixture(scope="module", params=Vocabulary)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("model")
    checkpoint = make_checkpoint(folder / "hf", CheckpointFamily.LLAMA, tied=True)
    return Tokenizer.load(resolve(str(make_gguf(folder / "tiny.gguf", checkpoint, vocabulary=request.param))))


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=4), max_size=12))
def test_pieces_of_any_tokens_make_up_the_decoded_whole(tokenizer: Tokenizer, steps: list[list[int]]) -> None:
    decoder = StreamDecoder(tokenizer)
    text = "".join(decoder.push(step) for step in steps) + decoder.flush()
    assert text == tokenizer.decode([token_id for step in steps for token_id in step])


def test_no_piece_of_a_real_text_has_half_a_character(tokenizer: Tokenizer) -> None:
    for text in awkward_texts(200):
        clean = text.replace("\ufffd", "?")
        token_ids = tokenizer.encode(clean)
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push([token_id]) for token_id in token_ids]
        pieces.append(decoder.flush())
        assert "\ufffd" not in "".join(pieces), text
        assert "".join(pieces) == tokenizer.decode(token_ids)


def test_text_comes_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    token_ids = tokenizer.encode("fox jumps", add_special_tokens=False)
    for length in range(1, len(token_ids) + 1):
        decoder.push([token_ids[length - 1]])
        fresh = StreamDecoder(tokenizer)
        assert fresh.push(token_ids[:length]) == tokenizer.decode(token_ids[:length])


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab é🙂.\n", min_size=2, max_size=12), cut=st.integers(1, 40))
def test_an_answer_goes_on_where_the_prompt_ends(tokenizer: Tokenizer, text: str, cut: int) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    prompt, answer = token_ids[:cut], token_ids[cut:]
    decoder = StreamDecoder(tokenizer, prompt)
    piece = decoder.push(answer) + decoder.flush()
    assert whole_characters(tokenizer, prompt) + piece == tokenizer.decode(token_ids)


def whole_characters(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of tokens without a last character that is not complete."""
    if tokenizer.spelling is not Spelling.BYTE_LEVEL:  # one bad byte spoils a whole run of byte tokens
        while tokenizer.decode(token_ids).endswith("\ufffd"):
            token_ids = token_ids[:-1]
    return tokenizer.decode(token_ids).rstrip("\ufffd")


def test_an_answer_that_is_a_text_of_its_own_has_no_leading_space(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, vocabulary=Vocabulary.SENTENCE_PIECE)
    tokenizer = Tokenizer.load(resolve(str(path)))
    first, second = tokenizer.encode("fox", False), tokenizer.encode("dog", False)
    assert StreamDecoder(tokenizer).push(second) == "dog"
    assert StreamDecoder(tokenizer, [1]).push(second) == "dog"
    assert StreamDecoder(tokenizer, first).push(second) == " dog"


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        emitted, match = watcher.push(piece)
        text += emitted
        if match is not None:
            assert watcher.push("more") == ("", match)
            assert watcher.flush() == ""
            return text, match
    return text + watcher.flush(), None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            match = max(complete, key=len)
            return text[: end - len(match)], match
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=5),
    pieces=st.lists(st.text(alphabet="abcd", max_size=6), max_size=10),
)
def test_the_first_complete_stop_string_counts_however_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@settings(deadline=None)
@given(
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    text=st.text(alphabet="abc", max_size=20),
)
def test_only_what_may_begin_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    watcher = StopStrings(stops)
    emitted, match = watcher.push(text)
    if match is None:
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        held = max((text[start:] for start in range(len(text) + 1) if text[start:] in beginnings), key=len)
        assert emitted + held == text
        assert watcher.flush() == held


def test_a_stop_string_may_span_many_pieces() -> None:
    assert run(["\n\nUser:"], list("Hi\n\nUser: x")) == ("Hi", "\n\nUser:")
    assert run(["🙂🙂"], ["a🙂", "b🙂", "🙂c"]) == ("a🙂b", "🙂🙂")


@pytest.mark.parametrize("stops", [[""], ["x" * (MAX_STOP_CHARS + 1)], ["x"] * (MAX_STOPS + 1), ["x"] * 10**6])
def test_stop_strings_over_the_limits_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StopStrings(stops)
    assert caught.value.field == "stop"


def test_the_most_that_is_allowed_works_on_a_long_text() -> None:
    stops = [chr(65 + index) + "a" * (MAX_STOP_CHARS - 1) for index in range(MAX_STOPS)]
    watcher = StopStrings(stops)
    text = ("A" + "a" * (MAX_STOP_CHARS - 2)) * 1000
    emitted, match = watcher.push(text)
    assert match is None
    assert emitted + watcher.flush() == text
    assert watcher.push(stops[7]) == ("", stops[7])
