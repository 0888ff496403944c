"""The house rules that a machine can watch: sizes, and modules that must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "protos",
    "engine",
    "kv_transfer",
    "prefill_pool",
    "decode_pool",
    "router",
    "cluster",
    "benchmarks",
    "tools",
    "tests",
)
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50


def test_there_is_something_to_watch():
    assert len(FILES) > 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("router.app", "torch"),
        ("cluster.front", "torch"),
        ("cluster.actors", "torch"),
        ("cluster.config", "torch"),
        ("cluster.cli", "torch"),
        ("cluster.cli", "ray"),
        ("engine.engine", "grpc"),
        ("kv_transfer.node", "grpc"),
    ],
)
def test_what_must_stay_light_does(module, heavy):
    code = f"import sys, {module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
