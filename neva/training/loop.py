"""One training loop for all stages, on one process or thousands.

A stage always begins from a checkpoint or from fresh weights and always ends in a checkpoint, so that going on in the next
stage and resuming after a kill are the same path.
"""

import fcntl
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from neva import config as tree
from neva.batch import Batch
from neva.checkpoint import store
from neva.data.draw import Bad
from neva.data.sample import SampleError
from neva.job import InitConfig, TrainConfig
from neva.parallel import machine
from neva.parallel import mesh as ranks
from neva.training.changes import changed_keys
from neva.training.epochs import with_steps
from neva.training.metrics import Reporter, StepReport, cut_back, steps_of
from neva.training.skipped import SKIPPED, write_skipped
from neva.training.stage import Stage, check, prepare, save, train_step

Say = Callable[[str], None]
Evaluate = Callable[[TrainConfig, Path], dict[str, float]]
"""Scores a checkpoint folder on the stage's held-out samples; called by every rank."""
Check = Callable[[TrainConfig, Say], None]
"""Raises ValueError for held-out samples of a stage that cannot be evaluated on."""


class Stopped(Exception):
    """Training ended early by a signal, after saving. `exit_code` is the shell's for that signal."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


class _Signals:
    """Notes the first SIGTERM or SIGINT for the end of the step; a second SIGINT interrupts at once."""

    def __init__(self):
        self.seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller's signals are its own
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.seen == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.seen = number


def train(
    stages: tuple[TrainConfig, ...],
    *,
    resume: str = "",
    on_check: Check | None = None,
    on_evaluate: Evaluate | None = None,
    say: Say = print,
) -> Path:
    """Run resolved stages one after the other and give the last checkpoint.

    `resume` is "auto" (the run folder's newest whole checkpoint, or a new start where there is none) or the path of a checkpoint.
    Raises ValueError for what the user can mend, and `Stopped` after a SIGTERM or SIGINT, when all is saved.
    """
    device = ranks.start()
    try:
        mesh = ranks.make(stages[0].parallel, device)
        if ranks.rank():
            say = _silent
        say(_first_line(stages, mesh.size()))
        stages = with_precision(stages)
        with _Signals() as signals, ExitStack() as held:
            found = find(stages, resume, say)
            stages = with_steps(with_date(stages, found), found=found, say=say)
            check_start(stages, found, world=mesh.size(), say=say)
            if on_check is not None:
                for config in stages[_position(stages, found)[0] :]:
                    on_check(config, say)
            run = _Run(mesh=mesh, device=device, signals=signals, say=say, held=held, rewind=resume not in ("", "auto"))
            if found is None:
                _open_run(stages, None, run)
            return _run(stages, found=found, on_evaluate=on_evaluate, run=run)
    finally:
        ranks.stop()


def _silent(text: str) -> None:
    """What other ranks than the first say."""


@dataclass(kw_only=True, eq=False)
class _Run:
    mesh: DeviceMesh
    device: torch.device
    signals: _Signals
    say: Say
    held: ExitStack
    """What is kept open while the run lasts: the lock on its folder."""
    rewind: bool
    """Set checkpoints aside that are newer than the one to go on from? A later `--resume auto` would go on from them."""
    told: set[str] = field(default_factory=set)
    """Lines that are said once in a run, whatever its stages."""

    begun: float = field(default_factory=time.monotonic)
    loss: float | None = None
    """Of the last step with a label."""

    def say_once(self, lines: list[str]) -> None:
        """Say those that were not said yet."""
        for line in lines:
            if line not in self.told:
                self.told.add(line)
                self.say(line)


def find(stages: tuple[TrainConfig, ...], resume: str, say: Say) -> Path | None:
    """The checkpoint to go on from; None for a new start. Writes nothing. ValueError where the run folder holds another run."""
    out = Path(stages[0].out)
    lines = out / "metrics.jsonl"  # empty where a run ended before its first step
    holds = ranks.share((lines.exists() and lines.stat().st_size > 0) or any((out / "checkpoints").glob("*")))[0]
    if not resume:
        if holds:
            raise ValueError(f"{out} holds a run already. Go on with it: --resume auto. Or start another: out=FOLDER.")
        return None
    if resume == "auto":
        found = store.newest_good(out, warn=say)
        if found is None:
            say(f"{out} has no checkpoint: starting fresh.")
        return found
    found = store.open_checkpoint(Path(resume)).folder
    if holds and found.resolve().parent != (out / "checkpoints").resolve():
        raise ValueError(f"{out} holds a run of its own, and {found} is not one of its checkpoints. Go on in another folder: out=FOLDER.")
    return found


def with_date(stages: tuple[TrainConfig, ...], found: Path | None) -> tuple[TrainConfig, ...]:
    """The stages with the date that chat templates tell: that of the run which
    goes on, else today's."""
    saved = store.load_config(found).get("date") if found is not None else ""
    begun = saved or ranks.share(date.today().isoformat())[0]
    dated = [replace(stage.data, date=stage.data.date or begun) for stage in stages]
    return tuple(replace(stage, data=data) for stage, data in zip(stages, dated, strict=True))


def _position(stages: tuple[TrainConfig, ...], found: Path | None) -> tuple[int, bool]:
    """Number of the stage to go on in, and whether `found` is of it: else that is of the stage before, at its end."""
    if found is None:
        return 0, False
    saved = store.load_config(found)
    name, names = (saved.get("train") or {}).get("name"), [stage.name for stage in stages]
    if name not in names:
        raise ValueError(f"{found} is of stage {name!r}, which this run does not have: its stages are {', '.join(names)}.")
    number = names.index(name)
    done = saved["step"] >= sum(stage.steps for stage in stages[: number + 1])
    return (number + 1, False) if done else (number, True)


def check_start(
    stages: tuple[TrainConfig, ...],
    found: Path | None,
    *,
    world: int,
    say: Say,
) -> None:
    """Raise ValueError for what would stop a run at its start, or at that of a later stage, or
    keeps it from going on from `found`. Says what has changed since. Writes nothing."""
    begin, inside = _position(stages, found)
    for number in range(begin, len(stages)):
        resume = found if inside and number == begin else None
        first = sum(stage.steps for stage in stages[:number])
        config = _without_used_init(stages, number)
        check(config, world=world, resume=resume, first_step=first, say=say)
    if found is not None and inside and (line := changed_keys(found, stages[begin])):
        say(line)


def _open_run(stages: tuple[TrainConfig, ...], found: Path | None, run: _Run) -> None:
    """Make the run folder, write config.yaml, and forget what the run did after the checkpoint that it goes on from.

    Every rank raises if the first cannot.
    """
    out, problem = Path(stages[0].out), ""
    if ranks.rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = run.held.enter_context((out / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends, however it ends
            tree.save(stages, out / "config.yaml")
            for name in ("metrics.jsonl", "evaluations.jsonl", SKIPPED):
                cut_back(out / name, store.load_config(found)["step"] if found else 0)
            if run.rewind and found is not None and found.resolve().parent == (out / "checkpoints").resolve():
                for moved in store.set_newer_aside(found):
                    run.say(moved)
        except BlockingIOError:
            problem = f"another process is training in {out}. Wait for it or stop it, or choose another folder: out=FOLDER."
        except OSError as error:
            problem = f"cannot write to the run folder {out} ({error.strerror}): make it writable or free some space, or choose another: out=FOLDER."
    if problem := ranks.share(problem)[0]:
        raise ValueError(problem)


def _run(stages: tuple[TrainConfig, ...], *, found: Path | None, on_evaluate: Evaluate | None, run: _Run) -> Path:
    last = found
    begin, inside = _position(stages, found)
    for number in range(begin, len(stages)):
        before = sum(stage.steps for stage in stages[:number])
        config = _without_used_init(stages, number)
        own = found if inside and number == begin else None
        stage = prepare(config, mesh=run.mesh, device=run.device, start=last, resume=own, first_step=before, say=run.say)
        try:
            if number == begin and found is not None:
                _open_run(stages, found, run)  # only now, as a run that cannot go on is left as it was
                _evaluate_missed(stages, found, on_evaluate=on_evaluate, run=run)
            if own is not None:
                run.say(f"Resumed stage {config.name} at step {stage.number} from {own}")
            last = _train_stage(stage, sum(s.steps for s in stages), on_evaluate=on_evaluate, run=run)
        finally:
            stage.loader.close()
    assert last is not None
    if begin == len(stages):
        if on_evaluate is not None and _missed(stages, last) is not None:
            _open_run(stages, last, run)
            _evaluate_missed(stages, last, on_evaluate=on_evaluate, run=run)
        run.say(f"Nothing left to do: {last} is the last step.")
    else:
        run.say(_ending(last, run))
    return last


def _missed(stages: tuple[TrainConfig, ...], found: Path) -> TrainConfig | None:
    """The stage of a checkpoint of this run whose evaluation was due and was stopped before its
    line was written; None if there is none."""
    out, saved = Path(stages[0].out), store.load_config(found)
    if found.resolve().parent != (out / "checkpoints").resolve():
        return None
    number = [stage.name for stage in stages].index(saved["train"]["name"])
    config = stages[number]
    step = saved["step"] - sum(stage.steps for stage in stages[:number])
    if not config.evaluate.every or not step or step % config.evaluate.every:
        return None
    recorded = ranks.share(saved["step"] in steps_of(out / "evaluations.jsonl"))[0]
    return None if recorded else config


def _evaluate_missed(
    stages: tuple[TrainConfig, ...],
    found: Path,
    *,
    on_evaluate: Evaluate | None,
    run: _Run,
) -> None:
    """Do the evaluation of a checkpoint that was due and is missing."""
    config = _missed(stages, found)
    if config is None or on_evaluate is None:
        return
    scores = on_evaluate(config, found)
    if ranks.rank() == 0:
        step, out = store.load_config(found)["step"], Path(config.out)
        reporter = Reporter(out=out, config=config, last_step=step, say=run.say, step=step)
        try:
            reporter.evaluation(step, scores)
        finally:
            reporter.close()


def _ending(last: Path, run: _Run) -> str:
    """A line on a run that has reached its end: time of this session, loss, checkpoint."""
    minutes, seconds = divmod(round(time.monotonic() - run.begun), 60)
    hours, minutes = divmod(minutes, 60)
    taken = f"{hours}h {minutes}m {seconds}s" if hours else f"{minutes}m {seconds}s"
    step = store.load_config(last)["step"]
    loss = "no loss" if run.loss is None else f"loss {run.loss:.4f}"
    return f"Done: step {step} after {taken} with {loss}, saved in {last}"


def _without_used_init(stages: tuple[TrainConfig, ...], number: int) -> TrainConfig:
    """A stage, without an `init` that was set for all stages, so meant for the run's start."""
    config = stages[number]
    if number and config.init == stages[number - 1].init:
        return replace(config, init=InitConfig())
    return config


def _train_stage(stage: Stage, last_step: int, *, on_evaluate: Evaluate | None, run: _Run) -> Path:
    config = stage.config
    folder = None
    reporter = None
    saved = stage.step
    said = len(stage.loader.left_out)
    if ranks.rank() == 0:
        reporter = Reporter(out=Path(config.out), config=config, last_step=last_step, say=run.say, step=stage.number)
    try:
        while stage.step < config.steps:
            since = time.monotonic()
            batches = _next_batches(stage, saved=saved == stage.step, say=run.say)
            run.say_once(stage.loader.unread.lines)
            report = train_step(stage, batches, since=since)
            run.loss = report.loss if report.labels else run.loss
            for error in stage.loader.left_out[said:SAID]:
                run.say(f"Left out: {error}")
                said += 1
            told = ranks.share((run.signals.seen, _write(reporter, report, stage.loader.skipped)))
            if problem := told[0][1]:
                raise ValueError(problem)
            stop = max(seen for seen, _ in told)
            evaluate = on_evaluate is not None and bool(config.evaluate.every) and stage.step % config.evaluate.every == 0
            due = bool(config.checkpoint.every) and stage.step % config.checkpoint.every == 0
            if due or stop or evaluate or stage.step == config.steps:
                folder = save(stage)
                saved = stage.step
            if evaluate and on_evaluate is not None and folder is not None:
                scores = on_evaluate(config, folder)  # on every rank: loading a checkpoint is collective
                if reporter is not None:
                    reporter.evaluation(stage.number, scores)
            if stop and stage.number < last_step:
                raise Stopped(
                    f"Stopped at step {stage.number} of {last_step}, saved in {folder}. Go on with the same command and --resume auto.", 128 + stop
                )
        assert folder is not None
        return folder
    finally:
        if reporter is not None:
            reporter.close()


SAID = 3
"""Samples that are left out are named as they are met, so many at most."""


def _next_batches(stage: Stage, *, saved: bool, say: Say) -> tuple[Batch, ...]:
    """The next step's. Where a sample stops the run, the steps done are saved first."""
    try:
        return next(stage.loader)
    except ValueError as error:
        # All ranks are here: the loader shares what went wrong.
        if not saved:
            _save_before(error, stage, say)
        raise


def _save_before(problem: ValueError, stage: Stage, say: Say) -> None:
    try:
        folder = save(stage)
    except store.CheckpointError as error:
        say(f"Step {stage.number} could not be saved before the error that follows: {error}")
        return
    skipping = ", or with data.on_error=skip" if isinstance(problem, SampleError) else ""
    fix = f"once its cause is mended{skipping}, go on with the same command and --resume auto"
    say(f"Saved {folder} before the error that follows: {fix}")


def _write(reporter: Reporter | None, report: StepReport, skipped: list[Bad]) -> str:
    """Record a step, and what was left out on the way to it, on the first rank; what went wrong."""
    if reporter is None:
        return ""
    try:
        reporter.write(report)
        write_skipped(reporter.out, report, skipped)
    except OSError as error:
        written = f"step {report.step} to {reporter.out / 'metrics.jsonl'}"
        reason = f"cannot write {written} ({error.strerror})"
        return f"{reason}: free some space, then go on with --resume auto"
    return ""


def choose_precision(wanted: str) -> tuple[str, str]:
    """`auto` made definite, and why: bf16 where the device computes it faster (CUDA from Ampere on; CPUs with AMX or AVX512-BF16)."""
    if wanted != "auto":
        return wanted, "as configured"
    if torch.cuda.is_available():
        return ("bf16", "the GPU computes it faster") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", "the GPU has no bf16")
    features = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    found = [name for name, check in features.items() if getattr(torch.cpu, check, bool)()]
    return ("bf16", f"the CPU has {found[0]}") if found else ("fp32", "the CPU has neither AMX nor AVX512-BF16")


def with_precision(stages: tuple[TrainConfig, ...]) -> tuple[TrainConfig, ...]:
    """The stages with `precision=auto` made definite."""
    return tuple(replace(stage, precision=choose_precision(stage.precision)[0]) for stage in stages)


def _first_line(stages: tuple[TrainConfig, ...], ranks: int) -> str:
    """What a run computes on, and in which precision."""
    told: dict[str, list[str]] = {}
    for stage in stages:
        precision, why = choose_precision(stage.precision)
        text = f"{precision} (auto: {why})" if stage.precision == "auto" else precision
        told.setdefault(text, []).append(stage.name)
    whose = len(told) > 1
    parts = [f"{text} in {' and '.join(names)}" if whose else text for text, names in told.items()]
    device = machine.found()
    threads = ""
    if device.kind == "cpu":
        each = " each" if ranks > 1 else ""
        threads = f", {tree.counted(torch.get_num_threads(), 'thread')}{each}"
    return f"{tree.counted(ranks, 'rank')} on {device}{threads}; precision {', '.join(parts)}"
