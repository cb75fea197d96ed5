import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(
    str(Path(__file__).parents[1])
)  # for benchmarks; at the end of the path, so that the tests import the installed sprompt


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist every worker uses only its share of the cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With SPROMPT_TEST_OPS="mask_nms masks", deselects the tests of all other ops: files of tests/ops and tests parametrised
    by spec."""
    chosen = os.environ.get("SPROMPT_TEST_OPS", "all").split()
    if chosen == ["all"]:
        return
    kept, left = [], []
    for item in items:
        op = _op_of(item)
        (kept if op is None or op in chosen else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _op_of(item: pytest.Item) -> str | None:
    """The op (the name of its folder) that a test is about; None if the test is not about a single op."""
    if item.path.parent.name == "ops" and (op := item.path.stem.removeprefix("test_")) in _op_of_specs().values():
        return op
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "spec" in parameters:
        return _op_of_specs()[parameters["spec"].name]
    if "case" in parameters:  # an error case, whose id begins with its spec's name
        return _op_of_specs().get(item.callspec.id.partition(",")[0])
    return None


@functools.cache
def _op_of_specs() -> dict[str, str]:
    """{name of a spec: name of the module of sprompt/testing/specs that defines it}."""
    from sprompt.testing import specs

    modules = [
        importlib.import_module(f"{specs.__name__}.{module.name}") for module in pkgutil.iter_modules(specs.__path__)
    ]
    return {spec.name: module.__name__.rpartition(".")[2] for module in modules for spec in module.SPECS}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """An illegal memory access makes CUDA unusable for the rest of the process. A worker of pytest-xdist then exits, and xdist
    starts a new worker."""
    yield
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        print(f"{item.nodeid}: {call.excinfo.exconly()[:500]}", file=sys.__stderr__, flush=True)
        os._exit(1)


def _patch_once_a_launch() -> None:
    """Triton's interpreter patches `triton.language` each time one jitted function calls another, which takes a millisecond.
    Patching once per launch is enough and makes the tests several times as fast."""
    import inspect

    from triton.language import core
    from triton.runtime import interpreter

    language = sys.modules["triton.language"]
    patched: set[tuple[int, ...]] = set()
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return execute(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = [v for v in self.fn.__globals__.values() if inspect.ismodule(v) and v in (language, core)]
        key = tuple(sorted(map(id, modules)))
        if key not in patched:
            patched.add(key)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once_a_launch()
