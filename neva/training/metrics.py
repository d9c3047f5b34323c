"""What a run reports: one JSON line a step, TensorBoard, a progress bar and a printed line now and then. Rank 0 only."""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from neva.batch import Batch
from neva.config import counted, write_whole
from neva.job import TrainConfig
from neva.models import cost

PEAKS: dict[str, float] = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 FLOP/s by a part of the device's name (NVIDIA's data sheets); elsewhere utilisation is not reported."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the micro-batches of a step hold; adds up over ranks."""

    tokens: int
    """Useful ones: not padding."""
    slots: int
    """Tokens with padding."""
    labels: int
    tiles: int
    flops: int

    @staticmethod
    def of(batches: Sequence[Batch], config: TrainConfig, trained: frozenset[str]) -> "Work":
        """Count the work of CPU batches."""
        works = [_micro_batch(batch, config, trained) for batch in batches]
        return Work(**{f.name: sum(getattr(work, f.name) for work in works) for f in fields(Work)})


def _micro_batch(batch: Batch, config: TrainConfig, trained: frozenset[str]) -> Work:
    documents, tiles, labels = _document_lengths(batch), batch.tiles.shape[0], batch.label_count
    runs = batch.runs
    work = cost.Work(
        documents=documents, tiles=tiles, labelled=labels, memory=len(batch.memory_tokens), crossing=sum(documents) * batch.any_tiles,
        pairs=int(((runs[:, 1] - runs[:, 0]) * (runs[:, 3] - runs[:, 2])).sum()),
    )  # fmt: skip
    flops = cost.step_flops(config.model, work, trained=trained, recompute=config.recompute == "block").total
    return Work(tokens=sum(documents), slots=batch.tokens.numel(), labels=labels, tiles=tiles, flops=flops)


def _document_lengths(batch: Batch) -> list[int]:
    lengths = batch.cu_seqlens.diff()
    real = batch.segments.flatten()[batch.cu_seqlens[:-1].long().clamp_max(batch.segments.numel() - 1)] > 0
    return lengths[(lengths > 0) & real].tolist()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One line of `metrics.jsonl`."""

    stage: str
    step: int
    """Optimiser step, counted over all stages."""
    loss: float | None
    """Mean over the step's label tokens; null where there were none, or it was not finite, and the
    step was left out."""
    losses: dict[str, float]
    """The same per kind of sample."""
    balance: float | None
    """The experts' load-balancing loss, times its weight, which is minimised too; null without experts."""
    grad_norm: float | None
    lr: float
    tokens: int
    labels: int
    padding: float
    """Share of token slots that hold none."""
    tokens_per_s: float
    tiles_per_s: float
    flops_per_s: float
    mfu: float | None
    """Share of the device's peak, where that is known."""
    memory_gib: float
    """Peak so far: of the GPU, else of the process."""
    seconds: float
    samples: int
    """Samples trained so far in this stage."""
    epochs: dict[str, float]
    """Source -> its samples trained so far in this stage, by its length: passes over
    it, if none is left out."""
    skipped_samples: int
    """Unreadable or over-long samples so far, counted in each epoch anew. Those met among the
    samples that packing chooses from (`data.pool`) are counted already."""
    reduced_samples: int
    """Samples so far whose images were cut into fewer tiles to fit (`data.fewer_tiles`)."""
    skipped_steps: int


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` (they will be done again) and a line torn by a kill; atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # torn
    write_whole(path, "".join(kept))


def steps_of(path: Path) -> set[int]:
    """The steps of a file of lines, of which a torn one has none."""
    found: set[int] = set()
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                found.add(json.loads(line)["step"])
    return found


@dataclass(kw_only=True, eq=False)
class Reporter:
    """Writes step reports. `close` it."""

    out: Path
    config: TrainConfig
    last_step: int
    """The last step of the run, for the ETA."""
    say: Callable[[str], None]
    step: int = 0
    """Steps that earlier sessions did."""
    since: list[StepReport] = field(default_factory=list, init=False)
    """Steps since the line that was printed last."""
    board: Any = field(default=None, init=False)
    bar: Any = field(default=None, init=False)

    def __post_init__(self):
        self.file = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self.started, self.first = time.monotonic(), self.step
        if self.config.log.tensorboard:
            self.board = _tensorboard(self.out, self.step, self.say)
        if sys.stderr.isatty():
            self.bar = _bar(self.config.name, self.last_step, self.step)

    def write(self, report: StepReport) -> None:
        """Record one step."""
        self.file.write(json.dumps(asdict(report)) + "\n")
        self.file.flush()
        self.step = report.step
        self.since += [report] if self.config.log.every else []
        if self.board is not None:
            self._plot(report)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=report.step, description=f"{report.stage} loss {_number(report.loss)}")
        every = self.config.log.every
        if every and (report.step % every == 0 or report.step == self.last_step):
            self.say(self.line())
            self.since.clear()

    def line(self) -> str:
        """The steps since the last line, as `printed` has them: a record of a log is one line."""
        done = max(1, self.step - self.first)
        left = (time.monotonic() - self.started) / done * (self.last_step - self.step)
        shown = sys.stdout.isatty()
        return printed(
            self.since,
            last_step=self.last_step,
            left=left,
            columns=shutil.get_terminal_size().columns if shown else LOG_COLUMNS,
            lines=2 if shown else 1,
            flops=self.config.log.flops,
        )

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Record held-out scores in `evaluations.jsonl` and TensorBoard."""
        with (self.out / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.config.name, "step": step, **scores}) + "\n")
        for name, value in scores.items():
            if self.board is not None:
                self.board.add_scalar(f"evaluation/{name}", value, step)
        told = (f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items())
        self.say(f"{self.config.name} {step}  " + "  ".join(told))

    def close(self) -> None:
        """Flush everything. What could not be written was an error at its step."""
        with suppress(OSError):
            self.file.close()
        for part, method in ((self.board, "close"), (self.bar, "stop")):
            if part is not None:
                getattr(part, method)()

    def _plot(self, report: StepReport) -> None:
        for name, value in asdict(report).items():
            if isinstance(value, int | float) and name != "step":
                self.board.add_scalar(f"train/{name}", value, report.step)
        for kind, value in report.losses.items():
            self.board.add_scalar(f"loss/{kind or 'all'}", value, report.step)


def printed(
    reports: Sequence[StepReport],
    *,
    last_step: int,
    left: float,
    columns: int,
    lines: int = 2,
    flops: bool = False,
) -> str:
    """Steps to print: means of losses and gradient norms, rates over their time, and how long what
    is left takes, of which `left` is the seconds.

    At most `lines` of `columns` each; what matters least is left out where there is no room.
    """
    last, seconds = reports[-1], max(1e-9, sum(r.seconds for r in reports))
    labelled = any(r.labels for r in reports)
    tokens = sum(r.tokens for r in reports)
    slots = sum(r.tokens / (1 - r.padding) for r in reports if r.padding < 1)
    computed = sum(r.flops_per_s * r.seconds for r in reports)
    tiles = sum(r.tiles_per_s * r.seconds for r in reports)
    used = sum((r.mfu or 0) * r.seconds for r in reports)
    parts = [
        f"{last.stage} {last.step}/{last_step}",
        f"loss {_number(_mean(r.loss for r in reports)) if labelled else 'none'}",
        f"grad {_number(_mean(r.grad_norm for r in reports)) if labelled else 'none'}",
        f"lr {last.lr:.2e}",
        f"ETA {duration(left)}",
        f"{tokens / seconds:,.0f} tok/s",
        f"{counted(last.skipped_samples, 'sample')} skipped" if last.skipped_samples else "",
        f"{counted(last.skipped_steps, 'step')} left out" if last.skipped_steps else "",
        f"{counted(last.reduced_samples, 'sample')} in fewer tiles" if last.reduced_samples else "",
        f"{computed / seconds / 1e9:,.1f} GFLOP/s" if flops else "",
        f"MFU {used / seconds:.1%}" if last.mfu is not None else "",
        f"{last.memory_gib:.2f} GiB",
        _kinds(reports),
        counted(last.samples, "sample"),
        f"{1 - tokens / slots:.1%} padding" if slots else "",
        f"{tiles / seconds:,.1f} tiles/s",
    ]
    rows = [""]
    for part in filter(None, parts):
        if rows == [""] or len(rows[-1] + GAP + part) <= columns:
            rows[-1] += GAP + part if rows != [""] else part
        elif len(rows) < lines:
            rows.append(GAP + part)
    return "\n".join(rows)


GAP = "  "
KINDS_SHOWN = 40
"""Columns of a printed line that the kinds' losses may take."""
KIND_SHOWN = 24
"""Letters of a kind's name."""
LOG_COLUMNS = 160
"""Length of a line that no terminal shows."""


def _kinds(reports: Sequence[StepReport]) -> str:
    """Mean loss of each kind, as many as have room; empty where there is one kind."""
    kinds = sorted({kind for r in reports for kind in r.losses})
    if len(kinds) < 2:
        return ""
    means = {kind: _mean(r.losses.get(kind) for r in reports) for kind in kinds}
    texts = [f"{kind[:KIND_SHOWN]} {_number(mean, places=3)}" for kind, mean in means.items()]
    shown = 1
    while shown < len(texts) and len(" ".join(texts[: shown + 1])) <= KINDS_SHOWN:
        shown += 1
    rest = [f"+{len(texts) - shown}"] if shown < len(texts) else []
    return " ".join(texts[:shown] + rest)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are finite; None if none is."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def duration(seconds: float) -> str:
    """Hours from one on, below that minutes, below that seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _number(value: float | None, *, places: int = 4) -> str:
    finite = value is not None and math.isfinite(value)
    return f"{value:.{places}f}" if finite else "not finite"


def _tensorboard(out: Path, step: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed, so no plots are written: pip install 'neva[tensorboard]', or log.tensorboard=false.")
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _bar(name: str, total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
    bar.add_task(name, total=total, completed=done)
    bar.start()
    return bar
