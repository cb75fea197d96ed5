"""Settings are the same after writing and reading YAML, and errors name the wrong key or value."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from sprompt import settings
from sprompt.settings import SettingsError, flat, from_plain, read_yaml, to_yaml


@dataclasses.dataclass
class Inner:
    rate: float = 1e-4
    drops: tuple[int, ...] = (8, 11)
    short: int | tuple[int, int] = 800
    site: Literal["kernel", "proposal"] = "kernel"
    flip: bool = True


@dataclasses.dataclass
class Outer:
    images: Path
    inner: Inner = dataclasses.field(default_factory=Inner)
    limit: int | None = None
    grid: str | tuple[int, int] = "pyramid"


def test_round_trip(tmp_path: Path) -> None:
    value = Outer(Path("a/b"), Inner(rate=3.0, drops=(1,), short=(640, 800)), limit=4, grid=(3, 5))
    (tmp_path / "c.yaml").write_text(to_yaml(value))
    assert from_plain(Outer, read_yaml(tmp_path / "c.yaml")) == value


def test_what_is_left_out_comes_from_the_base() -> None:
    base = Outer(Path("x"), Inner(rate=2.0, drops=(5,)))
    assert from_plain(Outer, {"inner": {"drops": [7]}}, base) == Outer(Path("x"), Inner(rate=2.0, drops=(7,)))


def test_nested_values_by_dotted_names() -> None:
    plain = {"images": "a", "inner": {"drops": [8, 11], "deep": {"x": None}, "none": {}}}
    assert flat(plain) == {"images": "a", "inner.drops": [8, 11], "inner.deep.x": None, "inner.none": {}}


def test_text_that_yaml_does_not_take_for_a_number() -> None:
    assert from_plain(Inner, {"rate": "1e-4"}).rate == 1e-4


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"images": "a", "iner": {}}, "iner: is not a setting; did you mean inner?"),
        ({"images": "a", "inner": {"rat": 1}}, "inner.rat: is not a setting; did you mean rate?"),
        ({}, "Outer: lacks images"),
        ({"images": 3}, "images: must be a path, got 3"),
        ({"images": "a", "limit": 1.5}, "limit: must be a whole number, got 1.5"),
        ({"images": "a", "limit": True}, "limit: must be a whole number, got True"),
        ({"images": "a", "inner": {"flip": 1}}, "inner.flip: must be true or false, got 1"),
        ({"images": "a", "inner": {"rate": "fast"}}, "inner.rate: must be a number, got 'fast'"),
        ({"images": "a", "inner": {"site": "x"}}, "inner.site: must be one of 'kernel', 'proposal', got 'x'"),
        ({"images": "a", "inner": {"drops": 8}}, "inner.drops: must be a list, got 8"),
        ({"images": "a", "inner": {"drops": ["a"]}}, "inner.drops[0]: must be a whole number, got 'a'"),
        ({"images": "a", "inner": {"short": [1, 2, 3]}}, "inner.short: must be"),
        ({"images": "a", "inner": 3}, "inner: must be a mapping, got 3"),
    ],
)
def test_wrong_settings_are_named(plain: dict, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        from_plain(Outer, plain)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "must hold `name: value` lines, got a list")]
)
def test_a_file_that_is_not_settings(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_yaml(path)
    assert read_yaml_missing(tmp_path)
    path.write_text("a: 1\n" * (settings.LARGEST_FILE // 4))
    with pytest.raises(SettingsError, match="at most"):
        read_yaml(path)


def read_yaml_missing(folder: Path) -> bool:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_yaml(folder / "none.yaml")
    return True


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(SettingsError, match="is not YAML"):
        read_yaml(tmp_path / "c.yaml")
