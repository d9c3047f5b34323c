"""A run that is killed again and again, and resumed, is the undisturbed run bit for bit. Through the real command line.

The whole matrix (2 precisions, 3 numbers of workers, 10 kills each) is a soak test; `make test-all` runs a diagonal of it.
"""

import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from neva.checkpoint import store
from tests import runs

pytestmark = pytest.mark.slow

STEPS = 12
"""Of each of the two stages."""
PLAN = ("llava-tiny", *runs.SMALL, f"steps={STEPS}", "checkpoint.every=5", "checkpoint.keep_last=0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole run per precision."""
    outs = {precision: tmp_path_factory.mktemp(precision) / "run" for precision in ("fp32", "bf16")}
    for precision, out in outs.items():
        runs.run("train", *PLAN, f"precision={precision}", "data.workers=0", f"out={out}")
    return outs


def check_equal(out: Path, whole: Path) -> None:
    """Every field of every step, and every bit of the last weights, optimiser, random and data state."""
    assert [line["step"] for line in runs.metrics(out)] == list(range(1, 2 * STEPS + 1))
    assert runs.learned(out) == runs.learned(whole)
    for name in ("step_12", "step_24"):
        assert runs.digests(out / "checkpoints" / name) == runs.digests(whole / "checkpoints" / name)
    assert not list((out / "checkpoints").glob("*.tmp")) and (out / "checkpoints" / "latest").resolve().name == "step_24"


def saves(out: Path) -> set[tuple[str, int]]:
    """Saves that have begun and not ended: those going on, and those that a kill cut off."""
    found = set()
    for folder in (out / "checkpoints").glob("step_*.tmp"):
        with suppress(FileNotFoundError):
            found.add((folder.name, folder.stat().st_ino))
    return found


def kill_somewhere(process: subprocess.Popen[str], out: Path, chance: random.Random, *, in_save: bool) -> tuple[bool, list[psutil.Process]]:
    """Kill -9 at a random moment after some more steps, or after the start of the next save. Whether a save was cut off; the orphans."""
    old, before, want = saves(out), runs.steps_done(out), chance.randint(1, 4)
    pause = chance.uniform(0, 0.03 if in_save else 0.3)
    due = (lambda: bool(saves(out) - old)) if in_save else (lambda: runs.steps_done(out) >= before + want)
    if not runs.wait_for(process, due):
        return False, []
    end = time.monotonic() + pause
    runs.wait_for(process, lambda: time.monotonic() >= end)
    children = runs.kill(process) if process.poll() is None else []
    return bool(saves(out) - old), children


def killed_and_resumed(out: Path, whole: Path, *, precision: str, workers: int, kills: int, seed: int) -> int:
    """Kill and resume until it was killed `kills` times and then finish; the number of saves that were cut off."""
    chance, cut = random.Random(seed), 0
    command = ("train", *PLAN, f"precision={precision}", f"data.workers={workers}", f"out={out}")
    done, most = 0, 0
    while done < kills:
        process = runs.start(*command, "--resume", "auto")
        in_save, children = kill_somewhere(process, out, chance, in_save=done % 2 == 1)
        if process.poll() is not None and process.returncode != -signal.SIGKILL:  # it was faster than us: take some of it back, and go on
            said = "" if process.stdout is None or process.stdout.closed else runs.finish(process)
            assert process.returncode == 0, said
            for folder in store.published(out / "checkpoints")[: chance.randint(1, 4)]:
                shutil.rmtree(folder)
            lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
            (out / "metrics.jsonl").write_text("".join(lines[: max(runs.steps_kept(out), default=0)]))  # else no later run has more steps
            continue
        assert runs.survivors(children) == [], "processes outlived the run that had started them"
        done, cut, most = done + 1, cut + in_save, max(most, len(children))
    assert most >= workers, "no kill found all workers running"
    runs.run(*command, "--resume", "auto")
    check_equal(out, whole)
    return cut


@pytest.mark.parametrize(("precision", "workers"), [("fp32", 0), ("bf16", 1), ("fp32", 3)])
def test_three_kills_change_no_bit(undisturbed: dict[str, Path], tmp_path: Path, precision: str, workers: int) -> None:
    cut = killed_and_resumed(tmp_path / "run", undisturbed[precision], precision=precision, workers=workers, kills=3, seed=workers)
    assert cut >= 1, "no kill fell into a save"


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_kills_change_no_bit(undisturbed: dict[str, Path], tmp_path: Path, precision: str, workers: int) -> None:
    cut = killed_and_resumed(tmp_path / "run", undisturbed[precision], precision=precision, workers=workers, kills=10, seed=10 + workers)
    assert cut >= 3, "too few kills fell into a save"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_changes_no_bit(undisturbed: dict[str, Path], tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "run"
    command = ("train", *PLAN, "precision=fp32", "data.workers=1", f"out={out}")
    process = runs.start(*command)
    assert runs.wait_for(process, lambda: runs.steps_done(out) >= (3 if number == signal.SIGTERM else 14))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = runs.finish(process)
    assert process.returncode == code
    stopped = re.search(r"Stopped at step (\d+) of 24, saved in (\S+)\. Go on with the same command and --resume auto\.", said)
    assert stopped and "Traceback" not in said
    assert len(runs.metrics(out)) == int(stopped[1]) == runs.steps_kept(out)[-1] and Path(stopped[2]).name == f"step_{stopped[1]}"
    assert runs.survivors(children) == []
    assert f"at step {stopped[1]} from" in runs.run(*command, "--resume", "auto")
    check_equal(out, undisturbed["fp32"])


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_neither_repeated_nor_overwritten(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed["fp32"], out, symlinks=True)
    again = (*PLAN, "precision=fp32", "data.workers=0", f"out={out}")
    before = tree_of(out)
    said = runs.run("train", *again, code=1)
    assert f"error: {out} holds a run already. Go on with it: --resume auto" in said and tree_of(out) == before
    other = tmp_path / "other" / "run"
    other.parent.mkdir()
    said = runs.run("train", *again, "--resume", undisturbed["fp32"], code=1)
    assert "is not one of its checkpoints" in said and tree_of(out) == before
    said = runs.run("train", *again, "--resume", "auto")
    assert "Nothing left to do" in said and "step_24 is the last step" in said
    assert {name for name, content in tree_of(out).items() if before.get(name) != content} <= {"config.yaml", "report.html"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_corrupt_newest_checkpoint_is_refused_by_path_and_passed_over_by_auto(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed["fp32"], out, symlinks=True)
    newest = out / "checkpoints" / "step_24"
    flip(newest / "weights" / "__0_0.distcp")
    before = tree_of(out)
    command = ("train", *PLAN, "precision=fp32", "data.workers=0", f"out={out}")
    for path in (newest, out):
        said = runs.run(*command, "--resume", path, code=1)
        assert "corrupt, the checksum is not the manifest's" in said and "--resume auto" in said and "Traceback" not in said
        assert tree_of(out) == before
    said = runs.run(*command, "--resume", "auto")
    assert "CORRUPT CHECKPOINT" in said and "IS PASSED OVER; trying step_22" in said and "at step 22 from" in said
    check_equal(out, undisturbed["fp32"])
    assert (out / "checkpoints" / "step_24.corrupt").is_dir()


def test_going_on_from_an_older_checkpoint_by_path_sets_the_newer_aside(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed["bf16"], out, symlinks=True)
    command = ("train", *PLAN, "precision=bf16", "data.workers=0", f"out={out}")
    process = runs.start(*command, "--resume", out / "checkpoints" / "step_10")
    assert runs.wait_for(process, lambda: runs.steps_done(out) in (11, 12))
    runs.kill(process)
    # Without that, auto would now go on from step 24, and metrics.jsonl would have a hole.
    assert {path.name for path in (out / "checkpoints").glob("*.replaced")} == {f"step_{n}.replaced" for n in (12, 17, 22, 24)}
    runs.run(*command, "--resume", "auto")
    check_equal(out, undisturbed["bf16"])


def test_a_saved_config_repeats_the_run_bit_for_bit(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    runs.run("train", undisturbed["bf16"] / "config.yaml", f"out={tmp_path / 'run'}", "data.workers=2")
    check_equal(tmp_path / "run", undisturbed["bf16"])


def test_a_run_goes_on_in_another_folder_from_a_checkpoint_by_path(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.run("train", *PLAN, "precision=fp32", "data.workers=0", f"out={out}", "--resume", undisturbed["fp32"] / "checkpoints" / "step_17")
    assert runs.learned(out) == runs.learned(undisturbed["fp32"])[17:]
    assert runs.digests(out / "checkpoints" / "step_24") == runs.digests(undisturbed["fp32"] / "checkpoints" / "step_24")
