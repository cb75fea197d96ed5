"""One process by default; two real ones sum."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sprompt.nn.distributed import all_sum, rank, world


def test_alone() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (rank(), world()) == (0, 1)
    assert all_sum(x).tolist() == [1.0, 2.0] and not all_sum(x).requires_grad


def _two(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    x = torch.tensor([1.0, 10.0]) * (index + 1)
    total = all_sum(x)
    assert (rank(), world()) == (index, 2)
    assert total.tolist() == [3.0, 30.0]
    assert x.tolist() == [1.0 * (index + 1), 10.0 * (index + 1)]  # the caller's own stays
    Path(folder, f"done{index}").touch()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.start_processes(_two, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    assert sorted(os.listdir(tmp_path))[:2] == ["done0", "done1"]
