"""From tokens to what the client reads: text without half characters, cut at stop strings.

A model without a tokenizer gives tokens alone; stop strings are refused for it before.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.stream_decoder import StopStrings, StreamDecoder
from engine.tokenizer import Tokenizer
from protos import inference_pb2, worker_pb2
from router.job import Chunk, Ending

_REASONS = {
    worker_pb2.ENGINE_FINISH_EOS: inference_pb2.FINISH_REASON_EOS,
    worker_pb2.ENGINE_FINISH_STOP: inference_pb2.FINISH_REASON_STOP,
    worker_pb2.ENGINE_FINISH_LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class OutputStream:
    """The text side of one stream; lives through all attempts of its request."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], stops: Sequence[str]) -> None:
        self.num_tokens = 0
        """Tokens given out so far."""
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, prompt_token_ids)
        self._stops = StopStrings(stops) if stops else None

    def push(self, chunk: Chunk) -> tuple[inference_pb2.Tokens, Ending | None]:
        """The message for new tokens, and how the stream ends if it ends with them.

        Tokens after the one that completes a stop string are not given out.
        """
        text, ids, stop_string = self._text(chunk.token_ids)
        ending = None
        if stop_string is not None:
            ending = Ending(inference_pb2.FINISH_REASON_STOP, stop_string)
        elif chunk.finish:
            rest, stop_string = self._rest()
            text += rest
            reason = inference_pb2.FINISH_REASON_STOP if stop_string else _REASONS[chunk.finish]
            ending = Ending(reason, stop_string or "")
        self.num_tokens += len(ids)
        message = inference_pb2.Tokens(offset=chunk.offset, token_ids=ids, text=text)
        if chunk.logprobs:
            message.logprobs.extend(chunk.logprobs[: len(ids)])
        return message, ending

    def _text(self, ids: list[int]) -> tuple[str, list[int], str | None]:
        """Text to give out, the tokens that were used, and the stop string if one was met."""
        if self._decoder is None:
            return "", ids, None
        if self._stops is None:
            return self._decoder.push(ids), ids, None
        text = ""
        for index, token_id in enumerate(ids):
            emitted, matched = self._stops.push(self._decoder.push([token_id]))
            text += emitted
            if matched is not None:
                return text, ids[: index + 1], matched
        return text, ids, None

    def _rest(self) -> tuple[str, str | None]:
        """What was held back, at the end of the stream."""
        if self._decoder is None:
            return "", None
        tail = self._decoder.flush()
        if self._stops is None:
            return tail, None
        text, matched = self._stops.push(tail)
        return (text, matched) if matched is not None else (text + self._stops.flush(), None)
