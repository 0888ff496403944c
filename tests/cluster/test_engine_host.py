"""The session of one front with its engine, where threads meet."""

import sys
import threading
import time
from dataclasses import replace

from protos import worker_pb2 as pb
from tests.session_pair import ROUTER, TIMEOUT_S, Peer, make_request, reserve, start_prefill

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


def outputs_until(peer: Peer, names: set[str], *before: pb.TokenOutput) -> dict[str, list[pb.TokenOutput]]:
    """What is said of requests, and was said before, until each of them has ended."""
    said = {name: [output for output in before if output.request_id == name] for name in names}
    while any(not outputs or not outputs[-1].finish for outputs in said.values()):
        output = peer.outputs.get(timeout=TIMEOUT_S)
        said[output.request_id].append(output)
    return said


def test_what_generates_is_handed_back_with_all_its_tokens_told(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        for name in ("a", "b"):
            reserve(peer, make_request(name, [5] * 20, max_tokens=3000), local_prefill=True)
        first = peer.outputs.get(timeout=TIMEOUT_S)
        reply = peer.call(pb.EngineCommand(hand_back=pb.HandBack(reason="of a test")))
        assert reply.stats.num_running == 0
        for outputs in outputs_until(peer, {"a", "b"}, first).values():
            assert outputs[-1].finish == pb.ENGINE_FINISH_HANDED_BACK
            assert [output.offset for output in outputs] == list(range(len(outputs)))
            assert outputs[-1].offset == sum(len(output.token_ids) for output in outputs)
        stats = peer.check()
        assert stats.free_blocks == stats.num_blocks
        assert reserve(peer, make_request("c", [5] * 20), local_prefill=True).WhichOneof("result") == "reserve"
        assert len(peer.stream("c")) == 12


def test_what_is_reserved_is_handed_back_once_its_kv_is_home(tiny_llama, tmp_path):
    with Peer("p", tiny_llama, tmp_path) as prefill, Peer("d", tiny_llama, tmp_path) as decode:
        request = make_request("a", range(5, 105))
        ticket = reserve(decode, request).reserve.ticket
        assert decode.call(pb.EngineCommand(hand_back=pb.HandBack())).stats.num_reserved == 1
        reply = start_prefill(prefill, request, ticket).get(timeout=TIMEOUT_S)
        assert len(reply.prefill.first.token_ids) == 1
        (output,) = outputs_until(decode, {"a"})["a"]
        assert (output.finish, output.offset) == (pb.ENGINE_FINISH_HANDED_BACK, 1)
        stats = decode.check()
        assert stats.free_blocks == stats.num_blocks
        assert stats.findable_blocks == 6, "what came may be found by the next one"


def test_a_reservation_that_is_to_be_handed_back_may_be_aborted_and_its_ticket_may_fail(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        for name in ("a", "b"):
            reserve(peer, make_request(name, [5] * 20))
        peer.call(pb.EngineCommand(hand_back=pb.HandBack()))
        assert peer.call(pb.EngineCommand(abort_decode=ABORT)).abort.found
        peer.send(pb.EngineCommand(router_gone=pb.RouterGone(router_id=ROUTER)))
        assert peer.host.drain(10.0)
        stats = peer.check()
        assert (stats.free_blocks, stats.num_reserved) == (stats.num_blocks, 0)


def test_orphans_are_not_handed_back(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        request = replace(make_request("a", [5] * 20, max_tokens=3000), resumable=True)
        reserve(peer, request, local_prefill=True)
        peer.outputs.get(timeout=TIMEOUT_S)
        peer.call(pb.EngineCommand(hand_back=pb.HandBack()))
        assert outputs_until(peer, {"a"})["a"][-1].finish == pb.ENGINE_FINISH_HANDED_BACK
        reserve(peer, replace(request, attempt=1), local_prefill=True)
        peer.outputs.get(timeout=TIMEOUT_S)
        peer.send(pb.EngineCommand(router_gone=pb.RouterGone(router_id=ROUTER)))
        assert peer.call(pb.EngineCommand(hand_back=pb.HandBack())).stats.num_running == 1


def test_a_drain_is_told_to_the_front_which_may_have_handed_back_what_would_take_too_long(tiny_llama, tmp_path):
    with Peer("d", tiny_llama, tmp_path) as peer:
        reserve(peer, make_request("a", [5] * 20, max_tokens=4000), local_prefill=True)
        assert not peer.host.drain(0.05)
        assert peer.told_draining
        peer.call(pb.EngineCommand(hand_back=pb.HandBack()))
        assert peer.host.drain(30.0)
        assert outputs_until(peer, {"a"})["a"][-1].finish == pb.ENGINE_FINISH_HANDED_BACK
