"""KV that cannot reach its decode worker after the first token went out: another attempt, not a hang."""

import socket

import pytest

from engine.config import ModelOptions
from tests.e2e.test_mini_cluster import alone, prompt_of, request_of, run  # noqa: F401
from tests.mini_cluster import Answer, MiniCluster, Shape


@pytest.mark.parametrize("how", ["the pair cannot be made", "the prefill worker is lost"])
def test_the_stream_goes_on_without_a_gap(tiny_llama, tmp_path, alone, how):  # noqa: F811
    expected = alone(prompt_of(20))

    async def scenario(cluster: MiniCluster) -> None:
        node = cluster.workers["decode-0"].host._session._node
        good = node._address
        answer = Answer()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            node._address = f"127.0.0.1:{silent.getsockname()[1]}"
            async for event in cluster.stub.Generate(request_of(prompt_of(20)), timeout=30):
                answer.take(event)
                if answer.token_ids and node._address != good:
                    node._address = good
                    if how == "the prefill worker is lost":
                        for name in ("prefill-0", "prefill-1"):
                            if cluster.workers[name].host.stats().open_sends:
                                await cluster.workers[name].front.link.restart()
                    else:
                        silent.close()
        assert answer.token_ids == expected
        assert cluster.router.stats().failed_attempts == 1

    run(Shape(model=ModelOptions(path=str(tiny_llama)), num_prefill=2), tmp_path, scenario)
