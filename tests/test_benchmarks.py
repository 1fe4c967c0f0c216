"""The benchmarks import, so that a change of the code which breaks one is noticed before it is run again."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    try:
        assert importlib.import_module(name).__doc__
    finally:
        for added in set(sys.modules) - before:
            if getattr(sys.modules[added], "__file__", "") and str(FOLDER) in (sys.modules[added].__file__ or ""):
                del sys.modules[added]
