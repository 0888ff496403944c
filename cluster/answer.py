"""What a Generate stream has said so far, put together; and the same for a program to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from protos.inference_pb2 import (
    Accepted,
    Finished,
    FinishReason,
    GenerateEvent,
    PositionLogprobs,
    Timing,
    Usage,
)


@dataclass(slots=True)
class Answer:
    """Grows with each event; whole once `finished` is set."""

    accepted: Accepted = field(default_factory=Accepted)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: GenerateEvent) -> str:
        """Take an event in; returns the text it adds."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self.accepted = event.accepted
        elif kind == "finished":
            self.finished = event.finished
        elif kind == "tokens":
            self.text += event.tokens.text
            self.token_ids += event.tokens.token_ids
            self.logprobs += event.tokens.logprobs
            return event.tokens.text
        return ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for json.dumps: text, token ids, why it ended, usage, timing in seconds, workers."""
        finished = self.finished or Finished()
        document: dict[str, Any] = {
            "request_id": self.accepted.request_id,
            "model": self.accepted.model,
            "seed": self.accepted.seed,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": finish_reason_name(finished.reason),
            "stop_string": finished.stop_string or None,
            "usage": {name: getattr(finished.usage, name) for name in _field_names(Usage)},
            "timing": {name: getattr(finished.timing, name) for name in _field_names(Timing)},
            "prefill_worker": finished.prefill_worker,
            "decode_worker": finished.decode_worker,
            "route": finished.route or None,
        }
        if self.logprobs:
            document["logprobs"] = [_logprobs_json(position) for position in self.logprobs]
        return document


def finish_reason_name(reason: FinishReason) -> str:
    """`eos`, `stop`, `length`, `cancelled` or `unspecified`."""
    return FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _field_names(message: type[Usage] | type[Timing]) -> list[str]:
    return [each.name for each in message.DESCRIPTOR.fields]


def _logprobs_json(position: PositionLogprobs) -> dict[str, Any]:
    return {
        "token_id": position.chosen.token_id,
        "logprob": position.chosen.logprob,
        "top": [{"token_id": each.token_id, "logprob": each.logprob} for each in position.top],
    }
