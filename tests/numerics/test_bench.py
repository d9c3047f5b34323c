"""The benchmarks at their smallest: they run, the sides agree where they are compared, and each row has its ratio."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "decode.py": (("--repeats", "1"), {"generate", "decode", "prefill"}),
    "train_step.py": (("--repeats", "1", "--samples", "16", "--only", "shuffled fp32"), {"shuffled fp32"}),
    "nvlm.py": (("--repeats", "1", "--only", "requests", "tiling"), {"prefill", "decode", "tiling"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name: str) -> None:
    args, rows = RUNS[name]
    done = subprocess.run([sys.executable, str(ROOT / "bench" / name), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *found = map(json.loads, done.stdout.splitlines())
    assert first["name"] == "machine" and first["cores"] >= 1
    assert {row["name"] for row in found} == rows and all(row["ratio"] > 0 for row in found)
