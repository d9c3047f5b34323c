"""The experiment of docs/nvlm.md in a few steps: it runs, it keeps what is done, and its report says what was compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEFORE, AFTER = "before\n<!-- made by experiments/nvlm.py -->\n", "<!-- end -->\nafter\n"


def run(out: Path, *args: str) -> str:
    command = [sys.executable, str(ROOT / "experiments" / "nvlm.py"), "--short", "--out", str(out), "--seeds", "0", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout


@pytest.mark.slow
def test_a_claim_is_trained_once_and_reported(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text(BEFORE + AFTER)
    said = run(out, "--claims", "resolution")
    named = {line.split("  ")[-1].split(":")[0] for line in said.splitlines() if " seed 0 " in line}
    assert named == {"vision", "text", "D", "D, one tile"}
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    assert len(stamps) == 4 and all(json.loads(file.read_text())["accuracy"] for file in stamps)
    said = run(out, "--claims", "resolution", "--page", str(page))
    assert " seed 0 " not in said and stamps == {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    shown = page.read_text()
    assert shown.startswith(BEFORE) and shown.endswith(AFTER) and (out / "report.md").read_text() in shown
    assert "| resolution | D | D, one tile |" in shown and "| D, one tile |" in shown and (tmp_path / "nvlm-accuracy.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_training_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "base" / "text" / "checkpoints" / "step_2").mkdir(parents=True)
    (out / "base" / "text" / "checkpoints" / "step_2" / "manifest.json").write_text("no manifest")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(out, "--claims", "resolution")
    assert "text, seed 0, failed" in caught.value.stderr and "log.txt" in caught.value.stderr
