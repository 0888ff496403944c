"""The one model this router serves: its name, limits, tokenizer, and what a prompt becomes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.chat_template import Message
from engine.config import ModelOptions
from engine.errors import InvalidRequestError
from engine.model_source import has_tokenizer, resolve
from engine.models.config import ModelConfig
from engine.tokenizer import Tokenizer
from protos import inference_pb2
from router.errors import InvalidArgumentError, ModelNotFoundError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Immutable once loaded."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and answer together."""
    tokenizer: Tokenizer | None
    """None for a model that takes and gives token ids only (dummy weights without a tokenizer.json)."""

    @classmethod
    def load(cls, options: ModelOptions) -> ServedModel:
        """Read the header and the tokenizer, never the weights; raises engine.errors.ModelError."""
        source = resolve(options.path, options.load_format)
        config = ModelConfig.load(source)
        return cls(
            name=options.name or source.name,
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            max_model_len=min(config.max_model_len, options.max_model_len or config.max_model_len),
            tokenizer=Tokenizer.load(source) if has_tokenizer(source) else None,
        )

    def check_name(self, asked: str) -> None:
        """ModelNotFoundError unless this model is meant; an empty name means it."""
        if asked and asked != self.name:
            raise ModelNotFoundError(f"there is no model {asked[:200]!r}; this cluster serves {self.name!r}")

    def needed_tokenizer(self, field: str) -> Tokenizer:
        """The tokenizer, for what `field` of a request asks; InvalidArgumentError where there is none."""
        if self.tokenizer is None:
            raise InvalidArgumentError(
                f"model {self.name} has no tokenizer: send the prompt as token_ids, without stop strings", field=field
            )
        return self.tokenizer

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text prompt."""
        if not text:
            raise InvalidArgumentError("the prompt is empty: text must have at least one character", field="text")
        try:
            return self.needed_tokenizer("text").encode(text)
        except InvalidRequestError as error:
            raise InvalidArgumentError(str(error), field=error.field) from error

    def render_chat(self, chat: inference_pb2.Chat) -> str:
        """What the chat template makes of a conversation."""
        messages = [Message(message.role, message.content) for message in chat.messages]
        try:
            return self.needed_tokenizer("chat").render_chat(messages)
        except InvalidRequestError as error:
            raise InvalidArgumentError(str(error), field=error.field) from error

    def encode_chat(self, chat: inference_pb2.Chat) -> list[int]:
        """Token ids of a conversation, ending where the answer begins."""
        return self.encode_rendered(self.render_chat(chat))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered conversation."""
        try:
            return self.needed_tokenizer("chat").encode(text, add_special_tokens=False)
        except InvalidRequestError as error:
            raise InvalidArgumentError(str(error), field="chat") from error
