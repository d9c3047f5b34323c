"""What a rank computes on: its name and its memory."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from neva.config import counted

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may use."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of device, of which each rank has one, or on CPUs a machine that ranks share."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int
    """Bytes: of one GPU, or of the machine."""
    count: int
    """GPUs of this machine, or cores that this process may use; 0 where it is not known."""

    def __str__(self) -> str:
        cores = f"{counted(self.count, 'core')}, " if self.kind == "cpu" else ""
        return f"{self.name} ({cores}{self.memory / 2**30:.1f} GiB)"


def found() -> Machine:
    """The device that training would take here."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Machine(
            kind="cuda",
            name=properties.name,
            memory=properties.total_memory,
            count=torch.cuda.device_count(),
        )
    return Machine(kind="cpu", name=_processor(), memory=_memory(), count=_cores())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "CPU"


def _memory() -> int:
    """Bytes of this machine, or of the container that the process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 0


def asked(gib: float) -> Machine:
    """A GPU of so much memory, which need not be there."""
    return Machine(kind="cuda", name="GPU", memory=int(gib * 2**30), count=0)
