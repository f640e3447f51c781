"""The README's map and links are true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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


def test_nothing_of_the_mask_imports_what_it_must_not() -> None:
    """The contribution can be lifted out: no argparse, no distributed code, no logging, no trainer."""
    for name in ("draws", "parts", "attention", "masks", "mask_config", "evolved_mask"):
        text = (ROOT / "common" / f"{name}.py").read_text()
        imported = re.findall(r"^\s*(?:from|import) (\S+)", text, re.MULTILINE)
        forbidden = ("argparse", "torch.distributed", "logging", "common.training", "mae_evolved")
        assert not [module for module in imported if module.startswith(forbidden)], name
        ours = {module for module in imported if module.startswith("common")}
        if name in ("draws", "parts", "attention", "masks"):
            assert not ours, name
