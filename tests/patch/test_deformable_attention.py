"""transformers' models have the same outputs, losses and gradients before and after `sprompt.patch.deformable_attention()`."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="its models are patched")
import transformers
from small_models import FAMILIES, small
from transformers.integrations import hub_kernels

import sprompt
from sprompt.patch import replaced
from sprompt.patch.kernel import layers
from sprompt.testing.compare import assert_close, tensors

patch = importlib.import_module("sprompt.patch.deformable_attention")

VERSION = replaced.version(transformers)
NAMES = [name for name in FAMILIES if name != "pp_doclayout_v4" or VERSION >= (5, 20)]
#: The losses of these models draw points in float32, whatever the dtype of the model.
LOSS_IN_FLOAT32 = ("rf_detr_masks", "mask2former", "oneformer")
#: Bounds by dtype: (of outputs, of gradients), relative to the largest value of each tensor. A gradient may differ by a tenth of its
#: bound of the largest gradient of all parameters too: some gradients are sums that cancel.
BOUNDS = {torch.float32: (2e-5, 1e-4), torch.float64: (1e-9, 1e-9)}
FORMS = {
    "layer": "transformers.models.deformable_detr.modeling_deformable_detr",
    "function": "transformers.models.oneformer.modeling_oneformer",
    "v2": "transformers.models.rt_detr_v2.modeling_rt_detr_v2",
}


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    sprompt.patch.undo()


def evaluated(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)  # of points that losses draw
    return [x.detach() for x in tensors(model(**inputs))]


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs (the loss is one of them) and gradients. The model is copied: OmDet-Turbo keeps what it made of its texts."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)  # of points that losses draw
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else None
    if loss is None:  # every float output counts; infinity stands where an anchor is outside of the picture
        floats = [x for x in tensors(outputs) if x.is_floating_point() and x.requires_grad]
        loss = torch.stack([torch.where(x.isfinite(), x, 0).square().mean() for x in floats]).sum()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return [x.detach() for x in tensors(outputs)], gradients


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    model, inputs = small(name, dtype)
    if dtype is torch.float64 and name in LOSS_IN_FLOAT32:
        inputs = {key: value for key, value in inputs.items() if "labels" not in key}
    with sprompt.trace_backends() as ran:
        outputs, gradients = step(model, inputs)
    assert not ran

    sprompt.patch.deformable_attention()  # the model is built already
    with sprompt.trace_backends() as ran:
        ours, our_gradients = step(model, inputs)
    attentions = sum(hasattr(module, "sampling_offsets") for module in model.modules())
    ops = [op for op, _ in ran]
    assert attentions and ops.count("deform_attn") == ops.count("deform_attn_backward") == attentions

    bound, gradient_bound = BOUNDS[dtype]
    assert_close(ours, outputs, bound, 0)
    assert our_gradients.keys() == gradients.keys()
    largest = max(float(each.abs().max()) for each in gradients.values())
    for parameter, gradient in gradients.items():
        try:
            assert_close(our_gradients[parameter], gradient, gradient_bound, 0.1 * gradient_bound * largest)
        except AssertionError as failure:
            raise AssertionError(f"gradient of {parameter}: {failure}") from None


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_models_built_before_while_and_after(name: str) -> None:
    before, inputs = small(name)
    expected = evaluated(before, inputs)
    sprompt.patch.deformable_attention()
    between, _ = small(name)
    for model in (before, between):
        with sprompt.trace_backends() as ran:
            assert_close(evaluated(model, inputs), expected, *BOUNDS[torch.float32])
        assert ran
    kept = pickle.dumps(between)
    sprompt.patch.undo()
    after, _ = small(name)
    for model in (before, between, after, pickle.loads(kept)):
        with sprompt.trace_backends() as ran:
            assert_close(evaluated(model, inputs), expected, 0, 0)
        assert not ran


def owned() -> dict[str, Any]:
    """Every attribute of the modules and the classes that are spoken of: name -> object."""
    found: dict[str, Any] = {}
    for folder in served_by_text():
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        for name, value in vars(module).items():
            found[f"{folder}.{name}"] = value
            if inspect.isclass(value) and "Deformable" in name:
                found |= {f"{folder}.{name}.{key}": each for key, each in vars(value).items()}
    return found


def test_undo_gives_back_the_same_objects() -> None:
    before = owned()
    sprompt.patch.deformable_attention()
    once = owned()
    changed = {name for name, value in once.items() if before.get(name) is not value}
    assert len(changed) == len(served_by_text())
    sprompt.patch.deformable_attention()
    again = owned()
    assert all(again[name] is value for name, value in once.items())
    sprompt.patch.undo()
    after = owned()
    assert after.keys() == before.keys() and all(after[name] is value for name, value in before.items())


def served_by_text() -> set[str]:
    """Folders of transformers/models whose modeling file defines a multi-scale deformable attention."""
    pattern = re.compile(r"^(class MultiScaleDeformableAttention|def multi_scale_deformable_attention)", re.MULTILINE)
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {file.parent.name for file in files if pattern.search(file.read_text(encoding="utf-8"))}


def test_every_model_of_this_version_is_served_and_tested() -> None:
    listed = {*patch.WITH_LAYER, *patch.WITH_FUNCTION, *patch.WITH_FUNCTION_V2, *patch.WITH_ATTRIBUTE_V2}
    there = {name for name in listed if patch.SINCE.get(name, VERSION) <= VERSION}
    assert there == served_by_text() == {name.removesuffix("_masks") for name in NAMES}


@pytest.mark.parametrize("name", ["deformable_attention", "mask2former"])
@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.17.0", "5.25.0", "6.0.0.dev0"])
def test_an_unknown_version_is_refused(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = owned()
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)
    with pytest.raises(
        ImportError, match=f"^sprompt.patch.{name}: transformers must be of version .*, got {version}; nothing was"
    ):
        getattr(sprompt.patch, name)()
    assert owned() == before


def test_a_version_without_one_of_the_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(FORMS["function"]), patch.FUNCTION)
    before = owned()
    with pytest.raises(ImportError, match=r"must have .*oneformer.*multi_scale_deformable_attention, got"):
        sprompt.patch.deformable_attention()
    assert owned() == before


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_the_discrete_method_stays_with_transformers(name: str) -> None:
    model, inputs = small(name)
    for module in model.modules():
        for attribute in ("method", "decoder_method"):
            if hasattr(module, attribute):
                setattr(module, attribute, "discrete")
    expected = evaluated(model, inputs)
    sprompt.patch.deformable_attention()
    with sprompt.trace_backends() as ran:
        assert_close(evaluated(model, inputs), expected, 0, 0)
    assert not ran


def test_a_core_that_a_user_has_set_stays() -> None:
    model, inputs = small("d_fine")
    attention = next(module for module in model.modules() if hasattr(module, "ms_deformable_attn_core"))
    sprompt.patch.deformable_attention()
    attention.ms_deformable_attn_core = lambda value, *_: value.new_zeros(2, 7, 32)
    with sprompt.trace_backends() as ran:
        model(**inputs)
    assert len(ran) == 1  # the other layer's
    sprompt.patch.undo()
    assert not attention.ms_deformable_attn_core(torch.ones(1)).any()


def operands(form: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3, as_tensor: bool = False) -> list[Any]:
    """Arguments of the layer or of a function: values, points and weights of these dtypes."""
    generator = torch.Generator().manual_seed(0)
    values, points, weights = (
        torch.rand(shape, generator=generator).to(dtype)
        for shape, dtype in zip(((2, 35, 4, 8), (2, 9, 4, 2, 3, 2), (2, 9, 4, 2, 3)), dtypes, strict=True)
    )
    points = 1.5 * points - 0.25  # some lie outside
    shapes = torch.tensor([[4, 6], [1, 11]])
    listed = shapes if as_tensor else [(4, 6), (1, 11)]
    if form == "layer":
        return [values, shapes, listed, torch.tensor([0, 24]), points, weights, 64]
    if form == "function":
        return [values, listed, points, weights]
    return [values, listed, points.flatten(3, 4)[:, :, :, :5], weights.flatten(3)[..., :5], [3, 2]]


def code(form: str) -> Callable[..., Tensor]:
    """transformers' own code of a form, patched or not."""
    module = importlib.import_module(FORMS[form])
    if form == "layer":
        return module.MultiScaleDeformableAttention()
    return getattr(module, patch.FUNCTION if form == "function" else patch.FUNCTION_V2)


@pytest.mark.parametrize("form", FORMS)
def test_sizes_may_be_a_tensor(form: str) -> None:
    arguments = operands(form, as_tensor=True)
    expected = code(form)(*arguments)
    sprompt.patch.deformable_attention()
    assert_close(code(form)(*arguments), expected, 1e-6, 0)


HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtypes", "autocast", "relative"),
    [
        ((HALF, HALF, HALF), False, 4e-3),
        ((BRAIN, BRAIN, BRAIN), False, 3e-2),
        ((SINGLE, SINGLE, DOUBLE), False, 1e-6),
        ((HALF, HALF, SINGLE), False, 2e-3),
        ((BRAIN, SINGLE, SINGLE), True, 8e-3),
        ((SINGLE, BRAIN, SINGLE), True, 8e-3),
        ((BRAIN, HALF, SINGLE), True, 8e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(form: str, dtypes: tuple[torch.dtype, ...], autocast: bool, relative: float) -> None:
    """Values, points and weights in these dtypes give transformers' dtype, within the rounding of the narrowest one."""
    arguments = operands(form, dtypes)
    with torch.autocast("cpu", enabled=autocast):
        expected = code(form)(*arguments)
        sprompt.patch.deformable_attention()
        ours = code(form)(*arguments)
    assert ours.dtype is expected.dtype
    assert_close(ours, expected, relative, 0)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_with_changing_sizes(form: str) -> None:
    sprompt.patch.deformable_attention()
    given, ours = operands(form), code(form)

    def attention(values: Tensor, points: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
        arguments = list(given)
        shapes = [(height, width), (1, 11)]
        places = {"layer": (0, 2, 4, 5), "function": (0, 1, 2, 3), "v2": (0, 1, 2, 3)}[form]
        for place, argument in zip(places, (values, shapes, points, weights), strict=True):
            arguments[place] = argument
        return ours(*arguments)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors_of = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    for height, width in ((4, 6), (3, 5)):
        values = tensors_of[0][:, -(height * width + 11) :]
        arguments = [x.clone().requires_grad_() for x in (values, *tensors_of[1:])]
        twins = [x.detach().clone().requires_grad_() for x in arguments]
        found, expected = compiled(*arguments, height, width), attention(*twins, height, width)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert_close(found.detach(), expected.detach(), 1e-6, 0)
        assert_close([x.grad for x in arguments], [x.grad for x in twins], 1e-6, 0)


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and knows which of them have ops of sprompt."""

    def __init__(self) -> None:
        self.served: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.served.append("sprompt" in graph.code)
        return graph.forward


def test_a_compiled_model_is_one_graph() -> None:
    model, inputs = small("rf_detr")
    inputs = {"pixel_values": inputs["pixel_values"]}
    expected, graphs = evaluated(model, inputs), Graphs()
    sprompt.patch.deformable_attention()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    assert_close(evaluated(compiled, inputs), expected, *BOUNDS[torch.float32])
    assert graphs.served == [True]


@torch.no_grad()
@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_code_that_was_compiled_before_is_compiled_anew(name: str) -> None:
    model, inputs = small(name)
    attention = next(module for module in model.modules() if hasattr(module, "sampling_offsets"))
    calls: list[tuple[Any, Any]] = []
    handle = attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    evaluated(model, inputs)
    handle.remove()
    (args, kwargs), *_ = calls
    graphs = Graphs()
    compiled = torch.compile(attention, fullgraph=True, backend=graphs)
    expected = compiled(*args, **kwargs)
    sprompt.patch.deformable_attention()
    assert_close(compiled(*args, **kwargs), expected, 1e-5, 0)
    sprompt.patch.undo()
    assert_close(compiled(*args, **kwargs), expected, 0, 0)
    assert graphs.served == [False, True, False]


def test_the_layer_is_one_that_the_kernel_interface_takes() -> None:
    layer, theirs = layers.MultiScaleDeformableAttention, type(code("layer"))
    assert layer.__init__ is nn.Module.__init__
    assert {*dir(layer)} - {*dir(nn.Module)} == {"can_torch_compile", "has_backward"}
    ours, wanted = (list(inspect.signature(each.forward).parameters.items()) for each in (layer, theirs))
    assert [(name, form.kind) for name, form in ours] == [(name, form.kind) for name, form in wanted]
    arguments = operands("layer")
    assert_close(layer()(*arguments), theirs()(*arguments), 1e-6, 0)


needs_kernels = pytest.mark.skipif(
    not hub_kernels.is_kernels_available(), reason="transformers finds no package kernels of a version that it takes"
)
NAME = "MultiScaleDeformableAttention"


def runs(model: nn.Module, inputs: dict[str, Any], expected: Any) -> int:
    """The number of attentions that run by sprompt. Outputs must be the expected ones."""
    with sprompt.trace_backends() as ran:
        assert_close(evaluated(model, inputs), expected, *BOUNDS[torch.float32])
    return len(ran)


@needs_kernels
def test_the_kernel_interface_on_a_cpu() -> None:
    from kernels import LocalLayerRepository, Mode, use_kernel_mapping

    model, inputs = small("rf_detr")
    inputs = {"pixel_values": inputs["pixel_values"]}
    expected = evaluated(model, inputs)
    repository = LocalLayerRepository(sprompt.patch.KERNEL, layer_name=NAME)
    with use_kernel_mapping({NAME: {"cpu": repository}}):
        model.set_use_kernels(True)
        assert runs(model, inputs, expected) == 2
        assert runs(model.train().eval(), inputs, expected) == 2  # a change of the mode binds the layers again
        model.set_use_kernels(True, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
        assert runs(model, inputs, expected) == 2


@needs_kernels
def test_kernel_config_takes_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the model is taken for one that is there, because KernelConfig refuses a CPU."""
    from transformers.utils import kernel_config

    model, inputs = small("rf_detr")
    inputs = {"pixel_values": inputs["pixel_values"]}
    expected = evaluated(model, inputs)
    monkeypatch.setattr(hub_kernels, "get_device_type", lambda device: "cuda")
    monkeypatch.setattr(kernel_config, "infer_device", lambda model: "cuda")
    monkeypatch.setattr("kernels.layer.repos._find_capability", lambda: 90)
    config = transformers.KernelConfig({NAME: f"{sprompt.patch.KERNEL}:{NAME}"}, use_local_kernel=True)
    model.set_use_kernels(True, config)
    assert runs(model, inputs, expected) == 2


@needs_kernels
def test_kernelize_and_the_patch_in_both_orders() -> None:
    """kernelize binds a forward to each instance: the one of the class, where no kernel is mapped to the device."""
    model, inputs = small("rf_detr")
    inputs = {"pixel_values": inputs["pixel_values"]}
    expected = evaluated(model, inputs)
    model.set_use_kernels(True)
    sprompt.patch.deformable_attention()
    assert runs(model, inputs, expected) == 0
    model.set_use_kernels(True)
    assert runs(model, inputs, expected) == 2
    sprompt.patch.undo()
    assert runs(model, inputs, expected) == 2
    model.set_use_kernels(True)
    assert runs(model, inputs, expected) == 0
