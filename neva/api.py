"""What the command line calls, and what a Python user calls: train, load, generate, evaluate, demo."""

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import neva
from neva import config as tree
from neva import plan
from neva.batch import ImageLayout
from neva.checkpoint import store
from neva.checkpoint.convert import import_model, lacks_encoder
from neva.checkpoint.export import export
from neva.checkpoint.foreign import is_foreign
from neva.checkpoint.hf import Options
from neva.checkpoint.hub import download
from neva.checkpoint.inspect import inspect as describe
from neva.checkpoint.nemo import is_nemo, unpack_texts
from neva.checkpoint.target import ExportOptions
from neva.data.image import open_image
from neva.data.preview import grid_picture
from neva.data.sample import MARKER, Picture, Sample, Turn
from neva.data.source import LlavaSource
from neva.data.tiling import tiling
from neva.data.workers import check_main
from neva.evaluate import held_out
from neva.evaluate import report as pages
from neva.evaluate import run as evaluation
from neva.evaluate.predictions import kept
from neva.evaluate.question import Judged, Question, questions, suited
from neva.infer.generate import Loaded, Sampling, load
from neva.infer.generate import generate as generate_batch
from neva.job import NAMED, InitConfig, TrainConfig
from neva.parallel import machine
from neva.parallel import mesh as ranks
from neva.recipes import going_on, inits, nemo_yaml
from neva.recipes.chosen import chosen_stages
from neva.recipes.nemo_yaml import Line
from neva.recipes.resolve import (
    check_systems,
    make_data,
    resolve,
    say_mock,
    say_templates,
    with_epochs,
)
from neva.training import loop
from neva.training.epochs import estimate, with_known_steps
from neva.training.stage import check, frozen_changed, parameter_table

__all__ = [
    "convert_config",
    "demo",
    "dry_run",
    "evaluate",
    "export_checkpoint",
    "generate",
    "import_checkpoint",
    "inspect",
    "load",
    "recipe",
    "report",
    "show",
    "tiles",
    "train",
]


def recipe(
    name: str,
    overrides: tree.Overrides = (),
    *,
    resume: str | None = None,
    say: Callable[[str], None] | None = None,
    trust_code: bool = False,
) -> tuple[TrainConfig, ...]:
    """The stages of a recipe (NAME, NAME/STAGE or a saved FILE.yaml) with overrides applied: texts
    such as `optim.lr=1e-4`, or a dict such as {"optim.lr": 1e-4}.

    `say` gets a line for each stage in which a checkpoint named by `init` puts its own model in the recipe's place.
    ValueError for a function to run (`image.process`) that neither the recipe nor an override
    names but such a checkpoint, unless `trust_code`. Of what `init` names only configs are read.
    `resume` is as in `train`: a run that goes on needs no folder that it began from.
    """
    return chosen_stages(
        name,
        overrides,
        place=_texts,
        is_gone=_is_gone,
        say=say,
        trust_code=trust_code,
        resume=os.path.expanduser(resume or ""),
    )


def _is_gone(source: str) -> bool:
    """Is what `init` names not to be had?"""
    try:
        return not fetch(source).exists()
    except ValueError:
        return True


def import_checkpoint(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    options: Options | None = None,
    parity: bool = True,
    say: Callable[[str], None] = tree.tell,
) -> Path:
    """Make a neva checkpoint of a Hugging Face folder (or hf:org/name), or of a decoder's and an encoder's; gives its path.

    Without `out` it lands in $NEVA_CACHE (~/.cache/neva), once. ValueError for what cannot be imported, or computes otherwise here.
    """
    options = options or Options()
    given = [sources] if isinstance(sources, str | Path) else sources
    folders = [fetch(str(source)) for source in given]
    if out is not None:
        return import_model(folders, Path(out), options, check=parity, say=say)
    place = _place(folders, options, parity=parity)
    if (place / "manifest.json").exists():
        return place
    with _lock_file(place) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the ranks of a run one imports, the others wait
        if not (place / "manifest.json").exists():
            say(f"Importing {', '.join(map(str, folders))} into {place}")
            import_model(folders, place, options, check=parity, say=say)
    return place


def _lock_file(place: Path) -> TextIO:
    """The file whose lock an import to this place of the cache holds."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.with_name(place.name + ".lock").open("w")
    except OSError as error:
        fix = "set NEVA_CACHE to a folder that can be, or name one with --out"
        raise ValueError(f"the cache {place.parent} cannot be written to ({error.strerror}): {fix}") from None


def _place(folders: Sequence[Path], options: Options, *, parity: bool) -> Path:
    """Where in the cache an import of these files goes."""
    stamps = [[str(folder.resolve()), *_stamps(folder)] for folder in folders]
    name = hashlib.sha256(json.dumps([stamps, str(options), parity]).encode()).hexdigest()[:12]
    return cache() / "imports" / f"{folders[0].resolve().name}-{name}"


def _stamps(source: Path) -> list[str]:
    """Name, size and time of the files of a model, so that a changed one is imported anew. NeMo's folders hold others; its archives are files."""
    found = [source] if source.is_file() else source.rglob("*") if is_nemo(source) else source.glob("*.*")
    files = sorted(file for file in found if file.is_file())
    return [f"{file.relative_to(source)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def cache() -> Path:
    """Where imports without a place of their own go: $NEVA_CACHE, else ~/.cache/neva."""
    return Path(os.environ.get("NEVA_CACHE") or Path.home() / ".cache" / "neva")


def fetch(source: str) -> Path:
    """A local folder as it is; `hf:org/name[@revision]` from the Hugging Face cache, or downloaded
    into it."""
    if not source.startswith("hf:"):
        return Path(source)
    return download(source.removeprefix("hf:"))


def inspect(path: str | Path) -> dict:
    """What a checkpoint or a Hugging Face folder is: family, sizes, dtypes, tokenizer, template, origin. A checkpoint is verified."""
    return describe(Path(path))


def convert_config(path: str | Path, out: str | Path | None = None) -> tuple[str, list[Line]]:
    """A NeMo 1.0 neva_config.yaml as our YAML, written to `out` if given, and what became of each of its keys. `${oc.env:…}` is the environment's."""
    stage, lines = nemo_yaml.convert(Path(path), os.environ)
    if out is not None:
        tree.save([stage], out)
    return tree.dumps([stage]), lines


def _places(init: InitConfig) -> dict[str, tuple[Path, ...]]:
    """Part -> where it comes from. A LLaVA without its encoder is imported together with it, which beside a whole model is no part any more."""
    found: dict[str, tuple[Path, ...]] = {
        name: (fetch(path),) for name in ("model", "decoder", "vision", "projector") if (path := getattr(init, name)) not in ("", "fresh")
    }
    seen = found.get("vision", ())
    for part in ("model", "decoder", "projector"):
        if part in found and seen and _is_foreign(*seen) and lacks_encoder(*found[part]):
            found[part] += seen
    if len(found.get("model", ())) > 1:
        del found["vision"]
    return found


def _is_foreign(path: Path) -> bool:
    return is_nemo(path) or is_foreign(path)


def _readable(init: InitConfig, *, say: Callable[[str], None]) -> dict[str, tuple[Path, ...]]:
    """Part -> folders whose configs can be read as they lie; those of a NeMo checkpoint by its import in the cache."""
    found = _places(init)
    for part, paths in found.items():
        if any(map(is_nemo, paths)):
            found[part] = (import_checkpoint(paths, say=say),)
    return found


def _texts(init: InitConfig) -> dict[str, tuple[Path, ...]]:
    """As `_readable`, but nothing is imported: of a NeMo checkpoint that is not yet, its config
    and tokenizer are read."""
    found = {}
    for part, paths in _places(init).items():
        imported = _place(paths, Options(), parity=True)
        if any(map(is_nemo, paths)):
            done = (imported / "manifest.json").exists()
            paths = (imported,) if done else tuple(map(_unpacked_texts, paths))
        found[part] = paths
    return found


def _unpacked_texts(path: Path) -> Path:
    """A NeMo archive's config and tokenizer as a folder in the cache; any other path as it is."""
    if not (is_nemo(path) and path.is_file()):
        return path
    identity = json.dumps([str(path.resolve()), *_stamps(path)])
    stamp = hashlib.sha256(identity.encode()).hexdigest()[:12]
    place = cache() / "texts" / f"{path.stem}-{stamp}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            unpack_texts(path, Path(scratch) / "texts")
            try:
                (Path(scratch) / "texts").rename(place)
            except OSError:
                if not place.exists():  # another process was first, with the same files
                    raise
    return place


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    options: ExportOptions | None = None,
    parity: bool = True,
    say: Callable[[str], None] = tree.tell,
) -> Path:
    """Write a checkpoint as a folder that transformers and vLLM load; gives its path. ValueError naming what that format cannot hold."""
    return export(Path(checkpoint), Path(out), options or ExportOptions(), check=parity, say=say)


def tiles(image: str, *, layout: ImageLayout, picture: str | Path | None = None) -> dict[str, int]:
    """Into how many columns and rows an image is cut, and how many tiles it makes with its thumbnail.

    `image` is a size such as 1920x1080, or a file; of a file a picture of the tiles under their tags is written to `picture`.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", image)
    shown = None if match else open_image(Path(image))
    size = (int(match[1]), int(match[2])) if match else shown.size if shown is not None else (0, 0)
    found = tiling(size, layout)
    if picture is not None:
        if shown is None:
            raise ValueError(f"{image} is a size: give an image file to draw its tiles")
        grid_picture(shown, layout).save(picture)
    return {"columns": found.columns, "rows": found.rows, "tiles": found.tiles}


def show(name: str, overrides: tree.Overrides = (), *, trust_code: bool = False) -> str:
    """The resolved config as YAML; `neva train FILE.yaml` runs it, so `trust_code` is as there."""
    return tree.dumps(resolve(recipe(name, overrides, trust_code=trust_code)))


def train(
    stages: str | tuple[TrainConfig, ...],
    overrides: tree.Overrides = (),
    *,
    resume: str | None = None,
    trust_code: bool = False,
    say: Callable[[str], None] = tree.tell,
) -> Path:
    """Train a recipe by name, or stages, and give the last checkpoint.

    `resume` is "auto" (go on from the run folder's newest checkpoint if there is one) or a checkpoint's path.
    `trust_code` lets a function run (`image.process`) that a checkpoint named by `init` brings.
    Raises ValueError for what the user can mend, `Stopped` after a signal.
    """
    check_main()
    resume = os.path.expanduser(resume or "")
    if isinstance(stages, str):
        place = partial(_readable, say=say)
        chosen = chosen_stages(
            stages,
            overrides,
            place=place,
            is_gone=_is_gone,
            say=say,
            trust_code=trust_code,
            resume=resume,
        )
    else:
        chosen = tree.override(stages, with_epochs(overrides), named=NAMED)
    resolved = resolve(chosen)
    say_mock(resolved, say)
    say_templates(resolved, say)
    make_data(resolved, say)
    check_systems(resolved)
    for stage in resolved:
        inits.check_fit(stage, _readable(stage.init, say=say))
    resolved = tuple(replace(stage, init=_imported(stage.init, say)) for stage in resolved)
    resolved = going_on.with_begun_init(resolved, going_on.checkpoint_of(resolved, resume))
    try:
        last = loop.train(
            resolved,
            resume=resume,
            on_check=held_out.check,
            on_evaluate=_score,
            say=say,
        )
    except loop.Stopped:
        _leave_report(resolved[0].out, say)
        raise
    _leave_report(resolved[0].out, say)
    if os.environ.get("RANK", "0") == "0":
        say(going_on.next_commands(last))
    return last


def report(run: str | Path) -> Path:
    """Write report.html into a run's folder, while it trains or afterwards; gives its path.

    ValueError for a folder without a config.yaml that can be read.
    """
    run = Path(run)
    page = run / "report.html"
    pages.write(page, report=pages.of_run(run), plots=pages.loss_plots(pages.metrics(run)))
    return page


def _leave_report(run: str, say: Callable[[str], None]) -> None:
    """The first rank's page of a run that ends. What keeps it from being written ends nothing."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        say(f"See {report(run)}")
    except (OSError, ValueError) as error:
        say(f"{run}/report.html could not be written: {error}")


def dry_run(
    name: str,
    overrides: tree.Overrides = (),
    *,
    ranks: int = 1,
    gpu_memory: float | None = None,
    resume: str | None = None,
    trust_code: bool = False,
    say: Callable[[str], None] = tree.tell,
) -> None:
    """All that `train` does before its first step, without weights: files, sizes, data, the
    trainable set.

    Says the memory that each stage needs on each of `ranks`, and whether the device found has it,
    or a GPU of `gpu_memory` GiB. With `resume` also whether the run can go on from its checkpoint,
    as `train` takes it.
    """
    resume = os.path.expanduser(resume or "")
    chosen = chosen_stages(
        name,
        overrides,
        place=_texts,
        is_gone=_is_gone,
        say=say,
        trust_code=trust_code,
        resume=resume,
    )
    resolved = resolve(chosen)
    say_mock(resolved, say)
    say_templates(resolved, say)
    found = loop.find(resolved, resume, say)
    make_data(resolved, say)
    check_systems(resolved)
    for stage in resolved:
        check(replace(stage, init=InitConfig()), world=ranks)
        inits.check_fit(stage, _texts(stage.init))
        held_out.check(stage, say)
    begun = with_known_steps(loop.with_date(resolved, found), found)
    told: set[str] = set()
    sized = tuple(estimate(stage, say, told=told) for stage in begun)
    if found is not None:
        without_init = tuple(replace(stage, init=InitConfig()) for stage in sized)
        loop.check_start(
            loop.with_precision(without_init),
            found,
            world=ranks,
            say=say,
        )
        say(f"The run can go on from {found}")
    for stage in sized:
        say(parameter_table(stage))
    judged_by = machine.found() if gpu_memory is None else machine.asked(gpu_memory)
    definite = tuple(replace(stage, precision=_precision(stage, asked=gpu_memory is not None)) for stage in resolved)
    say(plan.table(definite, ranks=ranks, machine=judged_by))


def _precision(stage: TrainConfig, *, asked: bool) -> str:
    """What `precision=auto` means here, or on a GPU that was asked for."""
    if stage.precision == "auto" and asked:
        return "bf16"
    return loop.choose_precision(stage.precision)[0]


def _imported(init: InitConfig, say: Callable[[str], None]) -> InitConfig:
    """`init` with Hugging Face folders replaced by their imports in the cache."""
    places = _places(init)
    changed = {part: str(import_checkpoint(paths, say=say) if _is_foreign(paths[0]) else paths[0]) for part, paths in places.items()}
    if len(places.get("model", ())) > 1:
        changed["vision"] = ""
    return replace(init, **changed)


def generate(
    checkpoint: str | Path | Loaded,
    *,
    prompt: str | None = None,
    images: Sequence[Picture | str] = (),
    data: str | Path | None = None,
    image_folder: str | Path = "",
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: evaluation.Progress | None = None,
    **options: Any,
) -> Iterator[dict]:
    """Answer one prompt about images, or every sample's last question of a LLaVA-format file, in batches.

    Images stand where the prompt says `<image>`, else before it. `options` are fields of
    `Sampling`, and `device`, `precision` and `trust_code` of `load` where `checkpoint` is a path.
    Gives dicts {"id", "text", "finish", "tokens" (generated)}, for a file also "truth" where it
    holds one. A question of a file that cannot be asked, such as one that is too long or in a row
    that cannot be read, has the finish "error" and says why as "error"; a prompt that cannot is a
    ValueError. `out`, a .jsonl file, keeps a file's answers: what it holds is not asked again
    (docs/evaluate.md). `progress` is called with the numbers of questions done and of all.
    """
    loaded, sampling = _loaded(checkpoint, options)
    chosen = Sampling(**_sampling(sampling))
    if data is not None:
        asked = list(questions(LlavaSource(data, image_folder, questions=True), each="last"))
        known = evaluation.settings("generate", loaded, chosen, data, image_folder)
        with kept(out, known, asked) as file:
            for start in range(0, len(asked), batch_size):
                part = asked[start : start + batch_size]
                judged = evaluation.ask(loaded, part, chosen, batch_size=batch_size, file=file)
                if progress is not None:
                    progress(start + len(part), len(asked))
                yield from map(_answer, judged)
            if file is not None:
                file.finish(None)
        return
    if prompt is None:
        raise ValueError("give a prompt, or data: a LLaVA-format file")
    if out is not None:
        raise ValueError("out goes with data: a prompt's answer is not kept")
    pictures = tuple(Path(image) if isinstance(image, str) else image for image in images)
    text = prompt if MARKER in prompt else f"{MARKER}\n" * len(pictures) + prompt
    turns = (Turn(role="user", text=text),)
    sample = Sample(source="prompt", id="0", turns=turns, images=pictures)
    (answer,) = generate_batch(loaded, [sample], chosen)
    yield _answer(Judged(question=Question(sample=sample, truth=None), answer=answer, right=False))


def _answer(judged: Judged) -> dict:
    """An answer as `generate` gives it."""
    question, answer = judged.question, judged.answer
    told = {"text": answer.text, "finish": answer.finish, "tokens": len(answer.tokens)}
    truth = {} if question.truth is None else {"truth": question.truth}
    error = {"error": answer.error} if answer.error else {}
    return {"id": question.sample.id, **told, **truth, **error}


def _loaded(checkpoint: str | Path | Loaded, options: dict) -> tuple[Loaded, dict]:
    """The model, loaded if it is not, and the options that loading does not take."""
    loading = {name: options[name] for name in LOADING if name in options}
    rest = {name: value for name, value in options.items() if name not in loading}
    if not isinstance(checkpoint, Loaded):
        return load(checkpoint, **loading), rest
    if loading:
        given = ", ".join(loading)
        raise ValueError(f"{given}: the model is loaded already; give it to neva.load")
    return checkpoint, rest


LOADING = ("device", "precision", "trust_code")
"""Options of `load` that `generate` and `evaluate` take beside a path."""


def _sampling(options: dict) -> dict:
    return {key: tuple(value) if key == "stop" else value for key, value in options.items()}


def evaluate(
    checkpoint: str | Path | Loaded,
    *,
    data: str | Path,
    image_folder: str | Path = "",
    batch_size: int = 32,
    max_new_tokens: int = 32,
    blind: bool = False,
    out: str | Path | None = None,
    progress: evaluation.Progress | None = None,
    **loading: Any,
) -> dict:
    """Exact-match accuracy on a LLaVA-format file, beside what can be had without looking.

    Every answer in the file is a question: the turns before it, as they stand, are its prompt. One
    without an answer is answered and not scored.
    Gives {"accuracy": {kind: share}, "counts": {kind: number}, "n": of all, "overall": shares of
    all, "baselines": the best answers without an image, "errors": why some could not be asked, such
    as a prompt that is too long, …}: `evaluate.run.summary`. Those whose question can be read count
    as answered wrong. `blind` asks again with black images: "blank_image".
    `out`, a .jsonl file, keeps the answers: what it holds is not asked again (docs/evaluate.md).
    `progress` is called with the numbers of questions done and of all. `loading` is `device`,
    `precision` and `trust_code` of `load` where `checkpoint` is a path.
    """
    loaded, unknown = _loaded(checkpoint, loading)
    if unknown:
        raise TypeError(f"evaluate() takes no {', '.join(unknown)}")
    sampling = Sampling(max_new_tokens=max_new_tokens)
    every = list(questions(LlavaSource(data, image_folder, questions=True)))
    asked = suited(every, caption=loaded.encoder.chosen.caption)
    passes = (False, True) if blind else (False,)
    judged: dict[bool, list[Judged]] = {}
    known = evaluation.settings("eval", loaded, sampling, data, image_folder)
    with kept(out, known, asked) as file:
        for number, blank in enumerate(passes):
            before, total = number * len(asked), len(passes) * len(asked)
            judged[blank] = evaluation.ask(
                loaded,
                asked,
                sampling,
                batch_size=batch_size,
                blank=blank,
                file=file,
                progress=progress and (lambda done, _, b=before, t=total: progress(b + done, t)),
            )
        left_out = len(every) - len(asked)
        score = evaluation.summary(judged[False], judged.get(True, ()), left_out=left_out)
        if file is not None:
            file.finish(score)
    return score


def _score(config: TrainConfig, checkpoint: Path) -> dict[str, float]:
    """The loop's evaluation: accuracy per kind on the stage's held-out file. Each rank asks its share of the questions."""
    source = held_out.open_source(config.evaluate, links=config.data.links)
    loaded = _load_own(config, checkpoint)
    judged = evaluation.evaluate(loaded, source, rank=ranks.rank(), world=ranks.world())
    everything = [j for part in ranks.share(judged) for j in part]
    failed = evaluation.errors(everything)
    if not failed:
        return evaluation.accuracy(everything)
    if ranks.rank() == 0:
        count = f"{len(failed)} of {len(everything)} questions were not asked"
        tree.tell(f"evaluate.source: {count}: {failed[0]}")
    return evaluation.accuracy(everything) | {"not_asked": len(failed)}


def _load_own(config: TrainConfig, checkpoint: Path) -> Loaded:
    """A checkpoint of a stage. What the stage ran on images, it may run; nothing else."""
    image = store.load_config(checkpoint)["model"]["image"]
    return load(checkpoint, trust_code=image["process"] == config.model.image.process)


def demo(overrides: tree.Overrides = (), *, say: Callable[[str], None] = tree.tell) -> dict:
    """Train the demo recipe, or go on with it, and write report.json and report.html into its `out`; gives the report."""
    started = time.monotonic()
    stages = resolve(recipe("demo", overrides))
    run = Path(stages[0].out)
    before = sum(line["seconds"] for line in pages.metrics(run)) if (run / "metrics.jsonl").exists() else 0.0
    try:
        last = train(stages, resume="auto", say=say)
    except loop.Stopped as stopped:
        raise loop.Stopped(going_on.stopped_demo(stopped.message, overrides), stopped.exit_code) from None
    begun = tree.load(run / "config.yaml", TrainConfig)
    pairs = zip(stages, begun, strict=True)
    stages = tuple(replace(stage, steps=one.steps) for stage, one in pairs)
    loaded = _load_own(stages[-1], last)
    source = LlavaSource(run / "data" / "heldout.json", run / "data" / "images")
    say(f"Asking {len(source):,} questions about held-out images, then with the images blanked")
    sampling = Sampling(max_new_tokens=8)
    judged = evaluation.evaluate(loaded, source, sampling=sampling, batch_size=64)
    blank = evaluation.evaluate(loaded, source, sampling=sampling, batch_size=64, blank=True)
    lines = pages.metrics(run)
    result = {
        "accuracy": evaluation.accuracy(judged),
        "baselines": evaluation.best_blind(judged),
        "blank_image": evaluation.accuracy(blank),
        "held_out_images": len({str(picture) for j in judged for picture in j.question.sample.images}),
        "seconds": before + time.monotonic() - started,
        "stages": [_stage_row(stages, number, lines) for number in range(len(stages))],
    }
    (run / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shown = pages.chosen(judged)
    pages.write(run / "report.html", report=pages.of_demo(result), plots=pages.loss_plots(lines), shown=shown)
    rows = (f"  {kind:<12} {result['accuracy'][kind]:6.1%}   without an image {result['baselines'][kind]:6.1%}" for kind in result["accuracy"])
    ask = f"neva generate {run} --image {run}/data/images/00000.png --prompt 'Which digit is this?'"
    say("\n".join(["Held-out accuracy:", *rows, f"{result['seconds']:.0f} seconds. See {run / 'report.html'}; ask it yourself: {ask}"]))
    return result


def _stage_row(stages: tuple[TrainConfig, ...], number: int, lines: Sequence[dict]) -> dict:
    """A stage of the demo's report. Frozen tensors are compared byte by byte with what the stage started from."""
    stage, checkpoints = stages[number], Path(stages[0].out) / "checkpoints"
    losses = [line["loss"] for line in lines if line["stage"] == stage.name]
    ends = [checkpoints / f"step_{sum(s.steps for s in stages[: n + 1])}" for n in range(number + 1)]
    trained, changed = frozen_changed(stage, ends[-1], ends[-2] if number else None)
    return {
        "name": stage.name, "steps": len(losses), "trainable": trained, "frozen_changed": changed,
        "loss_first": losses[0], "loss_last": losses[-1],
    }  # fmt: skip


neva.evaluate = evaluate  # importing the package neva/evaluate has put itself in the function's place
