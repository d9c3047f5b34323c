"""Training runs for tests, through the real command line: start, kill, and compare them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = str(ROOT / "neva" / "recipes" / "tokenizer")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SECONDS = 200

SMALL = (
    "data.sources.0.mock.words=[4,20]", "data.sources.0.mock.text_only_every=5", "data.pool=32", "data.system=Be brief.", "log.tensorboard=false",
    "batch.seq_length=128", "model.decoder.layers=1", "model.vision.layers=2", "optim.warmup=3",
)  # fmt: skip
"""Overrides that make llava-tiny fast: documents of 30 to 110 tokens, every fifth without an image."""


def neva(*args: object) -> list[str]:
    return [sys.executable, "-m", "neva", *map(str, args)]


def run(*args: object, code: int | None = 0, environment: dict[str, str] | None = None) -> str:
    """What `neva ARGS` prints; its exit code must be `code`."""
    done = subprocess.run(
        neva(*args), cwd=ROOT, env=ENVIRONMENT | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    assert code is None or done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout[-4000:]}"
    return done.stdout


def start(*args: object) -> subprocess.Popen[str]:
    """`neva ARGS` in a process group of its own."""
    return subprocess.Popen(
        neva(*args), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What the process printed until its end."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the process ended."""
    end = time.monotonic() + SECONDS
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.0005)
    return False


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill -9 the process alone; gives the processes that it had started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    return children


def survivors(processes: Sequence[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    """Those that still run after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; NaN and Infinity, which JSON does not have, are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in metrics.jsonl")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_done(out: Path) -> int:
    """Number of whole lines in metrics.jsonl so far."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


CLOCK = {"seconds", "tokens_per_s", "tiles_per_s", "flops_per_s", "memory_gib", "mfu"}
"""Fields of a line that depend on time and machine."""


def learned(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured: equal for two runs that are equal bit for bit."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(out)]


def digests(checkpoint: Path) -> dict[str, str]:
    """Checksums of a checkpoint's tensors (weights, optimiser, random state) and of its training state."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith((".distcp", "state.json"))}


def steps_kept(out: Path) -> list[int]:
    """Steps of the published checkpoints."""
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step_*") if folder.name[5:].isdigit())


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 28)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def row(id: str, question: str, answer: str, **fields: object) -> dict:
    """A LLaVA row of one exchange."""
    return {"id": id, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}


def colour_data(folder: Path, count: int = 24) -> Path:
    """A data file about images of one colour, every fourth sample without an image, of two kinds; beside it images/."""
    names = list(COLOURS)
    rows = []
    for n in range(count):
        name = names[n % len(names)]
        if n % 4 == 3:
            rows.append(row(f"t{n}", f"Write the word {name} {n % 3}.", name, kind="copy"))
            continue
        picture(folder / "images" / f"{n}.png", COLOURS[name], size=(30 + n, 28))
        rows.append(row(f"c{n}", "<image>\nWhich colour" + " please" * (n % 5) + "?", name, image=f"{n}.png", kind="colour"))
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path
