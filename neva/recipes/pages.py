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
PAGES, ASKED, TEXTS = 8000, 600, 4000
"""Pages to train on, held-out pages, and questions without a page; a third and a twentieth as many of `UNSEEN` and of held-out questions."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(folder: Path) -> None:
    """Write images/ and captions.json, pages.json, heldout.json, unseen.json, text.json and more into `folder`, which appears whole or not at all."""
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
            ("unseen", ASKED // 3, held_out, (UNSEEN,)),
        ):
            rows[name] = []
            for number in range(count):
                high, wide = layouts[number % len(layouts)]
                digits = random.choice(among, (high, wide))
                page = images[digits].transpose(0, 2, 1, 3).reshape(high * 28, wide * 28)
                picture, place = f"{name}-{number:05d}.png", int(random.integers(high * wide))
                Image.fromarray(page).save(part / "images" / picture, compress_level=1)
                asked = f"Number {place + 1}?", str(labels[digits].reshape(-1)[place])
                rows[name].append(sample(name, f"{name}-{number}", [picture], *asked) | {"digits": labels[digits].tolist()})
        rows["text"] = [_text(f"text-{number}", random) for number in range(TEXTS)]
        rows["text-heldout"] = [_text(f"text-heldout-{number}", random) for number in range(TEXTS // 20)]
        write_rows(part, rows)


def _text(id: str, random: np.random.Generator) -> dict:
    """A question without an image: about two digits, or about one that is named in words."""
    a, b = (int(x) for x in random.choice(10, 2, replace=False))
    kinds = {
        "larger": (f"Which is larger, {a} or {b}?", max(a, b)),
        "sum": (f"{a} and {b} make?", (a + b) % 10),
        "name": (f"{NAMES[a]}\nWhich digit is this?", a),
        "even": (f"{NAMES[a]}\nIs it even?", "yes" if a % 2 == 0 else "no"),
        "over": (f"{NAMES[a]}\nIs it larger than 4?", "yes" if a > 4 else "no"),
    }
    kind = str(random.choice(list(kinds)))
    question, answer = kinds[kind]
    return sample(kind, id, [], question, str(answer))
