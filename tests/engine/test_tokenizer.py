import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors

from engine.chat_template import Message
from engine.errors import BrokenModelError, InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from engine.gguf_tokenizer import build_tokenizer
from engine.model_source import ModelSource, resolve
from engine.tokenizer import Spelling, Tokenizer
from tests.engine.checkpoints import CHAT_TEMPLATE, CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.engine.gguf_checkpoints import sentence_piece_vocabulary
from tests.engine.texts import awkward_texts

CONVERSATIONS = [
    [Message("user", "hi <|im_end|> there")],
    [Message("system", "s"), Message("user", " u "), Message("assistant", "a"), Message("user", "2\n")],
    [Message("tool", "{}")],
]


def assert_equal_tokenizers(tokenizer: Tokenizer, oracle: Any, *, num_texts: int = 300) -> None:
    for text in awkward_texts(num_texts):
        token_ids = tokenizer.encode(text)
        assert token_ids == oracle(text)["input_ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == oracle.encode(text, add_special_tokens=False)
        assert_equal_texts(tokenizer, oracle, token_ids)
    chance = random.Random(1)
    for _ in range(num_texts):
        assert_equal_texts(tokenizer, oracle, chance.choices(range(tokenizer.vocab_size), k=chance.randrange(30)))
    for messages in CONVERSATIONS:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        for prompt in (True, False):
            text = oracle.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
            ids = oracle.apply_chat_template(plain, add_generation_prompt=prompt, return_dict=False)
            assert tokenizer.render_chat(messages, add_generation_prompt=prompt) == text
            assert tokenizer.encode_chat(messages, add_generation_prompt=prompt) == ids


def assert_equal_texts(tokenizer: Tokenizer, oracle: Any, token_ids: list[int]) -> None:
    for skip in (True, False):
        assert tokenizer.decode(token_ids, skip) == oracle.decode(token_ids, skip_special_tokens=skip)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return resolve(str(make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)))


def change(source: ModelSource, **changes: Any) -> None:
    path = source.path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_hugging_face_tokenizer_equals_that_of_transformers(source: ModelSource) -> None:
    tokenizer = Tokenizer.load(source)
    assert_equal_tokenizers(tokenizer, transformers.AutoTokenizer.from_pretrained(source.path))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((2, 0), 1)
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.spelling is Spelling.BYTE_LEVEL


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}},
        {"additional_special_tokens": ["fox", " the"]},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_settings_beside_the_tokenizer_count_as_in_transformers(source: ModelSource, changes: dict[str, Any]) -> None:
    change(source, **changes)
    oracle = transformers.AutoTokenizer.from_pretrained(source.path)
    assert_equal_tokenizers(Tokenizer.load(source), oracle, num_texts=50)


def test_a_beginning_token_in_tokenizer_json_is_added(source: ModelSource) -> None:
    path = source.path / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(path))
    tokenizer = Tokenizer.load(source)
    assert_equal_tokenizers(tokenizer, transformers.AutoTokenizer.from_pretrained(source.path), num_texts=20)
    assert tokenizer.encode("fox")[0] == 1
    assert tokenizer.encode("fox", add_special_tokens=False)[0] != 1


LLAMA_2_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@pytest.mark.parametrize("settings", [{}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}])
@pytest.mark.parametrize("normalizer", [None, LLAMA_2_NORMALIZER])
def test_a_llama_2_tokenizer_equals_that_of_transformers(
    source: ModelSource, settings: dict[str, Any], normalizer: normalizers.Normalizer | None
) -> None:
    tokens, scores, _ = sentence_piece_vocabulary()
    header = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    backend = build_tokenizer(header)
    if normalizer is not None:
        backend.normalizer, backend.pre_tokenizer = normalizer, None
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(source.path / "tokenizer.json"))
    change(source, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings)
    oracle = transformers.AutoTokenizer.from_pretrained(source.path)
    assert isinstance(oracle, transformers.LlamaTokenizer)
    assert_equal_tokenizers(Tokenizer.load(source), oracle, num_texts=100)


def test_the_demo_models_tokenizer_equals_that_of_transformers() -> None:
    source = demo_source()
    oracle = transformers.AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
    tokenizer = Tokenizer.load(source)
    assert_equal_tokenizers(tokenizer, oracle, num_texts=1000)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (49152, (2,), 1)


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, [{"name": "tools", "template": "?"}, {"name": "default", "template": "!"}]]
)
def test_older_places_of_the_chat_template_are_read(source: ModelSource, template: Any) -> None:
    (source.path / "chat_template.jinja").unlink()
    change(source, chat_template=template)
    oracle = transformers.AutoTokenizer.from_pretrained(source.path)
    text = oracle.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert Tokenizer.load(source).render_chat([Message("user", "x")], add_generation_prompt=False) == text


def test_without_a_chat_template_chats_are_refused(source: ModelSource) -> None:
    (source.path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.load(source)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([Message("user", "x")])


def test_a_lone_surrogate_is_refused(source: ModelSource) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode") as caught:
        Tokenizer.load(source).encode("a\ud800b")
    assert caught.value.field == "text"


def test_ids_outside_the_vocabulary_stand_for_nothing(source: ModelSource) -> None:
    tokenizer = Tokenizer.load(source)
    token_ids = tokenizer.encode("fox")
    assert tokenizer.decode([10**6, *token_ids, 4000]) == "fox"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(source: ModelSource, content: bytes) -> None:
    (source.path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BrokenModelError):
        Tokenizer.load(source)


def test_damaged_tokenizers_are_refused_or_work(source: ModelSource) -> None:
    path = source.path / "tokenizer.json"
    whole = path.read_bytes()
    chance = random.Random(3)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            Tokenizer.load(source)
        except (BrokenModelError, UnsupportedModelError):
            refused += 1
    assert refused > 20


def test_a_tokenizer_that_has_gone_is_not_found(source: ModelSource) -> None:
    (source.path / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError):
        Tokenizer.load(source)


def test_an_unknown_way_to_spell_text_is_refused_at_once(source: ModelSource) -> None:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.WordPiece()
    backend.save(str(source.path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        Tokenizer.load(source)
