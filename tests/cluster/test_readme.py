"""The clients in README.md and docs/client.md are run as they are written there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.inference_double import Double, answer_ids, answer_text, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- client example: begin -->\n```python\n(.*?)```\n<!-- client example: end -->", text, re.S)
    assert found, "README.md has no client example between its markers"
    return found[1]


def test_it_is_short(example):
    assert len(example.splitlines()) <= 20


def test_it_streams_an_answer(example):
    with serve(Double()) as double:
        done = subprocess.run(
            [sys.executable, "-c", example, double.address], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
    prompt = "<user>What is the capital of France?\n<assistant>"
    answer = answer_text(answer_ids([ord(each) for each in prompt], 64))
    assert done.stderr == ""
    assert done.stdout == f"{len(prompt)} prompt tokens\n{answer}\n64 tokens, 0.08 s\n"


def test_the_first_stream_of_the_client_page_runs():
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "client.md").read_text(), re.S)
    assert found
    with serve(Double()) as double:
        code = found[1].replace("127.0.0.1:50051", double.address)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    prompt = "<user>What is the capital of France?\n<assistant>"
    assert (done.stdout, done.stderr) == (answer_text(answer_ids([ord(each) for each in prompt], 4)), "")
