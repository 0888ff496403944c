from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import BrokenModelError, UnsupportedModelError
from engine.gguf_file import GgufFile
from engine.gguf_tokenizer import build_tokenizer, byte_alphabet
from engine.model_source import resolve
from engine.tokenizer import Spelling, Tokenizer
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.gguf_checkpoints import Vocabulary, make_gguf
from tests.engine.test_tokenizer import assert_equal_tokenizers


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_a_byte_level_vocabulary_cuts_as_transformers_does(tmp_path: Path, checkpoint: Path, pre: str) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, pre=pre)
    tokenizer = Tokenizer.load(resolve(str(path)))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert_equal_tokenizers(tokenizer, oracle)
    assert tokenizer.spelling is Spelling.BYTE_LEVEL


def test_a_sentence_piece_vocabulary_cuts_as_transformers_does(tmp_path: Path, checkpoint: Path) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, vocabulary=Vocabulary.SENTENCE_PIECE)
    tokenizer = Tokenizer.load(resolve(str(path)))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert_equal_tokenizers(tokenizer, oracle)
    assert tokenizer.spelling is Spelling.SENTENCE_PIECE_STRIPPED
    assert tokenizer.encode("fox")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)


def test_a_ggufs_tokenizer_equals_that_of_its_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(checkpoint)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint)
    assert_equal_tokenizers(Tokenizer.load(resolve(str(path))), oracle)


def test_the_byte_alphabet_has_a_printable_character_for_each_byte() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert (alphabet[ord("a")], alphabet[ord(" ")], alphabet[ord("\n")]) == ("a", "Ġ", "Ċ")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "'bert' is not supported; supported are gpt2"),
        ({"tokenizer.ggml.pre": "chameleon"}, UnsupportedModelError, "'chameleon' is not supported; supported are"),
        ({"tokenizer.ggml.tokens": None}, BrokenModelError, "no vocabulary"),
        ({"tokenizer.ggml.tokens": [1, 2]}, BrokenModelError, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["ab"]}, BrokenModelError, "merge 'ab'"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, BrokenModelError, "neither merges"),
    ],
)
def test_a_header_without_a_usable_vocabulary_is_refused(
    tmp_path: Path, checkpoint: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with GgufFile(make_gguf(tmp_path / "tiny.gguf", checkpoint)) as file:
        metadata = file.metadata | changes
    with pytest.raises(error, match=message):
        build_tokenizer({key: value for key, value in metadata.items() if value is not None})
