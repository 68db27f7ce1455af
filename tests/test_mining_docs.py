"""The examples of mining/ are true, and it stands on torch alone."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

from nerfstudio_softmining import mining

MODULES = [f"{mining.__name__}.{module.name}" for module in pkgutil.iter_modules(mining.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name and callable(value)]
    runner = doctest.DocTestRunner()
    for thing in (module, *own):  # by hand, as doctest does not recognise what a decorator has wrapped
        is_module = inspect.ismodule(thing)
        title = name if is_module else thing.__qualname__
        test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", dict(vars(module)), title, name, 0)
        runner.run(test)
    assert runner.summarize(verbose=False).attempted > 0
    assert runner.summarize(verbose=False).failed == 0


def test_mining_imports_torch_alone():
    """In a fresh process: beside the standard library, torch and jaxtyping, only itself."""
    code = f"""
import importlib, sys
import torch, jaxtyping
before = {{name.partition(".")[0] for name in sys.modules}}
for name in {MODULES!r}:
    importlib.import_module(name)
after = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(after - before - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("nerfstudio_softmining")))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    roots, ours = (set(line.split()) for line in output.splitlines())
    assert roots == {"nerfstudio_softmining"}
    assert ours == {"nerfstudio_softmining", mining.__name__, *MODULES}
