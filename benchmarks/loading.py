"""What it costs to load a training image: decoding, crop, flip and colours, ours beside the official transforms.

    python -m benchmarks.loading --official PATH_OF_MAE PATH_OF_UNILM PATH_OF_SIMMIM
    python -m benchmarks.loading --only mae --names 0 --json loading.json

It makes JPEGs of 500 x 375 pixels, the usual size of ImageNet's, from the photographs inside the scikit-image and scikit-learn
wheels, in ImageNet's layout in a temporary folder. A turn is what one process of a loader does for a batch: our samples, seeded
one by one and collated as uint8; and torchvision's ImageFolder with the official transforms, collated as float32. They take turns
in one process with one thread. MAE's transforms stand in the middle of its script and are built here from the same classes of
torchvision; BEiT's and SimMIM's are imported where a clone is given, and built from torchvision where not. The masks that the
official loaders draw are left out on both sides. Normalisation, which ours leaves to the device, is measured apart, on this CPU.

The difference is between our two loaders at the same seeds, in grey levels of the views. Names: a tree of so many empty files is
made and scanned, and a forked process reads every name once.

B images of a batch
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from beit_evolved.run_beit_pretraining import BEiTConfig, TwoViews
from benchmarks.official_models import find_clones, importing
from benchmarks.skipped_passes import write_json
from benchmarks.timing import CLOCKS, machine
from benchmarks.train_step import JPEG_SIZE, METHODS, Ratio, config_of, take_turns, words_of
from common.training.augment import RandomCrop
from common.training.config import TrainConfig
from common.training.data import IMAGENET_MEAN, IMAGENET_STD, Samples, Transform, collate, training_transform
from common.training.errors import BadInput, run_cli
from common.training.geometry import as_inputs
from common.training.listing import PackedNames, training_files
from common.training.sources import FileSource, PhotoSource

PROGRAM = "benchmarks.loading"
OURS, OFFICIAL, OURS_PIL, DEVICE = "ours", "official", "ours, --loader pil", "normalisation of ours"
CLASSES = 4
NAMES_A_FOLDER = 1000
TARGETS = (0.55, 0.40)
"""Our time an image / official: what was aimed at first, and then toward."""


# --- Images and transforms --------------------------------------------------------------------------------------


def make_images(folder: Path, count: int, seed: int) -> None:
    """Random crops of the photographs as JPEGs: train/<class>/<number>.JPEG."""
    photos, generator = PhotoSource(), np.random.default_rng(seed)
    width, height = JPEG_SIZE
    for number in range(count):
        photo = photos.load(number % len(photos))
        share = generator.uniform(0.7, 1.0)
        wide = share * min(photo.width, photo.height * width / height)
        left, top = generator.uniform(0, photo.width - wide), generator.uniform(0, photo.height - wide * height / width)
        place = folder / "train" / f"class_{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        box = (left, top, left + wide, top + wide * height / width)
        photo.resize(JPEG_SIZE, Image.Resampling.BICUBIC, box).save(place / f"{number:05d}.JPEG", quality=92)


def our_transform(config: TrainConfig) -> Transform:
    """The trainer's."""
    if not isinstance(config, BEiTConfig):
        return RandomCrop(config)
    height, width = config.image_size
    return TwoViews(config, (height // 2, width // 2))


def official_transform(method: str, config: TrainConfig, clone: Path | None) -> Transform:
    """That of the official scripts with their defaults, masks left out."""
    if method == "beit":
        return _beit_transform(config, clone)
    if method == "simmim" and clone is not None:
        with importing(clone):
            module = importlib.import_module("data.data_simmim")
        vit = SimpleNamespace(PATCH_SIZE=16)
        data = SimpleNamespace(IMG_SIZE=config.image_size[0], MASK_PATCH_SIZE=32, MASK_RATIO=0.6)
        made: Transform = module.SimMIMTransform(
            SimpleNamespace(DATA=data, MODEL=SimpleNamespace(TYPE="vit", VIT=vit))
        ).transform_img
        return made
    return training_transform(config)


def _beit_transform(config: TrainConfig, clone: Path | None) -> Transform:
    size, second = config.image_size[0], config.image_size[0] // 2
    to_tensor = transforms.ToTensor()
    normalised = transforms.Compose([to_tensor, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    before = transforms.Compose([transforms.ColorJitter(0.4, 0.4, 0.4), transforms.RandomHorizontalFlip()])
    if clone is not None:
        with importing(clone):
            two_of = importlib.import_module("transforms").RandomResizedCropAndInterpolationWithTwoPic
        two = two_of(size=size, second_size=second, interpolation="bicubic", second_interpolation="lanczos")
    else:
        two = _two_crops(size, second, config.crop_scale)

    def transform(image: Image.Image) -> Any:
        first, tokens = two(before(image))
        return normalised(first), to_tensor(tokens)

    return transform


def _two_crops(size: int, second: int, scale: tuple[float, float]) -> Callable[[Image.Image], Any]:
    crop = transforms.functional.resized_crop

    def two(image: Image.Image) -> Any:
        box = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        return (
            crop(image, *box, [size, size], InterpolationMode.BICUBIC),
            crop(image, *box, [second, second], InterpolationMode.LANCZOS),
        )

    return two


# --- Measuring --------------------------------------------------------------------------------------------------


def measure(method: str, folder: Path, clone: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a batch in each turn, ratios, images a second of a core, and the difference of the loaders."""
    config = config_of(method, "small")
    source = FileSource(training_files(folder).names)
    ours, pil = (Samples(source, our_transform(config), args.seed, loader=loader) for loader in ("torchvision", "pil"))
    official = ImageFolder(str(folder / "train"), official_transform(method, config, clone))
    epoch, places = iter(range(10**6)), range(len(source))

    def batch_of(samples: Samples) -> Any:
        drawn = next(epoch)
        return collate([samples[drawn, place] for place in places])

    ready = batch_of(ours)
    runs: dict[str, Callable[[], Any]] = {
        OURS: lambda: batch_of(ours),
        OFFICIAL: lambda: default_collate([official[place] for place in places]),
        OURS_PIL: lambda: batch_of(pil),
        DEVICE: lambda: as_inputs(ready),
    }
    for run in runs.values():
        run()  # warm
    seconds = take_turns(runs, torch.device("cpu"), args)
    rate = {name: len(source) / float(np.median(times)) for name, times in seconds.items()}
    with_device = [first + second for first, second in zip(seconds[OURS], seconds[DEVICE], strict=True)]
    return {
        "method": method, "images": len(source), "imported": clone is not None and method != "mae", "seconds": seconds,
        "images_a_second": rate, "ratio": asdict(Ratio.of(seconds[OURS], seconds[OFFICIAL])),
        "ratio_pil": asdict(Ratio.of(seconds[OURS_PIL], seconds[OFFICIAL])),
        "ratio_with_normalisation": asdict(Ratio.of(with_device, seconds[OFFICIAL])),
        "grey_levels": [difference(ours, pil, view) for view in range(len(ready.views))],
    }  # fmt: skip


def difference(ours: Samples, pil: Samples, view: int, epochs: int = 3) -> dict[str, float]:
    """Of a view by both loaders at the same seeds, over all pixels and colours."""
    found = []
    for key in ((epoch, place) for epoch in range(epochs) for place in range(len(ours))):
        first, second = ours[key][0], pil[key][0]
        assert first is not None
        assert second is not None
        found.append((first[view].int() - second[view].int()).abs().flatten().numpy())
    levels = np.concatenate(found)
    return {"mean": float(levels.mean()), "percentile_99.9": float(np.percentile(levels, 99.9)), "max": float(levels.max())}


# --- Names ------------------------------------------------------------------------------------------------------


def measure_names(root: Path, count: int) -> dict[str, Any]:
    """Time of the scan of so many names, and what they take in a process that reads each once."""
    for first in range(0, count, NAMES_A_FOLDER):
        folder = root / "train" / f"n{first:08d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + NAMES_A_FOLDER, count)):
            os.close(os.open(folder / f"{folder.name}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))
    start = time.perf_counter()
    names = training_files(root).names
    seconds = time.perf_counter() - start
    packed = copied_by_reading(FileSource(names))
    paths = [Path(name) for name in names]
    objects = copied_by_reading(PathSource(paths))
    return {
        "names": len(names), "scan_seconds": seconds, "packed_bytes": names.nbytes,
        "copied_by_a_process": {"packed": packed, "Path objects": objects},
    }  # fmt: skip


class PathSource(FileSource):
    """Names as objects."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(PackedNames.of([]))
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])


def copied_by_reading(source: FileSource) -> int:
    """Bytes of memory that a forked process has of its own for having read every name once (Linux)."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_read_names, args=(source, theirs))
    process.start()
    copied: int = ours.recv()
    process.join()
    return copied


def _read_names(source: FileSource, answer: Any) -> None:
    before = _private_bytes()
    for index in range(len(source)):
        source.name(index)
    answer.send(_private_bytes() - before)


def _private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Dirty:", "Private_Clean:")))


# --- Command line -----------------------------------------------------------------------------------------------


def describe(case: dict[str, Any]) -> str:
    """One method in a few lines."""
    ratio, rate = case["ratio"], case["images_a_second"]
    said = "met" if ratio["median"] <= TARGETS[1] else "first met" if ratio["median"] <= TARGETS[0] else "missed"
    with_device, pil = case["ratio_with_normalisation"], case["ratio_pil"]
    lines = [
        f"{case['method']}: ours / official {ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f}), "
        f"targets {TARGETS[0]} and {TARGETS[1]}: {said}; with normalisation on this CPU {with_device['median']:.3f}; "
        f"--loader pil {pil['median']:.3f}",
        "  images a second and core: " + ", ".join(f"{name} {rate[name]:.0f}" for name in (OURS, OFFICIAL, OURS_PIL)),
    ]
    for number, levels in enumerate(case["grey_levels"], 1):
        lines.append(
            f"  view {number}, difference to PIL in grey levels: " + ", ".join(f"{k} {v:.3g}" for k, v in levels.items())
        )
    return "\n".join(lines)


def describe_names(numbers: dict[str, Any]) -> str:
    """Scan and memory in a line."""
    copied = numbers["copied_by_a_process"]
    memory = ", ".join(f"{name} {value / 2**20:.1f} MiB" for name, value in copied.items())
    return (
        f"{numbers['names']} names: scanned in {numbers['scan_seconds']:.1f} s, {numbers['packed_bytes'] / 2**20:.1f} MiB "
        f"packed; copied by a process that reads each once: {memory}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--only", type=words_of(METHODS), default=list(METHODS), help="methods, such as mae,beit (default: all three)")
    add("--official", nargs="+", default=[], metavar="CLONE", help="clones of the official repositories, at the pinned commits")
    add("--images", type=int, default=56, help="B (default %(default)s)")
    add("--repeats", type=int, default=7, help="turns after a warm-up (default %(default)s)")
    add("--names", type=int, default=1_000_000, help="names of the simulated tree; 0: none (default %(default)s)")
    add("--seed", type=int, default=0, help="of images and draws (default %(default)s)")
    add("--clock", choices=tuple(CLOCKS), default="processor", help="wall, or processor (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    args = parser.parse_args(argv)
    for name, least in (("images", 1), ("repeats", 1), ("names", 0)):
        if getattr(args, name) < least:
            raise BadInput(f"--{name} must be {least} or more, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns its numbers."""
    args = parse(argv)
    torch.set_num_threads(1)
    clones = find_clones(args.official)
    load = {"load_at_start": os.getloadavg()[0]}
    record: dict[str, Any] = {"machine": {**machine(torch.device("cpu")), **load}, "clock": args.clock, "cases": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, args.images, args.seed)
        for method in args.only:
            record["cases"].append(measure(method, folder, clones.get(method), args))
            print(describe(record["cases"][-1]), flush=True)
    if args.names:
        with tempfile.TemporaryDirectory() as name:
            record["names"] = measure_names(Path(name), args.names)
        print(describe_names(record["names"]))
    record["machine"]["load_at_end"] = os.getloadavg()[0]
    about = record["machine"]
    print(
        f"{about['device']}, 1 thread of {about['cores']} cores, torch {about['torch']}, {args.clock} clock; "
        f"load {about['load_at_start']:.1f} at the start, {about['load_at_end']:.1f} at the end"
    )
    write_json(args.json, record)
    return record


if __name__ == "__main__":
    run_cli(PROGRAM, lambda argv: main(argv) and None)
