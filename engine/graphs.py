"""Steps of common sizes, recorded once as CUDA graphs and replayed without Python.

A recorded step is made for a number of rows, reads its inputs from fixed memory and may be given fewer: rows that are
left over are padding, store no KV and are not sampled. There are two kinds:

    decode    up to num_rows sequences of one token each
    prompts   up to MAX_PROMPTS sequences that together have up to num_rows tokens

The greedy choice is recorded too. Each layer of a recorded prompt step ends with an event, so that its KV can leave
while the next layer is computed. All recordings share their work space, for one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from engine.attention.paged import PagedAttention, PagedPlan
from engine.attention.prompts import FlashPlan, FlashPrompts, flash_arrays
from engine.batch import Batch, LayerHook, StepShape
from engine.batch_builder import StepArrays
from engine.kernels.attention import SPLIT_FIELDS, Splits
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder, Forward
from engine.sampler import choose_greedy
from engine.upload import mark, offsets_of

DECODE_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PROMPT_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 2560)
MAX_PROMPTS = 16
"""Sequences of a recorded prompt step."""
MAX_PAGES_TOKENS = 8192
"""Longest context of a recorded prompt step; a longer one takes long enough to hide its launches."""

_EMPTY = StepShape(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
Segments = list[tuple[np.ndarray, int, int]]
"""(values, room, padding): an array of a step, how many numbers there is room for, and what fills the rest."""


class StaticInputs:
    """Fixed memory that recorded steps read: arrays of int32, one after the other, filled by one copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.relay = torch.cuda.Stream(device)
        """Where the events of a replay's layers are copied before the next replay moves them."""
        self._memory = torch.zeros(size, dtype=torch.int32, device=device)

    def views(self, sizes: list[int]) -> list[torch.Tensor]:
        """Where arrays of these sizes lie."""
        return [self._memory[start : start + size] for start, size in zip(offsets_of(sizes), sizes, strict=False)]

    def fill(self, segments: Segments) -> None:
        """Enqueue the copy of a step's arrays; the last one's padding is left out."""
        starts = offsets_of([room for _, room, _ in segments])
        used = starts[-2] + segments[-1][0].size
        packed = torch.empty(used, dtype=torch.int32, pin_memory=True)
        host = packed.numpy()
        for start, (values, room, padding) in zip(starts, segments, strict=False):
            stop = min(start + values.size, used)
            host[start:stop] = values.ravel()
            host[stop : start + room] = padding
        self._memory[:used].copy_(packed, non_blocking=True)


class RecordedStep:
    """One graph."""

    def __init__(self, inputs: StaticInputs, num_layers: int, *, with_events: bool) -> None:
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        self._events = [torch.cuda.Event(external=True) for _ in range(num_layers)] if with_events else []
        self._num_layers = num_layers
        self._forward: Forward

    def record(self, compute: Callable[[LayerHook | None], Forward], pool: Any) -> None:
        """Record what `compute` enqueues, which has run once before."""
        hook = LayerHook(lambda layer, _: self._events[layer].record()) if self._events else None
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._forward = compute(hook)

    def replay(self, segments: Segments, hook: LayerHook | None) -> Forward:
        """Enqueue the step with these inputs; what it gives is overwritten by the next replay of any recording."""
        self._inputs.fill(segments)
        self._graph.replay()
        if hook is not None:
            self._tell(hook)
        return self._forward

    def _tell(self, hook: LayerHook) -> None:
        """Hand out events that stay what they are: the recorded ones mean the latest replay."""
        done = None if self._events else mark(self._inputs.device)
        relay = self._inputs.relay
        for layer in range(self._num_layers):
            on_layer = hook.listener(layer)
            if on_layer is None:
                continue
            event = done
            if self._events:
                relay.wait_event(self._events[layer])
                event = torch.cuda.Event(blocking=True)
                event.record(relay)
            on_layer(layer, event)


class StepGraphs:
    """All recorded steps of an engine."""

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, attention: PagedAttention, choices: torch.Tensor, max_model_len: int
    ) -> None:
        """`choices` [any, 2] int64 is where steps put what they choose, and find what the one before chose."""
        self._decoder = decoder
        self._cache = kv_cache
        self._attention = attention
        self._choices = choices
        self._max_blocks = -(-max_model_len // kv_cache.block_size)
        self._max_pages = min(self._max_blocks, -(-MAX_PAGES_TOKENS // kv_cache.block_size))
        self._decode: dict[int, RecordedStep] = {}
        self._prompts: dict[int, RecordedStep] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: StaticInputs

    @torch.inference_mode()
    def record(self, max_running: int, most_tokens: int, on_progress: Callable[[int, int], None]) -> None:
        """Record all sizes, the largest first, for they share work space; on_progress hears (done, in all)."""
        decode = _sizes(DECODE_ROWS, max_running)
        flash = isinstance(self._attention.prompts, FlashPrompts)
        prompts = _sizes(PROMPT_ROWS, min(most_tokens, PROMPT_ROWS[-1])) if flash else []
        most_blocks = max_running * self._max_blocks
        sizes = [offsets_of(self._decode_sizes(decode[-1]))[-1] + most_blocks]
        sizes += [offsets_of(self._prompt_sizes(rows))[-1] for rows in prompts]
        self._inputs = StaticInputs(max(sizes), self._cache.data.device)
        todo = [(rows, self._decode) for rows in decode] + [(rows, self._prompts) for rows in prompts]
        for done, (rows, recorded) in enumerate(sorted(todo, key=lambda item: -item[0])):
            make = self._record_decode if recorded is self._decode else self._record_prompts
            recorded[rows] = make(rows)
            on_progress(done + 1, len(todo))

    def replay(self, arrays: StepArrays, hook: LayerHook | None) -> Forward | None:
        """Enqueue the step by a recording that fits it; None if there is none."""
        shape = arrays.shape
        if shape.num_decode == shape.num_seqs:
            rows = next((rows for rows in sorted(self._decode) if rows >= shape.num_seqs), None)
            if rows is not None and len(arrays.sample_indices) == shape.num_seqs:
                return self._decode[rows].replay(self._decode_segments(arrays, rows), hook)
        elif shape.num_seqs <= MAX_PROMPTS and int(np.diff(shape.block_starts).max()) <= self._max_pages:
            rows = next((rows for rows in sorted(self._prompts) if rows >= shape.num_tokens), None)
            if rows is not None:
                return self._prompts[rows].replay(self._prompt_segments(arrays, rows), hook)
        return None

    # ---- decode: token_ids, sources, positions, slot_ids, split starts, split table, block_ids ----

    def _decode_sizes(self, rows: int) -> list[int]:
        return [rows] * 4 + [rows + 1, self._attention.planner.max_splits(rows) * SPLIT_FIELDS]

    def _record_decode(self, rows: int) -> RecordedStep:
        sizes = self._decode_sizes(rows)
        views = self._inputs.views([*sizes, rows * self._max_blocks])
        token_ids, sources, positions, slot_ids, starts, table, block_ids = views
        plan = PagedPlan(rows, Splits(table.view(-1, SPLIT_FIELDS), starts, block_ids), None)
        samples = torch.arange(rows, dtype=torch.int32, device=token_ids.device)
        batch = Batch(token_ids, sources, self._choices, positions, slot_ids, samples, _EMPTY, scratch=plan)
        batch.every_row_samples = True
        self._inputs.fill([*_rows([], rows), *_pad([], sizes[4:], -1), (np.zeros(1, np.int32), rows, 0)])
        return self._make(batch, with_events=False)

    def _decode_segments(self, arrays: StepArrays, rows: int) -> Segments:
        table, starts = self._attention.planner.cut(arrays.shape.context_lens)
        return [
            *_rows([arrays.token_ids, arrays.sources, arrays.positions, arrays.slot_ids], rows),
            (starts, rows + 1, int(starts[-1])),
            (table, self._attention.planner.max_splits(rows) * SPLIT_FIELDS, -1),
            (arrays.shape.block_ids, rows * self._max_blocks, 0),
        ]

    # ---- prompts: token_ids, sources, positions, slot_ids, sample_indices, query_starts, context_lens, pages ----

    def _prompt_sizes(self, rows: int) -> list[int]:
        return [rows] * 4 + [MAX_PROMPTS, MAX_PROMPTS + 1, MAX_PROMPTS, MAX_PROMPTS * self._max_pages]

    def _record_prompts(self, rows: int) -> RecordedStep:
        sizes = self._prompt_sizes(rows)
        token_ids, sources, positions, slot_ids, samples, starts, contexts, pages = self._inputs.views(sizes)
        plan = PagedPlan(0, None, FlashPlan(starts, contexts, pages.view(MAX_PROMPTS, -1), longest=rows))
        batch = Batch(token_ids, sources, self._choices, positions, slot_ids, samples, _EMPTY, scratch=plan)
        self._inputs.fill([*_rows([], rows), *_pad([], sizes[4:7], 0), (np.zeros(1, np.int32), sizes[7], 0)])
        return self._make(batch, with_events=True)

    def _prompt_segments(self, arrays: StepArrays, rows: int) -> Segments:
        starts, contexts, pages = flash_arrays(arrays.shape, 0)
        wide = np.zeros((len(contexts), self._max_pages), dtype=np.int32)
        wide[:, : pages.shape[1]] = pages
        return [
            *_rows([arrays.token_ids, arrays.sources, arrays.positions, arrays.slot_ids], rows),
            (arrays.sample_indices, MAX_PROMPTS, 0),
            (starts, MAX_PROMPTS + 1, int(starts[-1])),
            (contexts, MAX_PROMPTS, 0),
            (wide, MAX_PROMPTS * self._max_pages, 0),
        ]

    # ---- both ----

    def _make(self, batch: Batch, *, with_events: bool) -> RecordedStep:
        def compute(hook: LayerHook | None) -> Forward:
            batch.hook = hook
            forward = self._decoder.forward(batch, self._cache, self._attention)
            assert forward.logits is not None
            choose_greedy(forward.logits, self._choices[: forward.logits.shape[0]])
            return forward

        compute(None)  # compiles what is not compiled yet, and makes the libraries' work space
        step = RecordedStep(self._inputs, self._cache.num_layers, with_events=with_events)
        step.record(compute, self._pool)
        return step


def _sizes(common: Iterable[int], most: int) -> list[int]:
    """The common sizes below the most that is needed, and one that holds the most."""
    return [*(size for size in common if size < most), most]


def _rows(values: list[np.ndarray], rows: int) -> Segments:
    """token_ids, sources, positions and slot_ids; rows without values are token 0, stored nowhere."""
    first, *others = _pad(values, [rows] * 4, -1)
    return [(first[0], rows, 0), *others]


def _pad(values: list[np.ndarray], rooms: list[int], padding: int) -> Segments:
    """Segments of these values; where values are missing there is padding alone."""
    nothing = np.zeros(0, np.int32)
    given = [*values, *[nothing] * (len(rooms) - len(values))]
    return [(each, room, padding) for each, room in zip(given, rooms, strict=True)]
