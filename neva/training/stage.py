"""One stage of training: built from a config and a checkpoint, changed step by step, saved and restored."""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from neva import config as tree
from neva.batch import Batch
from neva.checkpoint import store
from neva.data.encode import Encoder
from neva.data.loader import Loader, LoaderOptions, alone
from neva.data.pack import Budget
from neva.data.source import LlavaSource, MockSource
from neva.data.survey import told
from neva.data.tokenizer import Tokenizer, load_tokenizer
from neva.job import InitConfig, SourceConfig, TrainConfig
from neva.models.vlm import VLM, VLMConfig, fresh, part_of
from neva.parallel import mesh as ranks
from neva.parallel.wrap import fill, freeze, logical_parameters, parallelize
from neva.training.loss import group_sums, not_finite
from neva.training.metrics import StepReport, Work, memory_gib, peak_flops
from neva.training.optim import clip, learning_rate, make_optimizer, optimizer_tensors

PATIENCE = 60.0
"""Seconds that a look at a stage's samples may take."""


@dataclass(kw_only=True, eq=False)
class Stage:
    """A stage being trained: what its steps change."""

    config: TrainConfig
    first_step: int
    """Steps of the stages before."""
    model: VLM
    optimizer: torch.optim.AdamW
    loader: Loader
    tokenizer: Tokenizer
    device: torch.device
    trained: frozenset[str]
    """Parts (vision, projector, decoder, cross, head) with a trained parameter."""
    step: int = 0
    """Optimiser steps done of this stage."""
    skipped_steps: int = 0
    sources: dict[str, Path] = field(default_factory=dict)
    """What the checkpoints that this stage began from remember of the folders that they were imported from: kind -> folder."""
    pinned: bool = False
    """Copy batches through page-locked memory?"""

    @property
    def number(self) -> int:
        """Step counted over all stages."""
        return self.first_step + self.step


PARTS = {"vision": ("vision",), "projector": ("projector",), "cross": ("cross",), "decoder": ("decoder", "head")}
"""Field of `InitConfig` -> the parts of the model that it speaks of."""


def check(
    config: TrainConfig,
    *,
    world: int,
    resume: Path | None = None,
    first_step: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Raise ValueError for what would stop the stage at its start: found before the first stage
    runs for hours.

    `resume` is a checkpoint of the stage to go on from; a line says what in it cannot be checked.
    """
    alone = replace(config, data=replace(config.data, workers=0))
    with closing(make_loader(alone, load_tokenizer(config.data.tokenizer), world=world)) as loader:
        if resume is not None:
            _check_resume(resume, loader, first_step=first_step, say=say)
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    if resume is not None:
        _check_same_model(resume, model)
    for path in (config.init.model, *part_paths(config.init).values()):
        if path and resume is None:
            store.find(Path(path))


def _check_same_model(folder: Path, model: VLM) -> None:
    """Raise ValueError unless a checkpoint holds the weights of a model, and the optimiser's state
    of those that are trained. Seen from configs alone."""
    saved = store.load_config(folder)
    with torch.device("meta"):
        theirs = VLM(tree.from_dict(VLMConfig, saved["model"]))
    freeze(theirs, tuple(saved["train"]["trainable"]))
    before, now = dict(theirs.named_parameters()), dict(model.named_parameters())
    for key, of in (("model", _shape), ("trainable", _is_trained)):
        names = [name for name in before | now if of(before.get(name)) != of(now.get(name))]
        if names:
            one = f"{names[0]} is {of(before.get(names[0]))} there and {of(now.get(names[0]))} here"
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder} was saved with another {key}: {one}{more}. Put it back.")


def _shape(parameter: torch.nn.Parameter | None) -> str:
    return "absent" if parameter is None else str(list(parameter.shape))


def _is_trained(parameter: torch.nn.Parameter | None) -> str:
    return "trained" if parameter is not None and parameter.requires_grad else "frozen"


def _check_resume(
    folder: Path,
    loader: Loader,
    *,
    first_step: int,
    say: Callable[[str], None],
) -> None:
    """Raise ValueError if a stage cannot go on from a checkpoint of it."""
    state = store.load_state(folder)
    before = store.load_config(folder)["step"] - state["step"]
    if before != first_step:
        raise ValueError(f"{folder} was saved after {before} steps of earlier stages, which now have {first_step}: put their steps back.")
    if untold := loader.check_state(state["data"]):
        keys = ", ".join(untold)
        told = f"{folder} is of an earlier version of neva and does not tell {keys}"
        say(f"WARNING: {told}. Only if they are as they were does the run go on as it would have.")


def prepare(
    config: TrainConfig,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    start: Path | None = None,
    resume: Path | None = None,
    first_step: int = 0,
    say: Callable[[str], None] = print,
) -> Stage:
    """Build a stage: sharded model with its weights, optimiser and loader.

    `resume` is a checkpoint of this stage to go on from. Without one the weights are those of `init.model`, else of the checkpoint
    `start`, except for parts that `init` wants fresh; without either all are fresh.
    """
    torch.manual_seed(config.seed + ranks.rank())  # else from the clock: two runs of one config would draw differently
    tokenizer = load_tokenizer(config.data.tokenizer)
    loader = make_loader(config, tokenizer, rank=ranks.rank(), world=mesh.size())
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    if resume is None and not config.epochs:
        _look(config, loader, say)
    say(parameter_table(config))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = frozenset(part_of(name) for name in names)
    parallelize(model, mesh, precision=config.precision, recompute=config.recompute, compile=config.compile)
    begin, origins = _origins(config, start, resume)
    found = lambda name: any(takes(name) for _, takes in origins)  # noqa: E731
    if new := dict.fromkeys(part_of(name) for name, _ in model.named_parameters() if origins and not found(name)):
        say(f"New, drawn from seed {config.seed}: {', '.join(new)}")
    fill(model, device, lambda name, shape: None if found(name) else fresh(name, shape, config.seed))
    for folder, takes in origins:
        if resume is None and takes("decoder.embed.weight") and (line := _new_rows(config, folder)):
            say(line)
        weights: dict[str, Tensor] = dict(logical_parameters(model))
        store.load_weights(folder, into=weights, only=takes, grow=resume is None)
    stage = Stage(
        config=config, first_step=first_step, model=model, optimizer=make_optimizer(model, config.optim), loader=loader,
        tokenizer=tokenizer, device=device, trained=trained, pinned=device.type == "cuda", sources=_sources(begin, config.init, resume),
    )  # fmt: skip
    if resume is not None:
        _restore(stage, resume)
    return stage


def _look(config: TrainConfig, loader: Loader, say: Callable[[str], None]) -> None:
    """Say what the stage's samples are and what its steps hold; raise SampleError for one that
    would stop it."""
    try:
        survey = loader.look(patience=PATIENCE)
    except ValueError:
        loader.close()
        raise
    say(f"Stage {config.name}: {told(loader.volume(survey, steps=config.steps), survey)}")
    say(f"Stage {config.name}: {loader.told(survey)}")


def _new_rows(config: TrainConfig, folder: Path) -> str:
    """A line on the tokens that the model has and a checkpoint has not; empty if none."""
    before = store.load_config(folder)["model"]["decoder"]["vocab"]
    after = config.model.decoder.vocab
    if after == before:
        return ""
    return f"The vocabulary grows from {before} to {after}: each new row is the mean of the others"


def _origins(config: TrainConfig, start: Path | None, resume: Path | None) -> tuple[Path | None, list[tuple[Path, Callable[[str], bool]]]]:
    """The checkpoint that the stage begins from, and all that give it weights, each with the names that it gives: others are drawn anew."""
    if resume is None and config.init.model:
        start = store.open_checkpoint(Path(config.init.model)).folder
    begin, paths = resume or start, part_paths(config.init) if resume is None else {}
    elsewhere = {part for field in PARTS if resume is None and getattr(config.init, field) for part in PARTS[field]}
    origins: list[tuple[Path, Callable[[str], bool]]] = []
    if begin is not None:
        uncrossed = set() if config.model.decoder.cross_layers else {"cross"}
        origins.append((begin, _taking(begin, {part for parts in PARTS.values() for part in parts} - elsewhere - uncrossed)))
    for field_name, path in paths.items():
        folder = store.open_checkpoint(Path(path)).folder
        origins.append((folder, _taking(folder, set(PARTS[field_name]))))
    return begin, origins


def _taking(folder: Path, parts: set[str]) -> Callable[[str], bool]:
    """Is a parameter of these parts? Cross-attention layers are drawn anew where the checkpoint is of a model without them."""
    crossed = store.load_config(folder).get("model", {}).get("decoder", {}).get("cross_layers")
    if parts == {"cross"} and not crossed:
        raise ValueError(f"init.cross: {folder} is of a model without cross-attention; name another, or set init.cross=fresh.")
    chosen = parts if crossed else parts - {"cross"}
    return lambda name: part_of(name) in chosen


def part_paths(init: InitConfig) -> dict[str, str]:
    """Part -> the checkpoint that it comes from, for the parts that come from one of their own."""
    return {part: path for part in PARTS if (path := getattr(init, part)) not in ("", "fresh")}


def _sources(begin: Path | None, init: InitConfig, resume: Path | None) -> dict[str, Path]:
    """The `source/` folders to carry on: those of the checkpoint that the stage begins from, less what comes from elsewhere, which brings its own."""
    found = {folder.name: folder for folder in sorted((begin / "source").glob("*"))} if begin is not None else {}
    replaced = [part for part in ("decoder", "vision") if resume is None and getattr(init, part)]
    if replaced and "vlm" in found:
        whole = found.pop("vlm")
        found = {"decoder": whole, "vision": whole} | found
    found = {kind: folder for kind, folder in found.items() if kind not in replaced}
    for part in replaced:
        if path := part_paths(init).get(part):
            own = [source for kind in (part, "vlm") if (source := store.find(Path(path)) / "source" / kind).is_dir()]
            found |= {part: own[0]} if own else {}
    return found


def make_loader(config: TrainConfig, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1) -> Loader:
    """The loader of a stage's data for one rank."""
    data, batch = config.data, config.batch
    encoder = Encoder(
        tokenizer=tokenizer,
        template=data.template,
        system=data.system,
        layout=config.model.layout,
        date=data.date,
    )
    options = LoaderOptions(
        shuffle=data.shuffle, seed=config.seed, workers=data.workers, pool=data.pool, prefetch=data.prefetch,
        on_error=data.on_error, over_long=data.over_long, fewer_tiles=data.fewer_tiles,
    )  # fmt: skip
    budget = Budget(seq_length=batch.seq_length, rows=batch.rows, micro_rows=batch.micro_rows, max_tiles=batch.max_tiles)
    sources = [make_source(one, seed=config.seed, links=data.links) for one in data.blend]
    weights = [source.weight for source in data.blend]
    share = ranks.share if world > 1 else alone  # a dry run has no ranks
    return Loader(
        sources,
        encoder,
        budget,
        options,
        weights=weights,
        rank=rank,
        world=world,
        share=share,
    )


def make_source(
    config: SourceConfig,
    *,
    seed: int = 0,
    links: bool = False,
) -> LlavaSource | MockSource:
    """The source that a config names. With `links` its images may be links that lead outside the
    image folder."""
    if config.mock is not None:
        m = config.mock
        return MockSource(
            samples=m.samples, words=m.words, images=m.images, image_size=m.image_size, text_only_every=m.text_only_every,
            seed=seed, name=config.name or "mock",
        )  # fmt: skip
    return LlavaSource(config.path, config.image_folder, name=config.name, links=links)


def train_step(stage: Stage, batches: tuple[Batch, ...], *, since: float | None = None) -> StepReport:
    """One optimiser step over this rank's micro-batches: forward, backward, clip, update.

    Rates in the report are per second from `since` (a `time.monotonic()`, by default now) until the step is done.
    """
    started, config = time.monotonic() if since is None else since, stage.config
    work = Work.of(batches, config, stage.trained)
    labels = ranks.total(work.labels)
    sums: dict[str, list[float]] = {}
    bad: list[str] = []
    pending: list[tuple[Batch, Tensor, Tensor]] = []
    balances: list[Tensor] = []
    for batch in batches:
        local = (batch.pin() if stage.pinned else batch).to(stage.device)
        out = stage.model(local)
        loss = out.losses.sum() / max(1, labels)
        if out.aux is not None:  # a mean over this micro-batch's rows; the step's is over those of all ranks
            balances.append(out.aux.detach() * (len(local.tokens) / config.batch.rows))
            loss = loss + out.aux * (len(local.tokens) / config.batch.rows)
        if loss.requires_grad:  # not where only vision is trained and no rank's micro-batch of this number holds an image
            loss.backward()
        pending.append((batch, out.losses.detach(), group_sums(out.losses, local)))
    for batch, losses, groups in pending:  # reads from the device only now, when all work is queued
        for name, (loss, count) in zip(batch.group_names, groups.T.tolist(), strict=True):
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + loss, entry[1] + count
        if not groups.isfinite().all():
            bad += not_finite(losses, batch)
    stage.step += 1
    lr = learning_rate(config.optim, stage.step, config.steps)
    norm = clip(stage.model, config.optim.clip).item()
    shared = ranks.share((sums, bad, work, sum(balance.item() for balance in balances) if balances else None))
    bad = [key for _, keys, _, _ in shared for key in keys]
    sound = labels > 0 and not bad and math.isfinite(norm)
    if sound:
        for group in stage.optimizer.param_groups:
            group["lr"] = lr
        stage.optimizer.step()
    stage.optimizer.zero_grad()
    if not sound:
        _leave_out(stage, labels, bad)
    seconds = time.monotonic() - started
    told = [balance for *_, balance in shared if balance is not None]
    balance = sum(told) if told else None
    norm = norm if sound else None
    return _report(stage, [s for s, *_ in shared], [w for _, _, w, _ in shared], balance=balance, norm=norm, lr=lr, seconds=seconds)


def _leave_out(stage: Stage, labels: int, bad: list[str]) -> None:
    """Count a step that changed no weight: all its samples were unreadable and skipped, or its loss or gradient is not finite.

    ValueError for the latter, with its samples' names, unless the config wants such steps left out.
    """
    what = f"the loss is not finite; samples: {', '.join(bad[:20])}" if bad else "the gradient norm is not finite though every loss is"
    if labels and stage.config.log.on_nonfinite == "stop":
        raise ValueError(
            f"Step {stage.number} of stage {stage.config.name}: {what}. Look at these samples, lower optim.lr, or leave such steps out with "
            "log.on_nonfinite=skip. The last checkpoint is untouched."
        )
    stage.skipped_steps += 1


def _report(
    stage: Stage, sums: list[dict[str, list[float]]], works: list[Work], *, balance: float | None, norm: float | None, lr: float, seconds: float
) -> StepReport:
    merged: dict[str, list[float]] = {}
    for part in sums:
        for name, (loss, count) in part.items():
            entry = merged.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + loss, entry[1] + count
    labels, tokens, slots, flops = (sum(getattr(w, key) for w in works) for key in ("labels", "tokens", "slots", "flops"))
    peak, counts = peak_flops(stage.device), stage.loader.counts
    return StepReport(
        stage=stage.config.name,
        step=stage.number,
        loss=sum(loss for loss, _ in merged.values()) / labels if norm is not None else None,
        losses={name: loss / count for name, (loss, count) in sorted(merged.items()) if count and norm is not None},
        balance=balance,
        grad_norm=norm,
        lr=lr,
        tokens=tokens,
        labels=labels,
        padding=1 - tokens / slots,
        tokens_per_s=tokens / seconds,
        tiles_per_s=sum(w.tiles for w in works) / seconds,
        flops_per_s=flops / seconds,
        mfu=flops / seconds / (peak * len(works)) if peak else None,
        memory_gib=memory_gib(stage.device),
        seconds=seconds,
        samples=counts["samples"],
        epochs=counts["epochs"],
        skipped_samples=counts["dropped"] + counts["skipped"],
        reduced_samples=counts["reduced"],
        skipped_steps=stage.skipped_steps,
    )


def save(stage: Stage) -> Path:
    """Write and publish a checkpoint of the stage as it stands."""
    config = stage.config
    training = store.Training(
        tensors=optimizer_tensors(stage.model, stage.optimizer),
        per_rank=_random_state(stage.device),
        state={"stage": config.name, "step": stage.step, "skipped_steps": stage.skipped_steps, "data": stage.loader.state_dict()},
    )
    described = {
        "step": stage.number,
        "model": tree.to_dict(config.model),
        "template": config.data.template,
        "system": config.data.system,
        "date": config.data.date,
        "train": tree.to_dict(config),
    }
    folder = store.save(
        Path(config.out), step=stage.number, config=described, write_files=lambda folder: _write_files(stage, folder),
        weights={name: parameter.detach() for name, parameter in logical_parameters(stage.model)}, training=training,
        keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every,
    )  # fmt: skip
    stage.sources = {kind: folder / "source" / kind for kind in stage.sources}  # the one they came from may be deleted now
    return folder


def _write_files(stage: Stage, folder: Path) -> None:
    stage.tokenizer.save(folder / "tokenizer")
    for kind, source in stage.sources.items():
        shutil.copytree(source, folder / "source" / kind)


def _restore(stage: Stage, folder: Path) -> None:
    """Take optimiser, random states and data position from a checkpoint of this stage; its weights are loaded already."""
    random = _random_state(stage.device)
    into = store.Training(tensors=optimizer_tensors(stage.model, stage.optimizer), per_rank=random)
    state = store.load_training(folder, into=into).state
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], stage.device)
    stage.step, stage.skipped_steps = state["step"], state["skipped_steps"]
    stage.loader.load_state_dict(state["data"])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def parameter_table(config: TrainConfig) -> str:
    """Parameters of each part, trained and frozen."""
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        rows.setdefault(part_of(name), [0, 0])[not parameter.requires_grad] += parameter.numel()
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"  {part:<14}{trained:>16,}{frozen:>16,}" for part, (trained, frozen) in {**rows, "total": total}.items()]
    head = f"Stage {config.name} ({config.precision}), {tree.counted(config.steps, 'step')}\n  {'parameters':<14}{'trained':>16}{'frozen':>16}"
    return "\n".join([head, *lines])


def frozen_changed(config: TrainConfig, end: Path, start: Path | None) -> tuple[int, int]:
    """Parameters that a stage trained, and how many of its frozen tensors have other bytes in its last checkpoint than at its start.

    `start` is the checkpoint that the stage began from; without one it began from fresh weights, which are drawn again to compare.
    """
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    names = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    after = _read(end, names)
    before = _read(start, names) if start is not None else {name: fresh(name, p.shape, config.seed) for name, p in names.items()}
    # In bf16 a module that is frozen whole is stored in bf16, so its start values may have been rounded once.
    kept = {name for name in names for dtype in (torch.float32, torch.bfloat16) if torch.equal(before[name].to(dtype).float(), after[name])}
    return trained, len(names) - len(kept)


def _read(folder: Path, names: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Some of a checkpoint's weights, in fp32: what bf16 holds is held exactly."""
    into = {name: torch.empty(parameter.shape) for name, parameter in names.items()}
    store.load_weights(folder, into=into, only=lambda name: name in into, grow=True)
    return into
