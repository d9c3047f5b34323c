"""Pages of digits: each layout is cut into a tile per digit, held-out digits are no training digits, and the answers are right."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neva.data.tiling import tile_grid
from neva.data.tokenizer import load_tokenizer
from neva.recipes import pages
from neva.recipes.digits import archive
from neva.recipes.nvlm_tiny import MODELS, TOKENIZER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages") / "data"
    pages.write(place)
    return place


def test_a_question_names_the_tile_that_answers_it(folder: Path) -> None:
    with np.load(archive()) as packed:
        label = {image.tobytes(): int(digit) for image, digit in zip(packed["images"], packed["labels"], strict=True)}
    seen: dict[str, set[bytes]] = {}
    for name in ("pages", "heldout", "unseen"):
        rows = json.loads((folder / f"{name}.json").read_text())
        for row in rows[:300]:
            page = Image.open(folder / "images" / row["image"])
            columns, lines = tile_grid(*page.size, tile=28, max_tiles=6, min_tiles=1)
            assert (page.width, page.height) == (28 * columns, 28 * lines) and ((lines, columns) == pages.UNSEEN) == (name == "unseen")
            tiles = np.asarray(page).reshape(lines, 28, columns, 28).swapaxes(1, 2).reshape(-1, 28, 28)
            question, answer = (turn["value"] for turn in row["conversations"])
            place = int(question.removeprefix("<image>\nNumber ").removesuffix("?")) - 1
            assert label[tiles[place].tobytes()] == int(answer) == np.ravel(row["digits"])[place]
            seen.setdefault(name, set()).update(tile.tobytes() for tile in tiles)
    for row in json.loads((folder / "alike.json").read_text())[:300]:
        page = np.asarray(Image.open(folder / "images" / row["image"]))
        hands = [part.tobytes() for part in np.split(page, 2, axis=int(page.shape[1] > 28))]
        assert {label[hand] for hand in hands} == {int(row["conversations"][1]["value"])}
        seen["pages"].update(hands)
    assert not seen["pages"] & (seen["heldout"] | seen["unseen"])


def test_a_tag_has_five_tokens_and_a_digit_one() -> None:
    tokenizer, image = load_tokenizer(TOKENIZER), MODELS["d"].image
    assert {len(tokenizer.encode(tag)) for tag in (*(f"<tile_{k}>" for k in range(1, 7)), image.thumbnail_tag)} == {5}
    assert all(len(tokenizer.encode(f" {digit}")) == 1 for digit in range(10))
