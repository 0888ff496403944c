import pytest

from decode_pool.credits import Share, share_out


@pytest.mark.parametrize("places", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("num_routers", [1, 2, 3, 5])
@pytest.mark.parametrize("turn", [0, 1, 2, 10**9])
def test_all_that_can_be_taken_is_shared_out_and_no_more(places: int, num_routers: int, turn: int):
    shares = share_out(places, 1000, 10.0, num_routers, turn)
    requests = [share.requests for share in shares]
    assert sum(requests) == places
    assert max(requests) - min(requests) <= 1
    assert 1000 * bool(places) <= sum(share.blocks for share in shares) <= 1000 * bool(places) + num_routers


def test_the_last_place_is_one_routers_after_the_other():
    holders = [share_out(1, 40, 10.0, 3, turn).index(Share(1, 40)) for turn in range(6)]
    assert holders == [0, 1, 2, 0, 1, 2]


def test_blocks_bound_the_requests_but_the_last_one_may_be_small():
    assert share_out(64, 45, 10.0, 2, 0) == [Share(2, 23), Share(2, 23)]
    assert share_out(64, 5, 10.0, 2, 0) == [Share(1, 5), Share(0, 0)]
    assert share_out(64, 0, 10.0, 2, 0) == [Share(0, 0)] * 2
