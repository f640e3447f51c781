"""The paper's Table 4 at tiny scale as jobs of a real Slurm: dependencies kept, nothing twice, a full table at the end."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paper.tables import TABLES
from tests.conftest import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import WAIT, until

pytestmark = pytest.mark.slow
RUNS = 19  # a tokenizer, six pre-trainings, and two runs behind each


def reproduce(cluster: Cluster, root: Path, *flags: str, **site: str) -> subprocess.CompletedProcess[str]:
    """`python -m paper.reproduce --table 4 --scale tiny FLAGS` on the login node of a cluster without GPUs."""
    values = {
        "SITE_ENV": os.devnull, "NODES": "1", "GPUS_PER_NODE": "0", "CPUS_PER_TASK": "1", "TIME": "00:20:00",
        "ACTIVATE": f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "paper.reproduce", "--table", "4", "--scale", "tiny", "--output_dir", str(root), *flags],
        cwd=ROOT, env={**cluster.environment, **values, **site}, capture_output=True, text=True, timeout=2 * WAIT, check=False,
    )  # fmt: skip


def test_table_4_from_submission_to_the_full_table(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "out"
    submitted = reproduce(cluster, root, "--submit")
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.endswith(f"{RUNS} jobs submitted, 0 in the queue already, 0 finished\n")
    jobs = {name: one["job"] for name, one in json.loads((root / "jobs.json").read_text()).items()}
    assert len(set(jobs.values())) == RUNS
    waiting = dict(re.findall(r"^(\S+): job \d+ after (\d+)$", submitted.stdout, flags=re.MULTILINE))
    assert len(waiting) == RUNS - 1 - 4, "all but the tokenizer, and the pre-training of MAE and SimMIM"
    assert all(
        jobs[name.replace(stage, "pretrain")] == job
        for name, job in waiting.items()
        if (stage := name.split("/")[2]) != "pretrain"
    )

    again = reproduce(cluster, root, "--submit")
    assert again.stdout.splitlines()[-1].startswith("0 jobs submitted"), again.stdout + again.stderr

    def left() -> str:
        return cluster.run("squeue", "--noheader", "--format=%A %j %T %r")

    def logs() -> str:
        return "\n".join(
            path.read_text()[-600:] for path in root.rglob("logs/*") if path.is_file() and "rror" in path.read_text()
        )

    until("the end of all jobs", lambda: not left().strip(), lambda: left() + logs(), seconds=4 * WAIT)
    status = reproduce(cluster, root, "--status").stdout
    assert status.endswith(f"{RUNS} finished\n"), status + logs()
    for name in waiting:
        mine, before = root / name, root / name.replace(name.split("/")[2], "pretrain")
        if mine != before:
            assert (before / "result.json").stat().st_mtime <= (mine / "run.json").stat().st_mtime
    collected = reproduce(cluster, root, "--collect")
    assert collected.returncode == 0, collected.stderr
    with (root / "table_4.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(list(TABLES["4"].cells()))
    for line in lines:
        (folder,) = line["runs"].split()
        metrics = json.loads((Path(folder) / "result.json").read_text())["metrics"]
        assert float(line["ours"]) in {round(value, 2) for value in metrics.values()}
        assert line["difference"] == (f"{float(line['ours']) - float(line['paper']):+.2f}" if line["paper"] else "")
    assert "nothing about the method" in collected.stdout
    over = reproduce(cluster, root, "--submit")
    assert over.stdout.splitlines()[-1] == f"0 jobs submitted, 0 in the queue already, {RUNS} finished"


def test_unknown_partition_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.run("scontrol", "--oneliner", "show", "jobs").count("JobId=")
    done = reproduce(cluster, tmp_path / "out", "--submit", "--only", "mae_small_200_random", PARTITION="nowhere")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "invalid partition specified: nowhere" in done.stderr
    assert done.stderr.endswith("nothing is submitted\n")
    assert cluster.run("scontrol", "--oneliner", "show", "jobs").count("JobId=") == before
    assert not (tmp_path / "out" / "jobs.json").exists()
