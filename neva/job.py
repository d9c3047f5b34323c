"""What a training stage is: `TrainConfig` and its parts. Recipes return tuples of these; the loop runs them.

Every field here is a key that `neva train RECIPE key=value` can set; `neva show RECIPE` prints them all.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os.path import expanduser
from typing import Literal

from neva import config as tree
from neva.config import FilePath
from neva.data.pack import POOL
from neva.models.decoder import DecoderConfig
from neva.models.presets import DECODERS, VISION, VLMS
from neva.models.vit import VisionConfig
from neva.models.vlm import VLMConfig
from neva.parallel.mesh import Degrees


@dataclass(frozen=True, kw_only=True)
class MockConfig:
    """Made-up samples of given lengths and image sizes: for dry runs, tests and benchmarks."""

    samples: int = 1000
    """How many there are."""
    words: tuple[int, int] = (20, 200)
    """Fewest and most words in a sample's text; drawn uniformly per sample."""
    images: int = 1
    """Images per sample."""
    image_size: tuple[int, int] = (64, 48)
    """Width and height in pixels."""
    text_only_every: int = 0
    """Every n-th sample has no image; 0 gives all samples their images."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a blend."""

    path: FilePath = ""
    """A LLaVA-format .json or .jsonl file; empty where `mock` is given. `{out}` stands for the run folder."""
    image_folder: FilePath = ""
    """Folder that the samples' image paths are relative to; nothing outside it is read, but what
    links lead to under `data.links`. `{out}` stands for the run folder."""
    weight: float | None = None
    """Share of the trained samples that are of this source, relative to the others; a sample that
    is left out is replaced by the source's next. Sources without a weight go through their samples
    at one pace, and together weigh as much as they have samples: beside 1,000 of them, 1000 gives
    this source half, 2 next to nothing."""
    name: str = ""
    """Name in reports; by default the file's stem."""
    mock: MockConfig | None = None
    """Samples made up in place of a file."""
    make: Literal["", "digits", "pages"] = ""
    """A data set that is written first to the folder of `path`, where that is not there yet: the demo's `digits`, or `pages` of them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become rows."""

    sources: tuple[SourceConfig, ...] = ()
    """The blend."""
    source: FilePath = ""
    """One-element spelling of `sources`: a file; takes the place of `sources`."""
    image_folder: FilePath = ""
    """One-element spelling of `sources`: the image folder."""
    folder: FilePath = ""
    """Where a recipe's named sources are: NAME.jsonl or NAME.json, and NAME/ with its images; takes the place of their `mock`."""
    absent: Literal["stop", "skip"] = "stop"
    """Named sources that `folder` does not hold are an error, or are left out."""
    tokenizer: FilePath = ""
    """A SentencePiece `.model`, a `tokenizer.json`, or a folder that holds one."""
    template: FilePath = ""
    """Chat format: a name (`plain` is LLaVA's pretraining, `v1` Vicuna's; `neva templates` lists them), a file of Jinja, or its text;
    empty for the tokenizer's own. `own` is that of the checkpoint that the stage starts from
    (`init`), which a stage with `init.model` takes by itself."""
    system: str | None = None
    """System message in place of the template's own."""
    date: str = ""
    """Day that a chat template's `strftime_now` tells, as YYYY-MM-DD; empty for the day on which
    the run begins, which is saved."""
    shuffle: bool = True
    """Another order of the samples in each epoch, from `seed`; else that of the file."""
    workers: int = 2
    """Processes that measure, read and decode; 0 does it in the training process. No number changes the data order."""
    pool: int = POOL
    """Measured samples that packing chooses from, counted from the oldest waiting one: more fill
    rows better, fewer let a sample wait for fewer rows. Whatever it is, all samples of a source are
    trained equally often, give or take one, and its share is kept within a percent."""
    prefetch: int = 2
    """Steps prepared ahead."""
    on_error: Literal["stop", "skip"] = "stop"
    """A sample that cannot be read stops the run, or is left out, counted and named. Another takes
    its place, but where only decoding shows the damage: that leaves padding."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """A sample longer than `batch.seq_length`: left out and counted, cut at the end, or an error."""
    links: bool = False
    """May a link inside an image folder lead outside it, as in a cache of the Hugging Face Hub? A
    file of a stranger's could link to any image of yours."""
    fewer_tiles: bool = False
    """Cut the images of a sample that is longer than a row, or has more tiles, into fewer tiles first (12, 8, 6, 4, 2, 1), and count it."""

    @property
    def blend(self) -> tuple[SourceConfig, ...]:
        """The sources to read, whichever way they were spelled."""
        return (SourceConfig(path=self.source, image_folder=self.image_folder),) if self.source else self.sources


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The shape of a step. A paper's batch of N samples is rows = N * mean sample length / seq_length."""

    seq_length: int = 2048
    """Tokens in a row; a row holds several samples."""
    rows: int = 16
    """Packed rows of one optimiser step over all ranks = data ranks * micro_rows * micro-batches."""
    micro_rows: int = 1
    """Rows in one forward pass of one rank."""
    max_tiles: int = 64
    """Image tiles that one row may hold."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Steps are optimiser steps of the stage."""

    lr: float = 1e-3
    """Highest learning rate, which warm-up ends at."""
    min_lr: float = 0.0
    """Learning rate at the last step of `cosine` and `linear`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls behind the warm-up."""
    warmup: float = 0.03
    """Steps of linear warm-up; below 1 it is a share of the stage's steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay of the means of gradients and of their squares."""
    eps: float = 1e-8
    """Adam's addition to the root of the squares' mean."""
    weight_decay: float = 0.0
    """Applied to matrices only, not to vectors (norms, biases)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where a stage's weights come from; empty, or equal to the `init` of the stage before: that stage, or fresh ones for the first."""

    model: FilePath = ""
    """A whole model to start from: a neva checkpoint (a `step_N` folder, a run folder, an import),
    a Hugging Face folder, or hf:org/name[@revision]."""
    decoder: FilePath = ""
    """Where this part comes from in place of `model`'s: a checkpoint or folder as above, or `fresh`, which draws it anew from the seed."""
    vision: FilePath = ""
    """The same of the encoder."""
    projector: FilePath = ""
    """The same of the projector; also LLaVA's `mm_projector.bin` or its folder, and an export of
    ours with `--part projector`."""
    cross: FilePath = ""
    """The same of the cross-attention layers, which are drawn anew where the decoder comes from a model without them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 500
    """Optimiser steps between checkpoints; the last step of a stage is always saved. 0 saves only that."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown; `metrics.jsonl` gets every step whatever stands here."""

    every: int = 10
    """Steps between printed lines, each of which tells the mean since the one before; 0 prints
    none."""
    flops: bool = False
    """Print GFLOP/s too; `metrics.jsonl` always has them."""
    tensorboard: bool = True
    """Write curves for TensorBoard beside `metrics.jsonl`, where it is installed."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is not finite names the step's samples and stops, or leaves the step out and counts it."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Exact-match accuracy on held-out samples while training. What cannot be asked is named when
    the run begins, and counted at each evaluation (`not_asked`); where its row can be read it
    counts as answered wrong, as in `neva eval`."""

    every: int = 0
    """Steps between evaluations, each after a checkpoint; 0 for none."""
    source: FilePath = ""
    """A LLaVA-format file. `{out}` stands for the run folder."""
    image_folder: FilePath = ""
    """Folder of its images. `{out}` stands for the run folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training."""

    name: str
    """Unique within the recipe; `NAME:key=value` overrides this stage alone."""
    model: VLMConfig
    """The model: sizes and mechanisms of its parts."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where its weights come from."""
    trainable: tuple[str, ...] = ("*",)
    """Wildcards over parameter names; `!pattern` takes away. Each must match a parameter."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The shape of a step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser and its schedule."""
    steps: int = 1000
    """Optimiser steps of this stage; with `epochs` what those come to, 0 as
    long as it is not known."""
    epochs: float = 0.0
    """In place of steps: train so many times the usable samples of all sources, rounded up to whole
    steps. The samples are measured when the run begins; to go on it needs the same `batch.rows`. On
    the command line the later of `steps=` and `epochs=` counts. 0 leaves it to `steps`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the device computes it faster, else fp32."""
    parallel: Degrees = field(default_factory=Degrees)
    """How ranks share the work."""
    recompute: Literal["none", "block"] = "none"
    """`block` keeps only the input of each decoder block and computes the rest again in backward."""
    compile: bool = False
    """Compile each decoder block."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved, and which are kept."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is printed and plotted."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out samples that are asked while training."""
    seed: int = 0
    """What fresh weights, the order of the data and dropout depend on."""
    out: FilePath = "runs/run"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/."""


OPTIMS: dict[str, OptimConfig] = {
    "adamw": OptimConfig(),
    "llava-pretrain": OptimConfig(lr=1e-3),
    "llava-finetune": OptimConfig(lr=2e-5),
}

NAMED: dict[type, Mapping[str, object] | Callable[[str], object]] = {
    OptimConfig: OPTIMS,
    DecoderConfig: DECODERS,
    VisionConfig: VISION,
    VLMConfig: VLMS,
    InitConfig: lambda path: InitConfig(model=expanduser(path)),
}
"""What a sub-config may be set to by one word: a preset's name, or a function of the word (`init=PATH`)."""


def find_keys(pattern: str = "") -> list[tree.Key]:
    """The keys of a stage whose names hold `pattern`, or match it where it is a wildcard; if there
    are none those whose texts hold it. ValueError where nothing does."""
    found = list(tree.keys(TrainConfig, NAMED))
    word = pattern.casefold()
    if any(mark in pattern for mark in "*?["):
        chosen = [key for key in found if fnmatchcase(key.path.casefold(), word)]
    else:
        chosen = [key for key in found if word in key.path.casefold()]
        chosen = chosen or [key for key in found if word in key.doc.casefold()]
    if not chosen:
        lasts = {key.path.rpartition(".")[2] for key in found}
        close = difflib.get_close_matches(word, lasts, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"no key's name or text has '{pattern}'.{hint}")
    return chosen
