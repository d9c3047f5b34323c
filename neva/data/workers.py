"""Runs the loader's tasks in worker processes, or in this one. A task's result does not depend on where it ran."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
import torch.multiprocessing

_desk: Any = None
"""In a worker: what its tasks work with, sent once at its start."""


class Crew:
    """Calls `task(desk, *args)` in `workers` processes; with none, in this process when the result is asked for.

    The processes end with this one, however it ends, and leave a signal to its process group to it.
    """

    def __init__(self, workers: int, desk: object) -> None:
        self._desk = desk
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["neva.data.loader"])
            # The server inherits the mask: a SIGTERM to the group would otherwise end it, and with it the pool's view of its workers.
            multiprocessing.resource_tracker.ensure_running()  # first, since its start unblocks the signal
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            multiprocessing.forkserver.ensure_running()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(desk,))

    def submit(self, task: Callable[..., Any], *args: object) -> Callable[[], Any]:
        """Starts a task and returns the function that waits for its result. That raises what the task raised, or ValueError if a worker died."""
        if self._pool is None:
            return partial(task, self._desk, *args)
        try:
            return partial(_result, self._pool.submit(_run, task, args))
        except BrokenProcessPool:
            raise ValueError(DIED) from None

    def close(self) -> None:
        """Ends the processes; tasks that have not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


DIED = (
    "a data worker died: it was killed, perhaps because memory ran out (lower data.workers, data.prefetch or batch.max_tiles), or shared memory "
    "is full (give the container a larger /dev/shm); data.workers=0 reads in the training process and shows an error's place"
)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ValueError(DIED) from None


def _run(task: Callable[..., Any], args: tuple[object, ...]) -> Any:
    return task(_desk, *args)


def _start(desk: object) -> None:
    """Sets a worker up: its desk, one thread, the parent's death and signals."""
    global _desk
    _desk = desk
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    else:  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _follow_parent() -> None:
    """Ends this worker when the process that uses it has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _obey_parent() -> None:
    """Takes SIGTERM from the parent only: a scheduler sends it to the whole group, and the parent may want to finish its step."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(1)
