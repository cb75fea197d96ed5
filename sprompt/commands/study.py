"""`sprompt study`: runs many small pre-trainings and fine-tunings and compares their results."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sprompt.atomic import atomic_write
from sprompt.commands import run_folder
from sprompt.commands.parsing import MODEL, parse, preset
from sprompt.methods.saliency_prompt.injection import places
from sprompt.models.registry import MODELS, build
from sprompt.settings import to_plain, to_yaml
from sprompt.study import prepare
from sprompt.study.plan import Cell, Inputs, chains
from sprompt.study.run import Runner
from sprompt.study.variants import QUESTIONS, VARIANTS

_SIDES = 12  # number of test pictures on the page


@dataclasses.dataclass
class Study:
    """Compares ways to start fine-tuning on few labels: from scratch, from a backbone, from proposals as pseudo-labels, and
    from Saliency Prompt pre-training with its parts taken out one by one. Each variant is pre-trained and fine-tuned with
    several seeds.

    A cell is one combination of variant, fraction and seed. After every cell the study writes OUT/results.json, OUT/tables.md
    and OUT/index.html again. At the end it writes pictures of curves, predictions and kernels. If you start the same command
    again after a kill, it goes on where it stopped. Without --images it draws synthetic scenes. `--preset study-cpu` takes
    hours on two cores. `--preset study-gpu` is for one GPU and your own pictures.
    """

    out: Path = Path("study")
    """Folder for all files of the study."""
    settings: str = "study-cpu"
    """Preset for the commands that the study runs: backbone, propose, pretrain, finetune and evaluate."""
    model: str | None = None
    """Name of the model, or package.module:Class for your own. Default: the model of the settings. Variants with a site of prompts that
    the model does not have are left out."""
    images: Path | None = None
    """Folder of labelled pictures. Default: the study draws synthetic scenes."""
    annotations: Path | None = None
    """COCO file of --images."""
    val_images: Path | None = None
    """Folder of the pictures to test on. Default: a share of the labelled pictures is kept for the test."""
    val_annotations: Path | None = None
    """COCO file of --val-images."""
    val_share: float = 0.3
    """Share of the labelled pictures that is kept for the test if there is no --val-images. It is drawn by image id."""
    within: str | None = None
    """Key of the image records in the COCO file. The test share is drawn separately for each value of this key."""
    unlabelled: Path | None = None
    """Folder of pictures for pre-training. Default: the labelled pictures that are not kept for the test, without their
    labels."""
    backbone: Path | None = None
    """Pre-trained backbone, as for `pretrain`. Default: the study trains a backbone on the pictures for pre-training."""
    scenes: tuple[int, int, int] = (1200, 1200, 150)
    """Three numbers of synthetic scenes: without labels, with labels, for the test."""
    scene_size: int = 160
    """Height and width of the synthetic scenes, pixels."""
    likeness: float = 0.0
    """Probability, 0 to 1, that an object in a synthetic scene has the colour and texture of its class. Otherwise only its
    shape tells the class."""
    variants: tuple[str, ...] = ()
    """Names of the variants to compare; see sprompt/study/variants.py. Default: all variants that the data allow."""
    fractions: tuple[float, ...] = (0.05,)
    """Shares of the labelled pictures to fine-tune on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is pre-trained and fine-tuned once for every seed. The seed also draws the labelled pictures."""
    longer: int = 1
    """Factor on the length of pre-training in the settings, at least 1."""
    evaluate_every: int = 4
    """Epochs of fine-tuning between two tests, for the learning curves."""
    jobs: int = 1
    """Number of commands that run at once. They share the cores or the GPU."""

    def run(self) -> None:
        from sprompt.study.figures import draw_curves, draw_maps, draw_predictions
        from sprompt.study.results import gather

        self._check()
        text = run_folder.prepared(self.out, self)
        self._say_if_slow()
        with Runner(self.out, self.jobs) as runner:
            pictures = self._pictures()
            names = self._variants(pictures.known is not None)
            longer = lengthened(self.settings, self.longer, self._model)
            content = to_yaml(preset(self.settings, self.model or MODEL))
            settings = (self.settings, hashlib.sha256(content.encode()).hexdigest()[:32])
            given = prepare.inputs(
                self.out, pictures, settings, self._model, self.backbone, longer, names, runner.command
            )
            work = list(chains(names, self.fractions, self.seeds))
            cells = [cell for _, own in work for cell in own]
            runner.check(work, given, self.evaluate_every)
            run_folder.write_config(self.out, text)
            about = self._about(pictures, given, names)
            failed: dict[Cell, str] = {}
            before = len(gather(self.out, cells, about, failed)["cells"])
            began = time.monotonic()

            def left(finished: int) -> str:
                if finished == before:  # so far only cells of an earlier start
                    return ""
                each = (time.monotonic() - began) / (finished - before)
                return f", {each * (len(cells) - finished - len(failed)) / 60:.0f} min left"

            def done(cell: Cell, why: str | None) -> None:
                if why is not None:
                    failed[cell] = why
                results = gather(self.out, cells, about, failed)
                self._show(results)
                said = f"failed: {why}" if why is not None else _numbers(results, cell)
                finished = len(results["cells"])
                run_folder.say(f"{cell}: {said}; {finished} of {len(cells)} cells{left(finished)}")

            runner.run(work, given, self.evaluate_every, done)
            results = gather(self.out, cells, about, failed)
            maps, sides = self._maps(cells, pictures), self._sides(cells, pictures)
            self._show(results, maps, sides)
            draw_curves(results, self.out / "curves.png")
            draw_predictions(sides, self.out / "predictions.jpg")
            draw_maps(maps, self.out / "kernels.png")
        run_folder.say(f"open {self.out / 'index.html'} in a browser; the tables are in {self.out / 'tables.md'}")
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(cells)} cells failed; start the same command again to repeat them"
            )

    def _check(self) -> None:
        for option in ("fractions", "seeds"):
            values = getattr(self, option)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{option}: must be different values, at least one, got {list(values)}")
        if not all(0 < share <= 1 for share in self.fractions):
            raise ValueError(f"--fractions: must be above 0 and at most 1 (0.05 is 5 %), got {list(self.fractions)}")
        if not 0 <= self.likeness <= 1:
            raise ValueError(f"--likeness: must lie between 0 and 1, got {self.likeness}")
        for option in ("jobs", "evaluate_every", "longer"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option.replace('_', '-')}: must be at least 1, got {getattr(self, option)}")
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"--variants: must be some of {', '.join(VARIANTS)}, got {unknown[0]}")
        if self.model is not None:
            MODELS.load(self.model)
        lacking = self._lacking_a_site()
        asked = [name for name in self.variants if name in lacking]
        if asked:
            raise ValueError(f"--variants: {asked[0]} is not for this model: {lacking[asked[0]]}; leave it out")
        if (self.images is None) != (self.annotations is None):
            raise ValueError("--annotations: must be given with --images, and only with it")
        if (self.val_images is None) != (self.val_annotations is None):
            raise ValueError("--val-annotations: must be given with --val-images, and only with it")

    @property
    def _model(self) -> tuple[str, ...]:
        """The option of the study's commands that chooses the model."""
        return () if self.model is None else ("--model", self.model)

    def _tuning(self) -> Any:
        """The settings of fine-tuning."""
        return parse("finetune", ["--preset", self.settings, *self._model])

    def _say_if_slow(self) -> None:
        """Prints a warning if the settings are meant for a GPU and the machine has none. The warnings of the commands go to
        their output.txt, where a user does not see them."""
        import torch

        from sprompt.machine import has_bf16

        tuned = self._tuning()
        if tuned.train.precision == "bf16" and (tuned.cpu or not torch.cuda.is_available()) and not has_bf16():
            run_folder.say(
                f"{self.settings}: computes in bf16, but this CPU has no instructions for bf16; that can take a hundred times as "
                "long as float32; use a GPU, or --settings study-cpu"
            )

    def _pictures(self) -> prepare.Pictures:
        data = self.out / "data"
        if self.images is None or self.annotations is None:
            return prepare.scenes(data, self.scenes, self.scene_size, self.likeness)
        images = run_folder.existing(self.images, "images", folder=True)
        annotations = run_folder.existing(self.annotations, "annotations", folder=False)
        val = None
        if self.val_images is not None and self.val_annotations is not None:
            val = (
                run_folder.existing(self.val_images, "val-images", folder=True),
                run_folder.existing(self.val_annotations, "val-annotations", folder=False),
            )
        unlabelled = self.unlabelled and run_folder.existing(self.unlabelled, "unlabelled", folder=True)
        return prepare.labelled(
            data, images, annotations, val, unlabelled, val_share=self.val_share, within=self.within
        )

    def _variants(self, known: bool) -> list[str]:
        """The variants asked for, or all variants. Variants that need true masks are left out if the masks are not known, and variants
        with a site that the model does not have."""
        hidden = [] if known else [name for name in VARIANTS if VARIANTS[name].proposals == "truth"]
        asked = [name for name in self.variants if name in hidden]
        if asked:
            raise ValueError(f"--variants: {asked[0]} needs pictures with known masks; leave out --unlabelled")
        hidden += self._lacking_a_site()
        return [name for name in VARIANTS if name not in hidden and (not self.variants or name in self.variants)]

    def _lacking_a_site(self) -> dict[str, str]:
        """The variants with a site that the model does not have, and why they cannot be."""
        import torch

        with torch.device("meta"):
            sites = build(self._tuning().model).sites
        found = {}
        for name, variant in VARIANTS.items():
            try:
                places(variant.method.get("site", "first"), sites)
            except ValueError as error:
                found[name] = str(error)
        return found

    def _about(self, pictures: prepare.Pictures, given: Inputs, names: list[str]) -> dict[str, Any]:
        """Facts about the whole study, for the page."""
        import torch

        from sprompt import __version__
        from sprompt.data.coco import CocoDataset
        from sprompt.data.folder import PictureFolder
        from sprompt.machine import machine
        from sprompt.study.masks import agreement

        train = CocoDataset(pictures.images, pictures.annotations)
        val = CocoDataset(pictures.val_images, pictures.val_annotations, keep_empty=True)
        tuned = self._tuning()
        device = torch.device("cpu" if tuned.cpu or not torch.cuda.is_available() else "cuda")
        return {
            "study": _settings(dataclasses.replace(self, variants=tuple(names))),
            "machine": f"{machine(device)}, sprompt {__version__}",
            "data": {
                "name": pictures.name, "unlabelled": len(PictureFolder(pictures.unlabelled)), "train": train.total,
                "val": len(val), "classes": train.classes, "fractions": list(self.fractions), "seeds": list(self.seeds),
                "epochs": tuned.train.epochs,
            },
            "proposals": {kind: agreement(file, pictures.known) for kind, file in given.proposals.items()},
        }  # fmt: skip

    def _show(self, results: dict[str, Any], maps: Any = None, sides: Any = ()) -> None:
        from sprompt.study.page import write_page
        from sprompt.study.tables import markdown

        atomic_write(self.out / "tables.md", markdown(results))
        write_page(self.out, results, maps, sides)

    def _maps(self, cells: list[Cell], pictures: prepare.Pictures) -> dict[str, Any]:
        """Mean masks of the kernels of each variant's first fine-tuned model."""
        from sprompt.data.folder import PictureFolder
        from sprompt.engine.trained import MODEL, load
        from sprompt.report.activation import activation_maps

        maps: dict[str, Any] = {}
        for cell in cells:
            file = cell.folder(self.out) / MODEL
            if cell.variant not in maps and file.is_file():
                opened = load(file)
                short, long = opened.size
                found = activation_maps(opened.model, PictureFolder(pictures.val_images), 100, short=short, long=long)
                maps[cell.variant] = found.numpy()
        return maps

    def _sides(self, cells: list[Cell], pictures: prepare.Pictures) -> Any:
        """Test pictures with the predictions of the first fine-tuned model of each start. If the study has no start among
        its variants, all variants are shown."""
        from sprompt.study.predictions import side_by_side

        files: dict[str, Path] = {}
        for cell in cells:
            file = cell.folder(self.out) / run_folder.PREDICTIONS
            if cell.variant not in files and file.is_file():
                files[cell.variant] = file
        starts = {name: file for name, file in files.items() if name in QUESTIONS["start"].variants}
        return side_by_side(pictures.val_images, pictures.val_annotations, starts or files, _SIDES)


def lengthened(settings: str, times: int, model: Sequence[str] = ()) -> list[str]:
    """Options that multiply the epochs of pre-training in the preset by `times`, and the epochs of its learning rate drops
    as well."""
    if times == 1:
        return []
    needed = ("--images", "-", "--proposals", "-", "--backbone", "-")
    own = parse("pretrain", ["--preset", settings, *model, *needed]).train
    drops = [str(times * drop) for drop in own.drops]
    return ["--train.epochs", str(times * own.epochs), *(["--train.drops", *drops] if drops else [])]


def _settings(study: Study) -> dict[str, Any]:
    """The settings for the page. Only the last part of a path is shown."""
    plain = to_plain(study)
    paths = {f.name: v.name for f in dataclasses.fields(study) if isinstance(v := getattr(study, f.name), Path)}
    return {**plain, **paths}


def _numbers(results: dict[str, Any], cell: Cell) -> str:
    metrics = next(
        row["metrics"] for row in results["cells"]
        if (row["variant"], row["fraction"], row["seed"]) == (cell.variant, cell.fraction, cell.seed)
    )  # fmt: skip
    return f"AP {100 * metrics['AP']:.2f}, classes pooled {100 * metrics['pooled']:.2f}"
