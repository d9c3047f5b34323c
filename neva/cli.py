"""The `neva` command. Each subcommand calls one function of `neva.api` and prints what it returns.

Nothing heavy is imported before a subcommand runs: `neva --help` answers at once.
"""

import errno
import json
import shutil
import sys
import time
from typing import Any

import click
from click.shell_completion import CompletionItem

from neva import __version__


class _Neva(click.Group):
    """Prints what a user can fix as one `error:` line with exit code 1, in place of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _echo("interrupted", err=True)
            ctx.exit(130)
        except Exception as error:
            message, code = _plain(error)
            if message is None or ctx.params.get("traceback"):
                raise
            _echo(message, err=True)
            ctx.exit(code)


def _plain(error: Exception) -> tuple[str | None, int]:
    """What to print for an error and the exit code; None where the traceback is the message."""
    # Looked up, not imported: a command that did not train has not paid for the import of torch.
    loop = sys.modules.get("neva.training.loop")
    stopped: Any = error if loop is not None and isinstance(error, loop.Stopped) else None
    if stopped is not None:
        return stopped.message, stopped.exit_code
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            return None, 1  # the reader of our output is gone; click leaves quietly
        return f"error: {error.filename}: {error.strerror}" if error.filename and error.strerror else f"error: {error}", 1
    return (f"error: {error}", 1) if isinstance(error, ValueError) else (None, 1)


TRUST = click.option(
    "--trust-code",
    is_flag=True,
    default=None,
    help="Run the function that the checkpoint names in image.process, if it names one.",
)


def _echo(text: object, *, err: bool = False) -> None:
    """Print what may hold names and texts of strangers' files."""
    from neva.config import shown  # which imports YAML

    click.echo(shown(str(text)), err=err)


class _Recipe(click.ParamType):
    """A recipe's name, NAME/STAGE, or a file: `shell_complete` offers them."""

    name = "recipe"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from neva.recipes import RECIPES

        names = list(RECIPES)
        if "/" in incomplete:
            names = [f"{name}/{stage}" for name, place in RECIPES.items() for stage in place.stages]
        offered = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return offered or [CompletionItem(incomplete, type="file")]


@click.group(cls=_Neva, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, hidden=True, envvar="NEVA_TRACEBACK", help="Show where an error arose.")
@click.version_option(__version__, prog_name="neva")
def main(traceback: bool) -> None:
    """Train, evaluate and run vision-language models.

    neva demo trains a tiny model on this machine in minutes. An override is key=value for all stages of a recipe, or
    STAGE:key=value for one: neva train llava-tiny optim.lr=1e-3 finetune:steps=200
    """


@main.command()
@click.argument("recipe", type=_Recipe())
@click.argument("overrides", nargs=-1)
@click.option("--resume", metavar="auto|PATH", help="Go on from the newest checkpoint of the run's folder, or from PATH.")
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Processes to start on this machine.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check all that can be checked without weights, say what memory a rank needs, and stop.",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="With --dry-run: judge by GPUs of this memory, in place of the device found.",
)
@TRUST
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    resume: str | None,
    nproc: int | None,
    dry_run: bool,
    gpu_memory: float | None,
    **trust: Any,
) -> None:
    """Train RECIPE: a name that `neva recipes` lists, NAME/STAGE, or a saved config.yaml."""
    if gpu_memory and not dry_run:
        raise click.UsageError("--gpu-memory goes with --dry-run")
    from neva import api

    if dry_run:
        asked = _given({"gpu_memory": gpu_memory, "resume": resume, **trust})
        api.dry_run(recipe, overrides, ranks=nproc or 1, **asked)
        return
    if nproc is not None:
        from neva import launch

        # a wrong key is said once, before any rank starts
        api.recipe(recipe, overrides, resume=resume, **_given(trust))
        flags = ["--traceback"] if ctx.find_root().params["traceback"] else []
        options = ["--resume", resume] if resume else []
        options += ["--trust-code"] if _given(trust) else []
        ctx.exit(launch.local([*flags, "train", *options, "--", recipe, *overrides], nproc))
    api.train(recipe, overrides, resume=resume, **_given(trust))


@main.command()
@click.argument("overrides", nargs=-1)
def demo(overrides: tuple[str, ...]) -> None:
    """Train a tiny model on handwritten digits, then let it answer questions about new ones; out=runs/demo and all else as in `train`."""
    from neva import api

    api.demo(overrides)


@main.command()
@click.argument("recipe", type=_Recipe())
@click.argument("overrides", nargs=-1)
@TRUST
def show(recipe: str, overrides: tuple[str, ...], **trust: Any) -> None:
    """Print the resolved config of RECIPE as YAML; `neva train` takes it back as a file."""
    from neva import api

    _echo(api.show(recipe, overrides, **_given(trust)).rstrip("\n"))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of {name, stages, description}.")
def recipes(as_json: bool) -> None:
    """List the recipes."""
    from neva.recipes import listing

    rows = listing()
    if as_json:
        _echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        _echo(f"{row['name']:{width}}  {row['description']} [{' → '.join(row['stages'])}]")


ON_DEVICE = click.option(
    "--device",
    metavar="cpu|cuda|cuda:N",
    help="Where the model runs; by default a GPU where there is one.",
)
IN_PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="auto, the default, is bf16 on a GPU and fp32 on a CPU.",
)
OUT = click.option(
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE.jsonl",
    help="Keep the answers and exact prompts of --data here, and settings and score in FILE.report.json. "
    "The same command goes on where it was stopped, and asks again what could not be asked.",
)
STRICT = click.option(
    "--strict",
    is_flag=True,
    help="Exit code 1 if any question cannot be asked; by default only if none can.",
)


@main.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("--prompt", metavar="TEXT", help="One question; `<image>` marks where an image stands, else images come first.")
@click.option("--image", "images", multiple=True, type=click.Path(exists=True, dir_okay=False), help="An image of the prompt; repeatable.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False),
    help="A LLaVA-format file: answers each sample's last question. A bad row costs that row.",
)
@click.option("--image-folder", type=click.Path(exists=True, file_okay=False), help="Folder of the data's images.")
@OUT
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), metavar="F", help="0 takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), metavar="F", help="Sample from the likeliest tokens of this mass.")
@click.option("--top-k", type=click.IntRange(min=0), metavar="N", help="Sample from the N likeliest tokens; 0 from all.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable.")
@click.option("--seed", type=int, metavar="N", help="Seed of the sampling.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples answered at once.")
@ON_DEVICE
@IN_PRECISION
@STRICT
@TRUST
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object per line; with --out a single one, of counts.",
)
def generate(checkpoint: str, as_json: bool, strict: bool, **options: Any) -> None:
    """Answer a prompt, or the questions of a data file, with a checkpoint (a step_N folder or a run's folder)."""
    if (options["prompt"] is None) == (options["data"] is None):
        raise click.UsageError("give --prompt TEXT for one question, or --data FILE for a file of them (one of the two)")
    if options["data"] is not None and options["images"]:
        raise click.UsageError("--image goes with --prompt; a data file names its own images, relative to --image-folder")
    for name in ("image_folder", "out"):
        if options["prompt"] is not None and options[name] is not None:
            fix = "give the prompt's images with --image" if name == "image_folder" else "a prompt's answer is printed"
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --data; {fix}")
    from neva import api

    refused: list[str] = []
    answered = 0
    given = _given(options)
    with _Progress(options["out"], quiet=options["out"] is None and sys.stdout.isatty()) as progress:
        if options["data"] is not None:
            given["progress"] = progress
        for row in api.generate(checkpoint, **given):
            if "error" in row:
                refused.append(row["error"])
            else:
                answered += 1
            if options["out"] is not None:
                continue
            if as_json:
                _echo(json.dumps(row, ensure_ascii=False))
            elif "error" in row:
                _echo(f"Not asked: {row['error']}", err=True)
            else:
                _echo(row["text"] if options["prompt"] is not None else f"{row['id']}: {row['text']}")
    if options["out"] is not None and as_json:
        _echo(json.dumps({"out": options["out"], "answered": answered, "errors": refused}))
    elif options["out"] is not None:
        _say_refused(refused)
        _echo(f"{answered} of {answered + len(refused)} questions answered: {options['out']}")
    _check_asked(answered, len(refused), strict=strict)


@main.command("eval")
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A LLaVA-format file with the right answers. A bad row costs that row.",
)
@click.option("--image-folder", type=click.Path(exists=True, file_okay=False), help="Folder of the data's images.")
@OUT
@click.option(
    "--blind",
    is_flag=True,
    default=None,
    help="Ask all again with black images: what the model scores without looking.",
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples answered at once.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
@ON_DEVICE
@IN_PRECISION
@STRICT
@TRUST
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def evaluate(checkpoint: str, as_json: bool, strict: bool, **options: Any) -> None:
    """Exact-match accuracy of a checkpoint on a data file, per kind of question and of all.

    Every answer of the file is a question; the turns before it are its prompt. Beside the accuracy
    stands what the best answers score that can be given without the image. docs/evaluate.md says
    more.
    """
    from neva import api

    with _Progress(options["out"]) as progress:
        result = api.evaluate(checkpoint, **_given(options), progress=progress)
    if as_json:
        _echo(json.dumps(result, ensure_ascii=False))
    else:
        _say_score(result, options["out"])
    _check_asked(result["answered"], len(result["errors"]), strict=strict)


def _say_score(result: dict[str, Any], out: str | None) -> None:
    """An evaluation's table, and what it does not count."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from neva.config import counted, shown

    columns = {"accuracy": "accuracy", "baselines": "best answer without the image"}
    if "blank_image" in result:
        columns["blank_image"] = "images blanked"
    overall = result["overall"] or {}
    if overall:
        table = Table("kind", caption=counted(result["n"], "question"))
        for heading in ("n", *columns.values()):
            table.add_column(heading, justify="right")
        for kind, count in result["counts"].items():
            shares = (f"{result[name][kind]:.1%}" for name in columns)
            table.add_row(Text(shown(kind)), str(count), *shares)
        table.add_section()
        table.add_row("all", str(result["n"]), *(f"{value:.1%}" for value in overall.values()))
        Console().print(table)
    if result["without_truth"]:
        count = result["without_truth"]
        where = out or "--out FILE.jsonl keeps what the model says"
        _echo(f"Not scored, since the file holds no answer: {counted(count, 'question')} ({where})")
    if result["left_out"]:
        asks = "the model's caption format asks first questions of images alone"
        _echo(f"Left out: {counted(result['left_out'], 'question')}; {asks}")
    _say_refused(result["errors"])
    if result["errors"]:
        _echo("Of those not asked, the ones whose question can be read count as wrong.", err=True)
    if out is not None:
        _echo(f"Answers: {out}; settings and score: {out.removesuffix('.jsonl')}.report.json")


SHOWN = 10
"""Questions that could not be asked are printed, so many at most."""


def _say_refused(errors: list[str]) -> None:
    for error in errors[:SHOWN]:
        _echo(f"Not asked: {error}", err=True)
    if len(errors) > SHOWN:
        _echo(f"Not asked: {len(errors) - SHOWN} more", err=True)


def _check_asked(answered: int, refused: int, *, strict: bool) -> None:
    """The end of a command that asks a file's questions, of which so many could not be asked."""
    if refused and not answered:
        raise ValueError("no question of the file could be asked: mend it, or name another")
    if refused and strict:
        raise ValueError(f"{refused} of {answered + refused} questions could not be asked (--strict)")


class _Progress:
    """Says on stderr how many questions are done: a bar on a terminal, else a line now and then."""

    SECONDS = 30.0

    def __init__(self, out: str | None, *, quiet: bool = False) -> None:
        self.out = out
        self.quiet = quiet
        self.bar: Any = None
        self.started = self.said = time.monotonic()
        self.first: int | None = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is KeyboardInterrupt and self.out is not None:
            _echo(f"{self.out} keeps what was answered: the same command goes on", err=True)

    def __call__(self, done: int, total: int) -> None:
        if self.first is None:
            self.first = done
            self.started = self.said = time.monotonic()
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(done, total)
            return
        now = time.monotonic()
        if now - self.said >= self.SECONDS and done > self.first:
            self.said = now
            left = (now - self.started) / (done - self.first) * (total - done)
            _echo(f"{done:,} of {total:,} questions, about {left / 60:.0f} min left", err=True)

    def _draw(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        if self.bar is None:
            columns = ("questions", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task("questions", total=total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done)


@main.command("import")
@click.argument("arguments", nargs=-1, metavar="[SRC] [KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=str), metavar="DIR", help="The checkpoint's folder; without it a place in $NEVA_CACHE.")
@click.option("--decoder", metavar="SRC", help="Compose a VLM of this decoder and --vision; its projector is new, and cross-attention if asked for.")
@click.option("--vision", metavar="SRC", help="The encoder of a composed VLM, or of a LLaVA in the original repository's layout.")
@click.option("--projector", metavar="NAME", help="Projector of a composed VLM: linear, mlp2x_gelu (default), ...")
@click.option("--dtype", type=click.Choice(["keep", "fp32", "fp16", "bf16"]), help="Convert the weights; by default they stay bit for bit.")
@click.option(
    "--template",
    metavar="NAME",
    help="Chat format; by default the folder's own, else LLaVA's v1.",
)
@click.option("--seed", type=int, metavar="N", help="Seed of a new projector.")
@click.option("--no-parity", is_flag=True, help="Publish without comparing with transformers; the checkpoint remembers it.")
def import_(arguments: tuple[str, ...], out: str | None, decoder: str | None, vision: str | None, no_parity: bool, **options: Any) -> None:
    """Make a neva checkpoint of SRC: a Hugging Face folder or hf:org/name[@revision], a LLaVA, a
    decoder, an encoder or a projector.

    KEY=VALUE changes the model's config on the way: image.aspect=pad, vision.image=448, vision.select_layer=-1.
    """
    from neva import api
    from neva.checkpoint.hf import Options

    overrides = tuple(argument for argument in arguments if "=" in argument)
    whole = [argument for argument in arguments if "=" not in argument]
    if len(whole) > 1 or (not whole and not decoder and not vision) or (whole and decoder):
        raise click.UsageError("give one SRC, or --decoder and --vision to compose a model of (one of the two)")
    sources = [source for source in (*whole, decoder, vision) if source]
    chosen = Options(**_given(options), overrides=overrides)
    _echo(api.import_checkpoint(sources, out, options=chosen, parity=not no_parity))


@main.command()
@click.argument("path", metavar="CKPT|FOLDER|FILE.nemo", type=click.Path(exists=True))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: str, as_json: bool) -> None:
    """Say what a checkpoint, a Hugging Face folder or a NeMo file holds; a checkpoint is
    verified."""
    from neva import api

    found = api.inspect(path)
    if as_json:
        _echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    width = max(map(len, found))
    for key, value in found.items():
        _echo(f"{key:{width}}  {value}")


@main.command()
@click.argument("pattern", default="")
@click.option("--json", "as_json", is_flag=True, help="A list of {path, kind, default, doc}.")
def keys(pattern: str, as_json: bool) -> None:
    """Say what the keys of a recipe mean: all, those of which PATTERN is a part, or a wildcard such
    as 'optim.*'; where no key's name has it, those whose text does."""
    from dataclasses import asdict

    from neva.job import find_keys

    found = find_keys(pattern)
    if as_json:
        _echo(json.dumps([asdict(key) for key in found], indent=2, ensure_ascii=False))
        return
    for key in found:
        value = f" = {key.default}" if key.default else ""
        _echo(f"{key.path}{value}")
        for line in (f"{key.kind}.", key.doc):
            if line:
                _echo(click.wrap_text(line, _columns(), initial_indent="    ", subsequent_indent="    "))


@main.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, file_okay=False))
def report(run: str) -> None:
    """Write report.html of a run's folder, while it trains or afterwards: losses, scores, speed."""
    from neva import api

    _echo(api.report(run))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of {name, system, stops, jinja}.")
def templates(as_json: bool) -> None:
    """List the chat formats."""
    from neva.data.templates import TEMPLATES

    if as_json:
        rows = [{"name": name, "system": t.system, "stops": list(t.stops), "jinja": t.jinja.strip()} for name, t in TEMPLATES.items()]
        _echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for name, template in TEMPLATES.items():
        _echo(f"{name:18}{template.system[:100]}")


@main.command("convert-config")
@click.argument("path", metavar="NEVA_CONFIG.YAML", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=str), metavar="FILE", help="Where the config goes; `neva train FILE` runs it.")
def convert_config(path: str, out: str | None) -> None:
    """Turn a NeMo 1.0 neva_config.yaml into a config of ours, and say of every key what became of it."""
    from neva import api

    text, lines = api.convert_config(path, out)
    words = {"to": "->", "none": "no meaning here:", "no": "NOT SUPPORTED:", "unresolved": "UNRESOLVED:", "unknown": "UNKNOWN:"}
    for line in lines:
        _echo(f"{line.key}={line.value} {words[line.kind]} {line.text}", err=out is None)
    if out is None:
        _echo(text.rstrip("\n"))


@main.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("--out", required=True, type=click.Path(path_type=str), metavar="DIR", help="The folder to write; it must not exist.")
@click.option("--to", "target", type=click.Choice(["hf"]), default="hf", help="Format; there is one.")
@click.option("--part", type=click.Choice(["all", "decoder", "vision", "projector"]), help="Export one part alone.")
@click.option("--keys", type=click.Choice(["source", "vllm"]), help="Spelling of names: as the folder that was imported, or as vLLM reads them.")
@click.option("--dtype", type=click.Choice(["keep", "fp32", "fp16", "bf16"]), help="Convert the weights.")
@click.option("--shard", type=click.IntRange(min=1), metavar="BYTES", help="Most bytes of a file; 5 GB.")
@click.option("--no-parity", is_flag=True, help="Publish without comparing with transformers.")
def export(checkpoint: str, out: str, target: str, no_parity: bool, **options: Any) -> None:
    """Write CKPT as a Hugging Face folder that transformers and vLLM load."""
    from neva import api
    from neva.checkpoint.target import ExportOptions

    _echo(
        api.export_checkpoint(
            checkpoint,
            out,
            options=ExportOptions(**_given(options)),
            parity=not no_parity,
        )
    )


@main.group()
def data() -> None:
    """Look at data before training on it."""


@data.command()
@click.argument("image", metavar="WxH|FILE")
@click.option("--max-tiles", type=click.IntRange(min=1), default=6, show_default=True, help="Most tiles, the thumbnail not counted.")
@click.option("--min-tiles", type=click.IntRange(min=1), default=1, show_default=True, help="Fewest tiles.")
@click.option("--tile", type=click.IntRange(min=1), default=448, show_default=True, help="Side of a tile in pixels.")
@click.option("--tags", type=click.Choice(["none", "1d", "grid", "bbox"]), default="1d", show_default=True, help="What the picture names tiles by.")
@click.option("--out", metavar="PNG", help="Where the picture of a file's tiles goes; by default NAME.tiles.png in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print columns, rows and tiles as JSON.")
def tiles(image: str, max_tiles: int, min_tiles: int, tile: int, tags: Any, out: str | None, as_json: bool) -> None:
    """Show how an image of a size, or in a file, is cut into tiles."""
    from pathlib import Path

    from neva import api
    from neva.batch import ImageLayout

    if min_tiles > max_tiles:
        raise ValueError(f"--min-tiles {min_tiles} is more than --max-tiles {max_tiles}")
    layout = ImageLayout(tile=tile, tokens_per_tile=1, aspect="tiles", min_tiles=min_tiles, max_tiles=max_tiles, tags=tags)
    picture = out or (f"{Path(image).stem}.tiles.png" if Path(image).is_file() else None)
    found = api.tiles(image, layout=layout, picture=picture)
    if as_json:
        _echo(json.dumps(found))
        return
    whole = " and one of the whole" if found["tiles"] > 1 else ""
    grid = f"{found['columns']} x {found['rows']} tiles of {tile} x {tile} pixels"
    _echo(f"{grid}{whole}: {found['tiles']} in all")
    if picture:
        _echo(picture)


def _columns() -> int:
    """Width of the terminal, within what is easy to read."""
    return min(100, shutil.get_terminal_size().columns)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given: what was not keeps the default that `api` documents."""
    return {name: value for name, value in options.items() if value not in (None, ())}
