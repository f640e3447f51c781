"""The README's map and links are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import common
from common.evolved_mask import EvolvedMask

ROOT = Path(__file__).parents[1]


def listed() -> set[str]:
    rows = (ROOT / "README.md").read_text().partition("## Files")[2]
    return set(re.findall(r"^\| `([^`]+)` \|", rows, re.MULTILINE))


def test_every_listed_file_exists() -> None:
    assert len(listed()) > 20
    assert not [path for path in listed() if not (ROOT / path).exists()]


def test_every_module_is_listed() -> None:
    """Each tracked Python file outside tests, but for package markers, is in the map or under a folder that is."""
    known = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    modules = {path for path in known if not path.startswith("tests/") and not path.endswith("__init__.py")}
    folders = tuple(path for path in listed() if path.endswith("/"))
    assert not {path for path in modules - listed() if not path.startswith(folders)}


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


METHOD = {
    "draws": set(),
    "precision": set(),
    "heads": {".precision"},
    "attention": {".heads"},
    "signals": {".attention", ".heads"},
    "states": set(),
    "moving_average": set(),
    "parts": {".draws", ".precision"},
    "cited_masks": set(),
    "masks": {".cited_masks", ".draws"},
    "mask_config": {".heads", ".masks", ".parts", ".signals"},
    "mask_state": {".mask_config", ".masks", ".states"},
    "evolved_mask": {
        ".attention",
        ".cited_masks",
        ".draws",
        ".mask_config",
        ".mask_state",
        ".masks",
        ".parts",
        ".signals",
    },
}
"""The files of the method, and what each may import of the others. Flags of a command line are beside it, not in it."""


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, relative ones with their dots."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", METHOD)
def test_nothing_of_the_mask_imports_what_it_must_not(name: str) -> None:
    """The contribution can be lifted out: torch and the standard library, no argparse, distributed code, logging or trainer."""
    imported = imports_of(ROOT / "common" / f"{name}.py")
    assert {module for module in imported if module.startswith(".")} <= METHOD[name]
    others = {module for module in imported if not module.startswith(".")}
    assert not [module for module in others if module.startswith(("argparse", "torch.distributed", "logging"))]
    assert {module.partition(".")[0] for module in others} <= sys.stdlib_module_names | {"torch"}


def test_the_seam_imports_the_method_alone() -> None:
    """What patched scripts call needs no trainer of ours."""
    ours = {
        module for module in imports_of(ROOT / "patches" / "seam.py") if module.startswith(("common", "mae_", "beit_", "simmim_"))
    }
    assert ours <= {f"common.{name}" for name in (*METHOD, "flags")}


def rows_of(document: str, heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, without their first two lines."""
    text = re.split(rf"^## {heading}$", (ROOT / "docs" / document).read_text(), flags=re.MULTILINE)[1]
    lines = [line for line in re.split(r"^## ", text, flags=re.MULTILINE)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_every_function_of_the_equations_exists() -> None:
    """docs/method.md's table: a function or class by that name is in one of the method's files, in the one named if one is."""
    defined: dict[str, set[str]] = {}
    for name in METHOD:
        for node in ast.walk(ast.parse((ROOT / "common" / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name, set()).add(f"common/{name}.py")
    rows = rows_of("method.md", "Equations")
    numbers = {int(number) for row in rows for number in row[0].split(",")}
    assert numbers == set(range(1, 19))
    for _, functions, *_ in rows:
        for function in re.findall(r"`(\w+)`", functions):
            assert function in defined, function
        for file in re.findall(r"\((common/\w+\.py)\)", functions):
            assert all(file in defined[function] for function in re.findall(r"`(\w+)`", functions)), file


def test_the_stable_names_are_those_of_the_package() -> None:
    """docs/api.md lists what the package exports, and the state as it is."""
    assert {row[0].strip("`") for row in rows_of("api.md", "Stable names")} == set(common.__all__)
    keys = {key for row in rows_of("api.md", "State") for key in re.findall(r"`(\w+)`", row[0])}
    assert keys == set(EvolvedMask((2, 2), 1, 1, num_parts=2).state_dict())
