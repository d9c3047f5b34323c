"""Starts a run as several processes on this machine."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

SPINS = "10000"
"""Turns for which a thread of OpenMP spins at a barrier before it sleeps."""


def sleep_soon() -> None:
    """Let OpenMP's threads sleep soon where they wait for each other, unless the environment says
    how they wait; torch reads it once, when it is imported.

    By default they spin for as long as the work takes, which beside other processes, such as data
    workers, takes the cores from those that have something to do.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def local(argv: list[str], nproc: int) -> int:
    """Run `neva ARGV` as `nproc` torchrun processes on this machine; the exit code that the command itself would give.

    SIGINT and SIGTERM reach every rank; a run that they stopped gives 128 + the signal's number. Call it from the main
    thread, which may receive signals.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Each rank would otherwise take every core; torchrun's own default of one thread wastes most of a large machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    options = parse_args(["--standalone", "--nproc-per-node", str(nproc), "-m", "neva", *argv])
    try:
        run(options)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # negative: the signal that killed the rank
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def end_at_once(command: Callable[[], object]) -> NoReturn:
    """Run a command that ends in SystemExit, flush what it printed, and end the process without Python's own clearing up.

    That races with gloo's threads: one that still frees a tensor of the last exchange finds the interpreter gone and aborts,
    so that about one run in thirty that had gone well gave exit code 134.
    """
    code: object = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)
