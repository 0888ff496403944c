import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import BrokenModelError, ModelError, ModelNotFoundError, UnsupportedModelError
from engine.gguf_file import CHUNK_ELEMENTS, GgufFile

Quant = gguf.GGMLQuantizationType
QUANTISABLE = [
    *(Quant.F32, Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0),
    *(Quant.TQ1_0, Quant.TQ2_0),
]
BLOCKS_ONLY = [Quant.Q2_K, Quant.Q3_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K, Quant.IQ4_NL, Quant.IQ4_XS, Quant.IQ3_S]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Quant]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("name", "größe")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["a", "", "ß"])
    writer.add_float32("half", 0.5)
    writer.add_bool("yes", True)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(*, version: int = 3, num_tensors: int = 0, num_keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def read_all(file: GgufFile, name: str) -> np.ndarray:
    return np.concatenate(list(file.rows(file.tensors[name])))


def test_metadata_and_tensors_are_read(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with GgufFile(write(tmp_path / "a.gguf", {"cube": (data, Quant.F32)})) as file:
        wanted = {"name": "größe", "numbers": [1, -2, 3], "words": ["a", "", "ß"], "half": 0.5, "yes": True}
        assert {name: file.metadata[name] for name in wanted} == wanted
        assert file.tensors["cube"].shape == (2, 3, 4)
        assert np.array_equal(read_all(file, "cube"), data.reshape(6, 4))


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_a_tensor_of_many_chunks_is_dequantised_as_the_gguf_package_does(tmp_path: Path, kind: Quant) -> None:
    shape = (3 * CHUNK_ELEMENTS // 256 + 5, 256)
    data = gguf.quantize(np.random.default_rng(1).standard_normal(shape, dtype=np.float32), kind)
    with GgufFile(write(tmp_path / "a.gguf", {"w": (data, kind)})) as file:
        chunks = list(file.rows(file.tensors["w"]))
        assert len(chunks) == 4
        assert np.array_equal(np.concatenate(chunks), gguf.dequantize(data, kind))


@pytest.mark.parametrize("kind", BLOCKS_ONLY)
def test_types_that_can_only_be_read_are_dequantised(tmp_path: Path, kind: Quant) -> None:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(2).integers(0, 60, (20, 512 // block_elements * block_bytes), dtype=np.uint8)
    with GgufFile(write(tmp_path / "a.gguf", {"w": (data, kind)})) as file:
        assert np.array_equal(read_all(file, "w"), gguf.dequantize(data, kind), equal_nan=True)


def test_a_row_longer_than_a_chunk_is_read(tmp_path: Path) -> None:
    data = np.arange(2 * CHUNK_ELEMENTS + 64, dtype=np.float32).reshape(1, -1)
    with GgufFile(write(tmp_path / "a.gguf", {"w": (data, Quant.F32)})) as file:
        assert np.array_equal(read_all(file, "w"), data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (header(num_keys=2**60), "announces 1152921504606846976 metadata keys"),
        (header(num_tensors=2**40, body=bytes(100)), "announces 1099511627776 tensors"),
        (header(num_keys=1, body=key("k", 8, struct.pack("<Q", 2**63))), "runs past the end"),
        (header(num_keys=1, body=key("k", 9, struct.pack("<IQ", 4, 2**61))), "array elements"),
        (header(num_keys=1, body=key("k", 9, struct.pack("<IQ", 8, 2**61))), "strings"),
        (header(num_keys=1, body=key("k", 9, struct.pack("<IQ", 9, 1))), "unknown type 9"),
        (header(num_keys=1, body=key("k", 77, bytes(8))), "unknown type 77"),
        (header(num_keys=1, body=key("k", 8, struct.pack("<Q", 1) + b"\xff")), "not UTF-8"),
        (header(num_keys=1, body=key("general.alignment", 4, bytes(4))), "general.alignment is 0"),
        (header(num_tensors=1, body=struct.pack("<Q1sI", 1, b"w", 9) + bytes(80)), "9 dimensions"),
        (header(num_tensors=1, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 2**62, 0, 0) + bytes(64)), "is truncated"),
        (header(num_tensors=1, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 0, 2**63) + bytes(64)), "is truncated"),
        (header(num_tensors=1, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 33, 2, 0) + bytes(64)), "impossible shape"),
        (header(num_tensors=1, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 0, 0, 0) + bytes(64)), "impossible shape"),
        (header(num_tensors=2, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 1, 0, 0) * 2 + bytes(64)), "two tensors"),
    ],
)
def test_a_broken_header_is_refused_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(BrokenModelError, match=message):
        GgufFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1), "GGUF version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(num_tensors=1, body=struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 999, 0) + bytes(64)), "unknown type 999"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=message):
        GgufFile(path)


def test_a_missing_file_and_a_directory_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(ModelError):
        GgufFile(tmp_path)


def test_a_file_cut_short_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"w": (np.ones((64, 64), dtype=np.float32), Quant.F32)})
    with GgufFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size // 2)
        with pytest.raises(BrokenModelError, match="cut short"):
            read_all(file, "w")
