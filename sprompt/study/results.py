"""Gathers the results of a study, as far as they are there, from its folders into one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sprompt.atomic import atomic_write
from sprompt.data.reading import read_json
from sprompt.study.plan import Cell
from sprompt.study.run import CELL

RESULTS = "results.json"
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def gather(out: Path, cells: Iterable[Cell], about: dict[str, Any], failed: dict[Cell, str]) -> dict[str, Any]:
    """The results of all finished cells, also written to out/results.json.

    Args:
        about: entries "study", "machine", "data" and "proposals" of the results, for the tables and the page.
        failed: the reason of each cell that ended with an error.
    """
    rows, seconds = [], {}
    for cell in cells:
        folder = cell.folder(out)
        if not (folder / CELL).exists():
            continue
        found, before = read_json(folder / CELL), cell.pretraining.folder(out)
        pretrained = read_json(before / CELL) if (before / CELL).exists() else None
        seconds[folder] = found["seconds"]
        spent = {"finetune": round(found["seconds"])}
        if pretrained is not None:
            seconds[before] = pretrained["seconds"]
            spent["pretrain"] = round(pretrained["seconds"])
        rows.append({
            "variant": cell.variant, "fraction": cell.fraction, "seed": cell.seed,
            "metrics": {name: found["metrics"][name] for name in SHOWN} | {"pooled": found["metrics"]["APpooled"]},
            "curve": found["curve"],
            "pretrained": pretrained and {n: pretrained["metrics"][n] for n in (*SHOWN, *(f"box/{n}" for n in SHOWN))},
            "monitors": pretrained["monitors"] if pretrained else {},
            "seconds": spent,
        })  # fmt: skip
    failures = [{"cell": str(cell), "why": why, "log": str(cell.folder(out))} for cell, why in failed.items()]
    results = {
        "version": 1, **about, "hours": round(sum(seconds.values()) / 3600, 2), "cells": rows, "failed": failures,
    }  # fmt: skip
    atomic_write(out / RESULTS, json.dumps(results, indent=1) + "\n")
    return results
