"""Runs the loader's tasks in worker processes, or in this one. A task's result does not depend on where it ran."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing


class Crew:
    """Calls `task(desk, *args)` in `workers` processes; with none, in this process when the result is asked for.

    The processes end with this one, however it ends, and leave a signal to its process group to it.
    """

    # Each worker has a pipe of its own and a thread here that waits for it. With the shared queues of ProcessPoolExecutor, a worker
    # that is killed while it writes leaves half a message or a held lock, and all wait for ever.

    def __init__(self, workers: int, desk: object) -> None:
        self._desk = desk
        self._threads: ThreadPoolExecutor | None = None
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        if not workers:
            return
        check_main()
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["neva.data.loader"])
        # The server inherits the mask: a SIGTERM to the group would otherwise end it, and with it the view of its workers.
        multiprocessing.resource_tracker.ensure_running()  # first, since its start unblocks the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        multiprocessing.forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for _ in range(workers):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, desk), daemon=True)
            worker.start()
            theirs.close()  # now the worker's end alone is left, and its death ends what we read
            self._workers.append(worker)
            self._pipes.append(ours)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data")

    def submit(self, task: Callable[..., Any], *args: object) -> Callable[[], Any]:
        """Starts a task and returns the function that waits for its result. That raises what the task raised, or ValueError if a worker died."""
        if self._threads is None:
            return partial(task, self._desk, *args)
        return self._threads.submit(self._ask, task, args).result

    def close(self) -> None:
        """Ends the processes; tasks that have not begun are dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join()

    def _ask(self, task: Callable[..., Any], args: tuple[object, ...]) -> Any:
        pipe = self._idle.get()
        try:
            pipe.send((task, args))
            done, result = pipe.recv()
        except (EOFError, OSError) as error:
            died = DIED
            for worker in self._workers:  # one is gone for good: let no other work on
                worker.join(timeout=1)
                if worker.exitcode == UNGUARDED:
                    died = GUARD
                worker.kill()
            raise ValueError(died) from error
        finally:
            self._idle.put(pipe)
        if not done:
            raise result
        return result


DIED = (
    "a data worker died: it was killed, perhaps because memory ran out (lower data.workers, data.prefetch or batch.max_tiles), or shared memory "
    "is full (give the container a larger /dev/shm); data.workers=0 reads in the training process and shows an error's place"
)


GUARD = (
    "each data worker runs the script that started it, and would train in turn: put what the "
    'script does below the line if __name__ == "__main__":, or read the data in the training '
    "process with data.workers=0"
)
UNGUARDED = 78
"""Exit code of a worker that was about to train."""


def check_main() -> None:
    """Call where a run begins. Ends the process with `UNGUARDED` if it is a worker that is still
    importing the script which started it: that one calls us outside `if __name__ == "__main__"`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


def _serve(pipe: Connection, desk: object) -> None:
    """A worker's life: one thread, the parent's death and signals, then tasks until the parent closes the pipe."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    else:  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    while True:
        try:
            task, args = pipe.recv()
        except (EOFError, ConnectionError):  # closed, or the parent is gone with an answer unread
            return
        try:
            answer = ForkingPickler.dumps((True, task(desk, *args)))
        except Exception as error:
            error.add_note(f"In a data worker:\n{traceback.format_exc()}")
            answer = ForkingPickler.dumps((False, error))
        pipe.send_bytes(answer)


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
