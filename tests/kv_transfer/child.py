"""A node in a process of its own, driven over stdin and stdout: one JSON object a line each way.

Commands: {"grant": num_tokens, "blocks": [...]}, {"send": ticket in hex, "tokens": how many to push,
"finish": bool}, {"stats": true}, {"sum": [slots]}. Answers carry the command's name; what ends later
arrives as {"event": "ready" | "end" | "settled", ...}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from kv_transfer.config import TransferConfig
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult
from protos import worker_pb2
from tests.kv_transfer import conftest

BOUND_S = 30.0
ROOT = Path(__file__).parents[2]


class Child:
    """The parent's handle of a node in another process."""

    def __init__(self, worker_id: str, **config: object) -> None:
        start = json.dumps({"worker_id": worker_id, "config": config})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_transfer.child", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._answers.get(timeout=BOUND_S)["started"]

    def ask(self, **command: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answers.get(timeout=BOUND_S)

    def event(self) -> dict[str, Any]:
        return self.events.get(timeout=BOUND_S)

    def close(self) -> None:
        """Kill the process if it still runs."""
        self.process.kill()
        self.process.wait(BOUND_S)
        self._reader.join(BOUND_S)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            (self.events if "event" in message else self._answers).put(message)


_lock = threading.Lock()


def _say(**message: object) -> None:
    with _lock:
        print(json.dumps(message), flush=True)


class _Told(SimpleQueue[Any]):
    """Where a node's verdicts go: to the parent."""

    def put(self, item: Any, *_: Any) -> None:
        if isinstance(item, ReceivedKV):
            _say(event="ready", id=item.ticket_id, num_bytes=item.num_bytes)
        elif isinstance(item, SendResult):
            _say(event="settled", id=item.ticket_id, state=item.state.value, reason=item.reason)
        else:
            _say(event="end", state=item[0].value, reason=item[1])


def _send(node: TransferNode, command: dict[str, Any]) -> None:
    ticket = KVTicket.from_proto(worker_pb2.KVTicket.FromString(bytes.fromhex(command["send"])))
    job = node.open_send(ticket, _Told().put)
    slot_ids = conftest.slots(command["blocks"], 0, command["tokens"])
    for layer in range(conftest.LAYOUT.num_layers):
        job.push(layer, 1, 0, slot_ids)
    if command["finish"]:
        job.finish(worker_pb2.TokenOutput(request_id=ticket.request_id, token_ids=[7]))
    _say(sent=True)


def _main(start: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    memory = conftest.Memory(conftest.LAYOUT, seed=5)
    node = TransferNode(
        worker_id=start["worker_id"],
        epoch=1,
        layout=conftest.LAYOUT,
        memory=memory,
        config=TransferConfig(**start["config"]),
        secret=conftest.SECRET,
    )
    _say(started=node.start())
    for line in sys.stdin:
        command = json.loads(line)
        if "grant" in command:
            ticket = conftest.offer(node, command["grant"], command["blocks"], received=_Told()).ticket
            _say(ticket=ticket.to_proto().SerializeToString().hex())
        elif "send" in command:
            _send(node, command)
        elif "sum" in command:
            _say(sum=memory.kv[:, :, command["sum"]].double().sum().item())
        else:
            _say(**asdict(node.stats()))
    node.stop()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
