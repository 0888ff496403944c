"""A request that is not resumable, sent again while it runs, on a whole cluster in one process."""

from __future__ import annotations

import grpc
import pytest

from tests.e2e.test_resume import Reading, generate, request_of, run, shape_of, status_of
from tests.mini_cluster import MiniCluster


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])
def test_a_call_that_takes_over_hears_what_one_call_alone_would(tiny_llama, tmp_path, sampling, colocated):
    async def scenario(cluster: MiniCluster) -> None:
        request = request_of("whole", seed=7, **sampling)
        request.resumable = False
        whole = Reading()
        await whole.read(generate(cluster.stub, request))
        request.request_id = "again"
        first, again = aiter(generate(cluster.stub, request)), Reading()
        for _ in range(6):
            await anext(first)
        await again.read(generate(cluster.stub, request))
        assert again.answer.token_ids == whole.answer.token_ids
        assert again.answer.text == whole.answer.text
        assert (await status_of(first))[0] is grpc.StatusCode.ABORTED
        assert cluster.router.stats().outcomes == {"length": 2, "aborted": 1}

    run(shape_of(tiny_llama, colocated=colocated), tmp_path, scenario)
