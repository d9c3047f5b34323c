"""The parts of examples/real that need no pre-trained weights."""

import fcntl
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from examples.real import __main__ as example
from examples.real import pictures, report
from examples.real.place import placed, write
from neva.data.image import open_image
from neva.data.source import LlavaSource


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "data"
    pictures.write_data(folder)
    return folder


def rows_of(data: Path, name: str) -> list[dict]:
    return json.loads((data / f"{name}.json").read_text(encoding="utf-8"))


def test_every_file_is_read_and_every_picture_opens(data: Path) -> None:
    for name in ("captions", "shapes", "signs", "heldout", "facts", "instructions", "prompts"):
        source = LlavaSource(data / f"{name}.json", data, questions=True)
        samples = [source[index] for index in range(len(source))]
        assert samples
        assert all(isinstance(p, Path) and p.is_file() for s in samples for p in s.images)
    files = [*data.rglob("*.png"), *data.rglob("*.jpg")]
    assert {open_image(file).size for file in files} == {(64, 64)}


def test_no_held_out_picture_is_trained(data: Path) -> None:
    held = {row["image"] for row in rows_of(data, "heldout")}
    trained = {row["image"] for n in ("captions", "shapes", "signs") for row in rows_of(data, n)}
    assert len(held) == 2 * pictures.HELD_OUT
    assert not held & trained
    assert len(held | trained) == 2000


def test_held_out_questions_stand_alone_and_are_told_nothing_by_their_wording(data: Path) -> None:
    rows = rows_of(data, "heldout")
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(report.KINDS, 60)
    assert all(len(row["conversations"]) == 2 for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    answers = Counter(r["conversations"][1]["value"] for r in rows if r["kind"] == "yes_no")
    assert answers == {"yes": 30, "no": 30}
    # Whether a shape or a colour is asked for tells nothing either.
    asked = [r["conversations"] for r in rows if r["kind"] == "yes_no"]
    about_shape = [a for q, a in asked if any(shape in q["value"] for shape in pictures.SHAPES)]
    assert Counter(a["value"] for a in about_shape) == {"yes": 15, "no": 15}


def test_answers_are_what_the_pictures_show(data: Path) -> None:
    lines = (data / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {label["image"]: label for label in map(json.loads, lines)}
    fields = {"shape": "shape", "colour": "colour", "sign": "digit"}
    for row in rows_of(data, "heldout"):
        question, answer = (turn["value"] for turn in row["conversations"])
        label = labels[row["image"]]
        if row["kind"] != "yes_no":
            assert answer == label[fields[row["kind"]]]
            continue
        named = {word.strip("?") for word in question.split()}
        assert (answer == "yes") == bool(named & {label["shape"], label["colour"]})


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(RuntimeError), placed(target) as part:
        write(part / "first", "1")
        raise RuntimeError
    assert not target.exists()
    with placed(target) as part:
        assert not (part / "first").exists()  # of the try that broke off
        write(part / "second", "2")
    assert [file.name for file in target.iterdir()] == ["second"]


def test_a_part_whose_result_is_there_is_passed_over(tmp_path: Path) -> None:
    place = example.Place(out=tmp_path)
    made: list[str] = []

    def make(place: example.Place) -> None:
        made.append("made")
        write(place / "result.json", "{}")

    part = example.Part(what="A part", result="result.json", make=make)
    for _ in range(2):
        example.do(part, place, "title")
    assert made == ["made"]
    assert json.loads((tmp_path / "parts.jsonl").read_text())["part"] == "A part"


def test_a_folder_of_another_length_of_training_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "trained.json", json.dumps([4, 5]))
    example.check_steps(example.Place(out=tmp_path, steps=(4, 5)))
    with pytest.raises(SystemExit, match="name another --out"):
        example.check_steps(example.Place(out=tmp_path))


def test_two_starts_do_not_work_in_one_folder(tmp_path: Path) -> None:
    """The lock outlives a start that was killed as long as its command runs on."""
    place = example.Place(out=tmp_path)
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    with example.alone(place):
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, close_fds=False, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline()
    try:
        assert is_locked(place)
    finally:
        child.kill()
        child.communicate()
    assert not is_locked(place)


def is_locked(place: example.Place) -> bool:
    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_text_is_trained_only_where_the_decoder_ended_its_answer(tmp_path: Path) -> None:
    answers = [
        {"id": "do-0", "text": "The sea is wide.", "finish": "stop"},
        {"id": "do-1", "text": "A bridge is", "finish": "length"},
    ]
    pictures.write_text(answers, tmp_path)
    (row,) = json.loads((tmp_path / "text.json").read_text())
    assert [turn["value"] for turn in row["conversations"]] == [
        "Write a sentence about the sea.",
        "The sea is wide.",
    ]


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("The capital of France is Paris.", True),
        ("PARIS", True),
        ("Parisian", False),
        ("It is Lyon.", False),
        ("", False),
    ],
)
def test_a_fact_is_known_if_its_word_stands_in_the_answer(answer: str, known: bool) -> None:
    assert pictures.knows({"answer": "Paris"}, answer) == known


def test_one_of_several_words_is_enough() -> None:
    assert pictures.knows({"answer": "eight|8"}, "A spider has 8 legs.")
    assert pictures.knows({"answer": "South America"}, "It is in South America.")
    assert not pictures.knows({"answer": "South America"}, "It is in America, in the South.")


def test_the_report_holds_a_runs_figures(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "after").mkdir()
    lines = []
    for number, row in enumerate(rows_of(data, "heldout")):
        truth = row["conversations"][1]["value"]
        line = {"id": row["id"], "kind": row["kind"], "truth": truth, "text": truth, "right": True}
        if number % 4 == 0:
            line |= {"text": "perhaps", "right": False}
        lines += [line | {"blank": blank} for blank in (False, True)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "after" / "heldout.jsonl").write_text(text)
    shares = dict.fromkeys(report.KINDS, 0.75)
    score = {"accuracy": shares, "blank_image": shares, "baselines": {**shares, "sign": 0.125}}
    (tmp_path / "after" / "heldout.report.json").write_text(json.dumps({"score": score}))
    said = {"facts": 29, "of": 40, "prompts": ["The capital\nof France | is Paris."] * 6}
    equal = {"heldout": {"equal": 239, "of": 240}, "prompts": {"equal": 6, "of": 6}, "apart": []}
    texts = {"lines": 3000, "ids_equal": 2999, "prompts": 6, "text_equal": 6}
    files = {"before": said, "after": {**said, "facts": 28}, "trained": [55, 24]}
    for name, found in {**files, "decoder": texts, "transformers": equal}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    spent = [{"part": "Train", "seconds": 61.2, "cpu_seconds": 120.0}] * 2
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in spent))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made by examples.real -->\nold\n<!-- end -->\nbehind\n")

    report.make(tmp_path, page)

    told = page.read_text()
    assert told.startswith("before\n<!-- made by examples.real -->\nTrained")
    assert told.endswith("|\n<!-- end -->\nbehind\n")
    assert "| Which digit does the hand show? (10) | 75% | 75% | 12% |" in told
    assert "Trained for 55 and 24 steps." in told
    assert "it tells 29 before training and 28 after" in told
    assert "| The capital of France \\| is Paris. |" in told
    assert "| token ids of lines of text | 2,999 of 3,000 |" in told
    assert "| answers about pictures, of the export | 239 of 240 |" in told
    assert "| all | 122 | 240 |" in told
    with Image.open(tmp_path / "answers.png") as sheet:
        rows = -(-(report.RIGHT + report.WRONG) // report.COLUMNS)
        assert sheet.size == (report.COLUMNS * report.CELL[0], rows * report.CELL[1])
