"""The session of one front with its engine, where threads meet."""

import sys
import threading
import time

from protos import worker_pb2 as pb
from tests.session_pair import TIMEOUT_S, Peer, make_request, reserve

ABORT = pb.AbortRequest(request_id="a")


def test_statistics_may_be_read_while_reservations_come_and_go(tiny_llama, tmp_path):
    stop, failures = threading.Event(), []

    def look() -> None:
        while not stop.is_set() and not failures:
            try:
                peer.session.stats()
                peer.session.num_open()
            except RuntimeError as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Peer("d", tiny_llama, tmp_path) as peer:
            thread = threading.Thread(target=look)
            thread.start()
            for turn in range(60):
                names = [f"r{turn}-{index}" for index in range(12)]
                for name in names:
                    reserve(peer, make_request(name, [5] * 20))
                for name in names:
                    peer.call(pb.EngineCommand(abort_decode=pb.AbortRequest(request_id=name)))
            stop.set()
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_workers_that_were_introduced_have_their_pair_before_any_request(tiny_llama, tmp_path):
    with Peer("p", tiny_llama, tmp_path) as prefill, Peer("d", tiny_llama, tmp_path) as decode:
        met = decode.description
        meet = pb.MeetRequest(epoch=1, worker=met.identity, control_addresses=met.control_addresses, layout=met.layout)
        for _ in range(2):
            assert prefill.call(pb.EngineCommand(meet=meet)).WhichOneof("result") == "meet"
        assert [until_paired(peer).peer for peer in (prefill, decode)] == ["d/1", "p/1"]
        pair = until_paired(prefill)
        assert (pair.direction, pair.transport, pair.is_slow) == ("to", "gloo", False)
        assert pair.latency_s > 0
        assert pair.bytes_per_s > 0


def test_a_meeting_with_an_impossible_layout_is_refused(tiny_llama, tmp_path):
    with Peer("p", tiny_llama, tmp_path) as peer:
        refused = peer.call(pb.EngineCommand(meet=pb.MeetRequest(worker=pb.WorkerIdentity(worker_id="d", epoch=1))))
        assert refused.error.status == "INVALID_ARGUMENT"
        assert "layout: num_layers must be at least 1, got 0" in refused.error.message


def until_paired(peer: Peer) -> pb.PairInfo:
    """The peer's only pair, once it is READY."""
    until, pause = time.monotonic() + TIMEOUT_S, threading.Event()
    while True:
        pairs = peer.call(pb.EngineCommand(renew=pb.RenewLeases())).pairs
        if [pair.state for pair in pairs] == ["ready"]:
            return pairs[0]
        assert time.monotonic() < until, f"no pair became ready: {pairs}"
        pause.wait(0.01)


def test_a_drain_ends_when_the_last_request_does(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        reserve(peer, make_request("a", [5] * 20, max_tokens=40), local_prefill=True)
        assert peer.host.drain(30.0)
        assert peer.session.num_open() == 0
        assert len(peer.stream("a")) == 40
        refused = reserve(peer, make_request("b", [5] * 20))
        assert refused.error.message == "this worker is draining"


def test_a_drain_that_takes_too_long_says_so(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        reserve(peer, make_request("a", [5] * 20))
        assert not peer.host.drain(0.1)
        peer.call(pb.EngineCommand(abort_decode=ABORT))
        assert peer.host.drain(10.0)


def test_a_role_is_taken_with_its_share_of_prompts_and_kept_for_the_next_epoch(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        order = pb.SetRole(role="decode", prompt_share=0.25)
        assert peer.call(pb.EngineCommand(set_role=order)).description.role == "decode"
        reserve(peer, make_request("a", [5] * 20, max_tokens=100), local_prefill=True)
        reserve(peer, make_request("b", [6] * 100, max_tokens=1), local_prefill=True)
        assert len(peer.stream("b")) == 1
        assert peer.engine.scheduler.stats().steps > 100 // 16, "the prompt had no more than a quarter of each step"
        peer.session.close()
        peer.session = peer.host.open_session(peer._take)
        start = pb.StartEngine(identity=pb.WorkerIdentity(worker_id="d", epoch=2))
        assert peer.call(pb.EngineCommand(start=start)).description.role == "decode"
        start.identity.epoch, again = 3, pb.SetRole(role="prefill")
        peer.session.close()
        peer.session = peer.host.open_session(peer._take)
        start.role.CopyFrom(again)
        assert peer.call(pb.EngineCommand(start=start)).description.role == "prefill"
