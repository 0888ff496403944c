"""What a reader of a story hears, wherever it begins and whenever it looks."""

from __future__ import annotations

import pytest

from protos import inference_pb2 as pb
from router.errors import InvalidArgumentError, RequestMovedError
from router.story import Reader, Story
from tests.router.harness import run

TEXTS = ["Hel", "", "lo", ", wörld", "!"]


async def told(num_messages: int, *, finished: bool) -> Story:
    """A story of one token a message, each with the text of its place."""
    story = Story()
    await story.write(pb.GenerateEvent(accepted=pb.Accepted(request_id="r")))
    for index, text in enumerate(TEXTS[:num_messages]):
        await story.write(pb.GenerateEvent(tokens=pb.Tokens(offset=index, token_ids=[index], text=text)))
    if finished:
        await story.write(pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_EOS)))
    return story


def no_replay(token_ids: list[int]) -> int:
    raise AssertionError(f"{len(token_ids)} tokens are at the end of a message")


async def rest_of(reader: Reader) -> tuple[list[int], str, int]:
    """All tokens and text until the end, and the number of messages that had them."""
    tokens: list[int] = []
    text, num = "", 0
    while (event := await reader.next_event(1.0)) is not None:
        if event.WhichOneof("event") == "tokens":
            assert event.tokens.offset == (tokens[-1] + 1 if tokens else event.tokens.offset)
            tokens += event.tokens.token_ids
            text += event.tokens.text
            num += 1
    return tokens, text, num


@pytest.mark.parametrize("offset", range(len(TEXTS) + 1))
def test_a_reader_begins_where_it_wants(offset: int) -> None:
    async def scenario() -> None:
        tokens, text, num = await rest_of(Reader(await told(5, finished=True), offset, no_replay))
        assert tokens == list(range(offset, 5))
        assert text == "".join(TEXTS[offset:])
        assert num == (1 if offset < 5 else 0), "what is there comes in one message"

    run(scenario())


def test_in_the_middle_of_a_message_the_text_is_replayed() -> None:
    async def scenario() -> None:
        story = Story()
        await story.write(pb.GenerateEvent(accepted=pb.Accepted()))
        tokens = pb.Tokens(token_ids=[0, 1, 2, 3, 4], text="".join(TEXTS))
        await story.write(pb.GenerateEvent(tokens=tokens))
        await story.write(pb.GenerateEvent(finished=pb.Finished()))
        reader = Reader(story, 3, lambda first: len("".join(TEXTS[: len(first)])))
        assert await rest_of(reader) == ([3, 4], "".join(TEXTS[3:]), 1)

    run(scenario())


def test_a_reader_that_comes_early_hears_of_everything_later() -> None:
    async def scenario() -> None:
        story = await told(2, finished=False)
        reader = Reader(story, 0, no_replay)
        assert (await reader.next_event(1.0)).accepted.request_id == "r"
        assert list((await reader.next_event(1.0)).tokens.token_ids) == [0, 1]
        await story.write(pb.GenerateEvent(tokens=pb.Tokens(offset=2, token_ids=[2], text="x")))
        assert (await reader.next_event(1.0)).tokens.text == "x"
        story.fail(RequestMovedError("elsewhere"))
        with pytest.raises(RequestMovedError):
            await reader.next_event(1.0)

    run(scenario())


def test_an_offset_behind_the_end_is_refused() -> None:
    async def scenario() -> None:
        reader = Reader(await told(5, finished=True), 6, no_replay)
        await reader.next_event(1.0)
        with pytest.raises(InvalidArgumentError, match="has 5 tokens") as caught:
            await reader.next_event(1.0)
        assert caught.value.field == "next_offset"

    run(scenario())
