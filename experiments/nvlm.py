"""Seven claims of the NVLM article at small scale: which come out with models of two million parameters on two cores.

    python experiments/nvlm.py                               # seeds 0, 1 and 2, all claims, then the report
    python experiments/nvlm.py --seeds 0 --claims tags       # what one claim needs, for one seed
    python experiments/nvlm.py --page docs/nvlm.md           # the report's figures, into the page

What is done is kept in --out and not done again; a killed training goes on from its last checkpoint. docs/nvlm.md says what each claim is and what
came out.

The task: a page of handwritten digits in rows and columns, cut into a tile per digit, and the question which digit is at a place in reading order.
As in the article, the encoder and the text decoder are trained first, once, each without the other, and the encoder stays frozen from then on:
the encoder reads digits and whole pages squashed to one tile, the decoder answers questions without images. Each training then has two stages,
alignment of the connector on pages of one digit, and fine-tuning of all but the encoder on pages and, for a seventh of the samples, text. A step
of any model has about as many samples as a step of another: rows are as long as its samples need.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np

import neva
from neva.data.encode import Encoder
from neva.data.source import LlavaSource
from neva.data.tokenizer import load_tokenizer
from neva.job import BatchConfig, CheckpointConfig, DataConfig, InitConfig, LogConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.decoder import CrossConfig
from neva.models.vlm import VLMConfig
from neva.recipes import pages
from neva.recipes.digits import archive, published, sample, write_rows
from neva.recipes.nvlm_tiny import MODELS as TINY
from neva.recipes.nvlm_tiny import TOKENIZER

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
BLEND = {"pages": 0.85, "text": 0.15}
SAMPLES = 64
"""Samples of a step, about."""
ALIGNED, ALIKE = 9000, ((1, 1), (1, 2), (2, 1))
"""The connector is aligned on so many pages (the small set has a sixth of them) that show one digit, once or in two hands, so that H has a memory."""
FOLDERS = {"small": ("extra", "extra"), "noisy": ("extra", "extra"), "read": ("extra", "data")}
"""Source -> where its file is, and its images; all others are in data/."""
QUESTIONS = ("Which digit is this?", "Is it even?", "Is it larger than 4?")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: a model, and what differs from the usual course."""

    model: VLMConfig
    captions: str = "small"
    """What the connector is aligned on."""
    blend: tuple[str, ...] = ("pages", "text")
    frozen: bool = False
    """Does the decoder stay as it is in fine-tuning?"""


def _with(model: VLMConfig, **image: object) -> VLMConfig:
    return replace(model, image=replace(model.image, **image))  # type: ignore[arg-type]


D, X = TINY["d"], TINY["x"]
H = replace(D, decoder=X.decoder, inline="thumbnail")
ROTARY = replace(H.decoder, cross=CrossConfig(rotary=True))
TRAININGS = {
    "D": Training(model=D),
    "D, one tile": Training(model=_with(D, aspect="square", max_tiles=1)),
    "D, no tags": Training(model=_with(D, tags="none")),
    "D, no text": Training(model=D, blend=("pages",)),
    "D, noisy captions": Training(model=D, captions="noisy"),
    "X": Training(model=X),
    "X, no tags": Training(model=_with(X, tags="none")),
    "X, frozen decoder": Training(model=X, frozen=True),
    "H, tags adjacent": Training(model=H),
    "H, no tags": Training(model=_with(H, tags="none")),
    "H, tags added": Training(model=replace(H, tag_binding="added")),
    "H, tags rotary": Training(model=replace(H, decoder=ROTARY, tag_binding="rotary")),
}
CLAIMS = {
    "cost": (),
    "resolution": ("D", "D, one tile"),
    "tags": ("D", "D, no tags", "X", "X, no tags", "H, no tags", "H, tags adjacent", "H, tags added", "H, tags rotary"),
    "text": ("D", "D, no text"),
    "frozen": ("X", "X, frozen decoder"),
    "speed": (),
    "captions": ("D", "D, noisy captions"),
}
"""Claim -> the trainings that it compares; `cost` and `speed` are measured, not trained."""


def write_data(out: Path) -> None:
    """The pages, and beside them what the encoder reads first and what the connector is aligned on."""
    pages.write(out / "data")
    if (out / "extra").exists():
        return
    with np.load(archive()) as packed:
        images, labels = packed["images"], packed["labels"]
    single = json.loads((out / "data" / "captions.json").read_text())
    whole = json.loads((out / "data" / "pages.json").read_text())
    shown = np.array([int(row["id"].removeprefix("digit-")) for row in single])
    random, small, noisy = np.random.default_rng(5), [], []
    with published(out / "extra") as part:
        for number in range(ALIGNED):
            digit, (high, wide) = int(random.integers(10)), ALIKE[number % len(ALIKE)]
            picture = f"alike-{number:05d}.png"
            pages.save(part / "images" / picture, images[random.choice(shown[labels[shown] == digit], (high, wide))])
            answers = (str(digit), "no" if digit % 2 else "yes", "yes" if digit > 4 else "no")
            if number < ALIGNED // 6:
                kind = number // len(ALIKE) % 3
                small.append(sample("small", f"small-{number}", [picture], QUESTIONS[kind], answers[kind]))
            named = digit if random.random() < 0.5 else int(random.integers(10))
            noisy.append(sample("noisy", f"noisy-{number}", [picture], QUESTIONS[0], str(named)))
        read = [
            sample("page", row["id"], [row["image"]], "Which digits are these?", "\n".join(" ".join(map(str, r)) for r in row["digits"]))
            for row in whole
        ]
        read += [
            sample("digit", row["id"], [row["image"]], *(turn["value"].removeprefix("<image>\n") for turn in row["conversations"])) for row in single
        ]
        write_rows(part, {"small": small, "noisy": noisy, "read": read})


def row_length(model: VLMConfig, sources: Sequence[SourceConfig]) -> int:
    """Tokens that a row must hold for a quarter of `SAMPLES`, or for the share of them that the weights say."""
    encoder = Encoder(load_tokenizer(TOKENIZER), "v1", "", model.layout)
    tokens = 0.0
    for one in sources:
        source = LlavaSource(one.path, one.image_folder)
        tokens += (one.weight or 0) * statistics.mean(encoder.measure(source[n]).tokens for n in range(210))
    return 8 * round(SAMPLES / 4 * tokens / 8)


def stage(name: str, model: VLMConfig, out: Path, run: Path, blend: dict[str, float], **fields: object) -> TrainConfig:
    """A stage on the files of that name, each with its weight."""
    sources = tuple(
        SourceConfig(path=str(out / folder / f"{source}.json"), image_folder=str(out / images / "images"), name=source, weight=weight)
        for source, weight in blend.items()
        for folder, images in (FOLDERS.get(source, ("data", "data")),)
    )
    usual = TrainConfig(
        name=name,
        model=model,
        data=DataConfig(sources=sources, tokenizer=TOKENIZER, template="v1", system="", workers=0),
        batch=BatchConfig(seq_length=row_length(model, sources), rows=4, micro_rows=1, max_tiles=256),
        optim=OptimConfig(lr=1e-3, min_lr=2e-5, warmup=20.0, betas=(0.9, 0.98), weight_decay=0.05),
        precision="fp32",
        checkpoint=CheckpointConfig(every=100, keep_last=1),
        log=LogConfig(every=50, tensorboard=False),
        out=str(run),
    )
    return replace(usual, **fields)  # type: ignore[arg-type]


def train_base(name: str, out: Path, steps: dict[str, int]) -> dict:
    """The encoder, or the text decoder; gives what it knows."""
    run = out / "base" / name
    if name == "vision":
        model = _with(D, aspect="square", max_tiles=1, tags="none", prefix="", suffix="")
        blend, seq_length, asked = {"read": 1.0}, 512, "captions-heldout"
    else:
        model = VLMConfig(decoder=D.decoder, vision=None, projector="none")
        blend, seq_length, asked = {"text": 1.0}, 1024, "text-all"
    first = stage(name, model, out, run, blend, steps=steps[name])
    neva.train((replace(first, batch=replace(first.batch, seq_length=seq_length)),), resume="auto")
    return {"accuracy": neva.evaluate(run, data=out / "data" / f"{asked}.json", image_folder=out / "data" / "images", max_new_tokens=4)["accuracy"]}


def train(name: str, seed: int, out: Path, steps: dict[str, int]) -> dict:
    """Both stages of a training; gives its accuracy on held-out pages and questions."""
    what, run = TRAININGS[name], place(out, name, seed)
    init = InitConfig(decoder=str(out / "base" / "text"), vision=str(out / "base" / "vision"), projector="fresh")
    connector = ("projector.*", *(("decoder.blocks.*.cross.*",) if what.model.decoder.cross_layers else ()))
    align = stage("align", what.model, out, run, {what.captions: 1.0}, steps=steps["align"], trainable=connector, init=init, seed=seed)
    align = replace(align, optim=replace(align.optim, lr=3e-3))
    blend = {source: BLEND[source] for source in what.blend}
    tune = stage("tune", what.model, out, run, blend, steps=steps["tune"], init=init, seed=seed)
    tune = replace(tune, trainable=connector if what.frozen else ("*", "!vision.*"))
    neva.train((align, tune), resume="auto")
    scores: dict[str, float] = {}
    for asked in ("heldout", "unseen", "text-all"):
        data, images = out / "data" / f"{asked}.json", out / "data" / "images"
        scores |= neva.evaluate(run, data=data, image_folder=images, max_new_tokens=4)["accuracy"]
    return {"accuracy": scores}


def place(out: Path, name: str, seed: int) -> Path:
    """The run folder of a training."""
    return out / f"seed{seed}" / re.sub(r"\W+", "-", name.lower())


def run_all(jobs: Sequence[tuple[str, int]], out: Path, at_once: int, short: bool) -> None:
    """Train what has no result yet, some at a time, each in a process with one thread."""
    waiting = [(name, seed) for name, seed in jobs if not result_file(out, name, seed).exists()]
    running: dict[subprocess.Popen, tuple[str, int, Path]] = {}
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, seed = waiting.pop(0)
                log = result_file(out, name, seed).parent / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, __file__, "--out", str(out), "--train", name, "--seeds", str(seed), *(["--short"] if short else [])]
                with log.open("a") as file:
                    env = os.environ | {"OMP_NUM_THREADS": "1"}
                    running[subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)] = (name, seed, log)
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                name, seed, log = running.pop(process)
                if process.returncode:
                    raise SystemExit(f"{name}, seed {seed}, failed; its log {log} ends with:\n{log.read_text()[-2000:]}")
                found = json.loads(result_file(out, name, seed).read_text())
                shown = ", ".join(f"{kind} {score:.3f}" for kind, score in found["accuracy"].items())
                print(f"{time.monotonic() - started:5.0f} s  seed {seed}  {name}: {shown}", flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()  # each saves a checkpoint first


def result_file(out: Path, name: str, seed: int) -> Path:
    """Where a training says what came of it."""
    return (out / "base" / name if name in ("vision", "text") else place(out, name, seed)) / "result.json"


def measure_cost(out: Path, short: bool) -> None:
    """Seconds and operations of steps and requests, by bench/nvlm.py, with the machine to itself."""
    lines = out / "cost.jsonl"
    if lines.exists():
        return
    print("Measuring steps and requests", flush=True)
    repeats = "1" if short else "5"
    command = [sys.executable, str(ROOT / "bench" / "nvlm.py"), "--only", "step", "requests", "--repeats", repeats]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True).stdout
    publish(lines, found)


def publish(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.rename(file)


class Results:
    """Accuracy of each training, by seed."""

    def __init__(self, out: Path, seeds: Sequence[int]):
        self.seeds = list(seeds)
        self.found = {
            (name, seed): json.loads(file.read_text()) for name in TRAININGS for seed in seeds if (file := result_file(out, name, seed)).exists()
        }

    def scores(self, name: str, kind: str) -> list[float]:
        """Per seed, for the seeds that were trained; `text` is the mean over kinds of questions without an image."""
        accuracies = [self.found[name, seed]["accuracy"] for seed in self.seeds if (name, seed) in self.found]
        if kind == "text":
            return [statistics.mean(score for k, score in a.items() if k not in ("heldout", "unseen")) for a in accuracies]
        return [a[kind] for a in accuracies]

    def compared(self, better: str, worse: str, kind: str) -> list[float]:
        """`better`'s accuracy less `worse`'s, per seed."""
        pairs = [(self.found.get((better, seed)), self.found.get((worse, seed))) for seed in self.seeds]
        if not all(a and b for a, b in pairs):
            return []
        return [a - b for a, b in zip(self.scores(better, kind), self.scores(worse, kind), strict=True)]


COMPARED = (
    ("resolution", "D", "D, one tile"),
    ("tags", "D", "D, no tags"),
    ("tags", "X", "X, no tags"),
    ("tags", "H, tags adjacent", "H, no tags"),
    ("tags", "H, tags added", "H, no tags"),
    ("tags", "H, tags rotary", "H, no tags"),
    ("text", "D", "D, no text"),
    ("frozen", "X", "X, frozen decoder"),
    ("captions", "D", "D, noisy captions"),
)
KINDS = {"heldout": "pages", "unseen": "unseen layout", "text": "text"}
QUESTIONS_OF = {"heldout": pages.ASKED, "unseen": pages.ASKED_UNSEEN, "text": 210}
NOTICEABLE = 0.03
COLOURS = {"D": "#4c72b0", "X": "#dd8452", "H": "#55a868"}


def report(out: Path, seeds: Sequence[int]) -> str:
    """Tables of what was found."""
    results = Results(out, seeds)
    percent = lambda row: f"{100 * statistics.mean(row):.1f} ({100 * min(row):.0f} to {100 * max(row):.0f})" if row else "-"  # noqa: E731
    lines = ["| training | " + " | ".join(f"{kind}, %" for kind in KINDS.values()) + " | minutes |", "|---|" + "---:|" * 4]
    for name in TRAININGS:
        minutes = [minutes_of(place(out, name, seed)) for seed in seeds if (name, seed) in results.found]
        if minutes:
            lines.append(f"| {name} | {' | '.join(percent(results.scores(name, kind)) for kind in KINDS)} | {statistics.mean(minutes):.1f} |")
    lines += ["", "| claim | first | less the second | pages | unseen layout | text |", "|---|---|---|---:|---:|---:|"]
    for claim, first, second in COMPARED:
        sides = {kind: results.scores(first, kind) + results.scores(second, kind) or [0.0] for kind in KINDS}
        cells = [points(results.compared(first, second, kind), statistics.mean(sides[kind]), QUESTIONS_OF[kind]) for kind in KINDS]
        lines.append(f"| {claim} | {first} | {second} | {' | '.join(cells)} |")
    cost = [json.loads(line) for line in (out / "cost.jsonl").read_text().splitlines()] if (out / "cost.jsonl").exists() else []
    at = {(row["name"], row["model"], row["tiles"]): row for row in cost if "model" in row}
    tiles = sorted({n for _, _, n in at})
    if tiles:
        lines += [
            "",
            "| tiles | step, s: D / H / X | D over H, X (operations) | first token, ms: D / H / X | each further, ms: D / H / X |",
            "|---|" + "---|" * 4,
        ]
    for n in tiles:
        step, first, later = ([at[what, m, n] for m in "DHX"] for what in ("step", "prefill", "decode"))
        cells = [
            " / ".join(f"{row['seconds']:.3f}" for row in step),
            ", ".join(f"{row['ratio']:.2f} ({row['flops_ratio']:.2f})" for row in step[1:]),
            *(" / ".join(f"{1000 * row['seconds']:.1f}" for row in rows) for rows in (first, later)),
        ]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def minutes_of(run: Path) -> float:
    """Of a training without pauses: steps of the median length, stage by stage."""
    seconds: dict[str, list[float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        seconds.setdefault(line["stage"], []).append(line["seconds"])
    return sum(len(row) * statistics.median(row) for row in seconds.values()) / 60


def points(differences: Sequence[float], mean: float, asked: int) -> str:
    """A mean difference in points with each seed's. Bold where every seed by itself shows it: 3 points or more of one sign, and 2 standard errors
    of a difference over `asked` questions; `mean` is the mean of both sides."""
    if not differences:
        return "-"
    found = statistics.mean(differences)
    error = math.sqrt(2 * mean * (1 - mean) / asked)
    clear = all(math.copysign(d, d * found) >= max(NOTICEABLE, 2 * error) for d in differences)
    shown = f"{100 * found:+.1f} ({', '.join(f'{100 * d:+.1f}' for d in differences)})"
    return f"**{shown}**" if clear else shown


def draw(out: Path, folder: Path, seeds: Sequence[int]) -> None:
    """nvlm-accuracy.png and nvlm-cost.png."""
    results = Results(out, seeds)
    names = [name for name in TRAININGS if results.scores(name, "heldout")]
    if names:
        figure, axes = plt.subplots(1, 3, figsize=(12, 0.35 * len(names) + 1.2), sharey=True, layout="constrained")
        for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
            rows = [results.scores(name, kind) for name in names]
            axis.barh(names, [statistics.mean(row) for row in rows], color=[COLOURS[name[0]] for name in names])
            for number, row in enumerate(rows):
                axis.plot(row, [number] * len(row), "k.", markersize=5)
            axis.set(title=title, xlim=(0, 1.02), xlabel="share of right answers (dots: seeds)")
            if kind != "text":
                axis.axvline(0.1, color="grey", linestyle=":", linewidth=1)
        axes[0].invert_yaxis()
        figure.savefig(folder / "nvlm-accuracy.png", dpi=110)
    if (out / "cost.jsonl").exists():
        rows = [json.loads(line) for line in (out / "cost.jsonl").read_text().splitlines()]
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
        for axis, name, value, title in zip(
            axes, ("step", "step", "prefill", "decode"), ("seconds", "gflop", "seconds", "seconds"),
            ("step, s a sample", "step, GFLOP a sample", "first token, s", "each further token, s"), strict=True,
        ):  # fmt: skip
            for model in "DHX":
                chosen = [row for row in rows if row["name"] == name and row.get("model") == model]
                axis.plot([row["tiles"] for row in chosen], [row[value] for row in chosen], "o-", label=model, color=COLOURS[model])
            axis.set(title=title, xlabel="tiles, thumbnail counted", ylim=(0, None), xticks=(1, 3, 5, 7))
        axes[0].legend()
        figure.savefig(folder / "nvlm-cost.png", dpi=110)


BEGIN, END = "<!-- made by experiments/nvlm.py -->", "<!-- end -->"


def main() -> None:
    """Train what is missing, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nvlm-claims"), help="folder of all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, each on one thread")
    parser.add_argument("--page", type=Path, help="also write the figures into this page, between its two comments, and the plots beside it")
    parser.add_argument("--short", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--train", choices=("vision", "text", *TRAININGS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.out
    steps = {"vision": 1000, "text": 250, "align": 60, "tune": 400}
    if given.short:
        steps = dict.fromkeys(steps, 2)
    if given.train:
        seed = given.seeds[0]
        found = train_base(given.train, out, steps) if given.train in ("vision", "text") else train(given.train, seed, out, steps)
        publish(result_file(out, given.train, seed), json.dumps(found))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings are ended too
    out.mkdir(parents=True, exist_ok=True)
    made = out / "steps.json"
    if made.exists() and json.loads(made.read_text()) != steps:
        raise SystemExit(f"{out} holds trainings of {json.loads(made.read_text())} steps, not {steps}: give another --out.")
    made.write_text(json.dumps(steps))
    if given.page and BEGIN not in given.page.read_text():
        raise SystemExit(f"{given.page} has no line {BEGIN!r} to write behind.")
    write_data(out)
    needed = {name for claim in given.claims for name in CLAIMS[claim]}
    if {"cost", "speed"} & set(given.claims):
        measure_cost(out, given.short)
    if needed:
        run_all([("vision", 0), ("text", 0)], out, given.jobs, given.short)
    for seed in given.seeds:
        run_all([(name, seed) for name in TRAININGS if name in needed], out, given.jobs, given.short)
    text = report(out, given.seeds)
    (out / "report.md").write_text(text)
    draw(out, out, given.seeds)
    print(text)
    if given.page:
        before, rest = given.page.read_text().split(BEGIN)
        given.page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")
        draw(out, given.page.parent, given.seeds)


if __name__ == "__main__":
    main()
