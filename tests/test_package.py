"""What `pip install .` installs: the mask alone, as `evolved_part_masking`, needing torch and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import common
from common.evolved_mask import EvolvedMask

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = (
    "__init__", "attention", "cited_masks", "draws", "evolved_mask", "flags", "heads", "mask_config", "mask_state", "masks",
    "moving_average", "parts", "precision", "signals", "states",
)  # fmt: skip
STABLE = (
    "AttentionTap", "EvolvedMask", "MaskBatch", "MaskConfig", "PartsFit", "PartsOptions", "alpha_at", "attention_mode", "blend",
    "check_mask", "choose_layers", "count_masked", "fit_parts", "grid_probability", "mae_ids", "num_parts_at", "part_probability",
    "partition_parts", "patch_graph", "pixel_mask", "select_masked", "signal_graph",
    "stream_attention", "stream_signal",
)  # fmt: skip
ABSENT = ("common", "patches", "slurm", "mae_evolved", "downstream", "timm", "torchvision", "tensorboard", "numpy", "submitit")

MAKE_A_MASK = """
import torch
from evolved_part_masking import EvolvedMask, __version__
generator = torch.Generator().manual_seed(0)
attention = torch.rand(3, 2, 37, 37, generator=generator).softmax(-1)
make_mask = EvolvedMask(grid_size=(6, 6), num_masked=20, total_epochs=10, num_parts=5)
make_mask.set_epoch(7)
print(make_mask(torch.arange(3), lambda rows: attention[rows], torch.arange(3)).mask.int().tolist(), __version__)
"""

WHAT_IS_THERE = """
import importlib.util, sys
print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])
"""


def torch_and_its_dependencies() -> set[str]:
    """Distributions that torch needs, itself among them, of those that are installed."""
    needed, waiting = set[str](), ["torch"]
    while waiting:
        name = waiting.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another machine or Python
            continue
        needed.add(name)
        names = {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower() for text in requirements if "extra ==" not in text}
        waiting += sorted(names - needed)
    return needed


def link_distribution(name: str, target: Path) -> None:
    """Makes an installed distribution importable in another site-packages, without its neighbours."""
    distribution = metadata.distribution(name)
    for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
        link = target / top
        if not link.exists():
            link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, where building may leave its own."""
    folder = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source: Path, hook: str, target: Path) -> Path:
    """A wheel by one of the hooks that pip calls."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "build_wheel", tmp_path_factory.mktemp("wheel"))


class BareEnvironment:
    """A virtual environment that holds one wheel, torch, and what torch needs.

    The wheel comes first, alone, into an environment that is still empty. Torch stands in a folder of its own, as links,
    and is added to the path afterwards: nothing that is installed can be written through them.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        self.python = folder / "env" / "bin" / "python"
        (folder / "empty").mkdir()
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        pip = [sys.executable, "-I", "-m", "pip", "--isolated", "--python", str(self.python), "--disable-pip-version-check"]
        install = [*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
        subprocess.run(install, check=True, env=settings, cwd=folder / "empty")
        site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        links = folder / "torch"
        links.mkdir()
        for name in torch_and_its_dependencies():
            link_distribution(name, links)
        (site / "torch.pth").write_text(f"{links}\n")

    def run(self, code: str, *arguments: str) -> str:
        """What a program prints, run in an empty folder with nothing of the caller's environment."""
        command = [str(self.python), "-I", "-B", "-W", "ignore", "-c", code, *arguments]
        return subprocess.run(command, cwd=self.folder / "empty", capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> BareEnvironment:
    return BareEnvironment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> BareEnvironment:
    """The same with what `pip install -e .` builds."""
    return BareEnvironment(tmp_path_factory.mktemp("editable"), build(source, "build_editable", tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_the_method_and_nothing_else(wheel: Path) -> None:
    """Every file of it, by name, and their bytes are those of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert files == {"evolved_part_masking/py.typed", *(f"evolved_part_masking/{name}.py" for name in MODULES)}
        for name in files:
            assert archive.read(name) == (ROOT / "common" / Path(name).name).read_bytes()
        (top_level,) = [name for name in archive.namelist() if name.endswith("top_level.txt")]
        assert archive.read(top_level).split() == [b"evolved_part_masking"]


def test_it_needs_torch_and_nothing_else(wheel: Path) -> None:
    """One dependency outside the extras, and the version that the code says."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    requirements = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.6"]
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == {"train", "cluster", "downstream", "demo", "dev"}
    assert re.findall(r"^Version: (.*)$", text, re.MULTILINE) == [common.__version__]


def test_a_mask_is_made_in_a_bare_environment(bare: BareEnvironment) -> None:
    """Without timm, torchvision, tensorboard and numpy: the mask that the checkout makes, to the bit."""
    assert bare.run(WHAT_IS_THERE, "torch", "evolved_part_masking", *ABSENT) == "['torch', 'evolved_part_masking']\n"
    attention = torch.rand(3, 2, 37, 37, generator=torch.Generator().manual_seed(0)).softmax(-1)
    make_mask = EvolvedMask(grid_size=(6, 6), num_masked=20, total_epochs=10, num_parts=5)
    make_mask.set_epoch(7)
    mask = make_mask(torch.arange(3), lambda rows: attention[rows], torch.arange(3)).mask
    assert bare.run(MAKE_A_MASK) == f"{mask.int().tolist()} {common.__version__}\n"


def test_every_stable_name_is_importable(bare: BareEnvironment) -> None:
    """All of docs/api.md from the package itself; the flags stand beside them, and no stable name imports them."""
    code = """
import sys, evolved_part_masking as package
print([name for name in sys.argv[1:] if getattr(package, name) is None], "evolved_part_masking.flags" in sys.modules)
from evolved_part_masking.flags import add_mask_flags
"""
    assert bare.run(code, *STABLE) == "[] False\n"
    assert {*STABLE, "__version__"} == set(common.__all__)


def test_an_editable_install_shows_the_same_one_name(editable: BareEnvironment, source: Path) -> None:
    """`pip install -e .` maps the package to the checkout's files and puts the checkout's own folders on no path."""
    assert editable.run(WHAT_IS_THERE, "torch", "evolved_part_masking", *ABSENT) == "['torch', 'evolved_part_masking']\n"
    where = editable.run("import evolved_part_masking; print(evolved_part_masking.__file__)")
    assert Path(where.strip()) == source / "common" / "__init__.py"
    assert "[[" in editable.run(MAKE_A_MASK)


def test_commands_without_a_model_do_not_load_torch() -> None:
    """The package's names are imported when asked for: applying patches needs no torch."""
    code = "import sys, patches.apply; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'EvolvedMasks'"):
        common.EvolvedMasks  # noqa: B018
    assert set(STABLE) <= set(dir(common))


def pinned(*files: str) -> set[str]:
    """Names of the pinned sets."""
    return {match for file in files for match in re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(), re.MULTILINE)}


@pytest.mark.parametrize(
    ("extra", "files"),
    [
        ("train", ["requirements.txt"]),
        ("cluster", ["requirements.txt"]),
        ("downstream", ["requirements.txt", "requirements-downstream.txt"]),
        ("demo", ["requirements.txt", "requirements-demo.txt"]),
        ("dev", ["requirements.txt", "requirements-demo.txt", "requirements-downstream.txt", "requirements-dev.txt"]),
    ],
)
def test_extras_are_the_pinned_sets(extra: str, files: list[str]) -> None:
    """What an extra names is pinned in the requirements of the same name, and no newest file pins more than its extra."""
    names = {re.split(r"[\[<>=]", text)[0] for text in PROJECT["optional-dependencies"][extra]} - {PROJECT["name"]}
    assert names <= pinned(*files)
    if len(files) > 1:
        assert names == pinned(files[-1])
