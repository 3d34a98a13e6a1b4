"""The public surface: short, sorted, documented, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

PACKAGES = ("safe_kernels", "safe_peft")


def modules(package: str) -> Iterator[str]:
    yield package
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        # `make clients` has Lightning, and imports the module that needs it.
        if not module.name.endswith(("._C", ".__main__", ".lightning")):
            yield module.name


MODULES = [name for package in PACKAGES for name in modules(package)]


def public_functions(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """Functions of this module, and methods of its classes, whose names do not begin with an underscore."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        item = getattr(module, name)
        if getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(item):
            yield name, item
        elif inspect.isclass(item):
            for key, value in vars(item).items():
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if inspect.isfunction(function) and not key.startswith("_") and function.__name__ != "<lambda>":
                    yield f"{name}.{key}", function


EXPORTED = {
    f"{package}.{name}": getattr(importlib.import_module(package), name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_surface_is_short_and_sorted(package: str) -> None:
    names = importlib.import_module(package).__all__
    assert list(names) == sorted(set(names))
    assert len(names) <= 20
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_and_star_give_the_surface(package: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from {package} import *", namespace)
    expected = set(importlib.import_module(package).__all__)
    assert expected <= set(namespace)
    assert expected <= set(dir(importlib.import_module(package)))


def test_what_is_exported_is_documented() -> None:
    for name, item in EXPORTED.items():
        doc = inspect.getdoc(item) or ""
        assert doc and len(doc.splitlines()[0]) > 10, f"{name}: a sentence that says what it is"
        if inspect.isfunction(item) or (inspect.isclass(item) and not issubclass(item, Exception)):
            assert "Example:" in doc, name
        if inspect.isfunction(item):
            assert not missing_sections(item, doc), name


def missing_sections(function: Callable, doc: str) -> list[str]:
    """What the docstring of a function with arguments and a result has to have."""
    signature = inspect.signature(function)
    wanted = [name for name in signature.parameters if name not in ("self", "cls")]
    missing = ["Args:"] if wanted and "Args:" not in doc else []
    missing += [
        f"Args: {name}" for name in wanted if not re.search(rf"^\s+\*{{0,2}}{name}( \(.*\))?:", doc, re.MULTILINE)
    ]
    if signature.return_annotation not in (None, "None", inspect.Signature.empty) and "Returns:" not in doc:
        missing.append("Returns:")
    return missing


def test_docstrings_that_list_arguments_list_them_all() -> None:
    stale = {}
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, name
        for key, function in public_functions(module):
            doc = inspect.getdoc(function) or ""
            if "Args:" in doc and (missing := [part for part in missing_sections(function, doc) if part != "Returns:"]):
                stale[name, key] = missing
    assert not stale


def test_annotations_are_everywhere() -> None:
    for name, key, function in ((m, *found) for m in MODULES for found in public_functions(importlib.import_module(m))):
        signature = inspect.signature(function)
        bare = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is inspect.Parameter.empty and parameter.name not in ("self", "cls")
        ]
        assert not bare, f"{name}.{key}"
        assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{key}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=dict(vars(module))):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_the_examples_are_found() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name), name))
    assert examples > 20
