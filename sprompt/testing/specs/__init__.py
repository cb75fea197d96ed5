"""One module per op's folder. Each has SPECS (a list of OpSpec) and BENCHES (a list of Bench)."""

import importlib
import pkgutil

from sprompt.testing.spec import Bench, OpSpec

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]

SPECS: list[OpSpec] = [spec for module in _modules for spec in module.SPECS]
BENCHES: list[Bench] = [bench for module in _modules for bench in module.BENCHES]
