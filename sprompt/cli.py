"""`sprompt COMMAND ...`: finds the command, reads its settings, runs it."""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

#: {name: description}. Each command except env is a class of its name in sprompt/commands/<name>.py; `lvis-ow` is in lvis_ow.py.
COMMANDS = {
    "backbone": "train a backbone on pictures without labels (DenseCL), if you have no checkpoint",
    "check": "check pictures and labels before a training, and measure how long the training will take",
    "split": "split labelled pictures into a part for training and a part for validation",
    "lvis-ow": "build the open-world data set LVIS-OW from the annotations of LVIS and COCO",
    "propose": "find saliency mask proposals in pictures without labels",
    "pretrain": "train a model on proposals, which prompt its queries (Saliency Prompt)",
    "finetune": "train on labelled pictures, from a pre-trained model, a backbone or scratch",
    "labeler": "train a network that finds masks in boxes (Mask Auto-Labeler)",
    "label": "write masks into the boxes of a COCO file, with a trained labeler",
    "evaluate": "COCO or open-world metrics of a model, or of a results file, on labelled pictures",
    "predict": "masks of a folder of pictures, as COCO results",
    "view": "a gallery of proposals, prompts, predictions and curves that opens in a browser",
    "demo": "the whole chain on synthetic scenes, in minutes on a CPU",
    "study": "compare ways to pre-train for few labels, with several seeds: tables, curves, pictures",
    "env": "versions, build, CPU, GPUs and backends, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status. A user's error is printed as one line; SPROMPT_TRACEBACK=1 adds the
    traceback."""
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
    form, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        from sprompt.commands.parsing import parse

        return parse(name, rest).run() or 0
    except KeyboardInterrupt:
        print(f"\nsprompt {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SPROMPT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free disk space, then start the same command again" if full else ""
        print(f"sprompt {name}: {error}{advice}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = form


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as one line for users, without its place in the source."""
    return f"warning: {message}\n"


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    chain = "From pictures to a model: propose, pretrain, finetune, evaluate, predict, view."
    return "\n".join(
        ["usage: sprompt COMMAND [options]", "", *lines, "", chain, "sprompt COMMAND --help lists a command's options."]
    )


if __name__ == "__main__":
    sys.exit(main())
