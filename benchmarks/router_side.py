"""The router that is measured, in a process of its own: RouterApp as it is, its log in a file as of a real one."""

from __future__ import annotations

import asyncio
import cProfile
import gc
import json
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import logs, niceness
from engine.config import ModelOptions
from router.app import RouterApp
from router.config import RouterConfig
from router.store import MemoryStore, WorkerRecord

START_TIMEOUT_S = 30.0
DRAIN_S = 10.0
HOUR_S = 3600.0
VOCAB_SIZE = 300
Mode = Literal["split", "colocated"]


class RouterSide:
    """One router."""

    def __init__(self, folder: Path, router_id: str, mode: Mode, profile: str = "") -> None:
        """`profile`: a file for cProfile's account of the event loop; empty: none is made."""
        self._folder = folder
        self._router_id = router_id
        self._mode = mode
        self._profile = profile

    async def start(self, workers: dict[str, tuple[str, str]]) -> str:
        """Serve with these workers (role and address by id), all of them READY; gives host:port."""
        self._log = logs.configure("router", target=self._folder / f"{self._router_id}.log")
        store = MemoryStore()
        for worker_id, (role, address) in workers.items():
            record = WorkerRecord(worker_id=worker_id, epoch=1, role=role, address=address)  # type: ignore[arg-type]
            await store.register(record, HOUR_S)
        self._app = RouterApp(
            config=RouterConfig(port=0),
            model=ModelOptions(path=str(self._folder)),
            mode=self._mode,
            store=store,
            secret=b"of a benchmark",
            router_id=self._router_id,
        )
        address = await self._app.start()
        async with asyncio.timeout(START_TIMEOUT_S):
            while self._app.stats().workers.get("ready", 0) < len(workers):  # noqa: ASYNC110 (once, at the start)
                await asyncio.sleep(0.01)
        gc.collect()
        gc.freeze()  # this and the next line as the router's actor does
        niceness.poller_gives_way()
        if self._profile:
            self._profiler = cProfile.Profile()
            self._profiler.enable()
        return address

    async def stop(self) -> None:
        """Stop it; AssertionError if anything was left behind."""
        if self._profile:
            self._profiler.disable()
            self._profiler.dump_stats(self._profile)
        await self._app.drain(DRAIN_S)  # of clients that have just left
        self._app.check_integrity()
        await self._app.stop()
        self._log.close()


def make_model(folder: Path) -> None:
    """A header and a byte-level tokenizer, as much of a model as a router reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
