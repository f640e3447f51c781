"""Labelled scenes from real photographs, in the layouts of ImageNet, ADE20K and COCO at once.

    python -m scenes OUT --train 8000 --val 1000 --size 64

    OUT/imagenet/{train,val}/<class>/*.jpg                                  class: that of the largest visible object
    OUT/ade20k/images/{training,validation}/*.jpg
    OUT/ade20k/annotations/{training,validation}/*.png                      0 unlabelled (none), 1..C objects, C+1 background
    OUT/ade20k/classes.txt                                                  index and name
    OUT/coco/{train2017,val2017}/*.jpg
    OUT/coco/annotations/instances_{train,val}2017.json                     boxes, areas, masks as exact run lengths
    OUT/contact_sheet.png                                                   scenes with the outlines of their masks
    OUT/SOURCES.txt                                                         packages and licences
    OUT/scenes.json                                                         seed, counts, pictures used; written last

A picture is one file under three names (hard links, or copies where the file system has none), and its stem is its COCO id.
Background is a class of its own in ADE20K's annotation: the benchmark's loaders ignore 0, and a segmenter that never has to say
"none of these" would not be measured on the outlines. sources.py says what pictures are used, drawing.py how a
scene is composed. Where the packages are not installed, scenes of drawn shapes take their place, and OUT/SOURCES.txt says so.

C classes   S side of a scene in pixels
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from common.training.errors import BadInput, Parser, run_cli
from scenes.contact_sheet import contact_sheet
from scenes.drawing import draw_scene
from scenes.layouts import COCO, FIRST_ID, make_folders, write_lists, write_scene
from scenes.sources import INSTALL, SPLITS, Library, LibraryKind, load_library, missing_packages, resolve

PROGRAM = "scenes"
Sources = Literal["auto", "photos", "shapes"]

SIZES = (64, 512)
MOST_SCENES = 999_999
_DONE, _UNDER_WAY = "scenes.json", "scenes.unfinished.json"
_OURS = ("imagenet", "ade20k", "coco", "contact_sheet.png", "SOURCES.txt", _DONE)
_SHEET = {"train": 24, "val": 16}

_LICENCES = {
    "tuxpaint-stamps-default": "GPL-2, Bill Kendrick and contributors (objects)",
    "mate-backgrounds": "GPL-2+, the photographers named in its copyright file (backgrounds)",
    "lomiri-wallpapers-16.04": "CC-BY-4.0 and CC-BY-SA-4.0, the photographers in the file names (backgrounds)",
}


@dataclass(frozen=True)
class SceneSettings:
    """All that the bytes of the data depend on, besides the pictures themselves."""

    train: int
    val: int
    size: int
    seed: int
    sources: LibraryKind
    format: int = 1  # to be counted up whenever the same settings come to give other bytes


def make_scenes(
    out: Path,
    train: int,
    val: int,
    size: int,
    seed: int = 0,
    sources: Sources = "auto",
    workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the scenes below `out`, unless they are there already, and returns the content of scenes.json.

    Args:
        train, val: scenes of each split, 1 to 999,999.
        size: side in pixels, 64 to 512.
        sources: `auto` takes photographs where the packages are installed, else shapes.
        workers: processes, 0 for one a core. They change nothing but the time.
        overwrite: replace scenes of other settings.

    Raises:
        BadInput: a value out of range, missing packages, or an `out` that holds something else.
    """
    settings = _settings(train, val, size, seed, sources)
    if workers < 0:
        raise BadInput(f"--workers must be 0 or more, got {workers}")
    try:
        present = _complete(out, settings, overwrite)
        if present is not None:
            return present
        library = load_library(settings.sources, settings.size)
        _begin(out, settings)
        return _make(out, settings, library, workers)
    except OSError as error:
        raise BadInput(f"{out}: {error}") from error


def _settings(train: int, val: int, size: int, seed: int, sources: Sources) -> SceneSettings:
    for flag, value, low, high in (("train", train, 1, MOST_SCENES), ("val", val, 1, MOST_SCENES), ("size", size, *SIZES)):
        if not low <= value <= high:
            raise BadInput(f"--{flag} must be {low} to {high}, got {value}")
    if seed < 0:
        raise BadInput(f"--seed must be 0 or more, got {seed}")
    if sources not in get_args(Sources):
        raise BadInput(f"--sources must be one of {', '.join(get_args(Sources))}, got {sources!r}")
    return SceneSettings(train, val, size, seed, resolve(sources))


# The state of OUT: scenes.json means whole, scenes.unfinished.json means ours but interrupted, anything else is not ours.


def _complete(out: Path, settings: SceneSettings, overwrite: bool) -> dict[str, Any] | None:
    """What scenes.json says if `out` already holds these scenes; None if they have to be made.

    Raises:
        BadInput: `out` holds other scenes and `overwrite` is off, or holds what this program did not write.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is not a folder")
    if not (out / _DONE).exists():
        if out.is_dir() and any(out.iterdir()) and not (out / _UNDER_WAY).exists():
            raise BadInput(f"{out} holds files that are not scenes; name an empty or new folder")
        return None
    try:
        present: dict[str, Any] = json.loads((out / _DONE).read_text())
        former = dict(present["settings"])
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{out / _DONE} was not written by {PROGRAM}; name an empty or new folder") from None
    if former == asdict(settings):
        return present
    if not overwrite:
        changed = ", ".join(f"{key} {former.get(key)}" for key, value in asdict(settings).items() if former.get(key) != value)
        raise BadInput(f"{out} holds other scenes ({changed}); add --overwrite to replace them")
    return None


def _begin(out: Path, settings: SceneSettings) -> None:
    """Marks `out` as unfinished, then clears what a former or interrupted run left."""
    out.mkdir(parents=True, exist_ok=True)
    (out / _UNDER_WAY).write_text(json.dumps(asdict(settings)))
    for name in (_DONE, *_OURS):  # what says "whole" goes first
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _finish(out: Path, content: dict[str, Any]) -> None:
    """Writes scenes.json in one step."""
    (out / _UNDER_WAY).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(out / _UNDER_WAY, out / _DONE)


# Making them.


def _make(out: Path, settings: SceneSettings, library: Library, workers: int) -> dict[str, Any]:
    make_folders(out, library.classes)
    records = {split: _render_split(out, settings, library, split, workers) for split in SPLITS}
    for split in SPLITS:
        write_lists(out, split, records[split], library.classes, settings.size)
    (out / "SOURCES.txt").write_text(_sources_text(library))
    samples = [
        (out / f"coco/{COCO[split]}/{record['file_name']}", record["objects"])
        for split in SPLITS
        for record in records[split][: _SHEET[split]]
    ]
    contact_sheet(samples, library.classes, settings.size).save(out / "contact_sheet.png")
    content = _summary(settings, library, records)
    _finish(out, content)
    return content


@dataclass(frozen=True)
class _Job:
    """What a process needs to write any scene of a split."""

    out: Path
    settings: SceneSettings
    library: Library
    split: str

    def __call__(self, index: int) -> dict[str, Any]:
        scene = draw_scene(self.library.pools[self.split], self.settings.size, self.settings.seed, self.split, index)
        return write_scene(self.out, scene, self.library.classes, self.split, FIRST_ID[self.split] + index)


_JOB: list[_Job] = []  # of this worker process


def _start_worker(job: _Job) -> None:
    _JOB[:] = [job]


def _run_job(index: int) -> dict[str, Any]:
    return _JOB[0](index)


def _render_split(out: Path, settings: SceneSettings, library: Library, split: str, workers: int) -> list[dict[str, Any]]:
    """Writes all scenes of a split; their records in order."""
    count = getattr(settings, split)
    job, processes = _Job(out, settings, library, split), min(workers or _cores(), -(-count // 64))
    if processes == 1:
        return [job(index) for index in _progress(range(count), count, split)]
    # forked processes share the pictures and import nothing again
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(job,)) as executor:
        return list(_progress(executor.map(_run_job, range(count), chunksize=32), count, split))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(items: Any, total: int, split: str) -> Iterator[Any]:
    """`items` with a progress bar, on a terminal and where tqdm is installed."""
    if find_spec("tqdm") is None:
        return iter(items)
    from tqdm import tqdm

    return iter(tqdm(items, total=total, desc=split, unit=" scenes", disable=None))


def _summary(settings: SceneSettings, library: Library, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "classes": list(library.classes),
        "ade20k_background": len(library.classes) + 1,
        "splits": {split: _split_summary(library, split, records[split]) for split in SPLITS},
        "left_out": library.left_out,
    }


def _split_summary(library: Library, split: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    pool = library.pools[split]
    scenes = Counter(record["label"] for record in records)
    objects = Counter(thing["label"] for record in records for thing in record["objects"])
    return {
        "scenes": len(records),
        "scenes_of_class": {name: scenes[label] for label, name in enumerate(library.classes)},
        "objects_of_class": {name: objects[label] for label, name in enumerate(library.classes)},
        "cutouts": {
            name: [picture.name for picture in pictures] for name, pictures in zip(library.classes, pool.cutouts, strict=True)
        },
        "backgrounds": [picture.name for picture in pool.backgrounds],
    }


def _sources_text(library: Library) -> str:
    if library.kind == "shapes":
        return f"Scenes of drawn shapes, not of photographs: no picture of others is in them.\nFor photographs: {INSTALL}\n"
    lines = [f"{package}: {licence}" for package, licence in _LICENCES.items()]
    return "\n".join(
        [
            "These scenes are composed from photographs of the following Debian packages. They are derived works: pass them on",
            "only under the terms in /usr/share/doc/<package>/copyright. Nothing of these packages is part of this project.",
            "",
            *lines,
            "",
            "scenes.json lists every picture used, by split.",
            "",
        ]
    )


# Command line.


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, empty, or of an earlier call")
    parser.add_argument("--train", type=int, default=2000, metavar="N", help="training scenes [%(default)s]")
    parser.add_argument("--val", type=int, default=500, metavar="N", help="validation scenes [%(default)s]")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of a scene, 64 to 512 pixels [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all scenes [%(default)s]")
    parser.add_argument("--sources", choices=get_args(Sources), default="auto", help="auto: photos where installed, else shapes")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0: one a core [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace scenes of other settings in OUT")
    return parser


def main(argv: Sequence[str]) -> None:
    """The command `python -m scenes`."""
    args = _parser().parse_args(argv)
    done_before = args.out / _DONE
    stamp = done_before.stat().st_mtime_ns if done_before.is_file() else None
    content = make_scenes(**vars(args))
    counts, kind = {split: content["splits"][split]["scenes"] for split in SPLITS}, content["settings"]["sources"]
    if args.sources == "auto" and kind == "shapes":
        print(f"drawn shapes, since these packages are not installed: {', '.join(missing_packages())}; run: {INSTALL}")
    verb = "holds already" if stamp is not None and done_before.stat().st_mtime_ns == stamp else "holds"
    print(f"{args.out} {verb} {counts['train']} + {counts['val']} scenes ({kind}) of {len(content['classes'])} classes")


if __name__ == "__main__":
    run_cli(PROGRAM, main)
