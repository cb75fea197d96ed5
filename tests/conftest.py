import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(
    str(Path(__file__).parents[1])
)  # benchmarks; at the end, so that whichever sprompt is installed is tested


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist every worker keeps to its share of the cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
