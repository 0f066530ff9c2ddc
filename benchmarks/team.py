"""Processes that train one model together: each has its share of a step, gradients are averaged.

One process with two threads waits for the slower of the two in every operation, which on a machine
that does other things as well costs half the speed; two processes wait once a step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

# One part of the head start is the first process's alone.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Team:
    """This process's place among ``size`` of them, from 0."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all others are here."""
        if self.size > 1:
            dist.barrier()

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Make the gradients the mean over the team."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g) / self.size)


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(team, *arguments)`` in ``size`` processes of one thread each."""
    if size == 1:
        torch.set_num_threads(1)
        work(Team(), *arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        meeting = Path(scratch) / "meeting"
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        spawn(_join, (size, meeting, work, arguments), nprocs=size)


def _join(
    rank: int, size: int, meeting: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    address = f"file://{meeting}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=PATIENCE
    )
    work(Team(rank, size), *arguments)
    dist.barrier()
    dist.destroy_process_group()
