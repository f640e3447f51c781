"""What a job will run, found out and checked before it is submitted: `python -m slurm.plan --help`.

The same is checked again as a job's first act, so that `sbatch` on a script ends with the same line.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.mask_config import MaskConfig
from common.training.checkpoint import check_same_run, find_resume, read_checkpoint, upgraded
from common.training.command_line import parse_arguments, parse_flags
from common.training.config import ImageSetConfig, RunConfig, TrainConfig
from common.training.errors import BadInput, Parser, run_cli
from common.training.listing import scan_images, training_files
from common.training.mask import make_mask
from common.training.sources import count_source, open_source
from downstream.training import TaskConfig, check_same_task, parse_task
from slurm.partition import Request, check_partition
from slurm.upstream import official_command

PROGRAM = "slurm.plan"
WORKED_OUT = ("batch_size", "accum_iter")


@dataclass(frozen=True)
class Resources:
    """What is asked of the cluster, as far as the training depends on it.

    Attributes:
        nodes, ranks_per_node: processes of the run; a rank is a GPU, or a CPU process where there are none.
        effective_batch: images an update, which the recipe states.
        batch_per_rank: images that a rank can hold at once.

    Raises:
        BadInput: a value below 1.
    """

    nodes: int
    ranks_per_node: int
    effective_batch: int
    batch_per_rank: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise BadInput(f"{name.replace('_', ' ')} must be 1 or more, got {value}")

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.ranks_per_node

    def split(self) -> tuple[int, int]:
        """(batch_size, accum_iter) whose product with the ranks is the effective batch; batch_size as large as fits.

        Raises:
            BadInput: the ranks do not divide the batch.
        """
        if self.effective_batch % self.ranks:
            fitting = [count for count in range(1, self.effective_batch + 1) if self.effective_batch % count == 0]
            neighbours = [max(count for count in fitting if count < self.ranks), *(c for c in fitting if c > self.ranks)][:2]
            raise BadInput(
                f"{self.nodes} nodes x {self.ranks_per_node} GPUs (or processes) = {self.ranks} ranks cannot share an effective "
                f"batch of {self.effective_batch} equally; {' or '.join(map(str, neighbours))} ranks can"
            )
        share = self.effective_batch // self.ranks
        batch_size = max(size for size in range(1, min(share, self.batch_per_rank) + 1) if share % size == 0)
        return batch_size, share // batch_size

    def summary(self) -> str:
        """One line for the user."""
        batch_size, accum_iter = self.split()
        return (
            f"{self.nodes} nodes x {self.ranks_per_node} ranks, batch {batch_size} x {accum_iter} accumulation steps a rank "
            f"= {self.effective_batch} images an update"
        )


def plan(module: str, flags: Sequence[str], resources: Resources, pending: bool = False) -> list[str]:
    """The trainer's flags with batch and accumulation worked out, everything checked that can be without training.

    Args:
        module: a runnable module with a `main(argv)` and one configuration of its own, a subclass of RunConfig.
        pending: files that the run starts from are still to be written by another run, and not looked for.

    Raises:
        BadInput: a flag, the data, the output folder, a checkpoint of other settings, or ranks that do not fit the batch.
    """
    batch_size, accum_iter = resources.split()
    flag_names = {word.split("=")[0].removeprefix("--") for word in flags if word.startswith("--")}
    for name in WORKED_OUT:
        if name in flag_names:
            raise BadInput(f"--{name} is worked out from the effective batch, the ranks and what a rank can hold: leave it out")
    words = [*flags, "--batch_size", str(batch_size), "--accum_iter", str(accum_iter)]
    config, mask_config = configuration(module, words, resources.ranks, pending)
    check_paths(config, pending)
    if isinstance(config, TrainConfig) and mask_config is not None:
        make_mask(config, mask_config)  # as the trainer's start does: what model and flags decide of it
    check_data(module, config, resources.effective_batch)
    check_checkpoint(module, config, mask_config, resources.effective_batch)
    return words


def configuration(module: str, argv: Sequence[str], ranks: int = 1, pending: bool = True) -> tuple[RunConfig, MaskConfig | None]:
    """What the module makes of its command line.

    Args:
        ranks: processes of the run. --preset goes by the training images, which the module's `count_images(config)` counts where
            it has data in a layout of its own.
        pending: a checkpoint that the run starts from may still have to be written by another run.

    Raises:
        BadInput: no such module, one that is no trainer, or flags that it refuses.
    """
    try:
        trainer = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise BadInput(f"{module}: no such module") from None
    classes = [member for _, member in inspect.getmembers(trainer, inspect.isclass) if issubclass(member, RunConfig)]
    # the one from which no other here is made
    configurations = [member for member in classes if sum(issubclass(other, member) for other in classes) == 1]
    if len(configurations) != 1 or not hasattr(trainer, "main"):
        raise BadInput(f"{module}: is not a trainer of this project (one configuration and a main)")
    count = getattr(trainer, "count_images", count_source)
    if issubclass(configurations[0], TrainConfig):
        return parse_arguments(configurations[0], module, "", argv, count=count, ranks=ranks)
    if issubclass(configurations[0], TaskConfig):
        return parse_task(configurations[0], module, "", argv, count=count, ranks=ranks, pending=pending)[0], None
    return parse_flags(configurations[0], module, "", argv, count=count, ranks=ranks), None


def check_paths(config: RunConfig, pending: bool = False) -> None:
    """Raises BadInput for an output folder that cannot be made, or a named file that is not there."""
    for name in ("tokenizer", "init_from"):
        value = getattr(config, name, "")
        if value and not pending and not Path(value).exists():
            raise BadInput(f"--{name} {value}: no such file or folder")
    check_folder("--output_dir", Path(config.output_dir))


def check_folder(flag: str, folder: Path) -> None:
    """Raises BadInput unless `folder` is or can be made a folder that can be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise BadInput(f"{flag} {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} {folder}: {existing} cannot be written to")


def check_data(module: str, config: RunConfig, effective_batch: int) -> None:
    """Raises BadInput if the data is not there, or if an epoch of it does not fill one update."""
    needed = -(-effective_batch // config.repeat)
    images = count_images(module, config, needed)
    if images is not None:
        check_epoch(images, config.repeat, effective_batch, offer=config.preset == "none")


def check_epoch(images: int, repeat: int, effective_batch: int, offer: bool = False) -> None:
    """Raises BadInput if an epoch of `images` x `repeat` samples does not fill one update.

    Args:
        offer: the command has a preset that could help.
    """
    preset = ", or let --preset small choose it" if offer else ""
    if images * repeat < effective_batch:
        raise BadInput(
            f"an effective batch of {effective_batch} images an update, but an epoch has {images * repeat} "
            f"({images} images x --repeat {repeat}): nothing would ever be updated (lower the batch, or raise --repeat{preset})"
        )


def count_images(module: str, config: RunConfig, needed: int) -> int | None:
    """Training images, or any number from `needed` up where there are more; None where counting would take too long.

    A module whose data has a layout of its own has a function `check_data(config)`, which may return their number.

    Raises:
        BadInput: the data is not there.
    """
    module_check = getattr(importlib.import_module(module), "check_data", None)
    if module_check is not None:
        count: int | None = module_check(config)
        return count
    if isinstance(config, ImageSetConfig) and (not config.data_path or config.dataset not in ("auto", "folder")):
        count = len(open_source(config))
    else:
        count = count_files(Path(config.data_path), needed)
    subset = getattr(config, "subset", 0)
    return min(count, subset) if subset else count


def count_files(root: Path, needed: int) -> int:
    """Images of a folder, class by class until there are `needed`: the whole of ImageNet takes minutes to list.

    Raises:
        BadInput: none at all; as the trainer says it.
    """
    folder, count = root / "train" if (root / "train").is_dir() else root, 0
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and not entry.name.startswith("."):
            count += len(scan_images(entry))
        if count >= needed:
            return count
    return len(training_files(root))


def check_checkpoint(module: str, config: RunConfig, mask_config: MaskConfig | None, effective_batch: int) -> None:
    """Raises BadInput if the run would continue a checkpoint that cannot be read or was made with other settings.

    Whether the number of images is the same is left to the trainer, which counts them. A module that is neither pre-training nor
    a downstream task has a function `check_checkpoint`.
    """
    path = find_resume(config)
    if path is None:
        return
    state = upgraded(read_checkpoint(path), path)
    if isinstance(config, TrainConfig) and mask_config is not None:
        check_same_run(state, path, config, mask_config, effective_batch, state.get("samples", 0))
    elif isinstance(config, TaskConfig):
        check_same_task(state, path, config, effective_batch, state.get("samples", 0))
    else:
        importlib.import_module(module).check_checkpoint(config, path, effective_batch)


def add_resources(parser: argparse.ArgumentParser) -> None:
    """The flags of :class:`Resources` but for the ranks."""
    parser.add_argument("--effective_batch", type=int, required=True, help="images an update, of the recipe")
    capacity_help = "images that a GPU can hold at once; the rest is accumulated"
    parser.add_argument("--batch_per_rank", type=int, required=True, help=capacity_help)
    parser.add_argument("--nodes", type=int, default=1, help="nodes [1]")


def main(argv: Sequence[str]) -> None:
    """Prints a title, the plan's summary, and the words of each rank's command after `python`, one a line."""
    args = _parser().parse_args(argv)
    resources = Resources(args.nodes, args.ranks_per_node, args.effective_batch, args.batch_per_rank)
    words = _official_words(args, resources) if args.upstream else _words(args, resources)
    if args.cpus_per_task:
        cpus, options = args.cpus_per_task, args.sbatch_options
        check_partition(Request(args.partition, args.nodes, args.ranks_per_node, cpus, args.qos, options))
    print("\n".join([f"{PROGRAM}:", resources.summary(), *words]))


def _words(args: argparse.Namespace, resources: Resources) -> list[str]:
    places = ["--data_path", args.data_path, "--output_dir", args.output_dir, "--dist_timeout", args.dist_timeout]
    return ["-m", args.module, *plan(args.module, [*places, *args.flags], resources, args.pending)]


def _official_words(args: argparse.Namespace, resources: Resources) -> list[str]:
    data, output = Path(args.data_path), Path(args.output_dir)
    check_folder("--output_dir", output)
    words = official_command(args.module, Path(args.upstream), data, output, resources.split(), args.flags)
    check_epoch(count_files(data, resources.effective_batch), 1, resources.effective_batch)
    return words


def _parser() -> Parser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    add_resources(parser)
    add = parser.add_argument
    add("--ranks_per_node", type=int, default=1, help="GPUs of a node, or processes where it has none")
    add("--data_path", default="", help="as the trainer's")
    add("--output_dir", required=True, help="as the trainer's")
    add("--dist_timeout", default="10", help="as the trainer's")
    add("--upstream", default="", metavar="PATH", help="a patched clone: plan the official script of the module")
    add("--cpus_per_task", type=int, default=0, help="cores of a rank; 0: the partition is not looked at [0]")
    add("--partition", default="", help="where the job will be; default: the cluster's")
    add("--qos", default="", help="of the job")
    add("--sbatch_options", default="", help="more options of sbatch")
    add("--pending", action="store_true", help="do not look for files that another job is to write first")
    add("module", help="module to run, such as mae_evolved.main_pretrain")
    add("flags", nargs=argparse.REMAINDER, help="its flags; with --upstream the official script's")
    return parser


if __name__ == "__main__":
    run_cli(PROGRAM, main)
