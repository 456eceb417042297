"""The public face: what `semanticodec` exports, and what the package installs."""

import ast
import importlib
import tomllib
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import semanticodec

HOMES = {
    alias.name: node.module
    for node in ast.walk(ast.parse(Path(semanticodec.__file__).read_text()))
    if isinstance(node, ast.ImportFrom) and node.level == 1
    for alias in node.names
}
"""Public name -> the module it is imported from, as type checkers see it."""


def test_all_is_exactly_what_is_imported():
    assert set(semanticodec.__all__) == set(HOMES)
    assert len(set(semanticodec.__all__)) == len(semanticodec.__all__)


@pytest.mark.parametrize("name", semanticodec.__all__)
def test_every_name_resolves_to_the_object_of_its_module(name: str):
    home = importlib.import_module(f"semanticodec.{HOMES[name]}")
    assert getattr(semanticodec, name) is getattr(home, name)


def test_nothing_else_is_public():
    for name in semanticodec.__all__:
        getattr(semanticodec, name)
    public = {n for n, value in vars(semanticodec).items() if n[0] != "_" and not isinstance(value, types.ModuleType)}
    assert public - {"TYPE_CHECKING"} == set(semanticodec.__all__)


def test_dir_lists_lazy_names():
    assert set(semanticodec.__all__) <= set(dir(semanticodec))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Encodec'"):
        semanticodec.Encodec  # noqa: B018


def test_every_error_is_public_and_has_the_one_base():
    errors = importlib.import_module("semanticodec.errors")
    tree = {n: e for n, e in vars(errors).items() if isinstance(e, type)}
    assert set(tree) <= set(semanticodec.__all__)
    assert all(issubclass(error, (semanticodec.SemantiCodecError, Warning)) for error in tree.values())


def test_every_package_folder_is_installed(root: Path):
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {folder: name for name, folder in setuptools["package-dir"].items()}
    found = set()
    for top in ("semanticodec", "server", "client"):
        for init in (root / top).rglob("__init__.py"):
            head, *tail = init.parent.relative_to(root).parts
            found.add(".".join([folders.get(head, head), *tail]))
    assert sorted(found) == setuptools["packages"]


def test_every_requirement_is_pinned_within_its_range(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in sum(project["optional-dependencies"].values(), project["dependencies"])]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in wanted:
        if requirement.name != project["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
