"""Work in a process of its own that kills itself (kill -9) before or after a chosen
call of a chosen function.

A clock would hit another moment on every machine; a call is the same moment everywhere.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Work = Callable[..., object]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When the process dies."""

    function: str
    """As `neva.checkpoint.stream:_write_unit`; a method as `pathlib:Path.rename`."""
    call: int = 1
    """Which call of it, from 1."""
    when: Literal["before", "after"]

    def __str__(self) -> str:
        return f"{self.when} call {self.call} of {self.function.partition(':')[2]}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the process ended."""

    code: int
    """Exit code; minus the number of the signal that killed it."""
    calls: dict[str, int]
    """How often each of the counted functions was called; empty for a process that was killed."""


def run(
    work: Work,
    *arguments: Any,
    notes: Path,
    moment: Moment | None = None,
    counted: Sequence[str] = (),
) -> Ended:
    """`work(*arguments)` in a new process, which is killed at `moment`; `work` is a
    function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neva.api", "transformers"])  # imported once, then forked
    notes.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(work, arguments, notes, moment, tuple(counted)))
    process.start()
    process.join(timeout=200)
    assert process.exitcode is not None, "the process does not end"
    return Ended(
        code=process.exitcode,
        calls=json.loads(notes.read_text()) if notes.exists() else {},
    )


def _child(
    work: Work,
    arguments: tuple[Any, ...],
    notes: Path,
    moment: Moment | None,
    counted: tuple[str, ...],
) -> None:
    calls = dict.fromkeys((*counted, *([moment.function] if moment else [])), 0)
    for function in calls:
        _count(
            function,
            calls,
            moment if moment is not None and moment.function == function else None,
        )
    work(*arguments)
    notes.write_text(json.dumps(calls))


def _count(function: str, calls: dict[str, int], moment: Moment | None) -> None:
    """Put a counting function in the place of this one."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    honest = getattr(owner, name)

    @functools.wraps(honest)
    def counting(*args: Any, **options: Any) -> Any:
        calls[function] += 1
        now = moment is not None and calls[function] == moment.call
        if now and moment is not None and moment.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = honest(*args, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counting)
