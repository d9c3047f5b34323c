"""What a user gets wrong ends in one error line with the sample or key and the fix, a non-zero exit code, and nothing lost."""

import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from neva.cli import main
from neva.training.metrics import Reporter, StepReport
from tests import runs

SMALL = (
    "log.tensorboard=false", "data.workers=0", "data.pool=8", "batch.seq_length=128", "batch.rows=4", "steps=2",
    "model.decoder.layers=1", "data.system=",
)  # fmt: skip


def neva(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def train(out: Path, *overrides: object) -> Result:
    """One stage of llava-tiny on the overrides' data."""
    words = ("data.sources.0.mock.words=[4,20]",) if not any(str(o).startswith("data.source=") for o in overrides) else ()
    return neva("train", "llava-tiny/finetune", *SMALL, *words, f"out={out}", *overrides)


def must_fail(result: Result, *words: str) -> None:
    """A non-zero exit code and one error that holds the words, without a traceback."""
    assert result.exit_code not in (0, None), result.output
    assert "error: " in result.output and "Traceback" not in result.output, result.output
    for word in words:
        assert word in result.output, f"{word!r} is not in: {result.output}"


def data_file(tmp_path: Path, *rows: object) -> Path:
    """The rows as a data file beside images/good.png."""
    runs.picture(tmp_path / "images" / "good.png", (250, 10, 10))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


GOOD = runs.row("good", "<image>\nWhich colour?", "red", image="good.png")


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(60_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("none.png", None, "none.png"),
        ("empty.png", b"", "empty"),
        ("text.png", b"no image", "text.png"),
        ("bomb.png", bomb(), "pixels"),
        ("cut.png", b"cut", "cut.png"),
    ],
)
def test_images_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, word: str) -> None:
    path = data_file(tmp_path, GOOD, runs.row("bad", "<image>\nWhat?", "x", image=name))
    if content == b"cut":
        content = (tmp_path / "images" / "good.png").read_bytes()[:60]
    if content is not None:
        (tmp_path / "images" / name).write_bytes(content)
    source = (f"data.source={path}", f"data.image_folder={tmp_path / 'images'}")
    must_fail(train(tmp_path / "run", *source), "'bad'", word)
    skipped = train(tmp_path / "skip", *source, "data.on_error=skip")
    assert skipped.exit_code == 0, skipped.output
    assert runs.metrics(tmp_path / "skip")[-1]["skipped_samples"] > 0


BAD_ROWS = {
    "an image without a marker": (runs.row("bad", "What?", "x", image="good.png"), "<image>"),
    "two markers, one image": (runs.row("bad", "<image><image>What?", "x", image="good.png"), "2 <image>"),
    "a marker without an image": (runs.row("bad", "<image>What?", "x"), "<image>"),
    "an unknown role": ({"id": "bad", "conversations": [{"from": "robot", "value": "a"}, {"from": "gpt", "value": "b"}]}, "robot"),
    "an empty answer": (runs.row("bad", "What?", ""), "empty"),
    "no conversation": ({"id": "bad", "conversations": []}, "conversations"),
    "a path that climbs out": (runs.row("bad", "<image>What?", "x", image="../data.json"), ".."),
    "an absolute path": (runs.row("bad", "<image>What?", "x", image="/etc/hostname"), "absolute"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_samples_that_do_not_fit(tmp_path: Path, case: str) -> None:
    row, word = BAD_ROWS[case]
    path = data_file(tmp_path, GOOD, row)
    must_fail(train(tmp_path / "run", f"data.source={path}", f"data.image_folder={tmp_path / 'images'}"), "'bad'", word)


def test_a_link_out_of_the_image_folder(tmp_path: Path) -> None:
    path = data_file(tmp_path, GOOD, runs.row("bad", "<image>What?", "x", image="link.png"))
    runs.picture(tmp_path / "outside.png", (1, 2, 3))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    must_fail(train(tmp_path / "run", f"data.source={path}", f"data.image_folder={tmp_path / 'images'}"), "'bad'", "outside")


def test_over_long_samples_are_dropped_with_a_count_cut_or_refused(tmp_path: Path) -> None:
    long = runs.row("long", "Say it.", "word " * 400)
    path = data_file(tmp_path, GOOD, long)
    source = (f"data.source={path}", f"data.image_folder={tmp_path / 'images'}")
    assert train(tmp_path / "drop", *source).exit_code == 0
    assert runs.metrics(tmp_path / "drop")[-1]["skipped_samples"] > 0
    assert train(tmp_path / "cut", *source, "data.over_long=truncate").exit_code == 0
    assert runs.metrics(tmp_path / "cut")[-1]["skipped_samples"] == 0
    must_fail(train(tmp_path / "error", *source, "data.over_long=error"), "'long'", "seq_length")


def test_truncation_that_leaves_no_label(tmp_path: Path) -> None:
    path = data_file(tmp_path, runs.row("bad", "word " * 400, "x"))
    must_fail(train(tmp_path / "run", f"data.source={path}", "data.over_long=truncate"), "'bad'", "no label is left")


BAD_OVERRIDES = {
    "an unknown key": ("model.decoder.layerz=2", "Did you mean 'layers'?"),
    "a wrong type": ("optim.lr=fast", "optim.lr"),
    "an unknown stage": ("finetuen:steps=3", "finetune"),
    "no value": ("steps", "key=value"),
    "an unknown preset": ("optim=adamv", "adamw"),
    "a pattern that matches nothing": ("trainable=[projectr.*]", "projectr.*"),
    "rows that do not divide": ("batch.micro_rows=3", "batch.rows"),
    "no data file": ("data.source=/nowhere/x.json", "/nowhere/x.json"),
    "no tokenizer": ("data.tokenizer=/nowhere", "/nowhere"),
    "a vocabulary that is too small": ("model.decoder.vocab=100", "model.decoder.vocab"),
    "rows shorter than an image": ("batch.seq_length=16", "seq_length"),
    "heads that do not divide": ("model.decoder.kv_heads=3", "kv_heads"),
    "an unknown projector": ("model.projector=mlp", "mlpNx_gelu"),
    "no steps": ("steps=0", "steps"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_wrong_overrides(tmp_path: Path, case: str) -> None:
    override, word = BAD_OVERRIDES[case]
    result = train(tmp_path / "run", override)
    assert result.exit_code != 0 and "Traceback" not in result.output and word in result.output, result.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_recipe_and_bad_checkpoints(tmp_path: Path) -> None:
    must_fail(neva("train", "demoo"), "demo")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        must_fail(neva("generate", path, "--prompt", "x"), path.name)
        must_fail(neva("eval", path, "--data", data_file(tmp_path, GOOD)), path.name)


def test_a_run_folder_that_is_taken_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "run"
    taken = train(out)
    assert taken.exit_code == 0, taken.output
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    must_fail(train(out, "seed=3"), "--resume auto", "out=")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_folder_that_another_process_trains_in(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        must_fail(train(out), "another process", "out=")
    assert train(out).exit_code == 0


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    must_fail(train(tmp_path / "file" / "run"), "file")
    must_fail(train(tmp_path / "file"), "file")


def test_what_would_stop_a_later_stage_is_found_before_the_first(tmp_path: Path) -> None:
    for override, words in {
        "finetune:batch.rows=3": ("batch.rows is 3", "set it to 2 or 4"),
        "finetune:trainable=[projectr.*]": ("projectr.*",),
        "finetune:init=/nowhere": ("/nowhere", "there is no such path"),
        "finetune:evaluate.every=1": ("stage finetune", "evaluate.source=FILE"),
        "finetune:evaluate={every: 1, source: /nowhere.json}": ("/nowhere.json",),
        "finetune:checkpoint.every=-1": ("stage finetune", "checkpoint.every=-1"),
        "finetune:data={source: /nowhere.json}": ("stage finetune", "/nowhere.json"),
        "finetune:data.image_folder=/nowhere": ("stage finetune", "data.source"),
    }.items():
        result = neva("train", "llava-tiny", *SMALL, "data.sources.0.mock.words=[4,20]", "batch.micro_rows=2", f"out={tmp_path / 'run'}", override)
        must_fail(result, *words)
        assert not (tmp_path / "run").exists(), override


def test_an_image_folder_that_is_not_there(tmp_path: Path) -> None:
    path = data_file(tmp_path, GOOD)
    must_fail(train(tmp_path / "run", f"data.source={path}", "data.image_folder=/nowhere"), "the image folder /nowhere is not there")
    must_fail(train(tmp_path / "run", f"data.source={path}"), "'good'", "image_folder")


def test_a_corrupt_checkpoint_answers_nothing(tmp_path: Path) -> None:
    taken = train(tmp_path / "run")
    assert taken.exit_code == 0, taken.output
    weights = tmp_path / "run" / "checkpoints" / "step_2" / "weights" / "__0_0.distcp"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    held_out = data_file(tmp_path, runs.row("a", "What?", "x"))
    for command in (("generate", tmp_path / "run", "--prompt", "x"), ("eval", tmp_path / "run", "--data", held_out)):
        must_fail(neva(*command), "__0_0.distcp", "corrupt")
    must_fail(train(tmp_path / "next", f"init={tmp_path / 'run'}"), "__0_0.distcp", "corrupt")


def test_a_question_that_does_not_fit_names_the_sample(tmp_path: Path) -> None:
    taken = train(tmp_path / "run")
    assert taken.exit_code == 0, taken.output
    runs.picture(tmp_path / "a.png", (1, 2, 3))
    for args, words in (
        (("--prompt", "<image><image>?", "--image", tmp_path / "a.png"), ("2 <image>", "1 image")),
        (("--prompt", "word " * 3000), ("positions end at 2048",)),
        (("--data", data_file(tmp_path, runs.row("bad", "<image>?", "x", image="none.png")), "--image-folder", tmp_path), ("'bad'", "none.png")),
    ):
        must_fail(neva("generate", tmp_path / "run", *args), *words)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounts a small disk, which only root may do, on Linux")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "run"
        more = ("steps=6", "checkpoint.every=2", "checkpoint.keep_last=0", "precision=fp32")
        must_fail(train(out, *more), "step_4.tmp: No space left on device", "are free", "Older checkpoints are untouched")
        assert runs.steps_kept(out) == [2] and not list((out / "checkpoints").glob("*.tmp"))
        good = runs.digests(out / "checkpoints" / "step_2")
        free = shutil.disk_usage(disk).free
        (disk / "full").write_bytes(bytes(free))
        must_fail(train(out, *more, "--resume", "auto"), f"cannot write to the run folder {out} (No space left on device)", "out=FOLDER")
        assert runs.digests(out / "checkpoints" / "step_2") == good and len(runs.metrics(out)) == 4
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_metrics_that_cannot_be_written_stop_the_run_and_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Reporter, report: StepReport) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "write", full)
        must_fail(train(tmp_path / "run"), f"cannot write step 1 to {tmp_path / 'run' / 'metrics.jsonl'} (No space left on device)", "--resume auto")
    assert train(tmp_path / "run", "--resume", "auto").exit_code == 0
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == [1, 2]


def test_a_full_disk_names_the_path_and_keeps_older_checkpoints(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails inside a checkpoint's weights."""
    out = tmp_path / "run"
    taken = train(out)
    assert taken.exit_code == 0, taken.output
    good = runs.digests(out / "checkpoints" / "step_2")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from neva.cli import main;"
        "import neva.api; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); main(sys.argv[1:])"
    )
    overrides = (*SMALL, "data.sources.0.mock.words=[4,20]", "steps=4", f"out={out}")
    command = [sys.executable, "-c", code, "train", "llava-tiny/finetune", *overrides, "--resume", "auto"]
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=runs.SECONDS)
    assert done.returncode == 1 and "Traceback" not in done.stderr and str(out) in done.stderr, done.stderr
    assert runs.steps_kept(out) == [2] and runs.digests(out / "checkpoints" / "step_2") == good
    assert train(out, "steps=4", "--resume", "auto").exit_code == 0
    assert [line["step"] for line in runs.metrics(out)] == [1, 2, 3, 4]


def test_left_out_samples_are_named_as_they_are_met(tmp_path: Path) -> None:
    path = data_file(tmp_path, GOOD, *(runs.row(f"long{n}", "Say it.", "word " * 400) for n in range(6)))
    said = (
        train(tmp_path / "run", f"data.source={path}", f"data.image_folder={tmp_path / 'images'}").output.replace("\n", " ").split("Left out: ")[1:]
    )
    assert len(said) == 3 and all("'long" in text and "raise batch.seq_length" in text for text in said)


def test_missing_images_of_the_evaluation_are_found_before_training(tmp_path: Path) -> None:
    path, asked = data_file(tmp_path, GOOD), tmp_path / "asked.json"
    asked.write_text(json.dumps([{**json.loads(path.read_text())[0], "image": "nope.png"}]))
    images = tmp_path / "images"
    given = (f"data.source={path}", f"data.image_folder={images}", f"evaluate.source={asked}", f"evaluate.image_folder={images}")
    must_fail(train(tmp_path / "run", *given, "evaluate.every=1"), "nope.png", "evaluate.source")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_failed_before_its_first_step_does_not_hold_its_folder(tmp_path: Path) -> None:
    bad = data_file(tmp_path, runs.row("bad", "word " * 400, "x"))
    must_fail(train(tmp_path / "run", f"data.source={bad}", "data.over_long=truncate"), "no label is left")
    good = data_file(tmp_path, GOOD)
    assert train(tmp_path / "run", f"data.source={good}", f"data.image_folder={tmp_path / 'images'}").exit_code == 0
