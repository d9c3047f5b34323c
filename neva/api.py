"""What the command line calls, and what a Python user calls: train, load, generate, evaluate, demo."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from neva import config as tree
from neva import recipes
from neva.data.sample import MARKER, Picture, Sample, Turn
from neva.data.source import LlavaSource
from neva.evaluate import report
from neva.evaluate import run as evaluation
from neva.infer.generate import Loaded, Sampling, load
from neva.infer.generate import generate as generate_batch
from neva.job import NAMED, TrainConfig
from neva.parallel import mesh as ranks
from neva.recipes.resolve import make_data, resolve
from neva.training import loop
from neva.training.stage import frozen_changed

__all__ = ["demo", "evaluate", "generate", "load", "recipe", "show", "train"]


def recipe(name: str, overrides: Sequence[str] = ()) -> tuple[TrainConfig, ...]:
    """The stages of a recipe (NAME, NAME/STAGE or a saved FILE.yaml) with overrides such as `optim.lr=1e-4` applied."""
    return tree.override(recipes.get(name), overrides, named=NAMED)


def show(name: str, overrides: Sequence[str] = ()) -> str:
    """The resolved config as YAML; `neva train FILE.yaml` runs it."""
    return tree.dumps(resolve(recipe(name, overrides)))


def train(
    stages: str | tuple[TrainConfig, ...], overrides: Sequence[str] = (), *, resume: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Train a recipe by name, or stages, and give the last checkpoint.

    `resume` is "auto" (go on from the run folder's newest checkpoint if there is one) or a checkpoint's path.
    Raises ValueError for what the user can mend, `Stopped` after a signal.
    """
    chosen = recipe(stages, overrides) if isinstance(stages, str) else tree.override(stages, overrides, named=NAMED)
    resolved = resolve(chosen)
    make_data(resolved, say)
    return loop.train(resolved, resume=resume or "", on_evaluate=_score, say=say)


def generate(
    checkpoint: str | Path | Loaded,
    *,
    prompt: str | None = None,
    images: Sequence[Picture | str] = (),
    data: str | Path | None = None,
    image_folder: str | Path = "",
    batch_size: int = 16,
    **sampling: object,
) -> Iterator[dict]:
    """Answer one prompt about images, or every sample's last question of a LLaVA-format file, in batches.

    Images stand where the prompt says `<image>`, else before it. `sampling` is fields of `Sampling`.
    Gives dicts {"id", "text", "finish", "tokens" (generated)}, for a file also "truth" where it holds one.
    """
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint)
    chosen = Sampling(**_sampling(sampling))
    if data is not None:
        source = LlavaSource(data, image_folder)
        samples = [source[index] for index in range(len(source))]
    elif prompt is not None:
        pictures = tuple(Path(image) if isinstance(image, str) else image for image in images)
        text = prompt if MARKER in prompt else f"{MARKER}\n" * len(pictures) + prompt
        samples = [Sample(source="prompt", id="0", turns=(Turn(role="user", text=text),), images=pictures)]
    else:
        raise ValueError("give a prompt, or data: a LLaVA-format file")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        own = replace(chosen, seed=chosen.seed + start)  # a sample's stream does not depend on the batch size
        for sample, answer in zip(part, generate_batch(loaded, part, own), strict=True):
            truth = {"truth": sample.turns[-1].text} if sample.turns[-1].role == "assistant" else {}
            yield {"id": sample.id, "text": answer.text, "finish": answer.finish, "tokens": len(answer.tokens), **truth}


def _sampling(options: dict) -> dict:
    return {key: tuple(value) if key == "stop" else value for key, value in options.items()}


def evaluate(
    checkpoint: str | Path | Loaded, *, data: str | Path, image_folder: str | Path = "", batch_size: int = 32, max_new_tokens: int = 32
) -> dict:
    """Exact-match accuracy on a LLaVA-format file: {"accuracy": {kind: share}, "n": number of questions}.

    Every answer in the file is a question: the turns before it, as they stand, are its prompt.
    """
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    judged = evaluation.evaluate(loaded, LlavaSource(data, image_folder), sampling=sampling, batch_size=batch_size)
    return {"accuracy": evaluation.accuracy(judged), "n": len(judged)}


def _score(config: TrainConfig, checkpoint: Path) -> dict[str, float]:
    """The loop's evaluation: accuracy per kind on the stage's held-out file. Each rank asks its share of the questions."""
    source = LlavaSource(config.evaluate.source, config.evaluate.image_folder)
    judged = evaluation.evaluate(load(checkpoint), source, rank=ranks.rank(), world=ranks.world())
    return evaluation.accuracy([j for part in ranks.share(judged) for j in part])


def demo(overrides: Sequence[str] = (), *, say: Callable[[str], None] = print) -> dict:
    """Train the demo recipe, or go on with it, and write report.json and report.html into its `out`; gives the report."""
    started = time.monotonic()
    stages = resolve(recipe("demo", overrides))
    run = Path(stages[0].out)
    before = sum(line["seconds"] for line in report.metrics(run)) if (run / "metrics.jsonl").exists() else 0.0
    last = train(stages, resume="auto", say=say)
    loaded = load(last)
    held_out = LlavaSource(run / "data" / "heldout.json", run / "data" / "images")
    say(f"Asking {len(held_out):,} questions about held-out images, then with the images blanked")
    sampling = Sampling(max_new_tokens=8)
    judged = evaluation.evaluate(loaded, held_out, sampling=sampling, batch_size=64)
    blank = evaluation.evaluate(loaded, evaluation.Blanked(held_out), sampling=sampling, batch_size=64)
    lines = report.metrics(run)
    result = {
        "accuracy": evaluation.accuracy(judged),
        "baselines": evaluation.best_blind(judged),
        "blank_image": evaluation.accuracy(blank),
        "held_out_images": len({str(picture) for j in judged for picture in j.question.sample.images}),
        "seconds": before + time.monotonic() - started,
        "stages": [_stage_row(stages, number, lines) for number in range(len(stages))],
    }
    (run / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report.write(run / "report.html", report=result, plots=report.loss_plots(lines), shown=report.chosen(judged))
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
