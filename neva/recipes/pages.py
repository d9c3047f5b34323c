"""Pages of handwritten digits in rows and columns: fine detail that a small picture of the whole page cannot show.

A page of r rows and c columns is cut into r * c tiles of one digit each, and a question asks for the digit at a place in reading order. Training
and held-out pages share no digit. Everything is a function of the digits' archive: any process writes the same files.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from neva.recipes.digits import HELD_OUT, archive, published, sample, write_rows

LAYOUTS = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2))
"""(rows, columns) of pages; `tile_grid` cuts each into just these."""
UNSEEN = (2, 2)
"""A layout that no training page has."""
PAGES, ASKED, ASKED_UNSEEN, TEXTS, ALIKE = 8000, 600, 400, 4000, 6000
"""Pages to train on, held-out pages of their layouts and of `UNSEEN`, questions without a page to train on, pages of one digit in two hands."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(folder: Path) -> None:
    """Write images/, captions.json, alike.json, pages.json, heldout.json, unseen.json, text.json and more into `folder`: all of them or none."""
    if folder.exists():
        return
    with np.load(archive()) as packed:
        images, labels = packed["images"], packed["labels"]
    order, random = np.random.default_rng(0).permutation(len(labels)), np.random.default_rng(3)
    held_out, shown = order[:HELD_OUT], order[HELD_OUT:]
    rows: dict[str, list[dict]] = {}
    with published(folder) as part:
        for name, among in (("captions", shown), ("captions-heldout", held_out[:ASKED])):
            rows[name] = []
            for n in among:
                picture = f"digit-{n:05d}.png"
                Image.fromarray(images[n]).save(part / "images" / picture, compress_level=1)
                rows[name].append(sample("caption", f"digit-{n}", [picture], "Which digit is this?", str(labels[n])))
        for name, count, among, layouts in (
            ("pages", PAGES, shown, LAYOUTS),
            ("heldout", ASKED, held_out, LAYOUTS),
            ("unseen", ASKED_UNSEEN, held_out, (UNSEEN,)),
        ):
            rows[name] = []
            for number in range(count):
                high, wide = layouts[number % len(layouts)]
                digits = random.choice(among, (high, wide))
                picture, place = f"{name}-{number:05d}.png", int(random.integers(high * wide))
                save(part / "images" / picture, images[digits])
                asked = f"Number {place + 1}?", str(labels[digits].reshape(-1)[place])
                rows[name].append(sample(name, f"{name}-{number}", [picture], *asked) | {"digits": labels[digits].tolist()})
        apart, rows["alike"] = np.random.default_rng(7), []  # so that the other files do not depend on it
        for number in range(ALIKE):
            digit, size = int(apart.integers(10)), ((1, 2), (2, 1))[number % 2]
            picture = f"alike-{number:05d}.png"
            save(part / "images" / picture, images[apart.choice(shown[labels[shown] == digit], size)])
            rows["alike"].append(sample("alike", f"alike-{number}", [picture], "Which digit is this?", str(digit)))
        texts, kinds = _texts(), random.permutation(np.arange(TEXTS) % 5)
        rows["text"] = [_row(f"text-{n}", list(texts)[kind], texts, int(random.integers(1000))) for n, kind in enumerate(kinds)]
        rows["text-all"] = [_row(f"text-all-{kind}-{n}", kind, texts, n) for kind, asked in texts.items() for n in range(len(asked))]
        write_rows(part, rows)


def save(file: Path, digits: np.ndarray) -> None:
    """Write a page of digits (rows, columns, height, width)."""
    high, wide, *size = digits.shape
    Image.fromarray(digits.transpose(0, 2, 1, 3).reshape(high * size[0], wide * size[1])).save(file, compress_level=1)


def _row(id: str, kind: str, texts: dict[str, list[tuple[str, str]]], number: int) -> dict:
    return sample(kind, id, [], *texts[kind][number % len(texts[kind])])


def _texts() -> dict[str, list[tuple[str, str]]]:
    """Kind -> every question of it without an image, and its answer: about two digits, or one that is named in words.

    Trained ones are drawn from the same, so answers to them show what was kept, not what follows from it.
    """
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    return {
        "larger": [(f"Which is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs],
        "sum": [(f"{a} and {b} make?", str((a + b) % 10)) for a, b in pairs],
        "name": [(f"{name}\nWhich digit is this?", str(a)) for a, name in enumerate(NAMES)],
        "even": [(f"{name}\nIs it even?", "no" if a % 2 else "yes") for a, name in enumerate(NAMES)],
        "over": [(f"{name}\nIs it larger than 4?", "yes" if a > 4 else "no") for a, name in enumerate(NAMES)],
    }
