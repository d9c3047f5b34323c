"""Where tags, features and memory stand in a sample of NVLM-D, -X and -H, and what each token sees."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from neva.batch import IMAGE, ImageLayout
from neva.data.encode import Encoder
from neva.data.loader import Loader, LoaderOptions
from neva.data.pack import Budget, collate, next_runs
from neva.data.sample import Encoded, Sample, SampleError, Turn
from neva.data.source import MockSource
from neva.data.tokenizer import load_tokenizer
from neva.recipes.demo import TOKENIZER

TEXT = load_tokenizer(TOKENIZER)
D = ImageLayout(tile=8, tokens_per_tile=2, aspect="tiles", max_tiles=6, tags="1d", image_prefix="<Image>", image_suffix="</Image>")
X, H = replace(D, inline="none"), replace(D, inline="thumbnail")
SIZES = {3: (16, 8), 1: (8, 8), 7: (24, 16), 5: (32, 32)}
"""Tiles with the thumbnail -> a size that makes so many."""


def sample(*counts: int, text: str = "") -> Sample:
    images = tuple(Image.new("RGB", SIZES[count], (10 * count, 0, 0)) for count in counts)
    turns = (Turn(role="user", text=text or "a <image> b " * len(counts) + "c?"), Turn(role="assistant", text="d"))
    return Sample(source="s", id="0", turns=turns, images=images)


def encode(layout: ImageLayout, *counts: int, **how: object) -> Encoded:
    return Encoder(TEXT, "text", None, layout).encode(sample(*counts), **how)  # type: ignore[arg-type]


def ids(*texts: str | int) -> list[int]:
    """Ids of texts, each tokenised by itself; a number is so many features."""
    return [id for text in texts for id in ([IMAGE] * text if isinstance(text, int) else TEXT.encode(text))]


def test_d() -> None:
    encoded = encode(D, 3)
    tags = ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    body = ids(*(part for tag in tags for part in (tag, 2)))
    tokens = encoded.tokens.tolist()
    start = tokens.index(IMAGE) - len(ids("<tile_1>"))
    assert tokens[start : start + len(body)] == body and tokens[0] == TEXT.bos
    assert encoded.inline.tolist() == [0, 1, 2] and not len(encoded.memory) and not encoded.sees.any()
    assert torch.equal(encoded.slots.flatten(), torch.nonzero(encoded.tokens == IMAGE)[:, 0])
    assert not (encoded.labels[: start + len(body)] >= 0).any()


@pytest.mark.parametrize(("kind", "joined"), [("d", False), ("d", True), ("x", False), ("h", False)])
def test_a_prompt_spells_its_tags_and_features(kind: str, joined: bool) -> None:
    """As far as they stand in the sequence. Read again, text by text, it is the prompt's ids."""
    layout = replace({"d": D, "x": X, "h": H}[kind], tag_tokens="joined" if joined else "apart")
    named = {"d": "<tile_{}><image>", "x": "<tile_{}>", "h": ""}[kind]
    whole = "<tile_global_thumbnail>" + ("" if kind == "x" else "<image>")
    tiles = "".join(named.format(n) for n in (1, 2)) + whole
    encoder = Encoder(TEXT, "text", None, layout)
    prompt = encoder.prompt(sample(3))
    assert prompt.text == f"<s><Image>{tiles}</Image>\na  b c?" and prompt.sizes == (SIZES[3],)
    encoded = encoder.encode(sample(3), labels=False)
    assert list(prompt.tokens) == encoded.tokens.tolist()
    spelled = [id for id in prompt.tokens if id >= 0]
    assert prompt.text.removeprefix("<s>").replace("<image>", "") == TEXT.decode(spelled)


def test_one_tile_carries_the_thumbnails_tag() -> None:
    for layout in (D, X, H):
        text = TEXT.decode(encode(layout, 1).tokens.tolist())
        assert "<tile_global_thumbnail>" in text and "<tile_1>" not in text
    assert encode(H, 1).inline.tolist() == [0] and not len(encode(H, 1).memory)


def test_x() -> None:
    """No feature stands in the sequence; each tag sees its own tile, what follows sees all of the image's, what comes before none."""
    encoded = encode(X, 3, 7)
    assert IMAGE not in encoded.tokens.tolist() and encoded.memory.tolist() == list(range(10)) and encoded.memory_tags.shape == (10, 0)
    tokens, sees = encoded.tokens.tolist(), [tuple(pair) for pair in encoded.sees.tolist()]
    at = 0
    for image, (first, tags) in enumerate(((0, 3), (3, 7))):
        names = [*(f"<tile_{k}>" for k in range(1, tags)), "<tile_global_thumbnail>"]
        block = [TEXT.encode(name) for name in names]
        flat = [id for one in block for id in one]
        start = next(n for n in range(at, len(tokens)) if tokens[n : n + len(flat)] == flat)
        assert set(sees[at:start]) == {(0, 0) if image == 0 else (0, 3)}
        at = start
        for number, one in enumerate(block):
            assert set(sees[at : at + len(one)]) == {(first + number, first + number + 1)}
            at += len(one)
        assert sees[at] == (first, first + tags)
    assert set(sees[at:]) == {(3, 10)} and encoded.next_sees == (3, 10)


def test_all_images_stay_visible_if_the_config_says_so() -> None:
    encoded = encode(replace(X, cross_visible="all"), 3, 7)
    assert encoded.sees[-1].tolist() == [0, 10] and encoded.next_sees == (0, 10)
    assert [0, 3] in encoded.sees.tolist() and [3, 4] in encoded.sees.tolist()


def test_without_tags_an_image_of_x_takes_no_token() -> None:
    bare = replace(X, tags="none", image_prefix="", image_suffix="")
    with_image, without = encode(bare, 3), Encoder(TEXT, "text", None, bare).encode(sample(text="a  b c?"))
    assert len(with_image.tokens) == len(without.tokens) + 1  # the line break behind the image
    assert {tuple(pair) for pair in with_image.sees.tolist()[1:]} == {(0, 3)} and not without.sees.any()


def test_h() -> None:
    """The thumbnail stands in the sequence behind its tag; the other tiles' tags are keys, and the image's own tokens see them."""
    encoded = encode(H, 7, 1, 3)
    assert encoded.inline.tolist() == [6, 7, 10] and encoded.memory.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert encoded.memory_starts.tolist() == [0] * 6 + [6] * 2
    assert [[id for id in row if id >= 0] for row in encoded.memory_tags.tolist()] == [TEXT.encode(f"<tile_{k}>") for k in (1, 2, 3, 4, 5, 6, 1, 2)]
    assert TEXT.decode(encoded.tokens.tolist()).count("<tile_") == 3
    first = int(encoded.slots[0, 0])
    assert encoded.sees[first].tolist() == [0, 6] and encoded.sees[first + 4].tolist() == [0, 6]
    assert encoded.sees[int(encoded.slots[1, 0])].tolist() == [0, 0]  # an image of one tile has no memory, and is the latest
    assert encoded.sees[-1].tolist() == [6, 8]


@pytest.mark.parametrize("layout", [D, X, H])
@pytest.mark.parametrize("kind", ["none", "1d", "grid", "bbox"])
def test_measure_equals_encode(layout: ImageLayout, kind: str) -> None:
    encoder = Encoder(TEXT, "text", None, replace(layout, tags=kind))  # type: ignore[arg-type]
    for counts in ((), (1,), (3, 7), (5, 1, 3)):
        for length in (None, 20, 60, 90):
            for most in (0, 1, 2, 4):
                try:
                    measured = encoder.measure(sample(*counts), length=length, max_tiles=most)
                except SampleError as error:
                    assert "no label is left" in str(error)
                    continue
                encoded = encoder.encode(sample(*counts), length=length, max_tiles=most)
                assert (measured.tokens, measured.tiles) == (len(encoded.tokens), len(encoded.tiles))
                assert len(encoded.inline) + len(encoded.memory) == len(encoded.tiles) and len(encoded.sees) == len(encoded.tokens)


def test_packing_shifts_ranges_and_ragged_tags_leave_no_key() -> None:
    samples = [encode(H, 7), encode(H), encode(H, 3, 5)]
    total = sum(len(one.tokens) for one in samples)
    batch = collate([samples], Budget(seq_length=total + 4), layout=H, group_names=("s",), any_tiles=True)
    widths = [len([id for id in row if id >= 0]) + 2 for row in batch.memory_tags.tolist()]
    assert len(batch.memory_tokens) == sum(widths) == len(batch.memory_positions)
    bounds = [0]
    for width in widths:
        bounds.append(bounds[-1] + width)
    flat = batch.sees.view(-1, 2).tolist()
    for start, end, first, last in batch.runs.tolist():
        assert all((bounds[a], bounds[b]) == (first, last) for a, b in flat[start:end])
    covered = {n for start, end, *_ in batch.runs.tolist() for n in range(start, end)}
    assert covered == {n for n, (a, b) in enumerate(flat) if a < b}
    assert batch.memory_positions.tolist() == [*range(sum(widths[:6])), *range(sum(widths[6:8])), *range(sum(widths[8:]))]
    following = next_runs(samples, H).tolist()
    assert following == [[0, 1, 0, bounds[6]], [2, 3, bounds[8], bounds[12]]]
    added = collate([samples], Budget(seq_length=total), layout=replace(H, tag_binding="added"), group_names=("s",), any_tiles=True)
    assert len(added.memory_tokens) == 2 * len(added.memory)


def test_tiles_give_way_where_a_sample_is_too_long() -> None:
    """Only if asked for: 7 tiles are 2, then 1, until the sample fits; each is counted, and encoded as it was measured."""
    encoder = Encoder(TEXT, "text", None, D)
    whole, least = encoder.measure(sample(7)), encoder.measure(sample(7), max_tiles=1)
    assert (whole.tiles, least.tiles) == (7, 1)
    found = encoder.fit(sample(7), length=whole.tokens - 1, tiles=99)
    assert found.tokens < whole.tokens and found.max_tiles in (4, 2)
    assert encoder.fit(sample(7), length=99999, tiles=1).tiles == 1 and encoder.fit(sample(7), length=1, tiles=9) == least
    for layout, asked in ((H, sample(7)), (D, Sample(source="s", id="0", turns=(Turn(role="user", text="a b c"), Turn(role="assistant", text="d"))))):
        kept = Encoder(TEXT, "text", None, layout).fit(asked, length=1, tiles=99)
        assert kept.max_tiles == 0, "tiles of a memory, or of no image, shorten nothing"
    source = MockSource(samples=40, words=(4, 8), images=1, image_size=SIZES[7], text_only_every=4)
    for fewer in (False, True):
        options = LoaderOptions(fewer_tiles=fewer, pool=8)
        loader = Loader([source], Encoder(TEXT, "v1", "", D), Budget(seq_length=whole.tokens + 20, rows=2, max_tiles=5), options)
        batches = [batch for _ in range(6) for batch in next(iter(loader))]
        assert any(len(batch.tiles) for batch in batches) == fewer
        assert (loader.counts["reduced"] > 0, loader.counts["dropped"] > 0) == (fewer, not fewer)
        loader.close()
