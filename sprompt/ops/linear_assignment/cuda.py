"""linear_assignment on its CUDA kernel (csrc/linear_assignment/linear_assignment_cuda.cu): one launch, one block per image."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.linear_assignment.op import images

#: Bytes of shared memory that a block may use on every architecture from sm_80 on: sm_86 and sm_89 have 99 KB.
SHARED = 96 * 1024


def assignment_scratch(N: int, G: int, bytes_per_cost: int) -> int:
    """Bytes per image of the data that does not fit into shared memory: none, the costs, or the costs and the state."""
    costs = bytes_per_cost * N * G
    state = -(-(28 * max(N, G) + 4 * min(N, G)) // 16) * 16
    if costs + state <= SHARED:
        return 0
    padded = -(-costs // 16) * 16
    return padded if state <= SHARED else padded + state


def linear_assignment(a: Args, rows: Tensor) -> None:
    cost = images(a.cost)
    B, N, G = cost.shape
    size = assignment_scratch(N, G, max(cost.element_size(), 4))
    scratch = cost.new_empty((B, size), dtype=torch.uint8)
    native._C.cuda.linear_assignment(stream(cost), cost, a.counts, rows.view(B, G), scratch)
