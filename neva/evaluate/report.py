"""The page that shows a run: its stages, loss curves per kind and scores; of the demo also accuracy
beside what can be had without looking, and answers with their images."""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from neva import config as tree
from neva.data.image import open_image
from neva.data.sample import Picture
from neva.evaluate.run import Judged
from neva.job import TrainConfig
from neva.models.vlm import VLM
from neva.parallel.wrap import freeze
from neva.training.metrics import duration

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#be185d", "#65a30d")
MOST_POINTS = 400
"""Points of a curve; a long run's are thinned out."""
WIDTH, HEIGHT, LEFT, BOTTOM = 524, 240, 44, 26
"""Size of a plot, and room for its axes' numbers, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a plot in pixels."""

    name: str
    colour: str
    points: str
    """SVG's "x,y x,y"."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves of one stage."""

    title: str
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    """Height in pixels and number of each horizontal line."""
    first: int
    last: int
    more: int = 0
    """Kinds that are not drawn."""


Points = Sequence[tuple[int, float]]
"""Steps and values."""


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return _json_lines(run / "metrics.jsonl")


def _json_lines(path: Path) -> list[dict]:
    """The lines of a file, none where it is not there; one that is being written is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def loss_plots(lines: Sequence[dict]) -> list[Plot]:
    """A plot per stage with a smoothed curve per kind, of those that most steps hold."""
    plots = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        series: dict[str, list[tuple[int, float]]] = {}
        for line in (line for line in lines if line["stage"] == stage):
            for kind, value in line["losses"].items():
                if math.isfinite(value):
                    series.setdefault(kind, []).append((line["step"], value))
        plots.append(_plot(stage, {kind: _smooth(points) for kind, points in series.items()}))
    return plots


def score_plots(lines: Sequence[dict]) -> list[Plot]:
    """A plot per stage of the held-out scores, a curve per kind of question."""
    plots = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        series: dict[str, list[tuple[int, float]]] = {}
        for line in (line for line in lines if line["stage"] == stage):
            for kind, value in _scores(line).items():
                series.setdefault(kind, []).append((line["step"], value))
        plots.append(_plot(stage, series))
    return plots


def _scores(line: Mapping[str, object]) -> dict[str, float]:
    others = ("stage", "step", "not_asked")
    return {kind: value for kind, value in line.items() if kind not in others and isinstance(value, float | int)}


def of_run(run: Path) -> dict:
    """What the page says of a run's folder, from its config.yaml, metrics.jsonl and
    evaluations.jsonl.

    ValueError where it holds no config.yaml that can be read.
    """
    stages = tree.load(run / "config.yaml", TrainConfig)
    lines = metrics(run)
    evaluations = _json_lines(run / "evaluations.jsonl")
    rows = [_stage(stage, [line for line in lines if line["stage"] == stage.name]) for stage in stages]
    scores: dict[str, list[tuple[int, float]]] = {}
    for line in evaluations:
        for kind, value in _scores(line).items():
            scores.setdefault(kind, []).append((line["step"], value))
    done, planned = len(lines), sum(stage.steps for stage in stages)
    passed = duration(sum((line["seconds"] for line in lines), 0.0))
    memory = max((line["memory_gib"] for line in lines), default=0.0)
    open_end = "" if done >= planned else " It is not at its end."
    return {
        "title": str(run),
        "lead": f"{done:,} of {planned:,} steps in {passed}, {memory:.2f} GiB at most.{open_end}",
        "stages": rows,
        "scores": {kind: {"last": points[-1][1], "best": max(points, key=lambda point: point[1])} for kind, points in scores.items()},
        "score_plots": score_plots(evaluations),
    }


def _stage(stage: TrainConfig, lines: Sequence[dict]) -> dict:
    with torch.device("meta"):
        model = VLM(stage.model)
    freeze(model, stage.trainable)
    seconds = sum((line["seconds"] for line in lines), 0.0)
    tokens = sum(line["tokens"] for line in lines)
    slots = sum(line["tokens"] / (1 - line["padding"]) for line in lines if line["padding"] < 1)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    return {
        "name": stage.name,
        "steps": len(lines),
        "planned": stage.steps,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "samples": lines[-1]["samples"] if lines else 0,
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "padding": 1 - tokens / slots if slots else 0.0,
        "left_out": lines[-1]["skipped_samples"] if lines else 0,
        "seconds": seconds,
    }


def _plot(title: str, given: Mapping[str, Points]) -> Plot:
    most = sorted(given, key=lambda kind: -len(given[kind]))[: len(COLOURS)]
    kinds = sorted(most)
    series = {kind: _thinned(given[kind]) for kind in kinds}
    steps = [step for points in series.values() for step, _ in points]
    top = max((value for points in series.values() for _, value in points), default=1.0) * 1.05 or 1.0
    first = min(steps, default=0)
    last = max(*steps, first + 1) if steps else first + 1

    def place(step: int, value: float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 8)
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (1 - value / top) + 4:.1f}"

    curves = tuple(
        Curve(name=kind or "all", colour=COLOURS[i % len(COLOURS)], points=" ".join(place(*point) for point in series[kind]))
        for i, kind in enumerate(kinds)
    )
    height = HEIGHT - BOTTOM
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    ticks = tuple((height * (1 - share) + 4, f"{top * share:.2g}") for share in shares)
    more = len(given) - len(kinds)
    return Plot(title=title, curves=curves, ticks=ticks, first=first, last=last, more=more)


def _thinned(points: Points) -> list[tuple[int, float]]:
    """At most `MOST_POINTS` of them, the last included."""
    every = -(-len(points) // MOST_POINTS)
    return list(points[::-1][::every][::-1]) if every > 1 else list(points)


def _smooth(points: Points, keep: float = 0.9) -> list[tuple[int, float]]:
    """An exponential mean, without its start's bias."""
    mean, weight, out = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append((step, mean / weight))
    return out


def chosen(judged: Sequence[Judged], count: int = 20, wrong: int = 6) -> list[Judged]:
    """Questions to show: up to `wrong` mistakes, the rest right, kinds in turn, spread over the whole list."""
    mistakes = _spread([j for j in judged if not j.right], wrong)
    return mistakes + _spread([j for j in judged if j.right], count - len(mistakes))


def _spread(judged: Sequence[Judged], count: int) -> list[Judged]:
    kinds: dict[str, list[Judged]] = {}
    for j in judged:
        kinds.setdefault(j.question.sample.kind, []).append(j)
    rows: list[Judged] = []
    for turn in range(count):
        for kind in sorted(kinds):
            if turn < len(kinds[kind]):
                rows.append(kinds[kind][turn])
    return rows[:count]


def of_demo(result: dict) -> dict:
    """The demo's results with what its page says of them."""
    steps = sum(stage["steps"] for stage in result["stages"])
    took = f"{result['seconds']:.0f} seconds with data and evaluation"
    asked = f"Asked about {result['held_out_images']:,} images that no training sample shows."
    return result | {
        "title": "A vision-language model, trained on this machine",
        "lead": f"Two stages, {steps} optimiser steps, {took}. {asked}",
        "note": (
            "No pretrained weights are shipped, so the first stage, which trains the projector alone as "
            "LLaVA does, works between a random encoder and a random decoder and can learn little. The "
            "second stage trains everything from scratch."
        ),
        "source": "Digits: MNIST, Y. LeCun and C. Cortes, CC BY-SA 3.0.",
    }


ABSENT: dict[str, object] = {"note": "", "source": "", "accuracy": {}, "scores": {}, "score_plots": []}
"""What a report need not say."""
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "stage": ("name", str),
    "steps": ("steps", "{:,}".format),
    "steps planned": ("planned", "{:,}".format),
    "parameters trained": ("trainable", "{:,}".format),
    "frozen tensors that changed": ("frozen_changed", str),
    "loss, first step": ("loss_first", "{:.3f}".format),
    "loss, last step": ("loss_last", "{:.3f}".format),
    "samples": ("samples", "{:,}".format),
    "left out": ("left_out", "{:,}".format),
    "padding": ("padding", "{:.1%}".format),
    "tokens a second": ("tokens_per_s", "{:,.0f}".format),
    "time": ("seconds", duration),
}
"""Head of a column of the stages -> the field that it shows, and how. Those that no stage has are
left out."""


def _table(stages: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the stages."""
    shown = {head: column for head, column in COLUMNS.items() if any(column[0] in stage for stage in stages)}
    rows = []
    for stage in stages:
        values = [(stage.get(key), form) for key, form in shown.values()]
        rows.append(["–" if value is None else form(value) for value, form in values])
    return list(shown), rows


def write(path: Path, *, report: dict, plots: Sequence[Plot], shown: Sequence[Judged] = ()) -> None:
    """Write the page: one file, no script, nothing loaded from elsewhere."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [
        {
            "images": [_data_url(picture) for picture in j.question.sample.images],
            "question": j.question.sample.turns[-1].text.replace("<image>", "").strip(),
            "answer": j.answer.text,
            "truth": j.question.truth,
            "right": j.right,
        }
        for j in shown
    ]
    size = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM}
    heads, stages = _table(report["stages"])
    text = environment.get_template("report.html.j2").render(
        report=ABSENT | report,
        plots=plots,
        heads=heads,
        stages=stages,
        rows=rows,
        size=size,
    )
    tree.write_whole(path, text)


def _data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    open_image(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
