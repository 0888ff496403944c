"""Generates the Python code of protos/*.proto: `python -m tools.protos`; with --check, only compares.

The generated files are committed, so that a user needs no compiler; the check makes them anew in a
temporary directory and shows how the committed ones differ.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(target: Path) -> None:
    """Write the generated files to `target`/protos; SystemExit with protoc's words if it refuses."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    for source in sources:
        if "\nservice " not in (ROOT / source).read_text():
            (target / source).with_name(f"{Path(source).stem}_pb2_grpc.py").unlink()


def compare(made: Path, committed: Path) -> list[str]:
    """What differs, as lines of unified diffs; empty when nothing does."""
    differences: list[str] = []
    names = {path.name for pattern in PATTERNS for side in (made, committed) for path in side.glob(pattern)}
    for name in sorted(names):
        old, new = (_lines(side / name) for side in (committed, made))
        differences.extend(difflib.unified_diff(old, new, f"committed {name}", f"generated {name}", lineterm="", n=1))
    return differences


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    """Generate or check; the exit code is 1 when the committed code is not what the protos say."""
    parser = argparse.ArgumentParser(prog="tools.protos", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, show what differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = Path(folder) / "protos"
        differences = compare(made, ROOT / "protos")
        if check and differences:
            print("\n".join(differences[:40]))
            print("The generated code is not that of protos/*.proto: run `make protos` and commit it.")
            return 1
        if not check:
            for pattern in PATTERNS:
                for path in made.glob(pattern):
                    shutil.copy(path, ROOT / "protos" / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
