"""Submits a trainer through submitit: `python -m slurm.launch [options] -- MODULE [its flags]`.

    python -m slurm.launch --executor slurm --partition gpu --nodes 2 --gpus_per_node 8 --effective_batch 4096 \
        --batch_per_rank 256 -- mae_evolved.main_pretrain --config table4_mae_small_200 \
        --data_path IMAGENET --output_dir OUT

The same checks as slurm/*.sh come first. A job that is preempted or reaches its time limit saves its state, is requeued and
continues. `--executor local` runs it on this machine, `--executor debug` in this process.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.training.config import RunConfig
from common.training.errors import BadInput, Parser, run_cli
from slurm.partition import Request, check_partition
from slurm.plan import Resources, add_resources, check_folder, configuration, plan
from slurm.rank import Training  # before submitit: sets the signal that submitit will use

import submitit  # isort: skip
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError  # isort: skip

PROGRAM = "slurm.launch"
PROJECT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> None:
    """Checks, then submits, runs or renders."""
    args, module, flags = parse(argv)
    ranks = args.gpus_per_node or args.tasks_per_node
    if args.executor == "debug":
        args.nodes = ranks = 1
    resources = Resources(args.nodes, ranks, args.effective_batch, args.batch_per_rank)
    words = plan(module, flags, resources)
    config = configuration(module, words)[0]
    job_dir = Path(args.job_dir or Path(config.output_dir) / "submitit").absolute()
    check_folder("--job_dir", job_dir)
    if args.executor == "slurm" and not args.render:
        options = " ".join(f"--{option.removeprefix('--')}" for option in args.sbatch)
        check_partition(Request(args.partition or "", args.nodes, ranks, args.cpus_per_task, args.qos or "", options))
    executor = make_executor(args, ranks, job_dir)
    if args.render:
        Path(args.render).write_text(batch_script(executor))
        return
    print(f"{PROGRAM}: {resources.summary()}", flush=True)
    run(executor, Training(module, words, config.output_dir), config, args.wait)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(options, module, its flags).

    Raises:
        BadInput: no module, an unknown option, or options that the executor does not know.
    """
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args, command = _parser().parse_args(argv[:cut]), list(argv[cut + 1 :])
    if not command:
        raise BadInput("MODULE is missing: write the trainer and its flags behind --, as in: -- mae_evolved.main_pretrain ...")
    if args.render and args.executor != "slurm":
        raise BadInput(f"--render writes the batch script of --executor slurm, got --executor {args.executor}")
    if args.executor != "slurm" and args.nodes > 1:
        raise BadInput(f"--executor {args.executor} is this machine alone, got --nodes {args.nodes}")
    for name in ("time", "cpus_per_task", "signal_seconds"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be 1 or more, got {getattr(args, name)}")
    return args, command[0], command[1:]


def make_executor(args: argparse.Namespace, ranks: int, job_dir: Path) -> submitit.AutoExecutor:
    """The executor with all that is asked of the cluster.

    Raises:
        BadInput: no Slurm on this machine, or an option that submitit does not take.
    """
    if args.executor == "slurm" and shutil.which("srun") is None:
        raise BadInput("--executor slurm: srun is not on PATH, this is no node of a Slurm cluster (--executor local runs here)")
    # submitit's local controller makes a folder by the name it is given, %j and all: there the launch has one, not the job.
    folder = job_dir / (f"local-{os.getpid()}" if args.executor == "local" else "%j")
    executor = submitit.AutoExecutor(folder=folder, cluster=args.executor, slurm_max_num_timeout=args.max_restarts)
    if args.executor == "debug":
        return executor
    options: dict[str, Any] = {
        "name": args.job_name,
        "timeout_min": args.time,
        "nodes": args.nodes,
        "tasks_per_node": ranks,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": args.mem_gb,
    }
    if args.executor == "slurm":
        options |= _slurm_options(args)
    executor.update_parameters(**{key: value for key, value in options.items() if value is not None})
    return executor


def _slurm_options(args: argparse.Namespace) -> dict[str, Any]:
    extra = dict(_pair(word) for word in args.sbatch)
    return {
        "slurm_partition": args.partition,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_signal_delay_s": args.signal_seconds,
        # srun does not take sbatch's cores a task over; a rank that dies ends the others.
        "slurm_srun_args": [f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=1"],
        "slurm_setup": [f"export PYTHONPATH={PROJECT}${{PYTHONPATH:+:$PYTHONPATH}} SUBMITIT_PREEMPT_SIGNAL=USR1", *args.setup],
        "slurm_additional_parameters": {"requeue": True, **extra},
    }


def _pair(word: str) -> tuple[str, str | bool]:
    name, equals, value = word.removeprefix("--").partition("=")
    if not name:
        raise BadInput(f"--sbatch must be NAME or NAME=VALUE, got {word!r}")
    return name, value if equals else True


def batch_script(executor: submitit.AutoExecutor) -> str:
    """The script that would be given to sbatch."""
    slurm: Any = executor._executor
    return str(slurm._make_submission_file_text(slurm._submitit_command_str, ""))


def run(executor: submitit.AutoExecutor, training: Training, config: RunConfig, wait: bool) -> None:
    """Submits, and waits for the end if asked to or if the job is this process.

    Raises:
        BadInput: the cluster refuses the job.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    job = submit(executor, training)
    if executor.cluster == "debug":
        failed = job.exception()
        if failed is not None:
            raise failed
        return
    print(f"{PROGRAM}: job {job.job_id}; ranks write {job.paths.folder}/{job.job_id}_*_log.out and .err", flush=True)
    if not wait:
        return
    try:
        job.results()
    except (FailedJobError, UncompletedJobError) as error:
        raise SystemExit(f"{PROGRAM}: job {job.job_id} failed: {error}") from None
    print(f"{PROGRAM}: finished; {config.output_dir}")


def submit(executor: submitit.AutoExecutor, training: Training) -> submitit.Job[None]:
    """The submitted job.

    Raises:
        BadInput: the cluster refuses it; submitit's files for it are taken away again.
    """
    folder = executor.folder.parent
    before = set(folder.glob("*")) | set(folder.glob(".*"))
    try:
        return executor.submit(training)
    except (FailedJobError, FailedSubmissionError) as error:
        for path in (set(folder.glob("*")) | set(folder.glob(".*"))) - before:
            if path.is_file():
                path.unlink()
        marks = ("sbatch: error: ", "sbatch: fatal: ")
        lines = [line.removeprefix(mark) for line in str(error).splitlines() for mark in marks if line.startswith(mark)]
        raise BadInput(f"not submitted: {'; '.join(lines) or error}") from None


def _parser() -> Parser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--executor", choices=("slurm", "local", "debug"), default="slurm", help="where to run [slurm]")
    add_resources(parser)
    add("--gpus_per_node", type=int, default=0, help="GPUs of a node, one rank each [0: CPUs]")
    add("--tasks_per_node", type=int, default=1, help="ranks of a node without GPUs [1]")
    add("--cpus_per_task", type=int, default=10, help="cores of a rank [10]")
    add("--mem_gb", type=float, help="memory of a node in GB")
    add("--time", type=int, default=1440, help="minutes of one start; a longer run is requeued [1440]")
    add("--partition", help="as sbatch's")
    add("--account", help="as sbatch's")
    add("--qos", help="as sbatch's")
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="another option of sbatch; may be repeated")
    add("--setup", action="append", default=[], metavar="COMMAND", help="shell command before the ranks start; may be repeated")
    add("--signal_seconds", type=int, default=120, help="ranks save and leave this long before the time is up [120]")
    add("--max_restarts", type=int, default=1000, help="restarts after a time limit [1000]")
    add("--job_name", default="evolved_masks", help="as sbatch's [evolved_masks]")
    add("--job_dir", help="submitit's files and the ranks' logs, on a disk that all nodes see [<output_dir>/submitit]")
    add("--wait", action="store_true", help="return when the job has ended; exit code 1 if it failed")
    add("--render", metavar="FILE", help="write the batch script and submit nothing")
    return parser


if __name__ == "__main__":
    run_cli(PROGRAM, main)
