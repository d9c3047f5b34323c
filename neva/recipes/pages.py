"""Pages of handwritten digits in rows and columns: fine detail that a small picture of the whole page cannot show.

A page of r rows and c columns is cut into r * c tiles of one digit each. Training and held-out pages share no digit. Everything is a function of
the digits' archive: any process writes the same files.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from neva.recipes.digits import HELD_OUT, archive, published, sample, write_rows

LAYOUTS = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2))
"""(rows, columns) of pages; `tile_grid` cuts each into just these."""
PAGES, TEXTS, ASKED = 6000, 2000, 400
"""Pages to train on, questions without one, and held-out pages."""


def write(folder: Path) -> None:
    """Write images/, captions.json, pages.json, text.json and heldout.json into `folder`, which appears whole or not at all."""
    if folder.exists():
        return
    with np.load(archive()) as packed:
        images, labels = packed["images"], packed["labels"]
    order, random = np.random.default_rng(0).permutation(len(labels)), np.random.default_rng(3)
    held_out, shown = order[:HELD_OUT], order[HELD_OUT:]
    rows: dict[str, list[dict]] = {"captions": [], "pages": [], "text": [], "heldout": []}
    with published(folder) as part:
        for n in shown[:2000]:
            Image.fromarray(images[n]).save(part / "images" / f"digit-{n:05d}.png", compress_level=1)
            rows["captions"].append(sample("caption", f"digit-{n}", [f"digit-{n:05d}.png"], "", str(labels[n])))
        for name, count, among in (("pages", PAGES, shown), ("heldout", ASKED, held_out)):
            for number in range(count):
                high, wide = LAYOUTS[number % len(LAYOUTS)]
                digits = random.choice(among, (high, wide))
                page = images[digits].transpose(0, 2, 1, 3).reshape(high * 28, wide * 28)
                picture = f"{name}-{number:05d}.png"
                Image.fromarray(page).save(part / "images" / picture, compress_level=1)
                rows[name].append(sample("read", f"{name}-{number}", [picture], *_turns(labels[digits], random, cells=2 if name == "pages" else 1)))
        for number in range(TEXTS):
            a, b = (int(x) for x in random.choice(10, 2, replace=False))
            rows["text"].append(sample("larger", f"text-{number}", [], f"Which is larger, {a} or {b}?", str(max(a, b))))
        write_rows(part, rows)


def _turns(digits: np.ndarray, random: np.random.Generator, *, cells: int) -> list[str]:
    """Questions for the digit at a row and a column, counted from 1, and their answers, of so many cells."""
    turns: list[str] = []
    for cell in random.permutation(digits.size)[:cells]:
        row, column = divmod(int(cell), digits.shape[1])
        turns += [f"Row {row + 1}, column {column + 1}?", str(digits[row, column])]
    return turns
