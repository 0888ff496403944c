"""The model that the figures speak of: the shapes of Llama-3.1-8B, whose weights are made up where they are needed."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@contextlib.contextmanager
def config_directory(path: Path | None) -> Iterator[Path]:
    """The directory given, or a temporary one that holds nothing but a config.json."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pdserve-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B, indent=2))
        yield Path(folder)
