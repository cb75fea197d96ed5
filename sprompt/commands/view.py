"""`sprompt view`: writes a gallery that opens in a browser."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from sprompt.commands import run_folder
from sprompt.commands.parsing import read_record
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.engine.trained import MODEL, model_file
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import ModelConfig
from sprompt.settings import read_yaml


@dataclasses.dataclass
class View:
    """Writes a page of pictures about runs. It shows proposals, prompts and the kernels that take them, predictions beside
    labels, learning curves, metrics, and the mean mask of each kernel.

    The config.yaml of a run folder names the inputs of the run. --images, --proposals, --predictions and --labels replace these
    inputs, or name files if there is no run folder. The page needs no server and no network: open OUT/index.html.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of `pretrain`, `finetune`, `evaluate` and `predict`. If you name several runs of one kind, the page shows the pictures
    of the last. It shows predictions of `finetune` and `evaluate` beside the labels, predictions of `predict` in their own section."""
    out: Path = Path("view")
    """Folder of the page."""
    images: Path | None = None
    """Folder of the pictures of --proposals or --predictions."""
    proposals: Path | None = None
    """Proposal file of `sprompt propose`."""
    predictions: Path | None = None
    """File of COCO results."""
    labels: Path | None = None
    """COCO file with the labels of the pictures of --predictions."""
    title: str = "sprompt"
    """Heading of the page."""
    limit: int = 24
    """Largest number of pictures in a section."""
    cpu: bool = False
    """Do not use a GPU."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network of the runs' models. Give it only if a file does not name its network, such as an official release."""

    def run(self) -> None:
        from sprompt.report.gallery import build

        for folder in self.runs:
            if not folder.is_dir():
                raise ValueError(f"{folder}: there is no such run folder; check the path")
            if not any((folder / name).exists() for name in (run_folder.CONFIG, "log.jsonl", run_folder.METRICS)):
                raise ValueError(
                    f"{folder}: is not a run folder; it has no {run_folder.CONFIG}, log.jsonl or {run_folder.METRICS}"
                )
        if (self.proposals or self.predictions) and self.images is None:
            raise ValueError("--images: must be given with --proposals or --predictions")
        pretrained = self._last("pretrain")
        tested = self._last("finetune", "evaluate", having=run_folder.PREDICTIONS)
        predicted = self._last("predict", having=run_folder.PREDICTIONS)
        proposals = (self.images, self.proposals) if self.images and self.proposals else None
        predictions = (self.images, self.labels, self.predictions) if self.images and self.predictions else None
        prompts = activation = None
        pooled = False
        if pretrained is not None:
            folder, settings = pretrained
            proposals = proposals or (settings.images, settings.proposals)
            print("matching prompts and kernels", flush=True)
            prompts = self._prompts(folder, settings)
        if tested is not None:
            folder, settings = tested
            if predictions is None:
                predictions, pooled = (*_labelled(settings), folder / run_folder.PREDICTIONS), _pooled(folder)
        found = None
        if predicted is not None:
            folder, settings = predicted
            found = (settings.images, folder / run_folder.PREDICTIONS)
            if predictions is None:
                predictions, found = (settings.images, None, found[1]), None
        if last := tested or predicted:
            print("computing the mean mask of each kernel", flush=True)
            activation = self._activation(*last)
        if not (self.runs or proposals or predictions):
            raise ValueError("view: needs a run folder, --proposals or --predictions; see --help")
        page = build(
            self.out, proposals=proposals, runs=self.runs, predictions=predictions, found=found, activation=activation,
            prompts=prompts, pooled=pooled, title=self.title, limit=self.limit, tell=partial(print, flush=True),
        )  # fmt: skip
        print(f"open {page} in a browser")

    def _last(self, *commands: str, having: str = "config.yaml") -> tuple[Path, Any] | None:
        """The last run folder of one of these commands that has the file `having`, and its settings; None if there is none."""
        for folder in reversed(self.runs):
            file = folder / "config.yaml"
            if not file.is_file() or not (folder / having).is_file():
                continue
            if read_yaml(file).get("command") in commands:
                return folder, read_record(file)[1]
        return None

    def _prompts(self, folder: Path, settings: Any) -> Any:
        """The kernel that took each prompt in the pre-trained model. None if the model was never prompted, or if the model,
        its pictures or its proposals are missing."""
        from sprompt.data.coco import CocoDataset
        from sprompt.report.prompts import prompt_matches

        opened = self._model(folder / MODEL)
        if opened is None or not settings.images.is_dir() or not settings.proposals.is_file():
            return None
        dataset = CocoDataset(settings.images, settings.proposals, class_agnostic=True)
        short = settings.augment.shorts[1]
        return (
            prompt_matches(opened.model, dataset, settings.method, self.limit, short=short, long=settings.augment.long)
            or None
        )

    def _activation(self, folder: Path, settings: Any) -> Any:
        """Mean masks of the kernels over the pictures that the run was tested on. None if the model or the pictures are
        missing."""
        from sprompt.data.folder import PictureFolder
        from sprompt.report.activation import activation_maps

        trained = hasattr(settings, "train")
        opened = self._model(folder / MODEL if trained else settings.checkpoint and model_file(settings.checkpoint))
        images, _ = _labelled(settings)
        if opened is None or images is None or not images.is_dir():
            return None
        size = settings.test.sized(opened.size)
        return activation_maps(opened.model, PictureFolder(images), 100, short=size["short"], long=size["long"])

    def _model(self, file: Path | None) -> Any:
        import torch

        from sprompt.engine.trained import load

        if file is None or not file.is_file():
            return None
        opened = load(file, self.model, "cuda" if torch.cuda.is_available() and not self.cpu else "cpu")
        return opened


def _pooled(folder: Path) -> bool:
    """Whether a run was measured without classes."""
    try:
        metrics = read_json(folder / run_folder.METRICS)
    except DataError:
        return False  # no metrics yet, or broken ones, which the page names
    return isinstance(metrics, dict) and metrics.get("class_agnostic") is True


def _labelled(settings: Any) -> tuple[Path, Path | None]:
    """The folder of the pictures that a run was tested on, and their labels; None for missing labels."""
    if hasattr(settings, "val"):
        return settings.val.images, settings.val.annotations
    if hasattr(settings, "data"):
        return settings.data.images, settings.data.annotations
    return settings.images, None
