"""linear_assignment in plain PyTorch: the Hungarian method with potentials, on the host, in float64."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.linear_assignment.op import images, refuse

INFINITY = float("inf")


def linear_assignment(a: Args) -> Tensor:
    """Copies the costs to the host, so it waits for a CUDA device."""
    host = images(a.cost).to("cpu", torch.float64)
    B, _, G = host.shape
    rows = torch.full((B, G), -1)
    for b, count in enumerate([G] * B if a.counts is None else a.counts.tolist()):
        real = host[b, :, : max(count, 0)]
        if not 0 <= count <= G or not real.isfinite().all():
            if a.cost.is_cpu:
                refuse(a, b)
            rows[b] = -2
        else:
            # Sums of numbers near the end of the range would overflow. Scaling by a power of two changes no comparison.
            near_end = real.numel() > 0 and float(real.abs().max()) > 2.0**1000
            rows[b, :count] = match_columns(real * 2.0**-40 if near_end else real)
    return rows.view(*a.cost.shape[:-2], G).to(a.cost.device)


def match_columns(cost: Tensor) -> Tensor:
    """int64 (G,): the row of each column of a finite float64 cost (N, G), -1 where there are more columns than rows."""
    N, G = cost.shape
    if G <= N:
        return shortest_augmenting_paths(cost.mT)
    rows = torch.full((G,), -1)
    rows[shortest_augmenting_paths(cost)] = torch.arange(N)
    return rows


def shortest_augmenting_paths(cost: Tensor) -> Tensor:
    """int64 (n,): the partner of each of n persons among m >= n jobs; cost float64 (n, m).

    Potentials v (m,) <= 0 are zero for free jobs. Every matched person has a job of least cost[i, j] - v[j]. For one person
    after another, Dijkstra's algorithm over jobs finds the cheapest chain of changes that ends at a free job. The step from
    person i, who has job k, to job j has the length (cost[i, j] - v[j]) - (cost[i, k] - v[k]) >= 0.
    """
    n, m = cost.shape
    v = cost.new_zeros(m)
    person_of = [-1] * m
    job_of = [-1] * n
    for start in range(n):
        distance = cost.new_full((m,), INFINITY)  # of the jobs that are not settled
        before = torch.full((m,), -1)  # the person from which the path reaches a job
        settled: list[tuple[int, float]] = []  # jobs with their distances
        closed = torch.zeros(m, dtype=torch.bool)
        person, length = start, 0.0
        while True:
            here = 0.0 if person == start else float(cost[person, job_of[person]] - v[job_of[person]])
            through = (cost[person] - v) - here + length
            shorter = (through < distance) & ~closed
            distance[shorter] = through[shorter]
            before[shorter] = person
            job = int(distance.argmin())
            length = float(distance[job])
            if person_of[job] < 0:
                break
            settled.append((job, length))
            closed[job] = True
            distance[job] = INFINITY
            person = person_of[job]
        for passed, at in settled:
            v[passed] += at - length
        while True:  # follows the chain from its end
            person = int(before[job])
            person_of[job] = person
            job_of[person], job = job, job_of[person]
            if person == start:
                break
    return torch.tensor(job_of, dtype=torch.int64)
