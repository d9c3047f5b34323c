"""What every test shares: one thread per process, so that tests on a few cores do not fight and sums are reproducible."""

import os

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
