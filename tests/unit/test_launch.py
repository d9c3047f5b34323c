"""How a command's process ends: its exit code, what it had printed, and
nothing that runs after it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""An environment in which Python writes into a pipe block by block."""


def ended(body: str) -> subprocess.CompletedProcess[str]:
    """A process that ends a command of these lines by `end_at_once`."""
    lines = "\n".join("    " + line for line in body.splitlines())
    code = f"import atexit, sys, threading, time\nfrom neva import launch\ndef command():\n{lines}\nlaunch.end_at_once(command)\nprint('behind')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=BLOCKS,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit(143)", 143),
        ("sys.exit('a reason')", 1),
        ("return 5", 0),
    ],
)
def test_the_exit_code_is_the_commands(body: str, code: int) -> None:
    assert ended(body).returncode == code


def test_what_was_printed_arrives() -> None:
    done = ended("print('answer', end='')\nsys.stderr.write('warning')\nsys.exit(2)")
    assert (done.stdout, done.stderr, done.returncode) == ("answer", "warning", 2)


@pytest.mark.parametrize(("raised", "name"), [("RuntimeError('our fault')", "RuntimeError"), ("KeyboardInterrupt()", "KeyboardInterrupt")])
def test_an_error_is_told_with_its_traceback(raised: str, name: str) -> None:
    done = ended(f"print('so far')\nraise {raised}")
    assert done.returncode == 1 and done.stdout == "so far\n"
    assert "Traceback" in done.stderr and done.stderr.rstrip().splitlines()[-1].startswith(name)


def test_the_process_ends_at_once() -> None:
    """No handler of Python's end runs, and no thread is waited for: those are what aborts."""
    started = time.monotonic()
    body = "atexit.register(print, 'late')\nthreading.Thread(target=time.sleep, args=(50,)).start()\nprint('done')\nsys.exit(4)"
    done = ended(body)
    assert (done.stdout, done.returncode) == ("done\n", 4) and time.monotonic() - started < 40
