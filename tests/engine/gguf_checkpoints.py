"""Writes tiny GGUF models: the weights of a Hugging Face checkpoint with either kind of vocabulary."""

from __future__ import annotations

import enum
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engine.loader import _gguf_name
from engine.model_source import resolve
from engine.models.config import Family, ModelConfig
from tests.engine.checkpoints import CHAT_TEMPLATE, SENTENCES, VOCAB_SIZE

Quant = gguf.GGMLQuantizationType


class Vocabulary(enum.Enum):
    """Which kind of tokenizer the header describes."""

    BYTE_LEVEL = "gpt2"
    SENTENCE_PIECE = "llama"


def make_gguf(
    path: Path,
    checkpoint: Path,
    *,
    quant: Quant = Quant.F16,
    vocabulary: Vocabulary = Vocabulary.BYTE_LEVEL,
    pre: str = "default",
    rope_factors: tuple[float, ...] = (),
) -> Path:
    """Write the checkpoint's weights (unsharded) as llama.cpp keeps them; rows that `quant` cannot cut stay F16."""
    config = ModelConfig.load(resolve(str(checkpoint)))
    kind = config.family.value
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_model_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.family is Family.LLAMA:
        writer.add_rope_dimension_count(config.head_dim)
    _add_vocabulary(writer, checkpoint, vocabulary, pre)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        rows = _interleaved(name, weight, config).numpy()
        fitting = quant if rows.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0] == 0 else Quant.F16
        kept = Quant.F32 if rows.ndim == 1 else fitting
        writer.add_tensor(_gguf_name(name), gguf.quantize(rows, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(name: str, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Llama's query and key rows in llama.cpp's order: each row of the first half of a head before its partner."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or config.family is not Family.LLAMA:
        return weight.contiguous()
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, vocabulary: Vocabulary, pre: str) -> None:
    writer.add_tokenizer_model(vocabulary.value)
    writer.add_tokenizer_pre(pre)
    if vocabulary is Vocabulary.BYTE_LEVEL:
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
        special = {token["content"] for token in tokenizer["added_tokens"]}
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_add_bos_token(False)
    else:
        tokens, scores, types = sentence_piece_vocabulary()
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def sentence_piece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as a SentencePiece model has them: control, bytes, then learnt pieces."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 259, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    merged = ["".join(merge) for merge in learnt["merges"]]
    single = [token for token in learnt["vocab"] if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged))] + [-1e9] * len(single)
    types = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(single))]
    missing = VOCAB_SIZE - len(tokens)
    unused = [f"<unused{index}>" for index in range(missing)]
    return tokens + unused, scores + [-1e9] * missing, types + [5] * missing
