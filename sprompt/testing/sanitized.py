"""Calls every op that has a CUDA C++ kernel on small samples. compute-sanitizer runs this module (tools/gpu.sh)."""

import torch

from sprompt import backends
from sprompt.testing.calls import call
from sprompt.testing.specs import SPECS


def main() -> None:
    device = torch.device("cuda")
    for spec in SPECS:
        if "cuda" not in backends.registered(spec.ops[0]):
            continue
        for sample in spec.samples(device, spec.dtypes[0] if spec.dtypes else torch.float32, 0):
            call(spec, sample)
        torch.cuda.synchronize()
        print(spec.name)


if __name__ == "__main__":
    main()
