"""LLaVA files and made-up samples: what is read, and what each kind of bad input is told."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from neva.data.sample import Sample, SampleError
from neva.data.source import MOST_KEYS, LlavaSource, MockSource, unread

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "a.png")
    return tmp_path


def written(folder: Path, rows: list, name: str = "data.json") -> LlavaSource:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text(json.dumps(rows, ensure_ascii=False, indent=1) if name.endswith(".json") else lines, encoding="utf-8")
    return LlavaSource(folder / name, folder)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_reads_rows(folder: Path, name: str) -> None:
    rows = [
        {"id": "ä☃", "image": "images/a.png", "conversations": TALK, "kind": "größe"},
        {"id": 7, "conversations": [{"from": "system", "value": "Be brief."}, *TEXT]},
        {"image": ["images/a.png"] * 2, "conversations": [{"from": "human", "value": "<image> or <image>?"}, TALK[1]]},
    ]
    source = pickle.loads(pickle.dumps(written(folder, rows, name)))
    samples = [source[i] for i in range(len(source))]
    assert [sample.id for sample in samples] == ["ä☃", "7", "2"]
    assert [sample.kind for sample in samples] == ["größe", "", ""]
    assert [len(sample.images) for sample in samples] == [1, 0, 2]
    assert [turn.role for turn in samples[1].turns] == ["system", "user", "assistant"]
    assert samples[0].turns[0].text == "<image>\nWhat?" and samples[0].source == "data"
    assert samples[0].images[0] == (folder / "images/a.png").resolve()
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_blank_lines_are_skipped(folder: Path, mark: str) -> None:
    rows = [{"id": "é", "conversations": TEXT}, {"id": "b", "conversations": TEXT}]
    (folder / "a.json").write_text(mark + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "a.jsonl").write_text(mark + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        source = LlavaSource(folder / name)
        assert [source[i].id for i in range(len(source))] == ["é", "b"]


def test_line_separators_inside_a_text_do_not_split_its_line(folder: Path) -> None:
    """bytes.splitlines would also split at \\x0b, \\x0c and \\x1c in a str; a .jsonl line ends at a newline only."""
    text = "a\u2028b\x85c"
    source = written(folder, [{"id": "x", "conversations": [{"from": "human", "value": text}, TEXT[1]]}], "data.jsonl")
    assert len(source) == 1 and source[0].turns[0].text == text


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.json", None, "is missing"),
    "empty": ("a.json", b" \n", "is empty"),
    "empty lines": ("a.jsonl", b"\n \n", "holds no sample"),
    "no rows": ("a.json", b"[ ]", "holds no sample"),
    "object": ("a.json", b'{"id": 1}', "is not a list"),
    "byte order mark only": ("a.json", b"\xef\xbb\xbf", "is not a list"),
    "an object on several lines": ("a.json", b'{\n"id": 1\n}', "is not a list"),
    "Parquet": ("a.parquet", b"PAR1\x15\x04", "is a Parquet file: write its rows as lines"),
    "Parquet by another name": ("a.json", b"PAR1\x15\x04", "is a Parquet file"),
    "Arrow": ("a.arrow", b"ARROW1\0\0", "is an Arrow file"),
    "gzip": ("a.jsonl", gzip.compress(b'{"id": 1}'), "compressed by gzip: unpack it"),
    "UTF-16": ("a.jsonl", '{"id": 1}'.encode("utf-16"), "text in UTF-16: save it as UTF-8"),
    "Git LFS": ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "cut": ("a.json", b'[{"id": 1}, {"id', "is not JSON"),
    "unclosed": ("a.json", b'[{"id": 1}', "is not JSON"),
    "open": ("a.json", b"[", "is not JSON"),
    "trailing comma": ("a.json", b'[{"id": 1},]', "is not JSON"),
    "two lists": ("a.json", b"[{}] [{}]", "is not JSON"),
    "not UTF-8": ("a.json", '"é"'.encode("latin-1"), "is not UTF-8"),
    "bracket in the place of a brace": ("a.json", b'[{"id": 1}, {"id": 2]', "is not JSON"),
    "comma left out at the end": ("a.json", b'[{"id": 1} {"id": 2}]', "is not JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_told(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        LlavaSource(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.JSON", "a.json", "a.jsonl", "a.JSONL", "a.txt", "a"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_and_lines_are_told_apart_by_content(folder: Path, name: str, mark: str) -> None:
    rows = [{"id": "é", "conversations": TEXT}, {"id": "b", "conversations": TEXT}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for text in (json.dumps(rows, indent=1, ensure_ascii=False), lines, "\n\n" + lines + "\n"):
        (folder / name).write_text(mark + text, encoding="utf-8")
        source = LlavaSource(folder / name)
        assert [source[i].id for i in range(len(source))] == ["é", "b"]


def test_the_fingerprint_is_that_of_the_content(folder: Path) -> None:
    """An edit that keeps the number of samples is another set of them."""
    rows = [{"id": "a", "conversations": TEXT}]
    one = written(folder, rows).fingerprint
    assert written(folder, rows, "again.json").fingerprint == one
    rows[0]["id"] = "b"
    assert written(folder, rows).fingerprint != one
    assert MockSource(samples=2).fingerprint != MockSource(samples=2, seed=1).fingerprint


CASES = Path(__file__).parents[1] / "data" / "cases"


def test_keys_that_are_not_read_are_named(folder: Path) -> None:
    rows = [
        {"id": "a", "conversations": TEXT, "image": None, "video": "", "model": "x"},
        {"id": "b", "conversations": [TEXT[0], TEXT[1] | {"weight": 0}], "imgae": ["a.png"]},
        {"id": "c", "conversations": TEXT} | {f"key{n}": n for n in range(99)},
    ]
    source = written(folder, rows)
    assert [source[n].unread for n in (0, 1)] == [("model",), ("imgae", "turn.weight")]
    assert len(source[2].unread) == MOST_KEYS
    assert unread("imgae") == "its key 'imgae' is not read: did you mean 'image'?"
    assert unread("turn.weight").startswith("its key 'weight' of its turns is not read: every gpt")
    assert unread("model") == "its key 'model' is not read"
    assert "did you mean 'image'" in unread("images") and "a first turn" in unread("system")


def test_a_bad_row_says_which_of_its_keys_are_not_read(folder: Path) -> None:
    row = {"id": "x", "images": ["images/a.png"], "conversations": TALK}
    with pytest.raises(SampleError, match="but it has 0 image.*'images' is not read: did you mean"):
        written(folder, [row])[0]


def test_the_cases_of_keys_that_mean_something_elsewhere() -> None:
    images = LlavaSource(CASES / "images-key" / "data.json", CASES / "images-key" / "images")
    assert images[0].unread == ("images",)
    systems = LlavaSource(CASES / "system-key" / "data.json", CASES / "system-key" / "images")
    found = {}
    for index in range(len(systems)):
        try:
            found[systems[index].id] = systems[index].unread
        except SampleError as error:
            found[error.id] = error.message
    assert found["s"] == ("system", "mask") and found["w"] == ("turn.weight",)
    assert "its key 'system' is not read" in found["n"]


def test_a_missing_image_folder_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="image folder .* is missing"):
        LlavaSource(written(folder, [{"conversations": TEXT}]).path, folder / "nowhere")


def talk(*pairs: tuple[object, object]) -> dict:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


BAD_ROWS: dict[str, tuple[object, str]] = {
    "no object": ([1], "not an object"),
    "no conversations": ({}, "'conversations' is missing"),
    "empty conversations": ({"conversations": []}, "'conversations' is missing"),
    "conversations is a text": ({"conversations": "hi"}, "'conversations' is missing"),
    "turn is a text": ({"conversations": ["hi"]}, "turn 0 is not"),
    "value is a number": (talk(("human", 3), ("gpt", "x")), "turn 0 is not"),
    "from is missing": ({"conversations": [{"value": "x"}]}, "turn 0 is not"),
    "unknown role": (talk(("human", "a"), ("bot", "b")), "turn 1 is from 'bot'"),
    "gpt first": (talk(("gpt", "a"), ("human", "b")), "turn 0 is the assistant's"),
    "human twice": (talk(("human", "a"), ("human", "b")), "turn 1 is the user's"),
    "system later": (talk(("human", "a"), ("system", "b")), "turn 1 is the system's"),
    "only system": (talk(("system", "a")), "does not end with an answer"),
    "no answer": (talk(("human", "a")), "does not end with an answer"),
    "ends with a question": (talk(("human", "a"), ("gpt", "b"), ("human", "c")), "does not end with an answer"),
    "empty answer": (talk(("human", "a"), ("gpt", " \n")), "the answer in turn 1 is empty"),
    "lone surrogate": (talk(("human", "a\ud800"), ("gpt", "b")), "not valid Unicode"),
    "no marker": ({"image": "images/a.png", **talk(("human", "a"), ("gpt", "b"))}, "add <image>"),
    "marker without image": (talk(("human", "<image>a"), ("gpt", "b")), "hold 1 <image> but it has 0"),
    "two markers": ({"image": "images/a.png", **talk(("human", "<image><image>"), ("gpt", "b"))}, "hold 2 <image> but it has 1"),
    "marker in the answer": ({"image": "images/a.png", **talk(("human", "a"), ("gpt", "<image>"))}, "outside the human turns"),
    "image is a number": ({"image": 3, "conversations": TALK}, "'image' is 3"),
    "image is empty": ({"image": "", "conversations": TALK}, "'image' is ''"),
    "image is a list of numbers": ({"image": [1], "conversations": TALK}, "'image' is"),
    "image holds a zero byte": ({"image": "a\0", "conversations": TALK}, "'image' is"),
    "kind is a number": ({"kind": 1, "conversations": TEXT}, "'kind' is 1"),
    "image above the folder": ({"image": "../x.png", "conversations": TALK}, "holds '..'"),
    "image hidden above": ({"image": "images/../../x.png", "conversations": TALK}, "holds '..'"),
    "absolute image": ({"image": "/etc/passwd", "conversations": TALK}, "is absolute"),
    "image behind a link": ({"image": "link/x.png", "conversations": TALK}, "leads outside"),
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_told_and_named(folder: Path, case: str, name: str) -> None:
    row, message = BAD_ROWS[case]
    (folder / "link").symlink_to("/etc")
    rows = [{"id": "fine", "conversations": TEXT}, {"id": "bad-one", **row} if isinstance(row, dict) else row]
    (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    source = LlavaSource(folder / name, folder, name="mine")
    assert source[0].id == "fine"
    with pytest.raises(SampleError, match=message) as error:
        source[1]
    assert str(error.value).startswith(f"sample '{'bad-one' if isinstance(row, dict) else 1}' of 'mine': ")


def test_an_unreadable_line_is_named_by_file_and_line(folder: Path) -> None:
    good = json.dumps({"conversations": TEXT}).encode()
    (folder / "a.jsonl").write_bytes(good + b"\n\n{broken\n" + good[:-1] + b'\xff"}\n')
    source = LlavaSource(folder / "a.jsonl")
    assert len(source) == 3
    for index, line in ((1, 3), (2, 4)):
        with pytest.raises(SampleError, match=f"a.jsonl:{line} is not JSON"):
            source[index]


TORN: dict[str, bytes] = {
    "comma left out": b'{"id": "bad" "conversations": [{"from": "human", "value": "a"}]}',
    "comma too many": b'{"id": "bad", "conversations": [{"from": "human", "value": "a"},]}',
    "single quotes": b"{'id': 'bad', 'conversations': [{'from': 'human', 'value': 'a'}]}",
    "one quote": b'{"id": "bad", "conversations": [{"from": "human", "value": "a 5" pipe"}]}',
    "two quotes": b'{"id": "bad", "conversations": [{"from": "human", "value": "an "a" b"}]}',
    "bracket in a text": b'{"id": "bad", "conversations": [{"from": "human", "value": "}]" "b"}]}',
    "brace left out": b'{"id": "bad", "conversations": [{"from": "human", "value": "a"}]',
    "bracket left out": b'{"id": "bad", "conversations": [{"from": "human", "value": "a"}}',
    "brace too many": b'{"id": "bad", "conversations": [{"from": "human", "value": "a"}]}}',
    "not UTF-8": b'{"id": "bad", "conversations": [{"from": "human", "value": "caf\xe9"}]}',
    "control character": b'{"id": "bad", "conversations": [{"from": "human", "value": "a\x01"}]}',
    "cut": b'{"id": "bad", "conversations": [{"from": "hum',
    "python": b'{"id": "bad", "conversations": None}',
    "a word": b"bad",
}
"""Rows that are not JSON."""


@pytest.mark.parametrize("where", ["first", "middle", "twice"])
@pytest.mark.parametrize("separator", [b", ", b",\n ", b"\n"])
@pytest.mark.parametrize("case", TORN)
def test_a_row_that_is_not_json_costs_no_other_row(
    tmp_path: Path,
    case: str,
    separator: bytes,
    where: str,
) -> None:
    """Its own error names it by its place; with line breaks between rows the file is .jsonl."""
    texts = ("Hello", 'He said "Hi" {[', "größe", "last")
    talks = [[{"from": "human", "value": text}, TEXT[1]] for text in texts]
    rows: list[bytes] = [json.dumps({"id": f"row{n}", "conversations": talk}, ensure_ascii=False).encode() for n, talk in enumerate(talks)]
    places = {"first": [0], "middle": [2], "twice": [1, 3]}[where]
    for place in places:
        rows.insert(place, TORN[case])
    lines = separator == b"\n"
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_bytes(separator.join(rows) if lines else b"[" + separator.join(rows) + b"]")
    source = LlavaSource(path)
    read: list[str] = []
    for index in range(len(source)):
        try:
            read.append(source[index].turns[0].text)
        except SampleError as error:
            place = f"a.jsonl:{index + 1} is" if lines else f"a.json, row {index} is"
            assert f"{place} not JSON" in str(error) and index in places
            read.append("")
    expected = list(texts)
    for place in places:
        expected.insert(place, "")
    assert read == expected


def test_questions_need_no_answer(folder: Path) -> None:
    """With `questions`; an empty last answer is none, an empty one before is an error."""
    asked = [{"from": "human", "value": "a"}]
    blank = {"from": "gpt", "value": " "}
    rows = [
        {"id": "q", "conversations": asked},
        {"id": "empty", "conversations": [*asked, blank]},
        {"id": "later", "conversations": [*TEXT, *asked]},
        {"id": "system", "conversations": [{"from": "system", "value": "s"}, *asked]},
        {"id": "answered", "conversations": TEXT},
    ]
    path = written(folder, rows).path
    source = LlavaSource(path, questions=True)
    read = [[turn.role for turn in source[n].turns] for n in range(5)]
    asks = ["user", "assistant"]
    assert read == [["user"], ["user"], [*asks, "user"], ["system", "user"], asks]
    for number in range(4):
        with pytest.raises(SampleError):
            LlavaSource(path)[number]
    bad = [
        {"conversations": [{"from": "system", "value": "s"}]},
        {"conversations": [blank]},
        {"conversations": [*asked, blank, *asked]},
        {"conversations": [*asked, *asked]},
    ]
    source = LlavaSource(written(folder, bad).path, questions=True)
    for number in range(len(bad)):
        with pytest.raises(SampleError):
            source[number]


def test_an_image_needs_an_image_folder(folder: Path) -> None:
    path = written(folder, [{"image": "images/a.png", "conversations": TALK}]).path
    with pytest.raises(SampleError, match="no image_folder: set it"):
        LlavaSource(path)[0]


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "again.png").symlink_to(folder / "images" / "a.png")
    assert written(folder, [{"image": "again.png", "conversations": TALK}])[0].images == ((folder / "images/a.png").resolve(),)


def test_a_sample_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(SampleError("s", "i", "why; fix")))
    assert isinstance(error, SampleError) and (error.source, error.id, error.message) == ("s", "i", "why; fix")


def test_mock_samples_depend_on_seed_and_index_only() -> None:
    def read(source: MockSource, index: int) -> tuple:
        sample = source[index]
        return sample.turns, [image.tobytes() for image in sample.images]

    def make(seed: int = 0) -> MockSource:
        return MockSource(samples=20, words=(4, 9), images=2, image_size=(8, 6), text_only_every=5, seed=seed)

    assert [read(make(seed=3), i) for i in range(20)] == [read(make(seed=3), i) for i in range(20)]
    assert read(make(seed=3), 0) != read(make(seed=4), 0) and read(make(seed=3), 0) != read(make(seed=3), 1)
    for index in range(20):
        sample: Sample = make()[index]
        assert len(sample.images) == (0 if index % 5 == 4 else 2) == sample.turns[0].text.count("<image>")
        assert 4 <= sum(len(turn.text.replace("<image>", "").split()) for turn in sample.turns) <= 9
        assert sample.turns[1].text and all(image.size == (8, 6) for image in sample.images)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"samples": 1, "words": (5, 4)}, {"samples": 1, "images": -1}, {"samples": 1, "image_size": (0, 4)}])
def test_an_impossible_mock_source_is_told(bad: dict) -> None:
    with pytest.raises(ValueError, match="cannot be made"):
        MockSource(**bad)
