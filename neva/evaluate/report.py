"""The page that shows a run: loss curves per kind, accuracy beside what can be had without looking, and answers with their images."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from neva.data.image import open_image
from neva.data.sample import Picture
from neva.evaluate.run import Judged

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
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
    """A loss plot of one stage."""

    title: str
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    """Height in pixels and number of each horizontal line."""
    first: int
    last: int


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_plots(lines: Sequence[dict]) -> list[Plot]:
    """A plot per stage with a smoothed curve per kind."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    return [_plot(stage, [line for line in lines if line["stage"] == stage]) for stage in stages]


def _plot(title: str, lines: Sequence[dict]) -> Plot:
    kinds = sorted({kind for line in lines for kind in line["losses"]})
    series = {kind: _smooth([(line["step"], line["losses"][kind]) for line in lines if kind in line["losses"]]) for kind in kinds}
    top = max((value for points in series.values() for _, value in points), default=1.0) * 1.05
    first, last = lines[0]["step"], max(lines[-1]["step"], lines[0]["step"] + 1)

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
    return Plot(title=title, curves=curves, ticks=ticks, first=first, last=last)


def _smooth(points: Sequence[tuple[int, float]], keep: float = 0.9) -> list[tuple[int, float]]:
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


def write(path: Path, *, report: dict, plots: Sequence[Plot], shown: Sequence[Judged]) -> None:
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
    text = environment.get_template("report.html.j2").render(report=report, plots=plots, rows=rows, size=size)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    open_image(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
