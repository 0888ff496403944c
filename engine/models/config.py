"""What a model's header says about its shape: the only reader of a Hugging Face or GGUF header.

Families: Llama (SmolLM2, Llama 2 and 3, Mistral without a sliding window), Qwen2, Qwen3 (dense). All three
are pre-norm decoders with rotary positions, grouped-query attention and a SiLU-gated feed-forward.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import BrokenModelError, ModelNotFoundError, UnsupportedModelError
from engine.gguf_file import GgufFile
from engine.model_source import ModelKind, ModelSource

WeightDType = Literal["float32", "bfloat16", "float16"]


class Family(enum.Enum):
    """Which forward pass a model needs."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": Family.LLAMA,
    "MistralForCausalLM": Family.LLAMA,
    "Qwen2ForCausalLM": Family.QWEN2,
    "Qwen3ForCausalLM": Family.QWEN3,
}
_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_LIMITS = {
    "num_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_model_len": 1 << 28,
}


class RopeScalingKind(enum.Enum):
    """How rotary frequencies are stretched for contexts longer than those first trained on."""

    LINEAR = "linear"
    LLAMA3 = "llama3"
    FACTORS = "factors"


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """A stretch of the rotary frequencies; which fields count depends on `kind`."""

    kind: RopeScalingKind
    factor: float = 1.0
    """LINEAR and LLAMA3: frequencies (the low ones, for LLAMA3) are divided by this."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    """FACTORS (a GGUF's rope_freqs): each of the head_dim / 2 frequencies is divided by its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a model and the ids of the tokens that end its answers."""

    architecture: str
    """The Hugging Face class name: a key of SUPPORTED_ARCHITECTURES."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding: at least as many as the tokenizer has tokens."""
    max_model_len: int
    """Most tokens of prompt and answer the model was trained for."""
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    """The output projection is the embedding matrix; there is no lm_head.weight."""
    attention_bias: bool = False
    """The query, key and value projections have a bias."""
    output_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are RMS-normalised per head before the rotation."""
    dtype: WeightDType = "float32"
    """What the checkpoint was written in; bfloat16 for a quantised one."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must lie between 0 and 1, got {self.rms_norm_eps}")
        if not 1 <= self.rope_theta < 1e12:
            raise ValueError(f"rope_theta must be at least 1, got {self.rope_theta}")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"end-of-sequence token {token_id} is not in the vocabulary of {self.vocab_size}")

    @property
    def family(self) -> Family:
        """Which forward pass the model needs."""
        return SUPPORTED_ARCHITECTURES[self.architecture]

    @classmethod
    def load(cls, source: ModelSource) -> ModelConfig:
        """Read the header of the model at `source`.

        Raises UnsupportedModelError (an architecture or feature this engine lacks), BrokenModelError
        (a header that contradicts itself) or ModelNotFoundError.
        """
        try:
            if source.kind is ModelKind.GGUF:
                with GgufFile(source.path) as file:
                    return _from_gguf(file)
            return _from_hugging_face(source.path)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise BrokenModelError(f"the header of {source.path} is not usable: {error!r}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelNotFoundError or BrokenModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"there is no file {path}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenModelError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise BrokenModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BrokenModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _refuse_architecture(name: object) -> UnsupportedModelError:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    return UnsupportedModelError(f"the architecture {name!r} is not supported; supported are {supported}")


# ---- Hugging Face ----


def _from_hugging_face(directory: Path) -> ModelConfig:
    header = read_json(directory / "config.json")
    architecture = (header.get("architectures") or [header.get("model_type")])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise _refuse_architecture(architecture)
    family = SUPPORTED_ARCHITECTURES[architecture]
    _refuse_features(header, architecture)
    rope = _rope_parameters(header)
    llama_biases = family is not Family.QWEN2 and bool(header.get("attention_bias"))
    num_heads = header["num_attention_heads"]
    eos_token_ids, bos_token_id = hugging_face_special_ids(directory, header)
    return ModelConfig(
        architecture=architecture,
        num_layers=header["num_hidden_layers"],
        hidden_size=header["hidden_size"],
        intermediate_size=header["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=header.get("num_key_value_heads") or num_heads,
        head_dim=header.get("head_dim") or header["hidden_size"] // num_heads,
        vocab_size=header["vocab_size"],
        max_model_len=header["max_position_embeddings"],
        rms_norm_eps=float(header["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, header),
        tied_embeddings=bool(header.get("tie_word_embeddings", False)),
        attention_bias=family is Family.QWEN2 or llama_biases,
        output_bias=llama_biases,
        mlp_bias=bool(header.get("mlp_bias", False)),
        qk_norm=family is Family.QWEN3,
        dtype=_weight_dtype(header),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
    )


def _refuse_features(header: Mapping[str, Any], architecture: str) -> None:
    if header.get("quantization_config"):
        method = header["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(f"checkpoints quantised with {method!r} are not supported; use an unquantised one")
    activation = header.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{architecture} with the activation {activation!r} is not supported, only 'silu'")
    window = header.get("sliding_window")
    uses_window = header.get("use_sliding_window", architecture == "MistralForCausalLM")
    if window and uses_window and window < header["max_position_embeddings"]:
        raise UnsupportedModelError(f"{architecture} with a sliding window of {window} tokens is not supported")
    if header.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{architecture} with partial rotary positions is not supported")


def _rope_parameters(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings under the names of today's transformers, from either generation of config.json."""
    parameters = {"rope_theta": header.get("rope_theta", 10000.0)}
    parameters.update(header.get("rope_scaling") or {})
    parameters.update(header.get("rope_parameters") or {})
    return parameters


def _rope_scaling(rope: Mapping[str, Any], header: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=RopeScalingKind.LINEAR, factor=float(rope["factor"]))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", header["max_position_embeddings"])
        return RopeScaling(
            kind=RopeScalingKind.LLAMA3,
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(original),
        )
    raise UnsupportedModelError(f"the RoPE scaling {kind!r} is not supported; supported are default, linear, llama3")


def _weight_dtype(header: Mapping[str, Any]) -> WeightDType:
    dtype: WeightDType = header.get("dtype") or header.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(f"weights of type {dtype!r} are not supported; use float32, bfloat16 or float16")
    return dtype


def hugging_face_special_ids(directory: Path, header: Mapping[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """End-of-sequence ids and the begin-of-sequence id; generation_config.json goes before config.json."""
    generation = directory / "generation_config.json"
    merged = {**header, **(read_json(generation) if generation.is_file() else {})}
    eos = merged.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return tuple(int(token_id) for token_id in eos_ids), merged.get("bos_token_id")


# ---- GGUF ----


def _from_gguf(file: GgufFile) -> ModelConfig:
    metadata = file.metadata
    kind = metadata.get("general.architecture")
    if kind not in _GGUF_ARCHITECTURES:
        raise _refuse_architecture(kind)
    header = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    num_heads = header["attention.head_count"]
    head_dim = header.get("attention.key_length") or header["embedding_length"] // num_heads
    _refuse_gguf_features(header, kind, head_dim)
    vocab_size = header.get("vocab_size") or len(metadata["tokenizer.ggml.tokens"])
    return ModelConfig(
        architecture=_GGUF_ARCHITECTURES[kind],
        num_layers=header["block_count"],
        hidden_size=header["embedding_length"],
        intermediate_size=header["feed_forward_length"],
        num_heads=num_heads,
        num_kv_heads=header.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_model_len=header["context_length"],
        rms_norm_eps=header["attention.layer_norm_rms_epsilon"],
        rope_theta=header.get("rope.freq_base", 10000.0),
        rope_scaling=_gguf_rope_scaling(file, header, head_dim),
        tied_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm=kind == "qwen3",
        dtype=_gguf_dtype(file),
        eos_token_ids=gguf_eos_token_ids(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
    )


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: end of sequence, of turn, of message."""
    names = ("eos", "eot", "eom")
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _refuse_gguf_features(header: Mapping[str, Any], kind: str, head_dim: int) -> None:
    if header.get("expert_count"):
        raise UnsupportedModelError(f"{kind} with {header['expert_count']} experts is not supported, only dense models")
    window = header.get("attention.sliding_window")
    if window and window < header["context_length"]:
        raise UnsupportedModelError(f"{kind} with a sliding window of {window} tokens is not supported")
    if header.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{kind} with keys and values of different sizes is not supported")
    if header.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{kind} with partial rotary positions is not supported")


def _gguf_rope_scaling(file: GgufFile, header: Mapping[str, Any], head_dim: int) -> RopeScaling | None:
    kind = header.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"the RoPE scaling {kind!r} is not supported in a GGUF file")
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is not None:
        if tensor.shape != (head_dim // 2,):
            raise BrokenModelError(f"rope_freqs.weight must have {head_dim // 2} elements, got {tensor.shape}")
        factors = tuple(float(value) for chunk in file.rows(tensor) for value in chunk.ravel())
        return RopeScaling(kind=RopeScalingKind.FACTORS, factors=factors)
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 1.0))
    return RopeScaling(kind=RopeScalingKind.LINEAR, factor=factor) if kind == "linear" and factor != 1.0 else None


def _gguf_dtype(file: GgufFile) -> WeightDType:
    embedding = file.tensors.get("blk.0.attn_q.weight")
    names: dict[str, WeightDType] = {"F32": "float32", "F16": "float16"}
    return names.get(embedding.kind.name, "bfloat16") if embedding is not None else "bfloat16"
