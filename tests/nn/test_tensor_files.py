"""Files of tensors: details of reading and writing that the tests of weights do not cover."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sprompt.nn.tensor_files import read_config, read_metadata, read_tensors, write_tensors


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


@pytest.mark.parametrize("key", ["state_dict", "model", "teacher"])
def test_the_lines_that_convert_a_file(key: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T}
    path = tmp_path / "x.pth"
    torch.save({"args": Namespace(depth=2), key: tensors}, path)
    with pytest.raises(ValueError, match="convert it once") as error:
        read_tensors(path)
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})
    held, _ = read_tensors(path.with_suffix(".safetensors"))
    assert held.keys() == {"a"} and torch.equal(held["a"], tensors["a"])


def test_the_config_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert read_config(path) is None
    about = tmp_path / "config.json"
    for content, message in (
        ("{", "must be JSON"),
        ("[1]", r"must be a JSON object, got \[1\]"),
        ("[" * 10**5, "must be JSON"),
    ):
        about.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    with open(about, "wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(ValueError, match="must have at most 16 MiB, got 16777217 bytes"):
        read_config(path)
    about.write_text('{"a": 1}')
    assert read_config(path) == {"a": 1}
