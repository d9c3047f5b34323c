"""Generation, evaluation and the Python API on one tiny trained model, against the plainest way to do the same."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

import neva
from neva import api
from neva.cli import main
from neva.data.encode import Encoder
from neva.data.sample import Encoded, Sample, Turn
from neva.data.source import LlavaSource
from neva.data.tokenizer import JsonTokenizer
from neva.evaluate.run import errors, evaluate
from neva.infer.generate import (
    Loaded,
    Sampling,
    _Request,
    _stream,
    draw,
    generate,
    lay_out_for_decoding,
    unanswerable,
)
from neva.models.layers import RopeScaling
from neva.models.vlm import VLM
from neva.recipes.demo import MODEL
from tests import runs
from tests.packed import Item, pack


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colour_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has half learned to name the colours, trained from Python."""
    out = tmp_path_factory.mktemp("train") / "run"
    overrides = (
        f"data.source={data}", f"data.image_folder={data.parent / 'images'}", f"out={out}", "data.system=", "data.pool=32",
        "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=128",
        "log.tensorboard=false", "precision=fp32", "steps=30", "optim.lr=5e-3", "optim.warmup=3", "trainable=[*]", "checkpoint.every=0",
    )  # fmt: skip
    said: list[str] = []
    last = neva.train("llava-tiny/finetune", overrides, say=said.append)
    assert last == out / "checkpoints" / "step_30" and any("finetune 30/30" in text for text in said)
    return last


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return neva.load(checkpoint)


def picture(colour: str, size: tuple[int, int] = (40, 28)) -> Image.Image:
    return Image.new("RGB", size, runs.COLOURS[colour])


def asked(text: str, *images: Image.Image, before: Sequence[str] = ()) -> Sample:
    """A conversation whose last question is `text`; `before` are earlier questions and answers in turn."""
    turns = [Turn(role=("user", "assistant")[i % 2], text=said) for i, said in enumerate((*before, text))]
    return Sample(source="test", id=text[:20], turns=tuple(turns), images=images)


SAMPLES = (
    asked("<image>\nWhich colour?", picture("red")),
    asked("Write the word blue 1."),
    asked("Compare <image> with <image>, please: which colours?", picture("green"), picture("white", (28, 90))),
    asked("And now?", picture("blue"), before=("<image>\nWhich colour please?", "blue")),
    asked("?"),
)


def plain_greedy(loaded: Loaded, sample: Sample, count: int) -> list[int]:
    """The whole sequence through the model again for each token, no cache, no packing."""
    encoded = loaded.encoder.encode(sample, labels=False)
    tokens = encoded.tokens.tolist()
    for _ in range(count):
        batch = pack(loaded.encoder.layout, [[Item(tokens=tokens, labels=tokens, tiles=list(encoded.tiles))]], len(tokens))
        with torch.no_grad():
            token = int(loaded.model(batch, logits_at=torch.tensor([len(tokens) - 1])).logits[0].argmax())
        if token == loaded.encoder.tokenizer.eos:
            break
        tokens.append(token)
    return tokens[len(encoded.tokens) :]


class Endless(JsonTokenizer):
    """Its end token is one that the model has not learned to say."""

    eos = 510


def without_end(loaded: Loaded) -> Loaded:
    """The model, which now ends no answer by itself: so that long generations are compared."""
    tokenizer = loaded.encoder.tokenizer
    return replace(loaded, encoder=replace(loaded.encoder, tokenizer=Endless(tokenizer.files)))


def test_cached_greedy_decoding_is_the_argmax_of_full_forwards(loaded: Loaded) -> None:
    for model in (loaded, without_end(loaded)):
        answers = generate(model, SAMPLES, Sampling(max_new_tokens=12))
        for sample, answer in zip(SAMPLES, answers, strict=True):
            expected = plain_greedy(model, sample, 12)
            assert list(answer.tokens) == expected
            assert answer.text == model.encoder.tokenizer.decode(expected).strip()
            assert answer.finish == ("length" if len(expected) == 12 else "stop")


@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_for_decoding_changes_no_value(tied: bool) -> None:
    model = VLM(replace(MODEL, decoder=replace(MODEL.decoder, tied=tied))).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    x, ids = torch.randn(5, MODEL.decoder.width), torch.tensor([0, 3, 511, 3])
    matrix = model.decoder.embed.weight if tied else model.head.weight
    assert matrix is not None
    logits, embedded = model.head(x, tied=matrix), model.decoder.embed(ids)
    lay_out_for_decoding(model)
    assert matrix.shape == (512, 128) and matrix.T.is_contiguous()
    assert torch.allclose(model.head(x, tied=matrix), logits, rtol=1e-5, atol=1e-4) and torch.equal(model.decoder.embed(ids), embedded)


def test_the_model_learned_something(loaded: Loaded) -> None:
    """Else all answers could be alike, and the comparisons empty."""
    samples = [asked("<image>\nWhich colour?", picture(colour)) for colour in ("red", "green", "blue")]
    assert len({answer.text for answer in generate(loaded, samples, Sampling(max_new_tokens=8))}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_ragged_batch_answers_as_one_by_one(loaded: Loaded, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=temperature, top_k=20, seed=7)
    together = generate(loaded, SAMPLES, sampling)
    alone = [generate(loaded, [sample], sampling)[0] for sample in SAMPLES]
    assert together == alone and generate(loaded, SAMPLES, sampling) == together
    assert generate(loaded, SAMPLES[::-1], sampling) == together[::-1]
    assert generate(loaded, [], sampling) == []
    if temperature:
        assert generate(loaded, SAMPLES, replace(sampling, seed=100)) != together


def test_an_answer_ends_at_the_limit_at_a_stop_text_and_at_the_end_of_the_positions(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_end(loaded)
    (long,) = generate(model, SAMPLES[:1], Sampling(max_new_tokens=9))
    assert (len(long.tokens), long.finish) == (9, "length")
    whole = model.encoder.tokenizer.decode(long.tokens)
    stop = next(whole[n : n + 2] for n in range(1, len(whole)) if whole[n : n + 2].strip())
    (short,) = generate(model, SAMPLES[:1], Sampling(max_new_tokens=9, stop=(stop, "never")))
    assert short.finish == "stop" and short.text == whole[: whole.index(stop)].strip() and long.tokens[: len(short.tokens)] == short.tokens
    prompt = len(model.encoder.encode(SAMPLES[0], labels=False).tokens)
    full = model.model.config
    monkeypatch.setattr(model.model, "config", replace(full, decoder=replace(full.decoder, max_positions=prompt + 4)))
    (cut,) = generate(model, SAMPLES[:1], Sampling(max_new_tokens=9))
    assert cut.tokens == long.tokens[:4] and cut.finish == "length"
    with pytest.raises(ValueError, match=r"sample '.*' of 'test': its prompt has \d+ tokens but the model's positions end at"):
        generate(model, [asked("word " * 99)], Sampling())


def test_the_first_of_two_stop_texts_in_one_token_ends_the_answer(loaded: Loaded) -> None:
    tokenizer = loaded.encoder.tokenizer
    spelled = {id: tokenizer.decode([id]) for id in range(300, 500)}
    id, text = next((id, text) for id, text in spelled.items() if text.isalpha() and len(set(text)) > 2)
    prompt = loaded.encoder.encode(SAMPLES[4], labels=False)
    request = _Request(loaded, Sampling(stop=(text[2], text[1])), prompt)
    request.take(id)
    assert (request.answer().text, request.finish) == (text[:1], "stop")


def test_an_answer_without_any_stop_text_has_its_text(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = without_end(loaded)
    monkeypatch.setattr(Encoder, "stops", ())
    (answer,) = generate(model, SAMPLES[4:], Sampling(max_new_tokens=5))
    assert answer.finish == "length" and len(answer.tokens) == 5
    assert answer.text == model.encoder.tokenizer.decode(answer.tokens).strip() != ""


def test_mass_that_is_reached_exactly_takes_no_further_token() -> None:
    logits = torch.tensor([2.0, 2.0, -9.0])
    generator = torch.Generator().manual_seed(0)
    half = Sampling(temperature=1.0, top_k=2, top_p=0.5)
    assert len({draw(logits, half, generator) for _ in range(50)}) == 1
    more = replace(half, top_p=0.51)
    assert {draw(logits, more, generator) for _ in range(50)} == {0, 1}


def test_samples_draw_from_streams_of_their_own(loaded: Loaded) -> None:
    """The stream follows the sample's source, its id and the question, and nothing else."""
    model, sampling = without_end(loaded), Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    one = asked("Which colour is this?")
    others = [replace(one, id="other"), replace(one, source="other")]
    answers = generate(model, [one, *others, one, SAMPLES[4]], sampling)
    assert answers[0] == answers[3] == generate(model, [one], sampling)[0]
    assert len({answer.tokens for answer in answers}) == 4
    longer = asked("Which colour is this?", before=("Which colour is this?", "red"))
    assert longer.id == one.id  # two questions of one sample
    assert _stream_start(model, one) != _stream_start(model, longer)


def _stream_start(loaded: Loaded, sample: Sample) -> list[int]:
    stream = _stream(3, loaded.encoder.encode(sample, labels=False))
    return torch.randint(2**31, (4,), generator=stream).tolist()


@pytest.fixture
def learned(loaded: Loaded) -> Loaded:
    """A random model with a learned vector for each of 40 positions."""
    config = loaded.model.config
    positions = replace(config.decoder, positions="learned", max_positions=40)
    torch.manual_seed(0)
    model = VLM(replace(config, decoder=positions)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return replace(without_end(loaded), model=model)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("limit", [4, 99])
def test_learned_positions_and_a_ragged_batch(
    learned: Loaded,
    limit: int,
    temperature: float,
) -> None:
    """Requests that are done wait for the longest one, none beyond the last position."""
    samples = [sample for sample in SAMPLES if fits(learned, sample)]
    lengths = [len(encoded(learned, sample).tokens) for sample in samples]
    assert len(samples) >= 3 and len(set(lengths)) == len(lengths)
    sampling = Sampling(max_new_tokens=limit, temperature=temperature)
    together = generate(learned, samples, sampling)
    for sample, length, answer in zip(samples, lengths, together, strict=True):
        assert generate(learned, [sample], sampling) == [answer]
        assert answer.finish == "length" and len(answer.tokens) == min(limit, 40 - length)
        if not temperature:
            assert list(answer.tokens) == plain_greedy(learned, sample, len(answer.tokens))


def encoded(loaded: Loaded, sample: Sample) -> Encoded:
    return loaded.encoder.encode(sample, labels=False)


def fits(loaded: Loaded, sample: Sample) -> bool:
    tokens = encoded(loaded, sample).tokens.tolist()
    return not unanswerable(loaded.model.config.decoder, loaded.encoder.tokenizer, tokens)


def test_learned_positions_cannot_be_stretched() -> None:
    scaling = RopeScaling(kind="linear", factor=4.0)
    rotary = replace(MODEL.decoder, rope_scaling=scaling, max_positions=40)
    assert rotary.reach == 160 and replace(rotary, positions="learned").reach == 40
    stretched = RopeScaling(kind="llama3", factor=4.0, original=10)
    # whose max_positions counts what it was stretched to
    assert replace(rotary, rope_scaling=stretched).reach == 40


def test_ranks_share_the_questions(loaded: Loaded, tmp_path: Path) -> None:
    """Like cards: together they are what one rank asks, in its order."""
    source = LlavaSource(multi_turn(tmp_path), tmp_path)
    sampling = Sampling(max_new_tokens=3)
    whole = evaluate(loaded, source, sampling=sampling)
    parts = [evaluate(loaded, source, sampling=sampling, rank=rank, world=4) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 2, 2, 2]
    assert [parts[number % 4][number // 4] for number in range(9)] == whole


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_question_that_is_too_long_does_not_end_an_evaluation(
    learned: Loaded,
    tmp_path: Path,
    batch_size: int,
) -> None:
    """It is named and counts as wrong; the others are answered as without it."""
    file = multi_turn(tmp_path)
    rows = json.loads(file.read_text())
    kept = [row for row in rows if row["id"] != "b"]
    long = runs.row("long", "word " * 99, "x", kind="talk")
    file.write_text(json.dumps([*kept[:2], long, *kept[2:]]))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(kept))
    sampling = Sampling(max_new_tokens=99, temperature=0.8)
    source = LlavaSource(file, tmp_path)
    judged = evaluate(learned, source, sampling=sampling, batch_size=batch_size)
    (wrong,) = (j for j in judged if j.question.sample.id == "long")
    assert (wrong.answer.text, wrong.answer.finish, wrong.right) == ("", "error", False)
    said = "sample 'long' of 'held_out': its prompt has"
    assert wrong.answer.error.startswith(said) and "positions end at 40" in wrong.answer.error
    others = evaluate(learned, LlavaSource(plain, tmp_path, name="held_out"), sampling=sampling)
    assert [j.answer for j in judged if j is not wrong] == [j.answer for j in others]
    result = api.evaluate(learned, data=file, image_folder=tmp_path, batch_size=batch_size)
    assert result["errors"] == errors(judged) and result["n"] == len(judged)
    assert errors(judged) == [errors(others)[0], wrong.answer.error]  # one of the others is too
    assert len(judged) == len(others) + 1


def test_an_evaluation_says_what_was_not_asked(checkpoint: Path, tmp_path: Path) -> None:
    """On the command line: the too long question, and one whose image is broken, are named."""
    rows = [runs.row("long", "word " * 3000, "x"), runs.row("a", "Write the word red 1.", "red")]
    broken = runs.row("broken", "<image>\nWhich colour?", "red", image="broken.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "few.json").write_text(json.dumps([*rows, broken]))
    given = ("--data", tmp_path / "few.json", "--image-folder", tmp_path, "--max-new-tokens", 3)
    shown = neva_cli("eval", checkpoint, *given)
    assert shown.exit_code == 0 and "3 questions" in shown.output
    said = [line for line in shown.output.splitlines() if line.startswith("Not asked")]
    assert len(said) == 2 and "'long'" in said[0] and "'broken'" in said[1]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_a_bad_question_does_not_end_a_file(checkpoint: Path, tmp_path: Path, size: int) -> None:
    """The others are answered as without it; in place of its answer stands why."""
    fine = [runs.row(name, f"Write the word {name}.", name) for name in ("red", "green", "blue")]
    long = runs.row("long", "word " * 3000, "x")
    broken = runs.row("broken", "<image>\nWhich colour?", "red", image="broken.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    limits = ("--image-folder", tmp_path, "--max-new-tokens", 5, "--batch-size", size)
    drawn = (*limits, "--temperature", 1, "--json")
    answered = []
    for folder, rows in (("all", [long, *fine[:2], broken, fine[2]]), ("fine", fine)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "asked.json"
        file.write_text(json.dumps(rows))
        shown = neva_cli("generate", checkpoint, "--data", file, *drawn)
        assert shown.exit_code == 0, shown.output
        answered.append([json.loads(line) for line in shown.output.splitlines()])
    errors = [row for row in answered[0] if "error" in row]
    assert [row for row in answered[0] if "error" not in row] == answered[1]
    assert [row["id"] for row in errors] == ["long", "broken"]
    assert all((row["text"], row["finish"]) == ("", "error") for row in errors)
    plain = neva_cli("generate", checkpoint, "--data", tmp_path / "all" / "asked.json", *limits)
    told = [line for line in plain.output.splitlines() if line.startswith("Not asked: sample '")]
    assert plain.exit_code == 0 and len(told) == 2 and "positions end at" in told[0]


def test_a_long_question_does_not_end_a_training(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The evaluation of a stage says how many of its questions were not asked, and why."""
    rows = [runs.row("long", "word " * 3000, "x"), runs.row("a", "Write the word red 1.", "red")]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    overrides = (
        f"data.source={data}",
        f"data.image_folder={data.parent / 'images'}",
        f"out={tmp_path / 'run'}",
        f"evaluate.source={tmp_path / 'few.json'}",
        "evaluate.every=1",
        "steps=1",
        "model.decoder.layers=1",
        "model.vision.layers=2",
        "batch.seq_length=128",
        "log.tensorboard=false",
        "data.system=",
        "data.pool=32",
    )
    neva.train("llava-tiny/finetune", overrides)
    assert "1 of 2 questions were not asked: sample 'long'" in capsys.readouterr().out
    (line,) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["few"] in (0.0, 0.5)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, 5),
        ({"temperature": 0.5}, 5),
        ({"temperature": 2.0, "top_k": 2}, 2),
        ({"temperature": 1.0, "top_p": 0.75}, 2),  # 0.56 + 0.21 reach it
        ({"temperature": 1.0, "top_p": 0.01}, 1),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9}, 3),  # of the three that are left: 0.63, 0.23, 0.14
    ],
)
def test_draws_follow_the_tempered_and_cut_distribution(options: dict[str, Any], kept: int) -> None:
    order = torch.tensor([3, 1, 4, 0, 2])  # unsorted, so that ids and ranks differ
    logits, sampling = torch.empty(5), Sampling(**options)
    logits[order] = LOGITS
    expected = (LOGITS / sampling.temperature).exp()
    expected[kept:] = 0
    expected /= expected.sum()
    generator, count = torch.Generator().manual_seed(0), 3000
    drawn = torch.bincount(torch.tensor([draw(logits, sampling, generator) for _ in range(count)]), minlength=5)[order] / count
    assert ((drawn == 0) == (expected == 0)).all()
    error = (drawn - expected).abs()
    assert (error <= 4 * (expected * (1 - expected) / count).sqrt()).all(), error


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e-30, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    """And one of the likeliest, where several are equally so."""
    logits = torch.tensor([-3e38, 1.0, 2.0, 1.9, -1e-38, -torch.inf])
    sampling, generator = Sampling(temperature=temperature), torch.Generator().manual_seed(0)
    assert {draw(logits, sampling, generator) for _ in range(50)} == {2}
    logits[4] = 2.0
    assert {draw(logits, sampling, generator) for _ in range(50)} == {2, 4}


def test_a_huge_temperature_takes_any_token() -> None:
    sampling, generator = Sampling(temperature=1e308), torch.Generator().manual_seed(0)
    assert {draw(LOGITS, sampling, generator) for _ in range(200)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop": ("",)}, "an empty stop text"),
    ],
)
def test_bad_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def neva_cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="neva")


def test_generate_on_the_command_line(checkpoint: Path, loaded: Loaded, data: Path, tmp_path: Path) -> None:
    for n, colour in enumerate(("green", "white")):
        runs.picture(tmp_path / f"{n}.png", runs.COLOURS[colour])
    images = ("--image", tmp_path / "0.png", "--image", tmp_path / "1.png")
    limits = ("--max-new-tokens", 6, "--json")
    pictures = (tmp_path / "0.png", tmp_path / "1.png")
    # Images stand where the prompt says, else before it.
    for prompt, text in (("Which colours?", "<image>\n<image>\nWhich colours?"), ("Is <image> as <image>?", "Is <image> as <image>?")):
        shown = neva_cli("generate", checkpoint, "--prompt", prompt, *images, *limits)
        (expected,) = generate(
            loaded, [Sample(source="x", id="0", turns=(Turn(role="user", text=text),), images=pictures)], Sampling(max_new_tokens=6)
        )
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.output) == {"id": "0", "text": expected.text, "finish": expected.finish, "tokens": len(expected.tokens)}
    run = checkpoint.parents[1]
    folder = ("--image-folder", data.parent / "images")
    printed = [neva_cli("generate", run, "--data", data, *folder, "--batch-size", size, *limits).output for size in (5, 16)]
    rows = [json.loads(line) for line in printed[0].splitlines()]
    assert printed[0] == printed[1] and [row["id"] for row in rows] == [row["id"] for row in json.loads(data.read_text())]
    assert all(set(row) == {"id", "text", "finish", "tokens", "truth"} for row in rows)
    assert [row["truth"] for row in rows] == [row["conversations"][1]["value"] for row in json.loads(data.read_text())]
    plain = neva_cli("generate", run, "--data", data, *folder, "--max-new-tokens", 6).output.splitlines()
    assert plain == [f"{row['id']}: {row['text']}" for row in rows]
    drawn = [
        neva_cli("generate", run, "--data", data, *folder, "--temperature", 1.5, "--seed", 3, "--batch-size", size, *limits).output
        for size in (4, 24)
    ]
    assert drawn[0] == drawn[1] != printed[0]  # a sample's random stream does not depend on the batch size


def multi_turn(folder: Path) -> Path:
    """A data file with two kinds and a source's name in place of one, samples of several turns and of two images."""
    turns = (("human", "<image>\nWhich colour?"), ("gpt", "red"), ("human", "Write the word blue 1."), ("gpt", "blue"))
    talk = [{"from": who, "value": text} for who, text in turns]
    pair = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "green"}]
    later = [*pair, {"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "white"}]
    rows = [
        {"id": "a", "image": "red.png", "kind": "talk", "conversations": talk},
        {"id": "b", "image": ["green.png", "white.png"], "conversations": later},
        runs.row("c", "Write the word white 1.", "white"),
        *({"id": f"d{n}", **runs.row("", "<image>\nWhich colour?", colour, image=f"{colour}.png", kind="talk")} | {"id": f"d{n}"}
          for n, colour in enumerate(runs.COLOURS)),
    ]  # fmt: skip
    for colour, value in runs.COLOURS.items():
        runs.picture(folder / f"{colour}.png", value)
    (folder / "held_out.json").write_text(json.dumps(rows))
    return folder / "held_out.json"


def test_eval_counts_every_answer_and_is_a_brute_force_count(checkpoint: Path, loaded: Loaded, tmp_path: Path) -> None:
    file = multi_turn(tmp_path)
    shown = neva_cli("eval", checkpoint, "--data", file, "--image-folder", tmp_path, "--max-new-tokens", 7, "--json")
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.output)
    right: dict[str, list[bool]] = {}
    source = LlavaSource(file, tmp_path)
    for sample in (source[i] for i in range(len(source))):
        for number in range(1, len(sample.turns), 2):
            turns = sample.turns[:number]
            images = sample.images[: sum(turn.text.count("<image>") for turn in turns)]
            tokens = plain_greedy(loaded, replace(sample, turns=turns, images=images), 7)
            said = loaded.encoder.tokenizer.decode(tokens).strip()
            right.setdefault(sample.kind or "held_out", []).append(said == sample.turns[number].text)
    shares = {kind: sum(row) / len(row) for kind, row in sorted(right.items())}
    counts = {kind: len(row) for kind, row in right.items()}
    assert (result["accuracy"], result["n"], result["errors"]) == (shares, 9, [])
    assert result["counts"] == counts == {"talk": 6, "held_out": 3}
    assert any(any(row) for row in right.values())
    assert result["overall"]["accuracy"] == sum(map(sum, right.values())) / 9
    assert api.evaluate(loaded, data=file, image_folder=tmp_path, max_new_tokens=7, batch_size=2) == result
    table = neva_cli("eval", checkpoint, "--data", file, "--image-folder", tmp_path, "--max-new-tokens", 7)
    assert "9 questions" in table.output and f"{result['accuracy']['talk']:.1%}" in table.output


def test_the_python_api_takes_a_path_a_loaded_model_and_pictures(checkpoint: Path, loaded: Loaded) -> None:
    image = picture("red")
    (one,) = neva.generate(loaded, prompt="Which colour?", images=[image], max_new_tokens=5)
    (other,) = neva.generate(str(checkpoint), prompt="<image>\nWhich colour?", images=[image], max_new_tokens=5)
    assert one == other and set(one) == {"id", "text", "finish", "tokens"}
    (nothing,) = neva.generate(loaded, prompt="Which colour?", images=[image], max_new_tokens=5, stop=[one["text"][:1]])
    assert one["text"] and (nothing["text"], nothing["finish"]) == ("", "stop")
    with pytest.raises(ValueError, match="give a prompt, or data"):
        list(neva.generate(loaded))
    stages = neva.recipe("llava-tiny", ["optim.lr=7"])
    assert [stage.name for stage in stages] == ["pretrain", "finetune"] and stages[0].optim.lr == 7
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        neva.trian  # noqa: B018


def test_precision_of_a_loaded_model(checkpoint: Path) -> None:
    kinds: dict[str, Tensor] = {p: neva.load(checkpoint, precision=p).model.decoder.embed.weight for p in ("auto", "fp32", "bf16")}
    assert {name: value.dtype for name, value in kinds.items()} == {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    with pytest.raises(ValueError, match="precision='fp8' is none of fp32, bf16, auto"):
        neva.load(checkpoint, precision="fp8")
