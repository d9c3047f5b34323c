"""Starts a run as several processes on this machine."""

import os


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
