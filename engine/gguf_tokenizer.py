"""Builds a tokenizer from the vocabulary in a GGUF header.

Two kinds: byte-level BPE (`gpt2`: SmolLM2, Llama 3, Qwen) and SentencePiece-style BPE (`llama`: Llama 2,
Mistral). What the header leaves open is decided as transformers decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import BrokenModelError, UnsupportedModelError

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"

# How text is cut into words before merging: published with each model, in the syntax of the `tokenizers` package.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = None  # the byte-level pre-tokenizer's own
_WORDS = {
    "default": _GPT2_WORDS,
    "gpt-2": _GPT2_WORDS,
    "smollm": _GPT2_WORDS,
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "smaug-bpe": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "tekken": _TEKKEN_WORDS,
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF header describes, without beginning or end tokens added to a text.

    Raises UnsupportedModelError for a kind of tokenizer not named above, BrokenModelError for a header without one.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise BrokenModelError("the GGUF header has no vocabulary (tokenizer.ggml.tokens)")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, metadata)
    elif kind == "llama":
        tokenizer = _sentence_piece(tokens, metadata)
    else:
        raise UnsupportedModelError(f"the GGUF tokenizer {kind!r} is not supported; supported are gpt2 and llama")
    _add_marked_tokens(tokenizer, tokens, metadata)
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (as GPT-2 chose them)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return {**alphabet, **{byte: chr(256 + index) for index, byte in enumerate(others)}}


def _byte_level(tokens: list[str], metadata: Mapping[str, Any]) -> Tokenizer:
    words_name = metadata.get("tokenizer.ggml.pre", "default")
    if words_name not in _WORDS:
        raise UnsupportedModelError(
            f"the GGUF pre-tokenizer {words_name!r} is not supported; supported are {', '.join(_WORDS)}"
        )
    alphabet = byte_alphabet()
    spelled = set(alphabet.values())
    vocabulary = {
        token if spelled.issuperset(token) else "".join(alphabet[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_stated_merges(metadata)))
    words = _WORDS[words_name]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = (
        byte_level
        if words is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior="isolated"), byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(tokens: list[str], metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _stated_merges(metadata) if "tokenizer.ggml.merges" in metadata else _implied_merges(vocabulary, metadata)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    set_sentence_piece_rules(tokenizer, "first" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never")
    return tokenizer


def set_sentence_piece_rules(tokenizer: Tokenizer, prepend: str) -> None:
    """Cut and join text as a Llama vocabulary wants it, with ▁ for a space.

    `prepend`: where a ▁ is put before text that does not begin with one: `first` (at the beginning), `always`
    (after each special token too) or `never`.
    """
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=prepend, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if prepend == "never" else [decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence([*steps, *strip])


def _stated_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise BrokenModelError(f"the GGUF header has the merge {merge!r}, expected two pieces with a space between")
        merges.append((left, right))
    return merges


def _implied_merges(vocabulary: Mapping[str, int], metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges, only scores: every way to cut a token into two tokens, best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(vocabulary):
        raise BrokenModelError("the GGUF header has neither merges nor a score for each token")
    ranked = []
    for token, index in vocabulary.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(scores[index], len(left), len(right), left, right) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _add_marked_tokens(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Keep control tokens (special) and the maker's own tokens (plain) whole wherever they stand in a text."""
    known = tokenizer.get_vocab()
    marked = zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False)
    own = [(token, kind) for token, kind in marked if kind in (_CONTROL, _USER_DEFINED) and token in known]
    control = [AddedToken(token, normalized=False, special=True) for token, kind in own if kind == _CONTROL]
    plain = [AddedToken(token, normalized=False, special=False) for token, kind in own if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)
