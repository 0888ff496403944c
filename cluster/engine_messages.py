"""What an engine process says of itself and of its failures, as messages to its front."""

from __future__ import annotations

from engine.engine import Engine
from engine.errors import CapacityError, EngineError, InvalidRequestError
from engine.runner import ModelRunner
from kv_transfer.layout import KVLayout
from prefill_pool.worker import PrefillAborted
from protos import worker_pb2 as pb


def error_message(error: Exception) -> pb.EngineError:
    """An exception as the status a router can act on."""
    match error:
        case InvalidRequestError():
            return pb.EngineError(status="INVALID_ARGUMENT", message=f"{error.field}: {error}")
        case CapacityError():
            return pb.EngineError(status="RESOURCE_EXHAUSTED", message=str(error), retry_after_s=error.retry_after_s)
        case PrefillAborted():
            return pb.EngineError(status="ABORTED", message=str(error))
        case _:
            return pb.EngineError(status="INTERNAL", message=f"{type(error).__name__}: {error}")


def engine_stats(engine: Engine) -> pb.WorkerStats:
    """The engine's own counters as a message."""
    stats = engine.scheduler.stats()
    return pb.WorkerStats(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        free_blocks=stats.free_blocks,
        num_blocks=stats.num_blocks,
        waiting_tokens=stats.waiting_tokens,
        steps=stats.steps,
        computed_tokens=stats.computed_tokens,
        cached_tokens=stats.cached_tokens,
        preemptions=stats.preemptions,
        generated_tokens=stats.generated_tokens,
        findable_blocks=stats.findable_blocks,
        prompt_tokens_per_s=engine.loop.prompt_rate.tokens_per_s,
    )


def refuse_draining() -> pb.EngineReply:
    """The answer to new work while the engine process drains."""
    raise CapacityError("this worker is draining")


def refuse_not_started() -> pb.EngineReply:
    """The answer to whatever comes before StartEngine."""
    raise EngineError("no epoch has been started")


def kv_layout(runner: ModelRunner, model_hash: str) -> KVLayout:
    """How a rank's KV lies, and what of it the rank has."""
    return KVLayout(
        model_hash=model_hash,
        num_layers=runner.config.num_layers,
        block_size=runner.block_size,
        num_kv_heads=runner.config.num_kv_heads,
        head_dim=runner.config.head_dim,
        dtype=str(runner.dtype).removeprefix("torch."),
        tp_rank=runner.parallel.rank,
        tp_size=runner.parallel.size,
    )
