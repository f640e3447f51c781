"""The official scripts, patched, in place of the built-in trainers: where they are and what their flags are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.training.errors import BadInput
from patches.apply import Checkout, read_patch, read_upstream


@dataclass(frozen=True)
class OfficialScript:
    """An official pre-training script.

    Attributes:
        upstream: its entry in patches/upstream.toml.
        file: its name in the folder of the code.
        batch, accumulation, data, output, log: what it calls these; empty: it has no such thing.
        resume: it must be told which checkpoint to continue; the others look for one in their output folder.
        reads_train: data is the folder of the classes, not the one above it.
    """

    upstream: str
    file: str
    batch: str = "--batch_size"
    accumulation: str = ""
    data: str = "--data_path"
    output: str = "--output_dir"
    log: str = "--log_dir"
    resume: str = ""
    reads_train: bool = True


SCRIPTS = {
    "mae_evolved.main_pretrain": OfficialScript(
        "mae", "main_pretrain.py", accumulation="--accum_iter", resume="--resume", reads_train=False
    ),
    "beit_evolved.run_beit_pretraining": OfficialScript("beit", "run_beit_pretraining.py"),
    "simmim_evolved.main_simmim": OfficialScript(
        "simmim", "main_simmim.py", "--batch-size", "--accumulation-steps", "--data-path", "--output", log=""
    ),
}
"""The script that does what a built-in trainer does."""


def official_command(
    module: str, clone: Path, data: Path, output: Path, split: tuple[int, int], flags: Sequence[str]
) -> list[str]:
    """Words after `python` that run the official script of a built-in trainer.

    Args:
        module: the built-in trainer.
        clone: of the official repository, with the patch in it.
        data: folder with train/<class>/*.jpg.
        split: (batch_size, accum_iter) of a rank.
        flags: more, by their official names.

    Raises:
        BadInput: a trainer without an official script, a clone that is not the pinned one or lacks the patch, no data, or
            accumulation where the script has none.
    """
    if module not in SCRIPTS:
        raise BadInput(f"UPSTREAM is for {', '.join(SCRIPTS)}, not for {module}")
    script, (batch_size, accum_iter) = SCRIPTS[module], split
    folder = patched_folder(clone, script.upstream)
    if not (data / "train").is_dir():
        raise BadInput(f"--data_path {data}: has no folder train, which the official {script.upstream} code needs")
    if accum_iter > 1 and not script.accumulation:
        raise BadInput(
            f"the official {script.upstream} code cannot accumulate, and the effective batch needs {accum_iter} steps of "
            f"{batch_size} images a GPU: take more GPUs, or fit more images on each"
        )
    words = [str(folder / script.file), *flags, script.batch, str(batch_size)]
    words += [script.accumulation, str(accum_iter)] if script.accumulation else []
    words += [script.data, str(data / "train" if script.reads_train else data), script.output, str(output)]
    words += [script.log, str(output / "tensorboard")] if script.log else []
    newest = newest_checkpoint(output) if script.resume else None
    return [*words, script.resume, str(newest)] if newest else words


def patched_folder(clone: Path, name: str) -> Path:
    """The folder of the code in a clone.

    Raises:
        BadInput: not the pinned commit, or without the patch.
    """
    upstream = read_upstream(name)
    patch, checkout = read_patch(upstream), Checkout(clone, upstream)
    for path, hunks in patch.items():
        if not checkout.is_patched(path, hunks, checkout.read(path)):
            raise BadInput(
                f"UPSTREAM {clone}: {path} does not have the patch, or more than it (python -m patches.apply {name} {clone})"
            )
    return (checkout.root / upstream.folder).resolve()


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint-N.pth with the largest N."""
    numbered = [(path.stem.removeprefix("checkpoint-"), path) for path in output.glob("checkpoint-*.pth")]
    return max(((int(number), path) for number, path in numbered if number.isdecimal()), default=(0, None))[1]
