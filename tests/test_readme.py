"""The README's map and links are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    "attention": set(),
    "states": set(),
    "moving_average": set(),
    "parts": {".draws"},
    "masks": {".draws"},
    "mask_config": {".masks", ".parts"},
    "evolved_mask": {".attention", ".draws", ".mask_config", ".masks", ".parts", ".states"},
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
