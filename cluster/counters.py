"""Which figures of a worker and of a router only grow: counters, where the rest are gauges."""

from __future__ import annotations

WORKER_COUNTERS = (
    "steps",
    "computed_tokens",
    "cached_tokens",
    "generated_tokens",
    "preemptions",
    "sent_bytes",
    "received_bytes",
    "digest_mismatches",
    "lost_peers",
    "slow_pairs",
    "retired_pairs",
)
ROUTER_COUNTERS = (
    "outcomes",
    "accepted",
    "accepted_prompt_tokens",
    "sent_tokens",
    "routed_prompts",
    "routed_prompt_tokens",
    "routed_missing_tokens",
    "routed_missing_squares",
    "spilled_prompt_tokens",
    "prompt_tokens",
    "cached_prompt_tokens",
    "local_prompt_tokens",
    "generated_tokens",
    "failed_attempts",
    "given_back",
    "moved",
    "refused",
)
