"""Writes tiny random checkpoints, in the files and with the names that transformers gives them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 400
MAX_MODEL_LEN = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Paris is the capital of France; Rome is the capital of Italy; Madrid is the capital of Spain.",
    "def add(first, second):\n    return first + second\n",
    "Ein kleiner Satz über Bücher, Öfen und Äpfel. Une phrase française, naïve et déjà vue.",
    "In 1984 there were 365 days, 52 weeks and 12 months.",
)


class CheckpointFamily(enum.Enum):
    """The kinds of model that the engine must serve."""

    LLAMA = "llama"
    LLAMA3_ROPE = "llama3_rope"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


def make_checkpoint(
    directory: Path,
    family: CheckpointFamily,
    *,
    tied: bool,
    seed: int = 0,
    sharded: bool = False,
    num_kv_heads: int = 2,
) -> Path:
    """Write config.json, safetensors, tokenizer and chat template into `directory`, and return it.

    Norms and biases are random too, so that a forward pass that forgets one of them is found out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family, tied, num_kv_heads)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = [SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")]
    model.save_pretrained(directory, max_shard_size="100KB" if sharded else "1GB")
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer learnt from SENTENCES, with a chat template, as transformers wraps it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _model(family: CheckpointFamily, tied: bool, num_kv_heads: int) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    match family:
        case CheckpointFamily.LLAMA:
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        case CheckpointFamily.LLAMA3_ROPE:
            rope = {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=rope))
        case CheckpointFamily.MISTRAL:
            return transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=None))
        case CheckpointFamily.QWEN2:
            return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
        case CheckpointFamily.QWEN3:
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=32))
