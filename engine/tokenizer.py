"""Text to token ids and back, for the model's own tokenizer and chat template.

Built with the `tokenizers` package from a Hugging Face directory's tokenizer.json or from a GGUF header, so
that ids equal those of transformers' AutoTokenizer.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from engine.chat_template import ChatTemplate, Message
from engine.errors import BrokenModelError, InvalidRequestError, ModelError, ModelNotFoundError, UnsupportedModelError
from engine.gguf_file import GgufFile
from engine.gguf_tokenizer import build_tokenizer, set_sentence_piece_rules
from engine.model_source import ModelKind, ModelSource
from engine.models.config import gguf_eos_token_ids, hugging_face_special_ids, read_json
from engine.token_pieces import Pieces

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_GGUF_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Spelling(enum.Enum):
    """How the vocabulary writes text, which decides how tokens become text again."""

    BYTE_LEVEL = "byte_level"
    """Each character stands for one byte (GPT-2, Llama 3, Qwen)."""
    SENTENCE_PIECE = "sentence_piece"
    """▁ stands for a space, <0x..> for a byte (Llama 2)."""
    SENTENCE_PIECE_STRIPPED = "sentence_piece_stripped"
    """The same, and one space at the beginning of a text is dropped."""


class Tokenizer:
    """A model's tokenizer; what it does never changes, and threads may share it."""

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.spelling = _spelling(backend)
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.pieces = Pieces(backend, self.special_token_ids, byte_level=self.spelling is Spelling.BYTE_LEVEL)
        """What each token stands for; fills as tokens are met."""

    @classmethod
    def load(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer of the model at `source`; raises ModelError."""
        try:
            return _load_gguf(source.path) if source.kind is ModelKind.GGUF else _load_hugging_face(source.path)
        except ModelError:
            raise
        except Exception as error:  # the tokenizers package raises bare Exceptions
            raise BrokenModelError(f"the tokenizer of {source.path} is not usable: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return self._chat_template is not None

    @property
    def backend(self) -> Backend:
        """The `tokenizers` object underneath, to be read only."""
        return self._backend

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become those tokens, as in transformers.

        Raises InvalidRequestError for text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text is not valid Unicode: {error.reason}", field="text") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary stand for nothing."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text that the chat template makes of a conversation; raises InvalidRequestError."""
        if self._chat_template is None:
            raise InvalidRequestError("this model has no chat template: send text or token ids", field="chat")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; the template alone decides about begin-of-sequence tokens."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt), False)


def _spelling(backend: Backend) -> Spelling:
    """Raises UnsupportedModelError for a decoder that is not one of Spelling's."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    steps = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling.BYTE_LEVEL
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0]["content"] == " ":
        if kinds[3:] == []:
            return Spelling.SENTENCE_PIECE
        if kinds[3:] == ["Strip"] and (steps[3]["start"], steps[3]["stop"]) == (1, 0):
            return Spelling.SENTENCE_PIECE_STRIPPED
    raise UnsupportedModelError(
        f"the tokenizer's decoder {kinds} is not supported; supported are ByteLevel (as in Llama 3, Qwen) and "
        "Replace, ByteFallback, Fuse, Strip (as in Llama 2)"
    )


def _load_gguf(path: Path) -> Tokenizer:
    with GgufFile(path) as file:
        metadata = file.metadata
    backend = build_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    named: dict[str, str] = {}
    for name, key in _GGUF_IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise BrokenModelError(f"{path}: the {name} has the id {token_id}, but there are {len(tokens)} tokens")
            named[name] = tokens[token_id]
    _add_missing(backend, named.values())
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    _set_frame(backend, named, add_bos, metadata.get("tokenizer.ggml.add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        eos_token_ids=gguf_eos_token_ids(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        chat_template=ChatTemplate(template, named) if isinstance(template, str) else None,
    )


def _load_hugging_face(directory: Path) -> Tokenizer:
    """tokenizer.json alone decides about beginning and end tokens, as in transformers, whatever add_bos_token says."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{directory} has no tokenizer.json")
    backend = Backend.from_file(str(path))
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    named = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name)}
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = listed.values() if isinstance(listed, dict) else listed
    _add_missing(backend, [*named.values(), *(_content(token) for token in extra)])
    header = read_json(directory / "config.json")
    if header.get("model_type") == "llama" and settings.get("tokenizer_class") in _LLAMA_CLASSES:
        _follow_llama_class(backend, settings)
    eos_token_ids, bos_token_id = hugging_face_special_ids(directory, header)
    template = _hugging_face_template(directory, settings)
    return Tokenizer(
        backend,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        chat_template=None if template is None else ChatTemplate(template, named),
    )


def _follow_llama_class(backend: Backend, settings: Mapping[str, Any]) -> None:
    """The class named in tokenizer_config.json goes before the rules in tokenizer.json, as in transformers."""
    if _spelling(backend) is Spelling.BYTE_LEVEL:
        return
    if settings.get("add_prefix_space") is False:
        set_sentence_piece_rules(backend, "never")
    else:
        set_sentence_piece_rules(backend, "always" if settings.get("legacy") else "first")


def _hugging_face_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the setting: one template, or several of which `default` is taken."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _add_missing(backend: Backend, tokens: Iterable[str]) -> None:
    """Make the named tokens special that the tokenizer itself does not keep whole."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(tokens) if token not in present]
    backend.add_tokens([AddedToken(token, special=True) for token in missing])


def _set_frame(backend: Backend, named: Mapping[str, str], add_bos: bool, add_eos: bool) -> None:
    """Put the beginning and end tokens around each encoded text, or leave them away."""
    bos = [named["bos_token"]] if add_bos and "bos_token" in named else []
    eos = [named["eos_token"]] if add_eos and "eos_token" in named else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*bos, *eos])],
    )
