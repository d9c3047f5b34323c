"""Turns to ids and labels: prompts equal to training's, measures equal to encodings, truncation around images."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from neva.batch import IGNORE, IMAGE, IMAGE_END, IMAGE_START, ImageLayout
from neva.data.encode import Draft, Encoder, Placed
from neva.data.sample import Sample, SampleError, Turn
from neva.data.source import MockSource
from neva.data.template import render
from neva.data.templates import TEMPLATES, find_template
from neva.data.tiling import Tiling
from neva.data.tokenizer import JsonTokenizer, load_tokenizer

torch.set_num_threads(1)
TINY = load_tokenizer(Path(__file__).parents[1] / "data" / "tiny.model")
LAYOUT = ImageLayout(tile=8, tokens_per_tile=3)
PICTURE = Image.new("RGB", (9, 5), (1, 2, 3))


def bytes_tokenizer() -> JsonTokenizer:
    """One id per byte, but for a few merges that cross from a prompt's end into an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, ":Ġ", "Ġa", "</s>"])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(":", "Ġ"), ("Ġ", "a")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["</s>"])
    return JsonTokenizer({"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps({"eos_token": "</s>"}).encode()})


def chat(*texts: str, images: int = 0, system: str | None = None, **more: str) -> Sample:
    turns = [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    turns = [Turn(role="system", text=system), *turns] if system is not None else turns
    return Sample(**{"source": "test", "id": "s", **more}, turns=tuple(turns), images=(PICTURE,) * images)


def spelled(template: str, sample: Sample, **options: object) -> str:
    """The rendered pieces as text; what carries loss is in brackets."""
    names = {"image": "<image>", "end": "</s>"}
    pieces = render(find_template(template), sample.turns, **options)
    text = "".join(f"[{piece.text or names[piece.what]}]" if piece.loss else piece.text or names[piece.what] for piece in pieces)
    return text.replace("][", "")


CASES: dict[str, tuple[str, Sample, dict, str]] = {
    "two rounds": ("v1", chat("a", "b", "c", "d"), {"system": ""}, "USER: a ASSISTANT:[ b</s>]USER: c ASSISTANT:[ d</s>]"),
    "system": ("v1", chat("a", "b"), {"system": "Hi."}, "Hi. USER: a ASSISTANT:[ b</s>]"),
    "own system": ("v1", chat("a", "b", system="Own."), {"system": "Hi."}, "Own. USER: a ASSISTANT:[ b</s>]"),
    "default system": ("v1", chat("a", "b"), {}, TEMPLATES["v1"].system + " USER: a ASSISTANT:[ b</s>]"),
    "image to the front": ("v1", chat("what <image> is ", "b"), {"system": ""}, "USER: <image>\nwhat  is ASSISTANT:[ b</s>]"),
    "image alone": ("v1", chat("<image>", "b"), {"system": ""}, "USER: <image> ASSISTANT:[ b</s>]"),
    "later image": ("v1", chat("a", "b", "c\n<image>", "d"), {"system": ""}, "USER: a ASSISTANT:[ b</s>]USER: <image>\nc ASSISTANT:[ d</s>]"),
    "several images stay": ("v1", chat("of <image> and <image>?\n", "b"), {"system": ""}, "USER: of <image> and <image>? ASSISTANT:[ b</s>]"),
    "prompt": ("v1", chat("a", "b", "c", "d"), {"system": "", "answer": False}, "USER: a ASSISTANT:[ b</s>]USER: c ASSISTANT:"),
    "prompt without an answer": ("v1", chat("a"), {"system": "", "answer": False}, "USER: a ASSISTANT:"),
    "caption": ("plain", chat("<image>\nDescribe.", "A dog", "more", "x"), {}, "<image>[A dog\n]"),
    "captions of several": ("plain", chat("<image> <image>", "Two"), {}, "<image><image>[Two\n]"),
    "caption prompt": ("plain", chat("<image>\nDescribe.", "A dog"), {"answer": False}, "<image>"),
    "caption of nothing": ("plain", chat("Hello", "A dog"), {}, "[A dog\n]"),
}


@pytest.mark.parametrize("case", CASES)
def test_rendering(case: str) -> None:
    template, sample, options, expected = CASES[case]
    assert spelled(template, sample, **options) == expected


def test_stops() -> None:
    assert TEMPLATES["plain"].stops == ("\n",) and TEMPLATES["v1"].stops == ()
    with pytest.raises(ValueError, match="no template 'v2'. Known: plain, v0, v1"):
        Encoder(TINY, "v2", None, LAYOUT)


BAD: dict[str, tuple[str, Sample, bool, str]] = {
    "no turns": ("v1", chat(), True, "its turns are none"),
    "no answer": ("v1", chat("a"), True, "end with an answer"),
    "no question": ("v1", chat(system="x"), False, "hold a question"),
    "too few images": ("v1", chat("<image>", "b"), True, "hold 1 <image> but it has 0"),
    "too many images": ("v1", chat("a", "b", images=1), True, "hold 0 <image> but it has 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_does_not_fit_is_named(case: str) -> None:
    template, sample, labels, message = BAD[case]
    encoder = Encoder(TINY, template, None, LAYOUT)
    with pytest.raises(SampleError, match=message) as error:
        encoder.encode(sample, labels=labels)
    assert str(error.value).startswith("sample 's' of 'test': ")
    if labels:
        with pytest.raises(SampleError, match=message):
            encoder.measure(sample)


def test_a_caption_leaves_out_later_turns_and_their_images() -> None:
    encoder = Encoder(TINY, "plain", None, LAYOUT)
    long, short = chat("<image>", "b", "<image>", "d", images=2), chat("<image>", "b", images=1)
    assert encoder.encode(long).tokens.tolist() == encoder.encode(short).tokens.tolist()
    assert len(encoder.encode(long).tiles) == encoder.measure(long).tiles == 1


@pytest.mark.parametrize("picture", [Path("/nowhere/x.png"), b"", b"nonsense"])
def test_an_unreadable_image_is_named_in_measure_and_encode(picture: Path | bytes) -> None:
    sample = replace(chat("<image>", "b", images=1), images=(picture,))
    for read in (Encoder(TINY, "v1", None, LAYOUT).encode, Encoder(TINY, "v1", None, LAYOUT).measure):
        with pytest.raises(SampleError, match="sample 's' of 'test': the image"):
            read(sample)


def test_a_truncated_image_passes_its_header_and_fails_to_decode() -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    sample = replace(chat("<image>", "b", images=1), images=(file.getvalue()[:-500],))
    assert Encoder(TINY, "v1", None, LAYOUT).measure(sample).tiles == 1
    with pytest.raises(SampleError, match="truncated"):
        Encoder(TINY, "v1", None, LAYOUT).encode(sample)


@pytest.mark.parametrize(
    ("mode", "size", "aspect", "message"),
    [
        ("RGB", (1, 200), "pad", "too elongated to pad"),
        ("RGB", (200, 1), "pad", "too elongated to pad"),
        ("RGB", (1, 2_000_000), "crop", "too elongated to crop"),
        ("F", (20, 20), "square", "floating-point"),
        ("F", (20, 20), "pad", "floating-point"),
    ],
)
def test_an_images_header_is_judged_in_measure(mode: str, size: tuple, aspect: str, message: str) -> None:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "TIFF")
    sample = replace(chat("<image>", "b", images=1), images=(file.getvalue(),))
    encoder = Encoder(TINY, "v1", None, replace(LAYOUT, aspect=aspect))
    for read in (encoder.encode, encoder.measure):
        with pytest.raises(SampleError, match=message):
            read(sample)


def test_encoding_in_full() -> None:
    layout = replace(LAYOUT, start_end=True, image_prefix="<", image_suffix=">")
    encoded = Encoder(TINY, "v1", "", layout).encode(chat("<image>\nwhat", "red", images=1, kind="colours"))
    text = TINY.encode
    prompt = [TINY.bos, *text("USER: <"), IMAGE_START, *[IMAGE] * 3, IMAGE_END, *text(">\nwhat ASSISTANT:")]
    answer = [*text("red"), TINY.eos]
    assert encoded.tokens.tolist() == prompt + answer
    assert encoded.labels.tolist() == [IGNORE] * len(prompt) + answer
    assert encoded.tiles.shape == (1, 3, 8, 8) and encoded.tiles.dtype == torch.uint8
    assert encoded.group == "colours" and encoded.key == ("test", "s")
    assert Encoder(TINY, "v1", "", layout).encode(chat("a", "b")).group == "test"


def test_an_encoder_is_picklable() -> None:
    encoder = Encoder(TINY, "v1", None, LAYOUT)
    sample = chat("<image> a", "b", images=1)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again.encode(sample).tokens, encoder.encode(sample).tokens) and again.layout == LAYOUT


WORDS = st.text(alphabet="abc :\n<>/s\u00e9\u2603", max_size=12)
ANSWERS = WORDS.filter(lambda text: text.strip() != "")


Talk = tuple[list[tuple[list[str], str]], str | None]
# Rounds of (a question in parts, an image between each two; an answer), and a system message. Made into a Sample by the test:
# beartype's checks draw random numbers, which Hypothesis forbids while it draws.
TALKS = st.tuples(st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=3), ANSWERS), min_size=1, max_size=3), st.none() | WORDS)


def made(talk: Talk) -> Sample:
    rounds, system = talk
    texts = [text for parts, answer in rounds for text in ("<image>".join(parts), answer)]
    return chat(*texts, images=sum(len(parts) - 1 for parts, _ in rounds), system=system)


ENCODERS = [
    Encoder(tokenizer, "v1", system, layout)
    for tokenizer in (TINY, bytes_tokenizer())
    for system in (None, "")
    for layout in (LAYOUT, replace(LAYOUT, start_end=True, image_suffix="\n"))
]


@settings(max_examples=80, deadline=None)
@given(talk=TALKS, encoder=st.sampled_from(ENCODERS))
def test_measure_equals_encode_and_training_starts_with_the_prompt(talk: Talk, encoder: Encoder) -> None:
    sample = made(talk)
    encoded, prompt = encoder.encode(sample), encoder.encode(sample, labels=False)
    measure = encoder.measure(sample)
    assert (measure.tokens, measure.tiles) == (len(encoded.tokens), len(encoded.tiles))
    features = int((encoded.tokens == IMAGE).sum())
    assert features == measure.tiles * encoder.layout.tokens_per_tile
    carried = encoded.labels != IGNORE
    assert bool(carried.any()) and torch.equal(encoded.labels[carried], encoded.tokens[carried])
    assert encoded.tokens[-1] == encoder.tokenizer.eos and bool(carried[-1])
    assert encoded.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert bool(carried[len(prompt.tokens) :].all())
    if encoder.tokenizer is TINY:
        answer = sample.turns[-1].text
        if "s>" not in answer:  # a special token that is spelled in a text becomes its id
            assert encoder.tokenizer.decode(encoded.tokens[len(prompt.tokens) :].tolist()).strip() == answer.strip()


def test_no_id_spans_the_border_to_an_answer() -> None:
    """'…ASSISTANT:' + ' b' would give the one id ': ': a server sends '…ASSISTANT:', so training
    sees those ids too, and then ' b'."""
    encoder = Encoder(bytes_tokenizer(), "v1", "", LAYOUT)
    encoded, prompt = encoder.encode(chat("x", "b")), encoder.encode(chat("x"), labels=False)
    first = int((encoded.labels != IGNORE).nonzero()[0])
    assert encoder.tokenizer.decode(encoded.tokens[first:].tolist()) == " b"
    assert encoded.tokens[:first].tolist() == prompt.tokens.tolist()


def test_an_id_that_spans_the_end_of_an_answer_carries_no_loss() -> None:
    """':' + ' Q' give the one id ': ', which is no id of the answer."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ ' Q ' + m.content + ' A' }}"
        "{% else %}{% generation %}{{ m.content + ':' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    encoder = Encoder(bytes_tokenizer(), template, "", LAYOUT)
    encoded = encoder.encode(chat("x", "no", "z", "yes"))
    learnt = [encoder.tokenizer.decode([id]) for id in encoded.labels.tolist() if id != IGNORE]
    assert learnt == ["n", "o", "y", "e", "s", ":"]
    assert ": " in [encoder.tokenizer.decode([id]) for id in encoded.tokens.tolist()]


def test_an_answer_of_which_no_id_is_left_is_named() -> None:
    """Its one letter, the end, belongs to an id of what follows."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ ' Q ' + m.content + ' A' }}"
        "{% else %}{% generation %}{{ m.content + ':' }}{% endgeneration %}{{ ' ' }}{% endif %}"
        "{% endfor %}"
    )
    encoder = Encoder(bytes_tokenizer(), template, "", LAYOUT)
    encoder.encode(chat("x", "no"))
    with pytest.raises(SampleError, match="no token carries loss"):
        encoder.encode(chat("x", ""))


def test_an_image_for_a_model_that_does_not_see_is_named() -> None:
    encoder = Encoder(TINY, "v1", None, replace(LAYOUT, images=False))
    encoder.encode(chat("what", "red"))
    with pytest.raises(SampleError, match="the model has no vision encoder"):
        encoder.encode(chat("<image> what", "red", images=1))


@pytest.mark.parametrize("tokenizer", [TINY, bytes_tokenizer()])
def test_text_keeps_questions_and_answers_apart(tokenizer: JsonTokenizer) -> None:
    """The format `text` writes nothing between them, and their letters would merge."""
    encoder = Encoder(tokenizer, "text", None, LAYOUT)
    encoded = encoder.encode(chat("the col", "our is", "what no", "thing:", "x", "y"))
    begin = 0
    for turns in (1, 3, 5):
        texts = ("the col", "our is", "what no", "thing:", "x")[:turns]
        prompt = encoder.encode(chat(*texts), labels=False).tokens.tolist()
        assert encoded.tokens[: len(prompt)].tolist() == prompt
        asked = encoded.labels[begin : len(prompt)]
        begin = len(prompt) + encoded.labels[len(prompt) :].tolist().index(tokenizer.eos) + 1
        assert (asked == IGNORE).all() and (encoded.labels[len(prompt) : begin] != IGNORE).all()


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_the_prompt_of_a_sample_is_the_same_with_and_without_its_answer(template: str) -> None:
    encoder = Encoder(TINY, template, None, LAYOUT)
    with_answer = encoder.encode(chat("<image>\nwhat", "red", images=1), labels=False)
    without = encoder.encode(chat("<image>\nwhat", images=1), labels=False)
    assert torch.equal(with_answer.tokens, without.tokens) and len(with_answer.tiles) == 1


def test_measure_equals_encode_on_mock_samples_of_all_kinds() -> None:
    for template in TEMPLATES:
        for images in (0, 1, 3):
            source = MockSource(samples=6, words=(2, 30), images=images, text_only_every=3)
            encoder = Encoder(TINY, template, None, LAYOUT)
            for index in range(6):
                encoded, measure = encoder.encode(source[index]), encoder.measure(source[index])
                assert (measure.tokens, measure.tiles) == (len(encoded.tokens), len(encoded.tiles))


@settings(max_examples=60, deadline=None)
@given(talk=TALKS, encoder=st.sampled_from(ENCODERS), data=st.data())
def test_truncation_keeps_images_whole(talk: Talk, encoder: Encoder, data: st.DataObject) -> None:
    sample = made(talk)
    encoded = encoder.encode(sample)
    length = data.draw(st.integers(1, len(encoded.tokens) + 2))
    block = encoder.layout.tokens_per_image
    try:
        cut = encoder.encode(sample, length=length)
    except SampleError as error:
        assert "no label is left" in str(error)
        with pytest.raises(SampleError, match="no label is left"):
            encoder.measure(sample, length=length)
        return
    kept = len(cut.tokens)
    assert min(length, len(encoded.tokens)) - block < kept <= length
    assert torch.equal(cut.tokens, encoded.tokens[:kept]) and torch.equal(cut.labels, encoded.labels[:kept])
    assert int((cut.tokens == IMAGE).sum()) == len(cut.tiles) * encoder.layout.tokens_per_tile
    assert int((cut.tokens == IMAGE_START).sum()) == int((cut.tokens == IMAGE_END).sum())
    measure = encoder.measure(sample, length=length)
    assert (measure.tokens, measure.tiles) == (kept, len(cut.tiles))


@pytest.mark.parametrize(("start_end", "kept"), [(False, [1, 2, 3, 3, 3, 6]), (True, [1, 2, 2, 2, 2, 2, 7])])
def test_cuts_around_an_image(start_end: bool, kept: list[int]) -> None:
    image = [IMAGE_START, IMAGE, IMAGE, IMAGE, IMAGE_END] if start_end else [IMAGE] * 3
    before = [5, 6] if start_end else [5, 6, 8]
    end = len(before) + len(image)
    placed = Placed(start=len(before), end=end, size=(1, 1), tiling=Tiling(), slots=((0, 0, 0),), tagged=())
    draft = Draft(tokens=[*before, *image, 7], marks=[True] * (end + 1), images=[placed])
    cuts = [draft.cut(length) for length in range(1, len(kept) + 1)]
    assert [len(cut.tokens) for cut in cuts] == kept
    assert [len(cut.images) for cut in cuts] == [int(length >= end) for length in kept]


def test_an_image_that_decodes_to_another_size_than_its_header_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens were counted from the header; the pixels would no longer fit them."""
    encoder = Encoder(TINY, "v1", None, LAYOUT)
    sample = chat("<image>\nWhat?", "A cat.", images=1)
    assert len(encoder.encode(sample).tiles) == 1
    monkeypatch.setattr("neva.data.encode.image_size", lambda picture: (9, 6))
    with pytest.raises(SampleError, match=r"decodes to \(9, 5\) but its header says \(9, 6\)"):
        encoder.encode(sample)


def test_tiles_of_a_memory_are_not_given_up_for_a_text_that_is_too_long() -> None:
    """They take no token: fewer of them bring the sample no nearer. Where tiles are what
    is too many, they are."""
    layout = ImageLayout(tile=8, tokens_per_tile=3, aspect="tiles", max_tiles=6, inline="none")
    turns = (
        Turn(role="user", text="<image>\n" + "word " * 50),
        Turn(role="assistant", text="Yes."),
    )
    wide = Sample(source="s", id="0", turns=turns, images=(Image.new("RGB", (96, 16)),))
    encoder = Encoder(TINY, "v1", None, layout)
    whole = encoder.measure(wide)
    assert whole.tiles == 7
    assert encoder.fit(wide, length=20, tiles=99) == whole
    fewer = encoder.fit(wide, length=20, tiles=4)
    assert fewer.tiles <= 4 and fewer.tokens <= whole.tokens
