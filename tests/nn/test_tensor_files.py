"""Files of tensors: details of reading and writing that the tests of weights do not cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sprompt.nn.tensor_files import read_metadata, read_tensors, write_tensors


def test_there_and_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.randn(2).bfloat16().requires_grad_()}
    write_tensors(tmp_path / "x" / "t.safetensors", tensors, {"about": "two"})
    held, metadata = read_tensors(tmp_path / "x" / "t.safetensors")
    assert metadata == {"about": "two"} == read_metadata(tmp_path / "x" / "t.safetensors")
    assert held.keys() == tensors.keys() and all(torch.equal(held[name], tensors[name].detach()) for name in tensors)
    assert (tmp_path / "x" / "t.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with open(path, "wb") as file:
        file.write((64 << 20).to_bytes(8, "little"))
        file.truncate(128 << 20)
    with pytest.raises(ValueError, match="got a header of 67108864 bytes"):
        read_metadata(path)
