"""Runs behind a table of the paper: lists, submits, follows and collects them.

    python -m paper.reproduce --table 4 --dry_run --imagenet IMAGENET --ade20k ADE20K --tokenizer encoder.pkl
    python -m paper.reproduce --table 4 --submit ...      on a cluster: each run as a job behind those that it needs
    python -m paper.reproduce --table 4 --local ...       here, one after another
    python -m paper.reproduce --table 4 --status          which runs are finished, running, waiting, failed
    python -m paper.reproduce --table 4 --collect         table_4.md and table_4.csv beside the paper's numbers

--scale tiny runs the same graph on small composed scenes with tiny models, in minutes: its numbers say nothing but that all
parts work together. A finished run is never run again; --submit and --local take up what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from common.training.errors import BadInput, Parser, run_cli
from common.training.interrupt import EXIT_INTERRUPTED, Interrupted
from common.training.runlog import write_text
from paper import cost
from paper.graph import PROJECT, PlannedRun, Setting, check_recipes, data_of, graph
from paper.tables import TABLES, write_tables
from scenes.make import make_scenes
from slurm.partition import Request, check_partition
from slurm.plan import Resources, plan

PROGRAM = "paper.reproduce"
JOBS = "jobs.json"
SCENES = {"train": 96, "val": 32, "size": 64}
DATA_FLAGS = ("imagenet", "ade20k", "coco")
LAYOUTS = {
    "imagenet": "train/<class>/ and val/<class>/",
    "ade20k": "images/ and annotations/",
    "coco": "annotations/ and train2017/",
}
RunState = Literal["finished", "running", "waiting", "failed", "not submitted"]


def main(argv: Sequence[str]) -> None:
    """One of the actions."""
    args = parse(argv)
    setting = make_setting(args)
    names = list(TABLES) if args.table == "all" else [args.table]
    runs = graph(names, setting, args.only)
    if args.collect:
        collect(names, args.table, setting)
    elif args.status:
        show_status(runs, setting.root)
    else:
        check_recipes(runs)
        if args.dry_run:
            show(runs, args.tflops, setting)
            return
        check_inputs(runs, setting)
        prepare(setting)
        (submit if args.submit else run_here)(runs, setting)
        if args.local:
            collect(names, args.table, setting)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags.

    Raises:
        BadInput: an unknown flag or a value out of range.
    """
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--table", required=True, choices=[*TABLES, "all"], help="of the paper")
    actions = parser.add_mutually_exclusive_group(required=True)
    actions.add_argument("--dry_run", action="store_true", help="print every command with its GPU-hours, and their sum")
    actions.add_argument("--submit", action="store_true", help="submit what is missing, with afterok dependencies")
    actions.add_argument("--local", action="store_true", help="run what is missing on this machine, then collect")
    actions.add_argument("--status", action="store_true", help="say how each run stands")
    actions.add_argument(
        "--collect", action="store_true", help="write the table as Markdown and CSV; blank where a run is missing"
    )
    add("--output_dir", type=Path, help="root of all results [output/reproduce, for --scale tiny output/reproduce_tiny]")
    add("--scale", choices=("full", "tiny"), default="full", help="full: the paper's; tiny: the same graph in minutes [full]")
    add("--seeds", default="0", help="seeds of the whole chain, such as 0,1,2; tables give mean and standard deviation [0]")
    add("--only", default="", metavar="WORD", help="only encoders with this in their name, such as mae_ or evolved")
    for name in DATA_FLAGS:
        add(f"--{name}", default="", metavar="FOLDER", help=f"with {LAYOUTS[name]}")
    add("--tokenizer", default="", help="BEiT's: OpenAI's encoder.pkl, or one of train_tokenizer")
    share = f"{100 * cost.PUBLISHED_UTILISATION:.0f} %% of its peak, the share that MAE's published fine-tuning reached"
    add(
        "--tflops",
        type=float,
        default=cost.DEFAULT_TFLOPS,
        help=f"TFLOP/s that a GPU sustains, for the hours; default: an A100 at {share} [{cost.DEFAULT_TFLOPS}]",
    )
    args = parser.parse_args(argv)
    if not args.tflops > 0:
        raise BadInput(f"--tflops must be above 0, got {args.tflops}")
    return args


def make_setting(args: argparse.Namespace) -> Setting:
    """Where results go and data comes from."""
    words = args.seeds.split(",")
    if not all(word.isdecimal() for word in words):
        raise BadInput(f"--seeds must be numbers such as 0,1,2, got {args.seeds!r}")
    root = args.output_dir or Path("output") / ("reproduce" if args.scale == "full" else "reproduce_tiny")
    root = root.absolute()
    if args.scale == "tiny":
        data = {name: str(root / "scenes" / name) for name in DATA_FLAGS}
    else:
        data = {name: getattr(args, name) or f"<{name}>" for name in DATA_FLAGS}
    seeds = tuple(sorted({int(word) for word in words}))
    return Setting(root, args.scale, seeds, data, args.tokenizer or "<tokenizer>")


def check_inputs(runs: Sequence[PlannedRun], setting: Setting) -> None:
    """Raises BadInput for data or a tokenizer that the runs need and that is not named or not there."""
    if setting.scale == "tiny":
        return
    for name in sorted({data_of(run, setting) for run in runs}):
        folder = setting.data[name]
        if folder.startswith("<"):
            raise BadInput(f"--{name} is needed: a folder with {LAYOUTS[name]}")
        if not Path(folder).is_dir():
            raise BadInput(f"--{name} {folder}: no such folder")
    if any(setting.tokenizer in run.flags for run in runs):
        if setting.tokenizer.startswith("<"):
            raise BadInput("--tokenizer is needed for BEiT: OpenAI's encoder.pkl, or a tokenizer of beit_evolved.train_tokenizer")
        if not Path(setting.tokenizer).exists():
            raise BadInput(f"--tokenizer {setting.tokenizer}: no such file or folder")


def prepare(setting: Setting) -> None:
    """At tiny scale, composes the scenes that stand in for ImageNet, ADE20K and COCO."""
    if setting.scale == "tiny":
        content = make_scenes(setting.root / "scenes", SCENES["train"], SCENES["val"], SCENES["size"])
        print(f"{PROGRAM}: {SCENES['train']} scenes of {content['settings']['sources']} in {setting.root / 'scenes'}", flush=True)


# --- listing ---


def show(runs: Sequence[PlannedRun], tflops: float, setting: Setting) -> None:
    """Every command, what it waits for, and its hours."""
    total = 0.0
    for run in runs:
        hours = run.cost.gpu_hours(tflops) if run.cost and setting.scale == "full" else None
        total += 0.0 if run.finished or hours is None else hours
        state = "finished" if run.finished else f"{hours:.0f} GPU-hours" if hours is not None else "seconds to minutes"
        print(f"# {run.name}: {state}" + (f"; after {', '.join(run.needs)}" if run.needs else ""))
        print(f"{shlex.join([*environment(run, []), f'slurm/{run.script}.sh', *run.flags])}\n")
    unfinished = sum(not run.finished for run in runs)
    print(f"{len(runs)} runs, {unfinished} to do" + (f", about {total:.0f} GPU-hours" if setting.scale == "full" else ""))
    if setting.scale == "full":
        print(
            f"Hours are arithmetic, not timings: multiply-adds of the models at {tflops:g} TFLOP/s a GPU (paper/cost.py). "
            "Reading of data, evaluation and waiting are not in them."
        )


def environment(run: PlannedRun, after: Sequence[str]) -> list[str]:
    """NAME=VALUE words for slurm/*.sh."""
    words = [
        f"OUTPUT_DIR={run.folder}",
        f"DATA_PATH={run.data_path}",
        f"RECIPE={run.recipe}",
        f"EFFECTIVE_BATCH={run.effective_batch}",
    ]
    return [*words, *([f"AFTER={':'.join(after)}"] if after else [])]


# --- Slurm ---


def submit(runs: Sequence[PlannedRun], setting: Setting) -> None:
    """Submits the runs that are neither finished nor in the queue. All of them or, if one is refused, none.

    Raises:
        BadInput: what a run asks for cannot be; says which.
    """
    with locked(setting.root):
        jobs = read_jobs(setting.root)
        queue = read_queue(jobs)
        todo = [run for run in runs if not run.finished and run.name not in queue]
        site = site_values()
        for run in todo:
            check(run, site)
        submitted: list[str] = []
        try:
            for run in todo:
                after = [jobs[name]["job"] for name in run.needs if name in jobs and not _is_finished(name, runs)]
                jobs[run.name] = {"job": sbatch(run, after, site), "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                submitted.append(jobs[run.name]["job"])
                print(f"{run.name}: job {submitted[-1]}" + (f" after {', '.join(after)}" if after else ""), flush=True)
        except BadInput:
            if submitted:
                subprocess.run(["scancel", *submitted], check=False)
            raise
        write_text(setting.root / JOBS, json.dumps(jobs, indent=2) + "\n")
        print(f"{len(todo)} jobs submitted, {len(queue)} in the queue already, {sum(run.finished for run in runs)} finished")


def _is_finished(name: str, runs: Sequence[PlannedRun]) -> bool:
    return next(run.finished for run in runs if run.name == name)


def check(run: PlannedRun, site: dict[str, str]) -> None:
    """What the job's first act will check, before anything is submitted."""
    nodes, ranks = share(run, site)
    batch_per_gpu = int(site["BATCH_PER_GPU"] or run.batch_per_gpu)
    words = [*run.command(), "--data_path", run.data_path, "--output_dir", str(run.folder)]
    try:
        plan(words[0], words[1:], Resources(nodes, ranks, run.effective_batch, batch_per_gpu), pending=bool(run.needs))
        cpus, options = int(site["CPUS_PER_TASK"]), site["SBATCH_OPTIONS"]
        check_partition(Request(site["PARTITION"], nodes, ranks, cpus, site["QOS"], options))
    except BadInput as error:
        raise BadInput(f"{run.name}: {error}") from None


def share(run: PlannedRun, site: dict[str, str]) -> tuple[int, int]:
    """(nodes, ranks a node) of a run: the site's, or as many of them as can share the batch equally.

    What pre-training fills may be too much for UperNet's batch of 16.
    """
    if run.script == "train_tokenizer":
        return 1, 1
    nodes, ranks = int(site["NODES"] or 1), int(site["GPUS_PER_NODE"] or 8) or int(site["TASKS_PER_NODE"] or 1)
    pairs = [(n, r) for n in range(1, nodes + 1) for r in range(1, ranks + 1) if run.effective_batch % (n * r) == 0]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def site_values() -> dict[str, str]:
    """What slurm/site.env and the environment say, the latter first, as slurm/*.sh read them."""
    names = ["NODES", "GPUS_PER_NODE", "TASKS_PER_NODE", "BATCH_PER_GPU", "CPUS_PER_TASK", "PARTITION", "QOS", "SBATCH_OPTIONS"]
    prints = "; ".join(f'printf "%s\\n" "${{{name}-}}"' for name in names)
    script = f"PROJECT={shlex.quote(str(PROJECT))}; . {shlex.quote(str(PROJECT / 'slurm/job.sh'))}; {prints}"
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    if process.returncode:
        raise BadInput(f"slurm/site.env: {(process.stderr or process.stdout).strip().splitlines()[-1]}")
    return dict(zip(names, process.stdout.splitlines(), strict=True))


def sbatch(run: PlannedRun, after: Sequence[str], site: dict[str, str]) -> str:
    """Number of the job that slurm/<script>.sh submits.

    Raises:
        BadInput: refused; the script's own line.
    """
    nodes, ranks = share(run, site)
    values = dict(word.split("=", 1) for word in environment(run, after))
    values |= {"NODES": str(nodes), "TASKS_PER_NODE" if site["GPUS_PER_NODE"] == "0" else "GPUS_PER_NODE": str(ranks)}
    process = subprocess.run(
        [str(PROJECT / "slurm" / f"{run.script}.sh"), *run.flags],
        env={**os.environ, **values, "CHECKED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    numbers = [
        line.rpartition("submitted job ")[2].split(";")[0] for line in process.stdout.splitlines() if "submitted job " in line
    ]
    if process.returncode or not numbers:
        answer = (process.stderr or process.stdout).strip().splitlines() or ["no answer"]
        raise BadInput(f"{run.name}: {answer[-1]}; nothing is submitted")
    return numbers[-1]


def read_jobs(root: Path) -> dict[str, Any]:
    """Runs that were submitted -> their jobs."""
    path = root / JOBS
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None


def read_queue(jobs: dict[str, Any]) -> dict[str, str]:
    """Runs whose job is in the queue -> its state there, such as RUNNING or PENDING.

    Raises:
        BadInput: no Slurm on this machine.
    """
    if not jobs:
        return {}
    try:
        process = subprocess.run(["squeue", "--noheader", "--me", "--format=%A %T"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(f"squeue does not answer: {error}") from None
    states = dict(line.split() for line in process.stdout.splitlines())
    return {name: states[record["job"]] for name, record in jobs.items() if record["job"] in states}


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One submission at a time, so that two commands do not submit the same run."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".submitting").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{root}: another command is submitting there") from None
        yield


# --- status ---


def show_status(runs: Sequence[PlannedRun], root: Path) -> None:
    """A line for each run, then how many there are of each state."""
    jobs = read_jobs(root)
    queue = read_queue({name: jobs[name] for run in runs if (name := run.name) in jobs and not run.finished})
    states = {run.name: state_of(run, jobs, queue) for run in runs}
    for run in runs:
        job = f"  job {jobs[run.name]['job']}" if run.name in jobs and not run.finished else ""
        print(f"{states[run.name]:14}{run.name}{job}{progress_of(run)}")
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


def state_of(run: PlannedRun, jobs: dict[str, Any], queue: dict[str, str]) -> RunState:
    """By the result file first, then by the queue."""
    if run.finished:
        return "finished"
    if run.name in queue:
        return "running" if queue[run.name] in ("RUNNING", "COMPLETING") else "waiting"
    return "failed" if run.name in jobs else "not submitted"


def progress_of(run: PlannedRun) -> str:
    """Epochs that a started, unfinished run has logged."""
    log = run.folder / "log.txt"
    if run.finished or not log.exists():
        return ""
    return f"  {len(log.read_text().splitlines())} epochs; {run.folder}"


# --- this machine ---


def run_here(runs: Sequence[PlannedRun], setting: Setting) -> None:
    """Runs what is missing in this order, one process each.

    Raises:
        BadInput: a run was refused.
        Interrupted: a run was stopped with its state saved.
        RuntimeError: a run failed.
    """
    for number, run in enumerate(runs, start=1):
        if run.finished:
            continue
        batch, steps = Resources(1, 1, run.effective_batch, run.batch_per_gpu).split()
        words = [*run.command(), "--data_path", run.data_path, "--output_dir", str(run.folder)]
        print(f"{PROGRAM}: [{number}/{len(runs)}] {run.name}", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", *words, "--batch_size", str(batch), "--accum_iter", str(steps)], cwd=PROJECT, check=False
        ).returncode
        if code == EXIT_INTERRUPTED:
            raise Interrupted(f"{run.name} was asked to stop; the same command continues")
        if code == 2:
            raise BadInput(f"{run.name}: refused, see above")
        if code:
            raise RuntimeError(f"{run.name} failed with exit code {code}; its output is above")


# --- tables ---


def collect(names: Sequence[str], table: str, setting: Setting) -> None:
    """Writes and prints the tables."""
    claim = ""
    if setting.scale == "tiny":
        claim = (
            "Runs at tiny scale: models of 5 million weights on about a hundred composed scenes of 64 px, for minutes. The "
            "numbers show that every part runs, and nothing about the method; they cannot be compared with the paper's."
        )
    paths = write_tables(names, setting.root, setting.root / f"table_{table}", claim)
    print(paths[0].read_text())
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
