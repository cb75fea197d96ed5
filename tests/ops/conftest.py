import os
from collections.abc import Iterator

import pytest
import torch

import sprompt
from sprompt import backends
from sprompt.ops import triton_launch

#: The backends that can run on CPU tensors here; with SPROMPT_BACKEND, only that backend.
BACKENDS = ["native", "reference", *(["triton"] if not triton_launch.why_not(torch.empty(0)) else [])]
if os.environ.get("SPROMPT_BACKEND"):
    BACKENDS = [os.environ["SPROMPT_BACKEND"]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that every op of the test uses, if the op has that backend."""
    with sprompt.use_backend(request.param, [op for op in backends.ops() if request.param in backends.registered(op)]):
        yield request.param
