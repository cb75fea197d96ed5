"""The assignment of least total cost, for a batch of images."""

from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.linear_assignment import op


def linear_assignment(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    """Matches rows to columns one to one, at the least total cost (the Hungarian method), image by image.

    rows[b] minimises Σ_g cost[b, rows[b, g], g] over the injective maps of min(N, counts[b]) of the columns g < counts[b] to
    rows; the sum equals that of `scipy.optimize.linear_sum_assignment(cost[b, :, :counts[b]])` to rounding.

    Args:
        cost: (B, N, G) or (N, G), float32, bfloat16, float16 or float64, any strides; computed in float64. Padded columns g >=
            counts[b] are not read, so they may hold any value, NaN included.
        counts: (B,) int64, the number of real columns of each image, between 0 and G; None means all. Only with a batch
            dimension.

    Returns: int64 (B, G), or (G,): the row matched to each column. −1 for padding, and for columns that get no row because
    counts[b] > N. N, G or B of 0 are allowed.
    Ties: the result is one of the optima. Deterministic: it is the same optimum on every run and for every number of threads.
    Values: a NaN or infinity in a real entry raises NotFiniteError, a ValueError, on a CPU. On CUDA it raises nothing: such an
    image, and an image with a count outside [0, G], has −2 in all its columns.
    Not differentiable. Autocast changes nothing. The reference backend works on the host, so on CUDA it waits for the device.

    >>> linear_assignment(torch.tensor([[4.0, 1.0], [2.0, 3.0], [9.0, 9.0]])).tolist()
    [1, 0]
    >>> linear_assignment(torch.tensor([[[4.0, 1.0], [2.0, 3.0]]] * 2), torch.tensor([2, 1])).tolist()
    [[1, 0], [1, -1]]
    """
    checks.tensor("linear_assignment", "cost", cost, checks.FLOATS)
    if cost.dim() not in (2, 3):
        checks.bad_value("linear_assignment", "cost", "have shape (B, N, G) or (N, G)", tuple(cost.shape))
    if counts is not None:
        if cost.dim() == 2:
            checks.bad_value(
                "linear_assignment", "counts", "be None without a batch dimension", "a tensor", "give cost as (1, N, G)"
            )
        checks.counts("linear_assignment", counts, cost.shape[0])
        checks.same_device("linear_assignment", cost=cost, counts=counts)
    return op.linear_assignment(cost, counts)
