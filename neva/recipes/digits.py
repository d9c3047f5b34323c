"""The demo's data set: 10,000 handwritten digits as LLaVA-format questions and answers on disk.

Training and held-out samples share no image. Everything is a function of the archive: any process writes the same files.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = 1200
"""Digits that no training sample shows."""

WHAT = ("Which digit is this?", "What digit is shown?", "What number do you see?", "Read the digit.", "Name this digit.")
EVEN = ("Is it even?", "Is this digit even?", "Is this an even number?", "Is the number shown even?")
LARGER = ("Which is larger?", "Which of the two digits is larger?", "Which one is the larger digit?", "Which number is larger?")
BOTH = ("Which digits are these?", "What are the two digits?", "Read both digits.")
EVEN_TEXT = ("Is {a} even?", "Is {a} an even number?")
LARGER_TEXT = ("{a} and {b}: which is larger?", "{a} {b} Which number is larger?")


def archive() -> Path:
    """Where the digits are. ValueError outside a clone of the repository: they are not part of the wheel."""
    places = [root / "examples" / "digits" / "mnist_t10k.npz" for root in (Path(__file__).resolve().parents[2], Path.cwd())]
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        f"The demo's digits are not at {places[0]}: they come with the repository, not with the wheel. Run from a clone, "
        "or train on your own data: data.source=FILE data.image_folder=FOLDER."
    )


def write(folder: Path) -> None:
    """Write images/, captions.json, train.json and heldout.json into `folder`, which appears whole or not at all."""
    if folder.exists():
        return
    with np.load(archive()) as packed:
        images, labels = packed["images"], packed["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, shown = order[:HELD_OUT], order[HELD_OUT:]
    with published(folder) as part:
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(part / "images" / _picture(number), compress_level=1)
        write_rows(part, {"captions": _captions(shown, labels), "train": _train(shown, labels), "heldout": _held_out(held_out, labels)})


def write_rows(folder: Path, rows: dict[str, list[dict]]) -> None:
    """NAME.json of each list of samples."""
    for name, listed in rows.items():
        (folder / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, listed)) + "\n]\n", encoding="utf-8")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder with images/ to write into, which becomes `folder` when all is there."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    (part / "images").mkdir(parents=True)
    yield part
    try:
        part.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(part)  # another process was first, with the same bytes


def _picture(number: int | np.integer) -> str:
    return f"{number:05d}.png"


def sample(kind: str, id: str, images: list[str], *turns: str) -> dict:
    """A LLaVA row; the first question gets a marker per image."""
    values = ["<image>\n" * len(images) + turns[0], *turns[1:]]
    row = {"id": id, "kind": kind, "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]}
    return row | ({"image": images[0] if len(images) == 1 else images} if images else {})


def _yes(even: bool | np.bool_) -> str:
    return "yes" if even else "no"


def _captions(shown: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Every training digit with its name: what the first stage reads."""
    return [sample("what_is_it", f"caption-{n}", [_picture(n)], "", str(labels[n])) for n in shown]


def _train(shown: np.ndarray, labels: np.ndarray) -> list[dict]:
    """A conversation about each training image, as many comparisons, and some questions without an image."""
    random, rows = np.random.default_rng(1), []
    for place, n in enumerate(shown):
        digit, even = str(labels[n]), _yes(labels[n] % 2 == 0)
        what, parity = str(random.choice(WHAT)), str(random.choice(EVEN))
        turns = ((what, digit), (what, digit, parity, even), (parity, even, what, digit), (parity, even))[place % 4]
        rows.append(sample("what_is_it" if place % 4 < 2 else "even", f"digit-{n}", [_picture(n)], *turns))
        rows.append(_pair(f"pair-{n}", shown, labels, random, form=("alone", "first", "last")[place % 3]))
    for place in range(len(shown) // 8):
        a, b = (int(x) for x in random.choice(10, 2, replace=False))
        if place % 2:
            rows.append(sample("even", f"text-{place}", [], str(random.choice(EVEN_TEXT)).format(a=a), _yes(a % 2 == 0)))
        else:
            rows.append(sample("larger", f"text-{place}", [], str(random.choice(LARGER_TEXT)).format(a=a, b=b), "first" if a > b else "second"))
    return rows


def _pair(id: str, among: np.ndarray, labels: np.ndarray, random: np.random.Generator, *, form: str = "alone") -> dict:
    """Two pictures of different digits and which is larger; asked `alone`, or `last` after or `first` before what both are."""
    while True:
        first, second = (int(n) for n in among[random.integers(0, len(among), 2)])
        if labels[first] != labels[second]:
            break
    larger = (str(random.choice(LARGER)), "first" if labels[first] > labels[second] else "second")
    both = (str(random.choice(BOTH)), f"{labels[first]} and {labels[second]}")
    turns = {"alone": larger, "last": both + larger, "first": larger + both}[form]
    return sample("larger", id, [_picture(first), _picture(second)], *turns)


def _held_out(held_out: np.ndarray, labels: np.ndarray) -> list[dict]:
    """One question of each kind for each held-out digit."""
    random, rows = np.random.default_rng(2), []
    for n in held_out:
        rows.append(sample("what_is_it", f"what-{n}", [_picture(n)], str(random.choice(WHAT)), str(labels[n])))
        rows.append(sample("even", f"even-{n}", [_picture(n)], str(random.choice(EVEN)), _yes(labels[n] % 2 == 0)))
        rows.append(_pair(f"larger-{n}", held_out, labels, random))
    return rows
