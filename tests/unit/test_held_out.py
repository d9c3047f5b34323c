"""Evaluation while training: held-out rows that are bad end no run, and are named and counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from neva import api
from neva.cli import main
from neva.evaluate import held_out
from tests import runs

CASES = Path(__file__).parents[1] / "data" / "cases"
TINY = (
    "data.workers=0", "data.pool=8", "batch.seq_length=128", "batch.rows=4", "model.decoder.layers=1",
    "model.vision.layers=2", "log.tensorboard=false", "data.system=", "precision=fp32",
)  # fmt: skip


def given(out: Path, source: Path, images: Path | None = None, *more: str) -> list[str]:
    """A tiny run on the colours, evaluated on `source`."""
    data = out.parent / "colours" / "data.json"
    if not data.exists():
        runs.colour_data(data.parent)
    trains = [f"data.source={data}", f"data.image_folder={data.parent / 'images'}", f"out={out}"]
    asked = [f"evaluate.source={source}", f"evaluate.image_folder={images or ''}"]
    return [*TINY, *trains, *asked, "evaluate.every=1", *more]


def of_case(out: Path, name: str, *more: str) -> list[str]:
    return given(out, CASES / name / "data.json", CASES / name / "images", *more)


def train(*args: str) -> Result:
    return CliRunner().invoke(main, ["train", *args], prog_name="neva")


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def test_a_cut_image_ends_no_training_and_no_resumed_one(tmp_path: Path) -> None:
    """On the command line. The header of a cut image is whole, so that only asking finds it."""
    out = tmp_path / "run"
    asked = of_case(out, "eval-crash")
    first = runs.run("train", "llava-tiny/finetune", *asked, "steps=2")
    assert first.count("evaluate.source: 1 of 2 questions were not asked: sample 'cut'") == 2
    again = runs.run("train", "llava-tiny/finetune", *asked, "steps=4", "--resume", "auto")
    assert again.count("evaluate.source: 1 of 2 questions were not asked: sample 'cut'") == 2
    assert [(line["step"], line["not_asked"]) for line in evaluations(out)] == [(step, 1) for step in range(1, 5)]
    score = api.evaluate(out, data=CASES / "eval-crash" / "data.json", image_folder=CASES / "eval-crash" / "images")
    assert score["accuracy"]["data"] == evaluations(out)[-1]["data"] and score["n"] == 2


@pytest.mark.parametrize("lost", ["within a stage", "at its end", "at the end of all"])
def test_an_evaluation_that_a_kill_cut_off_is_done_when_the_run_goes_on(
    tmp_path: Path,
    lost: str,
) -> None:
    """The process dies after the checkpoint and before the line, as it would in an evaluation."""
    out = tmp_path / "run"
    steps = ("pretrain:steps=2", "finetune:steps=2", "checkpoint.keep_last=0")
    asked = ["llava-tiny", *of_case(out, "eval-crash", *steps)]
    whole = train(*asked)
    assert whole.exit_code == 0, whole.output
    lines = (out / "evaluations.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    step = {"within a stage": 3, "at its end": 2, "at the end of all": 4}[lost]
    for later in range(step + 1, 5):
        shutil.rmtree(out / "checkpoints" / f"step_{later}")
    (out / "evaluations.jsonl").write_text("".join(lines[: step - 1]) + lines[step - 1][:9])
    resumed = train(*asked, "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert (out / "evaluations.jsonl").read_text().splitlines(keepends=True) == lines
    before = (out / "evaluations.jsonl").read_bytes()
    assert train(*asked, "--resume", "auto").exit_code == 0
    assert (out / "evaluations.jsonl").read_bytes() == before


BAD: dict[str, tuple[Any, str]] = {
    "long": (runs.row("bad", "word " * 3000, "x"), "positions end at 2048"),
    "missing image": (runs.row("bad", "<image>?", "x", image="none.png"), "none.png is missing"),
    "no image": (runs.row("bad", "<image>?", "x", image="text.png"), "text.png cannot be read"),
    "no marker": (runs.row("bad", "What?", "x", image="red.png"), "no <image>"),
    "no object": (["bad"], "holds a list"),
    "outside": (runs.row("bad", "<image>?", "x", image="../x.png"), "holds '..'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows_are_named_at_the_start_and_counted(tmp_path: Path, fault: str) -> None:
    row, message = BAD[fault]
    runs.picture(tmp_path / "red.png", (250, 10, 10))
    (tmp_path / "text.png").write_text("no image")
    source = tmp_path / "asked.json"
    good = runs.row("good", "<image>\nWhich colour?", "red", image="red.png")
    source.write_text(json.dumps([good, row, runs.row("text", "Write the word red 1.", "red")]))
    asked = given(tmp_path / "run", source, tmp_path, "steps=1")
    for more in (("--dry-run",), ()):
        shown = train("llava-tiny/finetune", *asked, *more)
        assert shown.exit_code == 0, shown.output
        start = shown.output.split("finetune 1/1")[0]
        assert "evaluate.source: 1 of 3 questions cannot be asked" in start
        assert message in start
    assert "evaluate.source: 1 of 3 questions were not asked" in shown.output
    (line,) = evaluations(tmp_path / "run")
    assert line["not_asked"] == 1 and "asked" in line


def test_a_question_that_is_too_long_is_named_at_the_start(tmp_path: Path) -> None:
    """All that the case asks is too long: there is nothing to evaluate on."""
    shown = train("llava-tiny/finetune", *of_case(tmp_path / "run", "eval-long", "steps=1"))
    assert shown.exit_code == 1 and "evaluate.source=" in shown.output
    assert "no question can be asked" in shown.output and "positions end at" in shown.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_caption_stage_is_evaluated_on_first_questions_of_images(tmp_path: Path) -> None:
    """Of both stages; the second, whose template asks all, has all questions."""
    asked = of_case(tmp_path / "run", "eval-plain", "pretrain:steps=1", "finetune:steps=1")
    shown = train("llava-tiny", *asked)
    assert shown.exit_code == 0, shown.output
    lines = [line for line in shown.output.splitlines() if "evaluate.source" in line]
    assert len(lines) == 1 and lines[0].startswith("Stage pretrain: evaluate.source: template")
    assert lines[0].endswith("first questions of images alone: 1 others are left out")
    assert [set(line) for line in evaluations(tmp_path / "run")] == [{"stage", "step", "data"}] * 2
    source = tmp_path / "text.json"
    source.write_text(json.dumps([runs.row("t", "Say red", "red")]))
    nothing = train("llava-tiny/pretrain", *given(tmp_path / "other", source))
    assert nothing.exit_code == 1 and "template 'plain' asks, but 1 others" in nothing.output


def test_what_is_not_there_is_called_by_its_key(tmp_path: Path) -> None:
    source = tmp_path / "asked.json"
    source.write_text(json.dumps([runs.row("t", "Say red", "red")]))
    bad = tmp_path / "bad.json"
    bad.write_text("no list")
    unanswered = tmp_path / "unanswered.json"
    turn = {"from": "human", "value": "Say red"}
    unanswered.write_text(json.dumps([{"id": "q", "conversations": [turn]}]))
    for asked, images, words in (
        (tmp_path / "aksed.json", None, ("evaluate.source=", "is missing", "'asked.json'?")),
        (tmp_path / "none" / "a.json", None, ("evaluate.source=", "is missing")),
        (source, tmp_path / "none", ("evaluate.image_folder=", "is missing")),
        (bad, None, ("evaluate.source: ", "is not a list")),
        (unanswered, None, ("evaluate.source=", "holds no question with an answer")),
    ):
        for more in ((), ("--dry-run",)):
            asks = given(tmp_path / "run", asked, images, "steps=1", *more)
            shown = train("llava-tiny/finetune", *asks)
            assert shown.exit_code == 1, shown.output
            assert all(word in shown.output for word in ("error: stage finetune: ", *words))
            assert not (tmp_path / "run").exists()


def test_a_look_at_many_questions_ends_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [runs.row(f"t{n}", "Say red", "red") for n in range(9)]
    source = tmp_path / "asked.json"
    source.write_text(json.dumps([*rows, runs.row("long", "word " * 3000, "red")]))
    monkeypatch.setattr(held_out, "SECONDS", 0.0)
    shown = train("llava-tiny/finetune", *given(tmp_path / "run", source, None, "--dry-run"))
    assert shown.exit_code == 0, shown.output
    assert "evaluate.source: 1 of 10 questions were looked at" in shown.output


def test_a_row_that_is_mended_while_a_run_waits_is_asked(tmp_path: Path) -> None:
    """The source is read anew at each evaluation, and when a run goes on."""
    folder = tmp_path / "case"
    shutil.copytree(CASES / "eval-crash", folder)
    out = tmp_path / "run"
    asked = given(out, folder / "data.json", folder / "images")
    assert train("llava-tiny/finetune", *asked, "steps=1").exit_code == 0
    (folder / "images" / "cut.png").unlink()
    shutil.copy(folder / "images" / "good.png", folder / "images" / "cut.png")
    assert train("llava-tiny/finetune", *asked, "steps=2", "--resume", "auto").exit_code == 0
    assert ["not_asked" in line for line in evaluations(out)] == [True, False]
