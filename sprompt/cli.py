"""`sprompt COMMAND ...`: finds the command, reads its settings (preset, YAML file, options, in this order), runs it."""

import argparse
import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sprompt.settings import SettingsError, from_plain, read_yaml, to_plain

#: Each is a class of its name in sprompt/commands/<name>.py.
COMMANDS = {
    "backbone": "train a backbone on pictures without labels (DenseCL), if you have no checkpoint",
    "propose": "find saliency mask proposals in pictures without labels",
    "pretrain": "train K-Net on proposals, its kernels prompted by them (Saliency Prompt)",
    "finetune": "train on labelled pictures, from a pre-trained model, a backbone or scratch",
    "evaluate": "COCO metrics of a model, or of a results file, on labelled pictures",
    "predict": "masks of a folder of pictures, as COCO results",
    "view": "a gallery of proposals, prompts, predictions and curves that opens in a browser",
    "demo": "the whole chain on synthetic scenes, in minutes on a CPU",
    "study": "compare ways to pre-train for few labels, with several seeds: tables, curves, pictures",
    "env": "versions, build, CPU, GPUs and backends, for a bug report",
}
PRESETS = Path(__file__).parent / "presets"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Errors of a user are one line, SPROMPT_TRACEBACK=1 shows where they arose."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from sprompt import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"sprompt: {name} is not a command\n\n{overview()}", file=sys.stderr)
        return 2
    if name == "env":
        from sprompt import env

        env.main(rest)
        return 0
    try:
        parse(name, rest).run()
    except KeyboardInterrupt:
        print(f"\nsprompt {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SPROMPT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"sprompt {name}: {error}", file=sys.stderr)
        return 1
    return 0


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    chain = "From pictures to a model: propose, pretrain, finetune, evaluate, predict, view."
    return "\n".join(
        ["usage: sprompt COMMAND [options]", "", *lines, "", chain, "sprompt COMMAND --help lists a command's options."]
    )


def parse(name: str, argv: Sequence[str]) -> Any:
    """The command's settings: its defaults, changed by --preset, then by --config, then by the other options."""
    import tyro

    kind = command(name)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset")
    before.add_argument("--config", type=Path)
    chosen, rest = before.parse_known_args(list(argv))
    base = required_missing(kind)
    if chosen.preset is not None:
        base = from_plain(kind, preset(chosen.preset).get(name, {}), base, f"preset {chosen.preset}: {name}")
    if chosen.config is not None:
        plain = read_yaml(chosen.config)
        if plain.pop("command", name) != name:
            raise SettingsError(f"{chosen.config}: holds the settings of another command than {name}")
        base = from_plain(kind, plain, base, str(chosen.config))
    common = (
        f"--preset NAME starts from one of {', '.join(preset_names())}, or from a file with the settings of several commands; "
        "--config FILE.yaml from those of this command, such as the config.yaml of an earlier run. Other options come on top."
    )
    description = f"{inspect.cleandoc(kind.__doc__)}\n\n{common}"
    return tyro.cli(
        kind, args=rest, default=base, prog=f"sprompt {name}", description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip


def command(name: str) -> Any:
    """The dataclass of a command: `pretrain` is sprompt.commands.pretrain.Pretrain."""
    return getattr(importlib.import_module(f"sprompt.commands.{name}"), name.capitalize())


def required_missing(kind: Any) -> Any:
    """An instance in which the settings without a default are marked as missing, so that tyro asks for them."""
    import tyro

    missing = {
        f.name: tyro.MISSING
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    return kind(**missing)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """The settings of every command in a preset, or in a file like one."""
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name))
    if name not in preset_names():
        raise SettingsError(f"--preset: must be one of {', '.join(preset_names())}, or a file NAME.yaml, got {name}")
    return read_yaml(PRESETS / f"{name}.yaml")


def record(settings: Any) -> dict[str, Any]:
    """What config.yaml of a run holds: the command and all its settings."""
    return {"command": type(settings).__name__.lower(), **to_plain(settings)}


if __name__ == "__main__":
    sys.exit(main())
