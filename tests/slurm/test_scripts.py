"""The batch scripts on a login node, with programs that only write down how they were called in the place of Slurm's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.partition import Request, check_partition
from tests.conftest import ROOT
from tests.methods import write_tokenizer
from tests.slurm.conftest import TINY, WAIT, script

SCRIPTS = ("pretrain_mae", "pretrain_beit", "pretrain_simmim")


class Login:
    """A login node: a folder that comes first on PATH, in which sbatch records its options."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        (folder / "bin").mkdir()
        self.program("sbatch", f'printf "%s\\n" "$@" > {self.record}; env > {self.record}.env; echo "77;cluster"')
        (folder / "tiny.toml").write_text(TINY)
        self.environment = {**os.environ, "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.values: dict[str, object] = {
            "DATA_PATH": images, "OUTPUT_DIR": folder / "out", "RECIPE": folder / "tiny.toml", "ACTIVATE": "true",
            "EFFECTIVE_BATCH": 16, "BATCH_PER_GPU": 4,
        }  # fmt: skip

    def program(self, name: str, text: str) -> None:
        """A shell script on PATH."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def __call__(self, name: str, *flags: str, **values: object) -> subprocess.CompletedProcess[str]:
        return script(name, *flags, environment=self.environment, **{**self.values, **values})


@pytest.fixture
def login(tmp_path: Path, image_folder: Path) -> Login:
    (tmp_path / "login").mkdir()
    return Login(tmp_path / "login", image_folder)


def test_submitted_with_the_site_s_values(login: Login) -> None:
    done = login(
        *("pretrain_mae", "--seed", "3"),
        **{"PARTITION": "gpu", "ACCOUNT": "lab 7", "QOS": "", "TIME": "1:00:00", "NODES": 2, "GPUS_PER_NODE": 2, "MEM": "10G"},
        **{"CPUS_PER_TASK": 5, "SIGNAL_SECONDS": 60, "SBATCH_OPTIONS": "--exclusive --constraint=h100"},
    )
    assert done.returncode == 0, done.stderr
    logs = login.folder / "out" / "logs"
    assert done.stdout.splitlines() == [
        "pretrain_mae: 2 nodes x 2 ranks, batch 4 x 1 accumulation steps a rank = 16 images an update",
        f"pretrain_mae: submitted job 77; its output: {logs}",
    ]
    assert login.record.read_text().splitlines() == [
        *("--parsable", "--export=ALL", "--job-name=pretrain_mae", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"),
        *(
            "--cpus-per-task=5",
            "--time=1:00:00",
            "--signal=USR1@60",
            "--requeue",
            "--open-mode=append",
            f"--output={logs}/%j.out",
        ),
        *("--partition=gpu", "--account=lab 7", "--mem=10G", "--exclusive", "--constraint=h100"),
        *(str(ROOT / "slurm" / "pretrain_mae.sh"), "--seed", "3"),
    ]
    assert "NODES=2" in Path(f"{login.record}.env").read_text().splitlines()


def test_site_file_is_read_and_the_environment_wins(login: Login) -> None:
    site = login.folder / "site.env"
    site.write_text("PARTITION=of_site\nNODES=4\nGPUS_PER_NODE=1\nBATCH_PER_GPU=1\n")
    values = {key: value for key, value in login.values.items() if key != "BATCH_PER_GPU"}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain_mae.sh")],
        env={**login.environment, **{key: str(value) for key, value in values.items()}, "SITE_ENV": str(site), "NODES": "2"},
        cwd=login.folder, capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 nodes x 1 ranks, batch 1 x 8 accumulation steps" in done.stdout
    assert {"--partition=of_site", "--nodes=2"} <= set(login.record.read_text().splitlines())


def test_example_of_a_site_file_sets_only_what_the_scripts_read() -> None:
    example = (ROOT / "slurm" / "site.env.example").read_text()
    names = {line.split("=")[0] for line in example.splitlines() if line and not line.startswith("#")}
    known = (ROOT / "slurm" / "job.sh").read_text().split('VALUES="')[1].split('"')[0].split()
    assert names <= set(known)
    assert subprocess.run(["bash", "-n", str(ROOT / "slurm" / "site.env.example")], check=False).returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_fit_on_a_screen_and_submit(login: Login, name: str) -> None:
    text = (ROOT / "slurm" / f"{name}.sh").read_text()
    assert len(text.splitlines()) <= 40
    assert f"--job-name={name} " in text
    assert os.access(ROOT / "slurm" / f"{name}.sh", os.X_OK)
    recipe = (login.folder / "tiny.toml").read_text()
    model = {"pretrain_beit": "beit_tiny_patch4_8k_vocab", "pretrain_simmim": "simmim_vit_tiny_patch4"}.get(name)
    (login.folder / "tiny.toml").write_text(recipe.replace("mae_vit_tiny_patch4", model) if model else recipe)
    done = login(name, TOKENIZER=write_tokenizer(login.folder / "tokenizer"), GPUS_PER_NODE=4)
    assert done.returncode == 0, done.stderr
    assert login.record.read_text().splitlines()[-1] == str(ROOT / "slurm" / f"{name}.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipe_of_a_script_is_there_with_its_effective_batch(name: str) -> None:
    """The effective batch of a script is the one that its recipe states."""
    text = (ROOT / "slurm" / f"{name}.sh").read_text()
    recipe = (ROOT / text.split("RECIPE=$PROJECT/")[1].split("}")[0]).read_text()
    effective = text.split("EFFECTIVE_BATCH=")[1].split("}")[0]
    assert f"effective batch {effective}" in recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"DATA_PATH": ""}, "pretrain_mae: error: DATA_PATH is not set"),
        ({"DATA_PATH": "/nowhere"}, "--data_path /nowhere: no such folder"),
        ({"NODES": 3}, "3 nodes x 8 GPUs (or processes) = 24 ranks cannot share an effective batch of 16"),
        ({"SITE_ENV": "/nowhere.env"}, "SITE_ENV /nowhere.env: no such file"),
        ({"ACTIVATE": "false"}, "ACTIVATE false: no such file, and it fails as a command"),
        ({"UPSTREAM": "/nowhere"}, "/nowhere is not a folder"),
        ({"EFFECTIVE_BATCH": 24}, "an effective batch of 24 images an update, but an epoch has 16 (16 images x --repeat 1)"),
        ({"flags": "--output_dir x"}, "--output_dir: set OUTPUT_DIR in its place"),
    ],
)
def test_refused_in_one_line_and_nothing_submitted(login: Login, values: dict[str, object], message: str) -> None:
    done = login("pretrain_mae", *str(values.pop("flags", "")).split(), **values)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not login.record.exists()
    assert not (login.folder / "out").exists()


def test_refusal_of_sbatch_is_one_line(login: Login) -> None:
    login.program("sbatch", "echo 'sbatch: error: invalid account' >&2; echo 'sbatch: error: submission failed' >&2; exit 1")
    done = login("pretrain_mae")
    assert done.returncode == 2
    assert done.stderr == "pretrain_mae: error: not submitted: invalid account; submission failed\n"


# --- help ---

ALL_SCRIPTS = sorted(path.stem for path in (ROOT / "slurm").glob("*.sh") if "\nlaunch " in path.read_text())


@pytest.mark.parametrize(
    ("name", "flags"),
    [*((name, "--help") for name in ALL_SCRIPTS), ("pretrain_mae", "-h"), ("segment", "--seed 3 --help --epochs 2")],
)
def test_help_prints_variables_and_flags_and_submits_nothing(login: Login, name: str, flags: str) -> None:
    """The flags are those of the command's own --help, which is run whole for one script of each package."""
    if name not in ("pretrain_mae", "segment"):
        login.program("python", 'echo "$@ --weight_decay --config RECIPE"')
    done = login(name, *flags.split(), DATA_PATH="", NODES="2", TIME="7:00:00")
    assert done.returncode == 0, done.stderr
    assert not login.record.exists()
    assert not (login.folder / "out").exists()
    shown = done.stdout
    assert f"slurm/{name}.sh" in shown.split("\n\n")[0]
    assert "#SBATCH --" not in shown.split("\n\n")[0]
    lines = [line.split() for line in shown.splitlines()]
    assert ["TIME=7:00:00", "of", "one", "start;", "a", "longer", "run", "is", "requeued", "and", "goes", "on"] in lines
    variables = {line[0].split("=")[0] for line in lines if line and line[0].split("=")[0].isupper() and "=" in line[0]}
    own = set(re.findall(r'^: "\$\{([A-Z_]+)=', (ROOT / "slurm" / f"{name}.sh").read_text(), flags=re.M))
    assert own | {"PARTITION", "CPUS_PER_TASK", "MAX_RESTARTS", "AFTER", "OUTPUT_DIR", "DATA_PATH"} <= variables
    assert ("UPSTREAM" in variables) == ("UPSTREAM" in own), "only what the script reads"
    assert re.search(r"^-m \w+\.\w+ --help|^usage: ", shown, re.MULTILINE)
    assert "--weight_decay" in shown
    assert "--config RECIPE" in shown


@pytest.mark.parametrize("flags", ["--config --help", "--init_from x -h", "--help=x"])
def test_help_in_the_place_of_a_value_submits_nothing(login: Login, flags: str) -> None:
    login("finetune", *flags.split())
    assert not login.record.exists()


# --- the partition ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NODES": 4}, "4 nodes are asked for, but partition small has 3: the job would wait for ever"),
        ({"CPUS_PER_TASK": 20}, "40 CPUs a node (2 ranks x 20) are asked for, but partition small has at most 32"),
        (
            {"NODES": 2, "CPUS_PER_TASK": 16},
            "2 nodes with 32 CPUs a node (2 ranks x 16) are asked for, but partition",
        ),
        ({"NODES": 4, "PARTITION": "wide"}, "4 nodes are asked for, but partition wide gives a job at most 2"),
        ({"NODES": 16, "PARTITION": "small,wide", "GPUS_PER_NODE": 1}, "but partition small has 3; 16 nodes are asked for, but"),
        ({"NODES": 4, "PARTITION": "", "SBATCH_PARTITION": "small"}, "but partition small has 3"),
    ],
)
def test_more_than_the_partition_can_ever_give_is_refused(login: Login, values: dict[str, object], message: str) -> None:
    groups = ("small|small*|2|16|1-infinite|UNLIMITED", "small|small*|1|64|1-infinite|32", "wide|wide|8|64|1-2|UNLIMITED")
    file = login.folder / "groups"
    file.write_text("".join(f"{line}\n" for line in groups))
    login.program("sinfo", f'case "$*" in *=small) grep ^small {file} ;; *=wide) grep ^wide {file} ;; *) cat {file} ;; esac')
    usual = {"NODES": 1, "GPUS_PER_NODE": 2, "CPUS_PER_TASK": 4}
    done = login("pretrain_mae", **{**usual, **values})
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not login.record.exists()
    assert not (login.folder / "out").exists()


@pytest.mark.parametrize(
    ("program", "request_"),
    [
        ("exit 1", Request("", 16, 1, 1)),
        ("echo 'gpu|gpu*|1K|8|1-infinite|UNLIMITED'", Request("", 16, 1, 1)),
        ("echo nonsense", Request("", 16, 1, 1)),
        ("true", Request("unknown", 16, 1, 1)),
        ("echo 'gpu|gpu|2|8|1-infinite|UNLIMITED'", Request("", 16, 1, 1)),  # not the default, which a plug-in may choose
        ("echo 'gpu|gpu*|2|8|1-infinite|UNLIMITED'", Request("", 16, 1, 1, options="--exclusive --partition=other")),
        ("echo 'gpu|gpu*|16|8|1-2|UNLIMITED'", Request("", 16, 1, 8, qos="large")),
        ("echo 'gpu|gpu*|16|8|1-16|8'", Request("gpu", 16, 2, 4)),
    ],
)
def test_what_slurm_does_not_rule_out_is_left_to_sbatch(
    program: str, request_: Request, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    login.program("sinfo", program)
    monkeypatch.setenv("PATH", login.environment["PATH"])
    check_partition(request_)
