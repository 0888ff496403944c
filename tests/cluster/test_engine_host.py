"""The session of one front with its engine, where threads meet."""

import sys
import threading

from protos import worker_pb2 as pb
from tests.session_pair import Peer, make_request, reserve


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
