"""What a resumable request has said so far, for whoever follows it.

The session that serves the request writes (it takes a Story for its client); a `Reader` takes everything that is new
since it last looked, so a client that lags gets fewer, longer messages and nobody waits for it.

States: OPEN -> FINISHED (its Finished is there) or FAILED (a status is).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from protos import inference_pb2
from router.errors import InvalidArgumentError, RouterError
from router.tenants import Metadata
from router.wakeup import Signal

Replay = Callable[[list[int]], int]
"""How many characters of the text come with these first tokens."""


class Story:
    """The events of one request; the session's client as far as the session knows."""

    def __init__(self, metadata: Metadata = None) -> None:
        """`metadata`: of the call that began it."""
        self._metadata = metadata
        self.accepted: inference_pb2.Accepted | None = None
        self.finished: inference_pb2.Finished | None = None
        self.failure: RouterError | None = None
        self.news = Signal()
        self._token_ids: list[int] = []
        self._logprobs: list[inference_pb2.PositionLogprobs] = []
        self._texts: list[str] = []
        self._token_ends: list[int] = [0]
        """Tokens, and characters, up to each message's end; with the place before the first one."""
        self._char_ends: list[int] = [0]

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.finished is not None or self.failure is not None

    def time_remaining(self) -> float | None:
        """No call's deadline bounds the request; only its own does."""
        return None

    def invocation_metadata(self) -> Metadata:
        """What the call that began it said beside its request."""
        return self._metadata

    async def write(self, event: inference_pb2.GenerateEvent) -> None:
        """Take the session's next event; never blocks."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self.accepted = event.accepted
        elif kind == "finished":
            self.finished = event.finished
        else:
            tokens = event.tokens
            self._token_ids += tokens.token_ids
            self._logprobs += tokens.logprobs
            self._texts.append(tokens.text)
            self._token_ends.append(len(self._token_ids))
            self._char_ends.append(self._char_ends[-1] + len(tokens.text))
        self.news.notify()

    def fail(self, error: RouterError) -> None:
        """The session ended in a status."""
        self.failure = error
        self.news.notify()

    def place_of(self, offset: int, replay: Replay) -> Place:
        """Where the token of that offset begins, once it is there."""
        index = bisect.bisect_left(self._token_ends, offset)
        if self._token_ends[index] == offset:
            return Place(offset, self._char_ends[index])
        return Place(offset, replay(self._token_ids[:offset]))

    def since(self, place: Place) -> inference_pb2.Tokens | None:
        """All that is new since a place, which moves on; None: nothing is."""
        num_tokens, num_chars = self._token_ends[-1], self._char_ends[-1]
        if place.num_tokens == num_tokens and place.num_chars == num_chars:
            return None
        first = bisect.bisect_right(self._char_ends, place.num_chars) - 1
        text = "".join(self._texts[first:])[place.num_chars - self._char_ends[first] :]
        tokens = inference_pb2.Tokens(
            offset=place.num_tokens,
            token_ids=self._token_ids[place.num_tokens :],
            text=text,
            logprobs=self._logprobs[place.num_tokens :],
        )
        place.num_tokens, place.num_chars = num_tokens, num_chars
        return tokens


@dataclass(slots=True)
class Place:
    """How far a reader is."""

    num_tokens: int
    num_chars: int


class Reader:
    """One client's way through a story."""

    def __init__(self, story: Story, next_offset: int, replay: Replay) -> None:
        """`next_offset`: the first token that is wanted."""
        self._story = story
        self._next_offset = next_offset
        self._replay = replay
        self._place: Place | None = None
        self._told: list[str] = []

    async def next_event(self, timeout_s: float) -> inference_pb2.GenerateEvent | None:
        """The next message; None after Finished. RouterError where the story ends in a status.

        Waits for news in turns of `timeout_s`; the call's own end bounds the whole wait.
        """
        story = self._story
        while True:
            seen = story.news.version
            event = self._take()
            if event is not None:
                return event
            if "finished" in self._told:
                return None
            if story.failure is not None:
                raise story.failure
            await story.news.wait(seen, timeout_s=timeout_s)

    def _take(self) -> inference_pb2.GenerateEvent | None:
        story = self._story
        if story.accepted is not None and "accepted" not in self._told:
            self._told.append("accepted")
            return inference_pb2.GenerateEvent(accepted=story.accepted)
        if "accepted" not in self._told:
            return None
        if self._place is None and story.num_tokens >= self._next_offset:
            self._place = story.place_of(self._next_offset, self._replay)
        if self._place is not None and (tokens := story.since(self._place)) is not None:
            return inference_pb2.GenerateEvent(tokens=tokens)
        if story.finished is not None and "finished" not in self._told:
            if self._place is None:
                raise InvalidArgumentError(
                    f"next_offset is {self._next_offset}, but the answer has {story.num_tokens} tokens",
                    field="next_offset",
                )
            self._told.append("finished")
            return inference_pb2.GenerateEvent(finished=story.finished)
        return None
