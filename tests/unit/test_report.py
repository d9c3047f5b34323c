"""The report page and the numbers on it: read back from the file, and as a browser draws it."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import neva
from neva import api, config
from neva.data.sample import Picture, Sample, Turn
from neva.evaluate import report
from neva.evaluate.question import Judged, Question, blanked, questions, suited
from neva.evaluate.run import accuracy, best_blind, summary
from neva.infer.generate import Answer
from neva.job import TrainConfig
from neva.models import cost
from neva.models.presets import VLMS
from tests import runs

CHROMIUM = shutil.which("chromium") or ""
REPORT = {
    "accuracy": {"even": 0.875, "what_is_it": 0.25},
    "baselines": {"even": 0.5, "what_is_it": 0.125},
    "blank_image": {"even": 0.4375, "what_is_it": 0.0},
    "held_out_images": 1200,
    "seconds": 61.7,
    "stages": [
        {"name": "pretrain", "steps": 20, "trainable": 33024, "frozen_changed": 0, "loss_first": 6.25, "loss_last": 5.5},
        {"name": "finetune", "steps": 700, "trainable": 1234567, "frozen_changed": 3, "loss_first": 5.0, "loss_last": 0.0625},
    ],
}  # fmt: skip


def judged(
    truth: str,
    *,
    right: bool,
    kind: str = "even",
    text: str = "Is it even?",
    answer: str | None = None,
    images: Sequence[Picture] = (),
    id: str = "0",
) -> Judged:
    turns = (Turn(role="user", text="<image>\n" * len(images) + text),)
    sample = Sample(source="held-out", id=id, kind=kind, turns=turns, images=tuple(images))
    said = answer if answer is not None else truth if right else f"not {truth}"
    return Judged(
        question=Question(sample=sample, truth=truth),
        answer=Answer(text=said, tokens=(1,), finish="stop"),
        right=right,
    )


def dot(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (9, 7), colour)


def lines() -> list[dict]:
    """Two stages; the second has two kinds, one of which is missing from some steps."""
    first = [{"stage": "pretrain", "step": n, "losses": {"": 6.0 - n * (n % 2)}} for n in range(1, 6)]
    second = [
        {"stage": "finetune", "step": n, "losses": {"even": 2.0 / n} | ({"larger": 8.0} if n % 2 else {})}
        for n in range(6, 17)
    ]  # fmt: skip
    return first + second


class Page(HTMLParser):
    """Rows of table cells as text, the attributes of every element, and the text
    of the answers' cards."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


SHOWN = (
    judged("seven", right=False, kind="what_is_it", text="Which <b>digit</b>?", answer="<script>alert(1)</script>", images=(dot((200, 10, 10)),)),
    judged("no", right=False, answer=""),
    judged("yes", right=True, kind="larger", images=(dot((10, 200, 10)), dot((10, 10, 200)))),
)  # fmt: skip


def written(folder: Path) -> str:
    report.write(
        folder / "report.html",
        report=report.of_demo(REPORT),
        plots=report.loss_plots(lines()),
        shown=SHOWN,
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_says_the_reports_numbers(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    assert page.rows[1:3] == [
        ["even", "", "87.5%", "", "50.0%", "", "43.8%"],
        ["what is it", "", "25.0%", "", "12.5%", "", "0.0%"],
    ]
    heads = ["stage", "steps", "parameters trained", "frozen tensors that changed"]
    assert page.rows[3] == [*heads, "loss, first step", "loss, last step"]
    assert page.rows[4:6] == [
        ["pretrain", "20", "33,024", "0", "6.250", "5.500"],
        ["finetune", "700", "1,234,567", "3", "5.000", "0.062"],
    ]
    bars = [bar for bar in page.named("span") if "bar" in (bar.get("class") or "")]
    widths = [int(re.fullmatch(r"width: (\d+)px", bar["style"] or "")[1]) for bar in bars]  # type: ignore[index]
    assert widths == [round(160 * share) for share in (0.875, 0.5, 0.4375, 0.25, 0.125, 0)]
    assert "720 optimiser steps, 62 seconds" in page.text and "1,200 images" in page.text
    assert not list(tmp_path.glob(".report*"))


def test_the_page_shows_questions_answers_and_their_images(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    cards = [(card.get("class") or "").split() for card in page.named("div")]
    assert sum("wrong" in card for card in cards) == 2
    said = " ".join(page.text.split())
    assert "Which <b>digit</b>? <script>alert(1)</script> truth: seven" in said  # as text
    assert "Is it even? (nothing) truth: no" in said
    assert "Is it even? yes right" in said and "<image>" not in said and "truth: yes" not in said
    shown = [image["src"] or "" for image in page.named("img")]
    pixels = [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in shown]
    assert [picture.getpixel((3, 3)) for picture in pixels] == [(200, 10, 10), (10, 200, 10), (10, 10, 200)]


def test_the_page_runs_nothing_and_loads_nothing(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


def test_curves_are_the_smoothed_losses_in_pixels() -> None:
    """Points read back from pixels against the mean written out as a sum."""
    first, second = report.loss_plots(lines())
    assert (first.title, first.first, first.last) == ("pretrain", 1, 5)
    assert (second.title, second.first, second.last) == ("finetune", 6, 16)
    assert [curve.name for curve in first.curves] == ["all"]
    assert [curve.name for curve in second.curves] == ["even", "larger"]
    assert len({curve.colour for curve in second.curves}) == 2
    for plot, kinds in ((first, [""]), (second, ["even", "larger"])):
        bottom, top = plot.ticks[0][0], plot.ticks[-1][0]
        scale = 1.05 * max(value for kind in kinds for _, value in smoothed(plot.title, kind))
        assert [float(label) for _, label in plot.ticks] == pytest.approx([scale * k / 4 for k in range(5)], rel=0.06)
        for kind, curve in zip(kinds, plot.curves, strict=True):
            points = [tuple(map(float, point.split(","))) for point in curve.points.split()]
            across = report.WIDTH - 8 - report.LEFT
            steps = [plot.first + (x - report.LEFT) / across * (plot.last - plot.first) for x, _ in points]
            values = [(bottom - y) / (bottom - top) * scale for _, y in points]
            wanted = smoothed(plot.title, kind)
            assert steps == pytest.approx([step for step, _ in wanted], abs=0.01)
            assert values == pytest.approx([value for _, value in wanted], abs=0.001 * scale)


def smoothed(stage: str, kind: str) -> list[tuple[int, float]]:
    """Each loss with 0.9 of the weight of the one behind it."""
    told = [(line["step"], line["losses"][kind]) for line in lines() if line["stage"] == stage and kind in line["losses"]]
    means = []
    for end in range(1, len(told) + 1):
        weights = [0.9 ** (end - 1 - n) for n in range(end)]
        mean = sum(w * value for w, (_, value) in zip(weights, told, strict=False)) / sum(weights)
        means.append((told[end - 1][0], mean))
    return means


def test_metrics_are_the_lines_of_the_file(tmp_path: Path) -> None:
    rows = [{"stage": "ä", "step": 1}, {"stage": "b", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    assert report.metrics(tmp_path) == rows


def test_mistakes_come_first_and_kinds_in_turn() -> None:
    wrong = [judged("x", right=False, kind=kind, id=f"w{kind}{n}") for kind in "ab" for n in range(5)]
    right = [judged("x", right=True, kind=kind, id=f"r{kind}{n}") for kind in "abc" for n in range(9)]
    shown = [j.question.sample.id for j in report.chosen([*right, *wrong])]
    assert shown[:6] == ["wa0", "wb0", "wa1", "wb1", "wa2", "wb2"]
    assert shown[6:12] == ["ra0", "rb0", "rc0", "ra1", "rb1", "rc1"] and len(shown) == 20
    few = report.chosen([*right[:3], wrong[0]])
    assert [j.question.sample.id for j in few] == ["wa0", "ra0", "ra1", "ra2"]


def test_accuracy_and_what_is_had_without_looking() -> None:
    """Per kind, and per source where samples have no kind; a kind's own commonest
    truth, right or wrong."""
    told = [judged(truth, right=right, kind="even") for truth, right in (("no", True), ("yes", False), ("yes", False))]
    told += [judged(truth, right=truth == "3", kind="digit") for truth in "13233"]
    told += [judged("yes", right=True, kind=""), judged("no", right=False, kind="")]
    assert accuracy(told) == pytest.approx({"digit": 3 / 5, "even": 1 / 3, "held-out": 1 / 2})
    assert best_blind(told) == pytest.approx({"digit": 3 / 5, "even": 2 / 3, "held-out": 1 / 2})
    assert list(accuracy(told)) == list(best_blind(told)) == ["digit", "even", "held-out"]


def test_the_best_answers_without_the_image_follow_the_questions_words() -> None:
    """Of words that are asked ten times and more; all others of a kind share one answer. Against a
    search through all ways to answer so."""
    words = {"Is it red?": ("no",) * 9 + ("yes",) * 3, "Is it not red?": ("yes",) * 8 + ("no",) * 2}
    rare = {f"Is it {n}?": (("yes", "no", "yes")[n % 3],) for n in range(7)}
    few = {"Is it round?": ("yes",) * 4 + ("no",) * 5}
    told = [judged(truth, right=True, text=text, kind="even") for text, truths in (words | rare | few).items() for truth in truths]
    told += [judged(truth, right=True, kind="digit", text="Which?") for truth in "1123"]
    groups = [*words.values(), [truth for truths in (rare | few).values() for truth in truths]]
    right = sum(max(list(group).count(said) for said in ("yes", "no")) for group in groups)
    assert right == 9 + 8 + 9
    even = right / sum(map(len, groups))
    assert best_blind(told) == pytest.approx({"digit": 0.5, "even": even})
    found = summary(told)
    assert found["overall"]["baseline"] == pytest.approx((right + 2) / len(told))
    assert found["counts"] == {"digit": 4, "even": 38} and found["n"] == 42
    # Case, line breaks and where the image stands are no other words.
    same = [judged("a", right=True, text="Which  one?", kind="x") for _ in range(5)]
    same += [judged("b", right=True, text="<image>\nwhich one?", kind="x") for _ in range(5)]
    same += [judged("c", right=True, text=f"{n}?", kind="x") for n in range(2)]
    assert best_blind(same) == {"x": 7 / 12}


def test_a_caption_format_asks_first_questions_of_images() -> None:
    asks = Turn(role="user", text="<image>\nWhat?")
    answer = Turn(role="assistant", text="A cat.")
    text = Turn(role="user", text="Why?")
    samples = [
        Sample(source="s", id="two", turns=(asks, answer, text, answer), images=(dot((1, 2, 3)),)),
        Sample(source="s", id="text", turns=(text, answer)),
    ]
    asked = list(questions(Listed(samples)))
    assert [(q.sample.id, q.row, q.turn) for q in asked] == [("two", 0, 1), ("two", 0, 3), ("text", 1, 1)]
    assert suited(asked, caption=False) == asked and suited(asked, caption=True) == asked[:1]
    last = list(questions(Listed(samples), each="last"))
    assert [(q.sample.id, q.turn) for q in last] == [("two", 3), ("text", 1)]


class Listed:
    """A source of samples in memory."""

    name = "held-out"

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def test_blanked_images_are_black_and_all_else_stays(tmp_path: Path) -> None:
    """Of the size that the image has when it is shown: a photograph with an
    EXIF rotation is turned."""
    noise = torch.randint(
        1,
        256,
        (5, 8, 3),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )
    picture = Image.fromarray(noise.numpy())
    picture.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    turns = (
        Turn(role="user", text="<image><image><image>What?"),
        Turn(role="assistant", text="A cat."),
    )
    images = (tmp_path / "a.png", tmp_path / "turned.jpg", picture)
    source = Listed(
        [
            Sample(source="s", id="7", kind="k", turns=turns, images=images),
            Sample(source="s", id="8", turns=turns[1:]),
        ]
    )
    seen = blanked(source[0])
    assert [image.size for image in seen.images] == [(8, 5), (5, 8), (8, 5)]  # type: ignore[union-attr]
    assert all(image.mode == "RGB" and image.getextrema() == ((0, 0),) * 3 for image in seen.images)  # type: ignore[union-attr]
    assert (seen.turns, seen.id, seen.kind) == (turns, "7", "k")
    assert blanked(source[1]) == source[1]
    assert source[0].images[2] is picture and picture.getextrema() != ((0, 0),) * 3


@pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed: the page is not drawn")
def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    """Bars, curves and images have their colours on the picture, and the card
    of a mistake its own."""
    written(tmp_path)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,1700",
        f"--screenshot={tmp_path / 'page.png'}",
    ]
    subprocess.run(
        [*command, (tmp_path / "report.html").as_uri()],
        check=True,
        timeout=120,
        capture_output=True,
    )
    with Image.open(tmp_path / "page.png") as page:
        colours = page.convert("RGB").getcolors(2**24) or []
        drawn = {colour: count for count, colour in colours}
    # of the two blue bars, 12 pixels high with round corners
    wanted = round(160 * 0.875) + round(160 * 0.25)
    assert drawn[(0x25, 0x63, 0xEB)] >= 0.95 * 12 * wanted
    for colour in ((200, 10, 10), (10, 200, 10), (10, 10, 200)):
        assert 0.95 * 84**2 <= drawn[colour] <= 84**2
    assert drawn[(0xFE, 0xF2, 0xF2)] > 5000
    assert drawn[(0xD9, 0x77, 0x06)] > 100  # the second curve


def metric(stage: str, step: int, **fields: object) -> dict:
    line = {"stage": stage, "step": step, "loss": 3.0 - step / 10, "losses": {"a": 2.0, "b_c": 1.0}, "tokens": 90, "padding": 0.1}
    return line | {"seconds": 2.0, "memory_gib": 1.0 + step, "samples": step * 4, "skipped_samples": step} | fields


def run_folder(folder: Path) -> Path:
    """A run of two stages of 4 steps that stands in the second, whose last line is being
    written."""
    model = VLMS["llava-tiny"]
    stages = [TrainConfig(name=name, model=model, trainable=(trained,), steps=4) for name, trained in (("one", "projector.*"), ("two", "*"))]
    folder.mkdir()
    config.save(stages, folder / "config.yaml")
    lines = [metric("one", n) for n in range(1, 5)] + [metric("two", 5), metric("two", 6, loss=None, losses={})]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"stage": "tw')
    scores = [{"stage": "two", "step": 5, "yes_no": 0.75, "<b>": 0.5}, {"stage": "two", "step": 6, "yes_no": 0.5, "<b>": 0.625}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    return folder


def test_a_runs_page_says_what_its_files_say(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    page = Page(api.report(run).read_text(encoding="utf-8"))
    counts = cost.parameters(VLMS["llava-tiny"])
    heads = ["stage", "steps", "steps planned", "parameters trained", "loss, first step", "loss, last step", "samples"]
    assert page.rows[:3] == [["kind", "last", "best", "at step"], ["yes no", "50.0%", "75.0%", "5"], ["<b>", "62.5%", "62.5%", "6"]]
    assert page.rows[3] == [*heads, "left out", "padding", "tokens a second", "time"]
    assert page.rows[4] == ["one", "4", "4", f"{counts.projector:,}", "2.900", "2.600", "16", "4", "10.0%", "45", "8 s"]
    assert page.rows[5] == ["two", "2", "4", f"{counts.total:,}", "2.500", "2.500", "24", "6", "10.0%", "45", "4 s"]
    assert "6 of 8 steps in 12 s, 7.00 GiB at most. It is not at its end." in page.text and str(run) in page.text
    assert not page.named("img") and len(page.named("svg")) == 3
    (run / "metrics.jsonl").unlink()
    (run / "evaluations.jsonl").unlink()
    empty = Page(api.report(run).read_text(encoding="utf-8"))
    assert "0 of 8 steps in 0 s" in empty.text and empty.rows[1][:4] == ["one", "0", "4", f"{counts.projector:,}"]
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml: No such file"):
        api.report(run)


def test_a_long_run_has_curves_of_bounded_length() -> None:
    many = {f"k{n}": 1.0 for n in range(20)}
    lines = [metric("one", n, losses=many | {"rare": 1.0} if n % 50 else many) for n in range(1, 5001)]
    (plot,) = report.loss_plots(lines)
    assert len(plot.curves) == len(report.COLOURS) and plot.more == 21 - len(report.COLOURS)
    points = [curve.points.split() for curve in plot.curves]
    assert all(report.MOST_POINTS / 2 < len(row) <= report.MOST_POINTS for row in points)
    assert all(float(row[-1].split(",")[0]) == pytest.approx(report.WIDTH - 8, abs=0.1) for row in points)


def test_every_run_leaves_a_page_and_a_refused_one_none(tmp_path: Path) -> None:
    said: list[str] = []
    given = ["llava-tiny/finetune", [*runs.SMALL, f"out={tmp_path / 'run'}", "steps=2", "data.workers=0"]]
    neva.train(*given, say=said.append)
    page = tmp_path / "run" / "report.html"
    assert "2 of 2 steps" in page.read_text() and f"See {page}" in said
    page.unlink()
    with pytest.raises(ValueError, match="holds a run already"):
        neva.train(*given, say=said.append)
    assert not page.exists()


@pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed: the page is not drawn")
@pytest.mark.parametrize("kind", ["run", "demo"])
def test_nothing_is_cut_off_on_a_telephone(kind: str, tmp_path: Path) -> None:
    """At 420 pixels the margin right of the cards is empty from top to bottom."""
    written(tmp_path)
    place = api.report(run_folder(tmp_path / "run")) if kind == "run" else tmp_path / "report.html"
    drawn = screenshot(place, tmp_path, width=420, height=2200)
    ground = drawn.getpixel((2, 2))
    margin = drawn.crop((408, 0, 420, 2200))
    assert margin.getcolors() == [(12 * 2200, ground)] and drawn.crop((20, 0, 400, 2200)).getcolors(2**20) != [(380 * 2200, ground)]


def screenshot(page: Path, scratch: Path, *, width: int, height: int) -> Image.Image:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},{height}"]
    command += [f"--screenshot={scratch / 'page.png'}", page.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    with Image.open(scratch / "page.png") as shown:
        return shown.convert("RGB")
