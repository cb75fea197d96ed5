"""From a command line to the settings of a command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sprompt.registry import Named
from sprompt.settings import SettingsError, from_plain, read_yaml, to_plain

PRESETS = Path(__file__).parents[1] / "presets"
MODEL = "knet"  # the default model
FOLDER = "folder"  # key of config.yaml: the working directory of the run


def parse(name: str, argv: Sequence[str]) -> Any:
    """The command's settings: its defaults, changed by --preset, then by --config, then by the other options.

    --model, --method and --evaluator choose a configuration by name. Without --model, the file of --checkpoint chooses the
    model, if the file names one.
    """
    import tyro

    kind = command(name)
    chosen, rest = _choices(kind, argv)
    base = required_missing(kind)
    plain = {} if chosen.config is None else read_yaml(chosen.config)
    if plain.pop("command", name) != name:
        raise SettingsError(f"{chosen.config}: must hold settings of the command {name}, got those of another command")
    plain.pop(FOLDER, None)
    named = {
        option: kind.load(given).Config
        for option, kind in registries(kind).items()
        if (given := getattr(chosen, option))
    }
    model = _model_name(chosen, plain, name)
    if chosen.preset is not None:
        base = from_plain(kind, _section(kind, name, chosen.preset, model), base, f"preset {chosen.preset}: {name}")
    elif "model" in registries(kind) and model != base.model.registry.name(type(base.model)):
        base = dataclasses.replace(base, model=base.model.registry.get(model).Config())
    base = from_plain(kind, plain, base, str(chosen.config))
    for option, config in named.items():
        if type(getattr(base, option)) is not config:
            base = dataclasses.replace(base, **{option: config()})
    return tyro.cli(
        kind, args=rest, default=base, prog=f"sprompt {name}", description=_description(kind),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip


def _section(kind: Any, name: str, chosen: str, model: str) -> dict[str, Any]:
    """The settings of a command in a preset. A command with PRESET_OF takes them from the command named there, without the
    settings that it lacks itself. It also gets the name of the preset."""
    of = getattr(kind, "PRESET_OF", name)
    plain = preset(chosen, model).get(of, {})
    if of == name:
        return plain
    known = {f.name for f in dataclasses.fields(kind)}
    return {key: value for key, value in plain.items() if key in known} | {"preset": chosen}


def _choices(kind: Any, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options that decide which other options exist. Returns them and the rest of the command line."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset")
    before.add_argument("--config", type=Path)
    for option in registries(kind):
        before.add_argument(f"--{option}")
    chosen, rest = before.parse_known_args(list(argv))
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--checkpoint", type=Path)
    peek.add_argument("--model")  # of a command that only hands the name on
    seen = peek.parse_known_args(rest)[0]
    chosen.checkpoint = seen.checkpoint
    chosen.model = getattr(chosen, "model", None) or seen.model
    return chosen, rest


def registries(kind: Any) -> dict[str, Any]:
    """{setting: registry of its names}, for each setting of a command that is chosen by name."""
    hints = typing.get_type_hints(kind)
    return {
        f.name: hints[f.name].registry
        for f in dataclasses.fields(kind)
        if isinstance(hints[f.name], type) and issubclass(hints[f.name], Named)
    }


def _model_name(chosen: argparse.Namespace, plain: dict[str, Any], name: str) -> str:
    """The name of the model. The first source that has a name decides: --model, the file of --config, the file of
    --checkpoint, the default."""
    from sprompt.models.saved import saved_name

    written = plain.get("model")
    if isinstance(written, dict):
        written = written.get("name")
    return (
        chosen.model or written or (saved_name(chosen.checkpoint) if chosen.checkpoint is not None else None) or MODEL
    )


def _description(kind: Any) -> str:
    """The head of --help: the command's docstring, and the options that tyro does not know."""
    lines = [inspect.cleandoc(kind.__doc__), ""]
    for option, registry in registries(kind).items():
        names = ", ".join(registry.names())
        own = ", or package.module:Class for your own" if option == "model" else ""
        lines.append(
            f"--{option} NAME chooses the {option}: {names}{own}. The list below has the settings of the chosen {option}."
        )
    lines.append(
        f"--preset NAME takes defaults from a preset: {', '.join(preset_names())}, or a YAML file with the settings of several "
        "commands. --config FILE.yaml takes defaults from a file for this command, such as the config.yaml of an earlier run, and "
        "overrides --preset. All other options override both."
    )
    return "\n".join(lines)


def command(name: str) -> Any:
    """The dataclass of a command: `pretrain` is sprompt.commands.pretrain.Pretrain, `lvis-ow` is lvis_ow.LvisOw."""
    words = name.split("-")
    return getattr(importlib.import_module(f"sprompt.commands.{'_'.join(words)}"), "".join(map(str.capitalize, words)))


def required_missing(kind: Any) -> Any:
    """An instance of the command. Settings without a default are marked as missing, so that tyro requires them."""
    import tyro

    missing = {
        f.name: tyro.MISSING
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    return kind(**missing)


def preset_names(model: str = "*") -> list[str]:
    """Names of the presets of a model, or of any model."""
    return sorted({path.stem for path in PRESETS.glob(f"{model}/*.yaml")})


def preset(name: str, model: str = MODEL) -> dict[str, Any]:
    """The settings of every command, from a preset for a model or from a YAML file of the same form.

    A preset has two parts: presets/NAME.yaml for commands that have no model, and presets/MODEL/NAME.yaml.
    """
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name))
    if name not in preset_names():
        raise SettingsError(f"--preset: must be one of {', '.join(preset_names())}, or a file NAME.yaml, got {name}")
    if name not in preset_names(model):
        known = ", ".join(preset_names(model)) or "no preset"
        raise SettingsError(f"--preset: {model} has {known}, got {name}; give one of these, or a file NAME.yaml")
    shared = PRESETS / f"{name}.yaml"
    return (read_yaml(shared) if shared.is_file() else {}) | read_yaml(PRESETS / model / f"{name}.yaml")


def record(settings: Any) -> dict[str, Any]:
    """The content of a run's config.yaml: the command, the working directory, and all settings as they were given."""
    return {"command": type(settings).__name__.lower(), FOLDER: str(Path.cwd()), **to_plain(settings)}


def read_record(path: Path) -> tuple[str, Any]:
    """The command of a config.yaml, and its settings. A relative path that does not exist in the working directory is looked
    up in the working directory of the run."""
    plain = read_yaml(path)
    name = str(plain.pop("command", ""))
    folder = Path(str(plain.pop(FOLDER, ".")))
    if not (Path(__file__).parent / f"{name}.py").is_file():
        raise SettingsError(f"{path}: command must be a command of sprompt, got {name!r}")
    try:
        return name, _found(from_plain(command(name), plain), folder)
    except SettingsError as error:
        raise SettingsError(
            f"{path}: is not of this version of sprompt ({error}); train again, or use the version that wrote it"
        ) from None


def _found(value: Any, folder: Path) -> Any:
    """The setting. A path that exists only below `folder` gets `folder` in front."""
    if isinstance(value, Path):
        return folder / value if not value.exists() and (folder / value).exists() else value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {
        field.name: new
        for field in dataclasses.fields(value)
        if (new := _found(old := getattr(value, field.name), folder)) is not old
    }
    return dataclasses.replace(value, **changed) if changed else value
