"""`neva generate --data` and `neva eval` as a user runs them: bad rows, kept answers, baselines."""

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import neva
from neva import api
from neva.cli import main
from neva.infer.generate import Loaded
from tests import runs

CASES = Path(__file__).parents[1] / "data" / "cases"
TINY = (
    "data.pool=32", "data.system=", "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=128",
    "log.tensorboard=false", "precision=fp32", "checkpoint.every=0", "data.workers=0",
)  # fmt: skip
LEARN = ("steps=30", "optim.lr=5e-3", "optim.warmup=3", "trainable=[*]")
SHORT = ("--max-new-tokens", "5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colour_data(tmp_path_factory.mktemp("data"))


def trained(data: Path, out: Path, recipe: str, *overrides: str) -> Path:
    source = (f"data.source={data}", f"data.image_folder={data.parent / 'images'}", f"out={out}")
    return neva.train(recipe, [*source, *TINY, *overrides], say=lambda text: None)


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has half learned to name the colours."""
    out = tmp_path_factory.mktemp("train") / "run"
    return trained(data, out, "llava-tiny/finetune", *LEARN)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return neva.load(checkpoint)


@pytest.fixture(scope="module")
def captioner(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template is `plain`."""
    return trained(data, tmp_path_factory.mktemp("plain") / "run", "llava-tiny/pretrain", "steps=1")


def case(name: str) -> tuple[str, ...]:
    """The options that name a case's files."""
    return "--data", str(CASES / name / "data.json"), "--image-folder", str(CASES / name / "images")


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="neva")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


# One bad row costs one row.


@pytest.mark.parametrize("fault", ["no marker", "cut image"])
def test_one_bad_row_costs_its_row(checkpoint: Path, tmp_path: Path, fault: str) -> None:
    """On the command line, as processes; the others are answered as without it."""
    folder = CASES / "generate-one-bad"
    rows = json.loads((folder / "data.json").read_text())
    fine = written(tmp_path / "fine.json", *rows[:20], *rows[21:])
    bad = rows[20]["id"]
    assert "<image>" not in rows[20]["conversations"][0]["value"]
    n, said = 39, "no <image> in its turns"
    if fault == "cut image":
        rows[20] |= {"image": "cut.png", "conversations": rows[0]["conversations"]}
        n, said = 40, "cut.png"  # its question can be read, so that it is one that is not answered
    asked = written(tmp_path / "data.json", *rows)
    given = (checkpoint, "--data", asked, "--image-folder", folder / "images", *SHORT)
    told = [json.loads(text) for text in runs.run("generate", *given, "--json").splitlines()]
    assert [row["id"] for row in told] == [row["id"] for row in rows]
    assert [row["id"] for row in told if "error" in row] == [bad]
    assert said in next(row["error"] for row in told if "error" in row)
    alone = cli("generate", checkpoint, "--data", fine, *given[3:], "--json").output
    assert [row for row in told if "error" not in row] == list(map(json.loads, alone.splitlines()))
    score = json.loads(runs.run("eval", *given, "--json"))
    assert (score["n"], score["answered"], len(score["errors"])) == (n, len(rows) - 1, 1)
    right = sum(row["text"] == "red" for row in told)
    assert score["overall"]["accuracy"] == right / n
    for name in ("generate", "eval"):
        strict = runs.run(name, *given, "--strict", code=1)
        wanted = f"error: 1 of {len(rows)} questions could not be asked (--strict)"
        assert strict.splitlines()[-1] == wanted


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_torn_row_of_the_file_costs_its_row(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    good = [json.dumps(runs.row(f"g{n}", f"Write the word red {n}.", "red")) for n in range(3)]
    texts = [good[0], "[1, 2]", good[1], good[0][:-9], good[2]]
    path = tmp_path / f"data.{kind}"
    path.write_text("\n".join(texts) if kind == "jsonl" else f"[{', '.join(texts)}]")
    shown = cli("generate", checkpoint, "--data", path, *SHORT, "--json")
    assert shown.exit_code == 0, shown.output
    told = [json.loads(line) for line in shown.output.splitlines()]
    assert [row["id"] for row in told if "error" not in row] == ["g0", "g1", "g2"]
    errors = [row["error"] for row in told if "error" in row]
    place = f"{path}:4" if kind == "jsonl" else f"{path}, row 3"
    assert "holds a list" in errors[0] and f"{place} is not JSON" in errors[1]
    score = api.evaluate(checkpoint, data=path, max_new_tokens=5)
    assert score["n"] == 3 and [error in errors for error in score["errors"]] == [True, True]
    kept = tmp_path / "kept.jsonl"
    assert cli("eval", checkpoint, "--data", path, *SHORT, "--out", kept).exit_code == 0
    assert [row["row"] for row in lines(kept)] == list(range(5))
    assert [row["row"] for row in lines(kept) if "error" in row] == [1, 3]


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_where_no_question_can_be_asked_the_exit_code_says_so(
    checkpoint: Path,
    tmp_path: Path,
    name: str,
) -> None:
    rows = [runs.row(f"b{n}", "<image>\nWhich?", "red", image="none.png") for n in range(2)]
    path = written(tmp_path / "data.json", *rows)
    shown = cli(name, checkpoint, "--data", path, "--image-folder", tmp_path, "--json")
    assert shown.exit_code == 1 and "no question of the file could be asked" in shown.stderr
    assert shown.stdout.count("none.png is missing") == 2


def test_questions_without_an_answer_are_answered(checkpoint: Path, tmp_path: Path) -> None:
    given = case("questions-only")
    (row,) = lines_of(cli("generate", checkpoint, *given, *SHORT, "--json"))
    assert set(row) == {"id", "text", "finish", "tokens"} and row["id"] == "q1" and row["tokens"]
    kept = tmp_path / "kept.jsonl"
    shown = cli("eval", checkpoint, *given, *SHORT, "--out", kept)
    assert shown.exit_code == 0 and "holds no answer: 1 question (" in shown.output
    (line,) = lines(kept)
    assert (line["text"], line["truth"], line["right"]) == (row["text"], None, None)
    score = json.loads((tmp_path / "kept.report.json").read_text())["score"]
    assert (score["n"], score["overall"], score["without_truth"]) == (0, None, 1)
    # Beside questions that have one, also as the last of several.
    talk = [("human", "Write the word red 1."), ("gpt", "red"), ("human", "And blue?")]
    turns = [{"from": who, "value": text} for who, text in talk]
    empty = [*turns[2:], {"from": "gpt", "value": ""}]
    rows = [{"id": "talk", "conversations": turns}, {"id": "empty", "conversations": empty}]
    path = written(tmp_path / "some.json", *rows)
    told = lines_of(cli("generate", checkpoint, "--data", path, *SHORT, "--json"))
    assert [row["id"] for row in told] == ["talk", "empty"] and "truth" not in told[0]
    some = json.loads(cli("eval", checkpoint, "--data", path, *SHORT, "--json").output)
    assert (some["n"], some["without_truth"], some["answered"]) == (1, 2, 3)


def lines_of(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


# A caption template.


def test_a_caption_template_asks_no_later_question(captioner: Path, tmp_path: Path) -> None:
    shown = cli("eval", captioner, *case("eval-plain"), *SHORT)
    assert shown.exit_code == 0 and "Left out: 1 question;" in shown.output
    ask = {"from": "human", "value": "<image>\nWhich?"}
    red = {"from": "gpt", "value": "red"}
    talk = [ask, red, {"from": "human", "value": "And the shape?"}, {"from": "gpt", "value": "dot"}]
    rows = [{"id": "talk", "image": "good.png", "conversations": talk}]
    one = [{"id": "talk", "image": "good.png", "conversations": talk[:2]}]
    images = CASES / "eval-plain" / "images"
    scores = [
        api.evaluate(
            captioner,
            data=written(tmp_path / "data.json", *rows),
            image_folder=images,
            max_new_tokens=3,
        )
        for rows in (rows, one)
    ]
    assert scores[0] == scores[1] | {"left_out": 1} and scores[0]["n"] == 1
    written(tmp_path / "data.json", *rows)
    given = ("--data", tmp_path / "data.json", "--image-folder", images)
    later = cli("generate", captioner, *given, *SHORT)
    assert later.exit_code == 1 and "this is a later one" in later.stderr


# Answers that are kept.


def test_what_is_kept_says_what_was_asked(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """The exact prompt, image sizes and settings, against what the file and Pillow say."""
    kept = tmp_path / "new" / "kept.jsonl"
    images = data.parent / "images"
    given = ("--data", data, "--image-folder", images, *SHORT, "--precision", "bf16")
    score = json.loads(cli("eval", checkpoint, *given, "--out", kept, "--json").output)
    rows = json.loads(data.read_text())
    answers = lines_of(cli("generate", checkpoint, *given, "--json"))
    for row, line, answer in zip(rows, lines(kept), answers, strict=True):
        question, truth = (turn["value"] for turn in row["conversations"])
        assert line["prompt"] == f"<s>USER: {question} ASSISTANT:"
        sizes = []
        if "image" in row:
            with Image.open(images / row["image"]) as image:
                sizes = [list(image.size)]
        assert (line["image_sizes"], line["truth"], line["id"]) == (sizes, truth, row["id"])
        assert (line["text"], line["finish"]) == (answer["text"], answer["finish"])
        assert len(line["tokens"]) == answer["tokens"] and line["kind"] == row["kind"]
        assert line["right"] == (answer["text"] == truth) and not line["blank"]
    report = json.loads((tmp_path / "new" / "kept.report.json").read_text())
    assert report["score"] == score and score["n"] == len(rows)
    settings = report["settings"]
    assert settings["template"] == "v1" and "ASSISTANT:" in settings["chat_template"]
    assert (settings["precision"], settings["device"]) == ("bfloat16", "cpu")
    assert settings["temperature"] == 0 and settings["max_new_tokens"] == 5
    assert settings["checkpoint"] == str(checkpoint) and settings["images"]["aspect"] == "pad"


def test_the_prompt_is_spelled_from_the_tokens_that_are_asked(loaded: Loaded, data: Path) -> None:
    source = api.LlavaSource(data, data.parent / "images")
    for index in range(4):
        sample = source[index]
        prompt = loaded.encoder.prompt(sample)
        encoded = loaded.encoder.encode(sample, labels=False)
        assert list(prompt.tokens) == encoded.tokens.tolist()
        plain = prompt.text.replace("<image>", "")
        spelled = loaded.encoder.tokenizer.decode([t for t in prompt.tokens if t >= 0])
        assert plain.removeprefix("<s>").split() == spelled.split()


Change = Callable[[list[str]], list[str]]
STOPPED: dict[str, Change] = {
    "between lines": lambda kept: kept[:7],
    "half a line": lambda kept: [*kept[:7], kept[7][: len(kept[7]) // 2]],
    "within a character": lambda kept: [*kept[:7], kept[7][:30]],
    "out of order": lambda kept: kept[3:9],
    "a damaged line": lambda kept: [*kept[:3], '{"row": 3}\n', "nonsense\n", *kept[5:7]],
    "nothing": lambda kept: [],
}


@pytest.mark.parametrize("name", ["generate", "eval"])
@pytest.mark.parametrize("stopped", STOPPED)
def test_what_is_kept_is_not_asked_again(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    stopped: str,
    name: str,
) -> None:
    """Kept answers are marked, to see that they are taken as they are; the rest comes out as in
    one go."""
    given = ("--data", data, "--image-folder", data.parent / "images", *SHORT, "--batch-size", 4)
    kept = tmp_path / "kept.jsonl"
    first = cli(name, checkpoint, *given, "--out", kept)
    assert first.exit_code == 0, first.output
    whole = kept.read_text().splitlines(keepends=True)
    change = STOPPED[stopped]
    marked = [line.replace('"text": "', '"text": "kept ', 1) for line in whole]
    kept.write_text("".join(change(marked)))
    again = cli(name, checkpoint, *given, "--out", kept)
    assert again.exit_code == 0, again.output
    taken = {line for line in change(marked) if line in marked}
    expected = [mark if mark in taken else line for line, mark in zip(whole, marked, strict=True)]
    assert kept.read_text().splitlines(keepends=True) == expected
    assert not list(tmp_path.glob(".*"))


def test_half_a_line_is_cut_off_before_another_is_written(
    loaded: Loaded,
    data: Path,
    tmp_path: Path,
) -> None:
    """So that a run that is stopped again leaves whole lines."""
    kept = tmp_path / "kept.jsonl"
    asked: dict[str, Any] = {"data": data, "image_folder": data.parent / "images", "out": kept}
    list(api.generate(loaded, **asked, max_new_tokens=1))
    whole = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(whole[:5]) + whole[5][:40])
    answers = api.generate(loaded, **asked, max_new_tokens=1, batch_size=1)
    for _ in range(7):
        next(answers)
    answers.close()
    assert kept.read_text().splitlines(keepends=True) == whole[:7]


def test_a_killed_evaluation_goes_on(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """With -9, in the middle: no line is lost, and the file is that of one go."""
    images = ("--image-folder", data.parent / "images")
    given = ("--data", data, *images, "--max-new-tokens", 40, "--batch-size", 1, "--blind")
    kept = tmp_path / "kept.jsonl"

    def count() -> int:
        return kept.read_bytes().count(b"\n") if kept.exists() else 0

    process = runs.start("eval", checkpoint, *given, "--out", kept)
    assert runs.wait_for(process, lambda: count() >= 9)
    runs.kill(process)
    survived = set(kept.read_text().splitlines()[:9])
    assert count() < 48
    score = json.loads(runs.run("eval", checkpoint, *given, "--out", kept, "--json"))
    whole = tmp_path / "whole.jsonl"
    assert json.loads(cli("eval", checkpoint, *given, "--out", whole, "--json").output) == score
    assert kept.read_bytes() == whole.read_bytes() and count() == 48
    assert survived <= set(kept.read_text().splitlines())


def test_a_mended_row_is_asked_again_and_only_that(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    shutil.copytree(CASES / "eval-crash", folder)
    given = ("--data", folder / "data.json", "--image-folder", folder / "images", *SHORT)
    kept = tmp_path / "kept.jsonl"
    assert cli("eval", checkpoint, *given, "--out", kept).exit_code == 0
    assert ["error" in line for line in lines(kept)] == [False, True]
    mark = kept.read_text().replace('"text": "', '"text": "kept ')
    kept.write_text(mark)
    shutil.copy(folder / "images" / "good.png", folder / "images" / "cut.png")
    assert cli("eval", checkpoint, *given, "--out", kept, "--strict").exit_code == 0
    first, second = lines(kept)
    assert first["text"].startswith("kept ") and "error" not in second
    assert not second["text"].startswith("kept ") and second["tokens"]
    # A question that was changed in the file is another one.
    rows = json.loads((folder / "data.json").read_text())
    rows[0]["conversations"][0]["value"] = "<image>\nWhich shape?"
    written(folder / "data.json", *rows)
    assert cli("eval", checkpoint, *given, "--out", kept, "--strict").exit_code == 0
    assert "Which shape?" in lines(kept)[0]["prompt"] and len(lines(kept)) == 2
    assert not lines(kept)[0]["text"].startswith("kept ")


OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "temperature": (("--temperature", "0.5"), "temperature 0.0, not 0.5"),
    "length": (("--max-new-tokens", "6"), "max_new_tokens 5, not 6"),
    "seed": (("--seed", "3"), "seed 0, not 3"),
    "stop": (("--stop", "x"), "stop [], not ['x']"),
    "precision": (("--precision", "bf16"), "precision 'float32', not 'bfloat16'"),
}


@pytest.mark.parametrize("other", [*OTHERS, "checkpoint", "template", "data", "command"])
def test_answers_of_other_settings_are_refused_by_name(
    checkpoint: Path,
    captioner: Path,
    tmp_path: Path,
    other: str,
) -> None:
    kept = tmp_path / "kept.jsonl"
    given = ("--out", str(kept), *SHORT)
    name, model, asked = "generate", checkpoint, case("eval-crash")
    assert cli(name, model, *asked, *given).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    more, message = OTHERS.get(other, ((), f"{other} "))
    if other in ("checkpoint", "template"):
        model = captioner
    elif other == "data":
        asked = case("eval-long")
    elif other == "command":
        name, message = "eval", "command 'generate', not 'eval'"
    refused = cli(name, model, *asked, *given, *more)
    assert refused.exit_code == 1 and message in refused.stderr, refused.output
    assert f"error: {kept} holds answers made with" in refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli("generate", checkpoint, *case("eval-crash"), *given).exit_code == 0


def test_a_file_that_is_not_its_own_is_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps(runs.row("a", "Say it.", "x")) + "\n")
    for data in (mine, CASES / "eval-long" / "data.json"):
        refused = cli("eval", checkpoint, "--data", data, "--out", mine)
        assert refused.exit_code == 1 and "no mine.report.json beside it" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert len(lines(mine)) == 1
    (tmp_path / "new.report.json").write_text("{}")
    refused = cli("eval", checkpoint, *case("eval-long"), "--out", tmp_path / "new.jsonl")
    assert refused.exit_code == 1 and (tmp_path / "new.report.json").read_text() == "{}"
    named = cli("eval", checkpoint, *case("eval-long"), "--out", tmp_path / "new.json")
    assert named.exit_code == 1 and "ends in .jsonl" in named.stderr
    with (tmp_path / "held.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held = cli("eval", checkpoint, *case("eval-long"), "--out", tmp_path / "held.jsonl")
    assert held.exit_code == 1 and "another process writes" in held.stderr


# What is had without looking.


def test_the_blind_baselines(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Blanked images score as a folder of black ones; the best answers are counted by hand."""
    images = data.parent / "images"
    for path in images.iterdir():
        with Image.open(path) as image:
            Image.new("RGB", image.size).save(tmp_path / path.name)
    given = (checkpoint, "--data", data, *SHORT, "--json", "--image-folder")
    blind = json.loads(cli("eval", *given, images, "--blind").output)
    black = json.loads(cli("eval", *given, tmp_path).output)
    plain = json.loads(cli("eval", *given, images).output)
    assert blind["blank_image"] == black["accuracy"] != plain["accuracy"] == blind["accuracy"]
    assert blind["overall"]["blank_image"] == black["overall"]["accuracy"]
    assert "blank_image" not in plain and plain["baselines"] == black["baselines"]
    rows = json.loads(data.read_text())
    for kind in ("colour", "copy"):  # no wording is asked ten times
        truths = Counter(row["conversations"][1]["value"] for row in rows if row["kind"] == kind)
        assert plain["baselines"][kind] == max(truths.values()) / truths.total()
        assert plain["counts"][kind] == truths.total()
    table = cli("eval", checkpoint, "--data", data, *SHORT, "--image-folder", images, "--blind")
    assert f"{blind['overall']['blank_image']:.1%}" in table.output.split("all ")[-1]


def test_progress_counts_all_questions(loaded: Loaded, data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    asked: dict[str, Any] = {"data": data, "image_folder": data.parent / "images"}
    kept = tmp_path / "kept.jsonl"
    more = {"batch_size": 10, "max_new_tokens": 1, "out": kept}
    api.evaluate(loaded, **asked, **more, progress=lambda *at: seen.append(at))
    assert seen == [(0, 24), (10, 24), (20, 24), (24, 24)]
    seen.clear()
    api.evaluate(loaded, **asked, **more, blind=True, progress=lambda *at: seen.append(at))
    assert seen == [(24, 48), (24, 48), (34, 48), (44, 48), (48, 48)]
    seen.clear()
    list(api.generate(loaded, **asked, batch_size=16, progress=lambda *at: seen.append(at)))
    assert seen == [(16, 24), (24, 24)]


# Where it runs.


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_one_line(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in (("generate", "--prompt", "x"), ("eval", *case("eval-plain"))):
        shown = cli(name[0], checkpoint, *name[1:], *SHORT, "--device", device or "cpu")
        if device:
            assert shown.exit_code == 1 and shown.stderr.startswith(f"error: device='{device}'")
            assert len(shown.stderr.splitlines()) == 1
        else:
            assert shown.exit_code == 0, shown.output


def test_a_loaded_model_is_not_loaded_otherwise(loaded: Loaded, data: Path) -> None:
    with pytest.raises(ValueError, match="precision: the model is loaded already"):
        list(api.generate(loaded, prompt="x", precision="bf16"))
    with pytest.raises(TypeError, match="temperature"):
        api.evaluate(loaded, data=data, temperature=1.0)
