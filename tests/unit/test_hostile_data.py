"""Rows that were made to harm: nested without end, or with characters that command a terminal."""

import json
import unicodedata
from pathlib import Path

import pytest

from neva.config import shown
from neva.data.sample import SampleError
from neva.data.source import LlavaSource
from tests import runs
from tests.unit.test_bad_input import GOOD, data_file, must_fail, train

DEEP = '{"id": "deep", "n": "]}", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
DEEP_OBJECTS = '{"id": "deep", "n": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}"
RED = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\u202e"
"""Colour, a window's title, a cleared screen, a line that overwrites itself, and
text from right to left."""


@pytest.mark.parametrize("deep", [DEEP, DEEP_OBJECTS], ids=["lists", "objects"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_row_that_nests_too_deep_is_an_error_with_its_number(
    suffix: str,
    deep: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"data{suffix}"
    rows = [json.dumps(GOOD), deep, json.dumps(GOOD)]
    path.write_text("[" + ",\n".join(rows) + "]" if suffix == ".json" else "\n".join(rows))
    source = LlavaSource(path, tmp_path)
    assert len(source) == 3 and source[0].id == source[2].id == "good"
    with pytest.raises(SampleError, match="nests too deep") as raised:
        source[1]
    assert raised.value.id == "1" and len(str(raised.value)) < 500


def test_a_file_that_nests_without_an_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        LlavaSource(tmp_path / "data.json")


def test_training_stops_at_it_or_skips_and_counts_it(tmp_path: Path) -> None:
    path = data_file(tmp_path, GOOD)
    path.write_text(f"[{json.dumps(GOOD)}, {DEEP}]")
    source = (f"data.source={path}", f"data.image_folder={tmp_path / 'images'}")
    must_fail(train(tmp_path / "run", *source), "sample '1'", "nests too deep")
    skipped = train(tmp_path / "skip", *source, "data.on_error=skip")
    assert skipped.exit_code == 0, skipped.output
    assert runs.metrics(tmp_path / "skip")[-1]["skipped_samples"] > 0


def commands(text: str) -> set[str]:
    return {one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs")} - {"\n"}


@pytest.mark.parametrize("where", ["id", "kind", "image", "role"])
def test_what_a_row_says_commands_no_terminal(where: str, tmp_path: Path) -> None:
    """In errors, in what is left out, and in the losses of each kind."""
    bad = runs.row(f"b{RED}\nid", "<image>\nWhat?", "x", image="none.png")
    if where == "image":
        bad["image"] = f"{RED}.png"
    if where == "role":
        bad["conversations"][0]["from"] = RED
    good = {**GOOD, "kind": f"colour{RED}"}
    rows = (good, GOOD) if where == "kind" else (good, bad)
    path = data_file(tmp_path, *rows)
    source = (f"data.source={path}", f"data.image_folder={tmp_path / 'images'}")
    told = train(tmp_path / "run", *source, "log.every=1")
    assert commands(told.output) == set()
    assert "\\u001b" in told.output
    assert (told.exit_code == 0) == (where == "kind"), told.output
    skipped = train(tmp_path / "skip", *source, "data.on_error=skip", "log.every=1")
    assert skipped.exit_code == 0 and commands(skipped.output) == set()
    assert "\\u001b" in skipped.output


def test_other_text_is_shown_as_it_is() -> None:
    text = "naïve 日本\u3000🙂 👩\u200d🚀 a\tb\nc\xa0d"
    assert shown(text) == text
    assert json.loads(shown(json.dumps({"id": RED}, ensure_ascii=False))) == {"id": RED}
