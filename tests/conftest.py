"""Small real image folders and short real training runs, for all tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_evolved.main_pretrain import main

ROOT = Path(__file__).parents[1]
TINY = "--model mae_vit_tiny_patch4 --input_size 16 --batch_size 4 --epochs 4 --warmup_epochs 1 --blr 1e-2 --num_workers 0 "
TINY += "--parts_start 8 --parts_end 3 --picture_epochs 0 --device cpu"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors run fastest, and alike everywhere, on one thread."""
    torch.set_num_threads(1)


def write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20), seed: int = 0) -> None:
    """`count` smooth random JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"image_{index:02d}.jpg", quality=95)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageNet-style folder: 2 classes of 8 images under train/."""
    for seed, name in enumerate(("bird", "cat")):
        write_images(tmp_path / "images" / "train" / name, 8, seed=seed)
    return tmp_path / "images"


@pytest.fixture
def train(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a tiny MAE in this process and returns the output folder: `train("name", "--flag value ...")`."""

    def run(name: str, flags: str = "") -> Path:
        output = tmp_path / name
        main(f"{TINY} --data_path {image_folder} --output_dir {output} {flags}".split())
        return output

    return run


def run_module(arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` from the project's root, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def free_ports(count: int = 4) -> int:
    """The first of `count` free ports in a row, below the range that the system gives out by itself."""
    for base in range(20000 + os.getpid() % 600 * 16, 32000, 16):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


def read_log(output: Path) -> list[dict[str, object]]:
    """log.txt without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines]


def assert_same(first: object, second: object, where: str = "") -> None:
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert isinstance(second, (list, tuple))
        assert len(first) == len(second), where
        for index, (left, right) in enumerate(zip(first, second, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert first == second, where
