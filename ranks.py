"""Several processes, on as many GPUs or CPU cores: data parallel, started by torchrun.

    torchrun --nproc_per_node=2 rl.py --init runs/base/8M.pt --out runs/rl --threads 1

Every process ("rank") holds the whole model and does the same steps with the same numbers. The rollouts and
the rows of a gradient are split between the ranks and put together again, so an update is that of one process
but for rounding. Without torchrun there is one rank, and nothing here does anything. Rank 0 alone writes
files. A run may be resumed with another number of ranks. Left out: splitting the model itself.
"""
import atexit
import os
import sys
from functools import partialmethod
from typing import Any

# An idle thread looks for work 1,000 times, then sleeps. By default it looks much longer, keeping a core from
# the others, so that beside one busy process two threads are slower than one (results/benchmark/README.md).
# OpenMP reads this when torch is imported: hence before it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from model import GPT, Ids, Rollouts, decode_all, together, uniform


def join() -> None:
    """Meet the other processes that torchrun started (nccl between GPUs, gloo between CPUs)."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    if rank():                                   # only rank 0 prints; errors still reach the screen
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_part(rows: Any) -> Any:
    """This rank's part of a sequence: every world_size()-th element."""
    return rows[rank()::world_size()]


def gather(mine: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    parts = [mine]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    return [x for part in parts for x in part]


def add_up(*numbers: float) -> list[float]:
    """Each number, summed over the ranks."""
    return [sum(column) for column in zip(*gather([numbers]))]


def sample_together(model: GPT, prompts: Ids, group: int,
                    max_new: int, eos: int, pad: int,
                    generator: torch.Generator, temperature: float = 1.0) -> Rollouts:
    """model.sample with the work split between the ranks: every rank draws the same uniform numbers, decodes
    its part of the prompts and receives all rows, which do not depend on the number of ranks."""
    u = uniform(model, (len(prompts), group, max_new), generator)
    mine = my_part(prompts)
    parts = [decode_all(model, mine, my_part(u), eos, pad, temperature)] if mine else []
    order = my_part(range(len(prompts)))
    return together(gather(parts), gather(list(order)))


def sum_gradients(model: torch.nn.Module) -> None:
    """Replace each .grad by its sum over the ranks. A rank that had no rows adds nothing. Small gradients
    travel as one: a message costs more than its content."""
    if world_size() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    large = [p.grad for p in trained if p.numel() >= 1 << 20]
    small = [p.grad for p in trained if p.numel() < 1 << 20]
    one = parameters_to_vector(small)
    for work in [dist.all_reduce(g, async_op=True) for g in (*large, one)]:
        work.wait()
    vector_to_parameters(one, small)
