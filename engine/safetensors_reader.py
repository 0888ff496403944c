"""Reads the weights of a Hugging Face directory from its safetensors files, straight to the device that wants them.

The files are mapped. On a CPU a weight of the wanted type is not copied at all. For a GPU several threads read
different weights, each through pinned memory of its own: while one waits for the file, others copy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import BrokenModelError, ModelNotFoundError, UnsupportedModelError
from engine.models.config import read_json
from engine.read_ahead import Ahead, read_ahead

READ_THREADS = 4
"""On an H100 more of them get in each other's way."""
MAX_AHEAD_BYTES = 1 << 30
STAGING_BYTES = 16 << 20
"""Of one pinned buffer; each thread has two. Pinning takes longer than reading, so all weights share them."""
MAX_NAMES_IN_ERROR = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Shapes = Mapping[str, tuple[int, ...]]
Weights = Generator[tuple[str, torch.Tensor]]


def ahead_for(device: torch.device) -> Ahead | None:
    """How far to read ahead for a device; None: not at all."""
    if device.type == "cpu":
        return None
    return Ahead(threads=min(READ_THREADS, len(os.sched_getaffinity(0))), max_bytes=MAX_AHEAD_BYTES)


def read_safetensors(
    path: Path, shapes: Shapes, *, dtype: torch.dtype, device: torch.device, ahead: Ahead | None
) -> Weights:
    """Yield (name, weight) for each of `shapes`, in its order, as `dtype` on `device`.

    With `ahead` in other threads, without one after the other. What comes to a GPU is ordered on its default stream.
    """
    staging = None if device.type == "cpu" else _Staging(device)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file_path in _files(path):
            file = stack.enter_context(_open(file_path))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                files[name] = file
                found[name] = tuple(file.get_slice(name).get_shape())
        check_contents(path, found, shapes)

        def read(name: str) -> torch.Tensor:
            try:
                weight: torch.Tensor = files[name].get_tensor(name)
            except SafetensorError as error:
                raise BrokenModelError(f"{path}: {name} cannot be read: {error}; fetch the model again") from error
            if not weight.is_floating_point():
                raise UnsupportedModelError(f"{path}: {name} has type {weight.dtype}, expected floating point")
            return (weight if staging is None else staging.copy(weight)).to(dtype)

        if ahead is None:
            yield from ((name, read(name)) for name in shapes)
            return
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        yield from stack.enter_context(contextlib.closing(read_ahead(read, sizes, ahead)))


def check_contents(path: Path, found: Shapes, shapes: Shapes) -> None:
    """BrokenModelError unless what was found has each of `shapes`."""
    missing = [name for name in shapes if name not in found]
    if missing:
        listed = ", ".join(missing[:MAX_NAMES_IN_ERROR])
        more = f" and {len(missing) - MAX_NAMES_IN_ERROR} more" if len(missing) > MAX_NAMES_IN_ERROR else ""
        raise BrokenModelError(f"{path} lacks {len(missing)} weights: {listed}{more}; fetch the model again")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise BrokenModelError(f"{path}: {name} has shape {found[name]}, but the header asks for {shape}")


def _files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if not (path / INDEX_FILE).is_file():
        raise ModelNotFoundError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BrokenModelError(f"{path / INDEX_FILE} has no weight_map from names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise BrokenModelError(f"{path / INDEX_FILE} names {name!r}, which is not a file of that directory")
        if not (path / name).is_file():
            raise ModelNotFoundError(f"{path} lacks {name}, which {INDEX_FILE} names; fetch the model again")
    return [path / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BrokenModelError(f"{path} is broken or truncated: {error}; fetch the model again") from error


class _Staging:
    """Copies mapped weights to a GPU through two pinned buffers a thread: one is filled while the other is sent."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    def copy(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight on the GPU, in its own type."""
        with torch.cuda.device(self._device):
            target = torch.empty_like(weight, device=self._device)
            chunks = zip(_chunks(weight), _chunks(target), itertools.cycle(self._buffers()))
            for source, place, (buffer, sent) in chunks:
                sent.synchronize()
                filled = buffer[: len(source)].copy_(source)
                place.copy_(filled, non_blocking=True)
                sent.record()
        return target

    def _buffers(self) -> list[tuple[torch.Tensor, torch.cuda.Event]]:
        if not hasattr(self._own, "buffers"):
            pinned = (torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
            self._own.buffers = [(buffer, torch.cuda.Event()) for buffer in pinned]
        buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = self._own.buffers
        return buffers


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    octets = weight.view(-1).view(torch.uint8)
    return (octets[first : first + STAGING_BYTES] for first in range(0, len(octets), STAGING_BYTES))
