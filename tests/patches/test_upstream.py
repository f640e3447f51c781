"""Patches on the official repositories themselves. Needs clones at the pinned commits, named in the environment:

    UPSTREAM_MAE=PATH UPSTREAM_BEIT=PATH UPSTREAM_SIMMIM=PATH make test-upstream

Every run is a process of its own in a clone of the clone; what is given is only read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_evolved.model import BEiT
from common.masks import grid_classes
from common.training.checkpoint import load_weights, read_checkpoint
from downstream.vit import BackboneViT, build_encoder
from downstream.weights import load_encoder
from mae_evolved.model import MaskedAutoencoder
from patches import apply, seam
from patches.apply import HERE, read_patch, read_upstream
from simmim_evolved.model import SimMIM
from tests.conftest import assert_same, write_images

ROOT = HERE.parent
DRIVER, PARITY = (Path(__file__).parent / f"official_{name}.py" for name in ("driver", "parity"))
EPOCHS = 3
VARIABLES = {name: f"UPSTREAM_{name.upper()}" for name in ("mae", "beit", "simmim")}

if not any(map(os.environ.get, VARIABLES.values())):
    pytest.skip(
        f"run it with {' '.join(f'{variable}=PATH' for variable in VARIABLES.values())} make test-upstream",
        allow_module_level=True,
    )


@dataclass
class Clone:
    """An official repository, unpatched and patched, and the flags of a short run of it on a CPU."""

    name: str
    plain: Path
    patched: Path
    work: Path
    script: str
    flags: str
    checkpoint: str  # of an epoch, under the output folder
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def code(self, root: Path) -> Path:
        return root / read_upstream(self.name).folder

    def output(self, label: str) -> Path:
        return self.work / f"output-{label}"

    def saved(self, label: str, epoch: int) -> Path:
        return self.output(label) / self.checkpoint.format(epoch)

    def run(self, label: str, flags: str = "", *, patched: bool = True) -> dict[str, Any]:
        """Losses, masks and parts of a run; made once for a label."""
        if label not in self.runs:
            record = self.work / f"{label}.pt"
            flags = f"{self.flags.format(output=self.output(label))} {flags}"
            command = [sys.executable, "-W", "ignore", str(DRIVER), self.name, str(record), self.script, *flags.split()]
            done = execute(command, self.code(self.patched if patched else self.plain))
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            self.runs[label] = torch.load(record)
        return self.runs[label]


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """In `folder`, with this project and what the caller has on PYTHONPATH; as rank 0 of 1 for SimMIM, unknown to the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if (folder / "main_simmim.py").exists():
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout


def check_out(source: Path, target: Path, name: str) -> Path:
    """A clone at the pinned commit; of unilm only the folder that is needed."""
    upstream = read_upstream(name)
    root = git(source, "rev-parse", "--show-toplevel").strip()
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", root, str(target)], check=True)
    if upstream.folder != ".":
        git(target, "sparse-checkout", "set", upstream.folder)
    git(target, "checkout", "--quiet", upstream.commit)
    return target


FLAGS = {
    "mae": (
        "main_pretrain.py",
        f"--model tiny --batch_size 4 --epochs {EPOCHS} --warmup_epochs 1 --blr 1e-2 --num_workers 1 --device cpu "
        "--norm_pix_loss --data_path {images} --output_dir {{output}} --log_dir {{output}}",
        "checkpoint-{}.pth",
    ),
    # One worker: BEiT draws with Python's generator, which it seeds in workers only.
    "beit": (
        "run_beit_pretraining.py",
        f"--model tiny --batch_size 4 --epochs {EPOCHS} --save_ckpt_freq 1 --warmup_epochs 0 --lr 1e-3 --num_workers 1 "
        "--device cpu --no_auto_resume --discrete_vae_type customized --discrete_vae_weight_path {work} "
        "--data_path {images} --output_dir {{output}}",
        "checkpoint-{}.pth",
    ),
    "simmim": (
        "main_simmim.py",
        "--cfg {work}/tiny.yaml --batch-size 4 --amp-opt-level O0 --data-path {images}/train --output {{output}}",
        "tiny/default/ckpt_epoch_{}.pth",
    ),
}
TINY_YAML = (
    "{{MODEL: {{TYPE: vit, NAME: tiny, VIT: {{EMBED_DIM: 48, DEPTH: 2, NUM_HEADS: 3}}}}, DATA: {{NUM_WORKERS: 1}}, "
    "TRAIN: {{EPOCHS: {}, WARMUP_EPOCHS: 1, BASE_LR: 0.1}}, PRINT_FREQ: 1, SAVE_FREQ: 1}}"
)
RANDOM_TOKENIZER = """
import sys, torch
from patches import seam
sys.path.insert(0, ".")
seam.prepare("beit")
from modeling_discrete_vae import DiscreteVAE
torch.manual_seed(0)
model = DiscreteVAE(image_size=112, num_layers=3, num_tokens=8192, codebook_dim=512, hidden_dim=256)
torch.save({"weights": model.state_dict()}, sys.argv[1])
"""


@pytest.fixture(scope="module", params=VARIABLES)
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    name = request.param
    variable = VARIABLES[name]
    if not os.environ.get(variable):
        pytest.skip(f"run it with {variable}=PATH make test-upstream, PATH a clone of {read_upstream(name).url}")
    work = tmp_path_factory.mktemp(name)
    plain, patched = (check_out(Path(os.environ[variable]), work / kind, name) for kind in ("plain", "patched"))
    apply.main([name, str(patched)])
    for seed, label in enumerate(("bird", "cat")):
        write_images(work / "images" / "train" / label, 4, size=(96, 80), seed=seed)
        write_images(work / "images" / "val" / label, 1, size=(96, 80), seed=seed + 2)
    script, flags, checkpoint = FLAGS[name]
    made = Clone(name, plain, patched, work, script, flags.format(images=work / "images", work=work), checkpoint)
    if name == "simmim":
        (work / "tiny.yaml").write_text(TINY_YAML.format(EPOCHS))
    if name == "beit":
        done = execute([sys.executable, "-W", "ignore", "-c", RANDOM_TOKENIZER, f"{work}/pytorch_model.bin"], made.code(plain))
        assert done.returncode == 0, done.stderr
    return made


def test_only_added_lines(clone: Clone) -> None:
    rows = [line.split("\t") for line in git(clone.patched, "diff", "--numstat").splitlines()]
    assert {path for _, _, path in rows} == set(read_upstream(clone.name).blobs)
    assert all(removed == "0" for _, removed, _ in rows)
    assert 0 < sum(int(added) for added, _, _ in rows) <= 25
    for _, _, path in rows:
        compile((clone.patched / path).read_text(), path, "exec")


def test_export_and_git_agree_with_the_patch_file(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    text = (HERE / f"{clone.name}.patch").read_text()
    apply.main([clone.name, str(clone.patched), "--export"])
    assert capsys.readouterr().out == text
    git(clone.plain, "apply", "--unidiff-zero", str(HERE / f"{clone.name}.patch"))
    assert git(clone.plain, "diff") == git(clone.patched, "diff")
    apply.main([clone.name, str(clone.plain), "--reverse"])
    assert git(clone.plain, "status", "--porcelain") == ""


def test_no_line_of_the_official_code_is_ours(clone: Clone) -> None:
    """Inserted lines, and the code behind them, against every Python line of the upstream."""
    folder = clone.code(clone.plain)
    theirs = {line.strip() for path in folder.rglob("*.py") for line in path.read_text(errors="replace").splitlines()}
    patch = [line for hunks in read_patch(read_upstream(clone.name)).values() for hunk in hunks for line in hunk.lines]
    assert not {line.strip() for line in patch if line.strip()} & theirs
    files = [*(ROOT / "common").glob("official*.py"), *(ROOT / "patches").glob("**/*.py"), *Path(__file__).parent.glob("*.py")]
    ours = {line.strip() for path in files for line in path.read_text().splitlines()}
    telling = {line for line in ours & theirs if len(line) > 30 and not re.match(r"import |from ", line)}
    assert not telling


def test_official_masks_are_the_unpatched_run(clone: Clone) -> None:
    """Loss of every step, every tensor of the last checkpoint, and as many random numbers drawn."""
    plain = clone.run("plain", patched=False)
    same = clone.run("official", "--mask official")
    print(f"\n{clone.name} unpatched               {plain['losses']}\n{clone.name} patched, official mask {same['losses']}")
    assert len(plain["losses"]) == 2 * EPOCHS
    assert same["losses"] == plain["losses"]
    assert same["masks"] == []
    assert torch.equal(same["next_random"], plain["next_random"])
    first, second = (load(clone, label) for label in ("plain", "official"))
    assert first.keys() == second.keys()
    assert_same(first["model"], second["model"])
    assert_same(first["optimizer"]["state"], second["optimizer"]["state"])


def load(clone: Clone, label: str, epoch: int = EPOCHS - 1) -> dict[str, Any]:
    """A checkpoint of a run of ours, so read with all that is in it."""
    return torch.load(clone.saved(label, epoch), weights_only=False)


def test_evolved_masks_evolve(clone: Clone) -> None:
    made = clone.run("evolved")
    count = {"mae": 147, "beit": 75, "simmim": 117}[clone.name]
    assert made["epochs"] == [epoch for epoch in range(EPOCHS) for _ in range(2)]
    assert all(mask.sum(dim=1).tolist() == [count] * 4 for mask in made["masks"])
    by_grid = [share_of_grid_masks(made, epoch) for epoch in range(EPOCHS)]
    assert by_grid[0] == 1.0
    assert by_grid[-1] < 1.0
    assert all(parts.eq(-1).all() for parts in made["parts"][:2])
    assert made["parts"][-1].max() > 0
    assert len({round(loss, 6) for loss in made["losses"]}) == 2 * EPOCHS


def share_of_grid_masks(made: dict[str, Any], epoch: int) -> float:
    """Images whose mask is whole classes of the 2x2 grid, but for the one class in which the count ends."""
    classes = grid_classes(14, 14)
    masks: Tensor = torch.cat([mask for mask, made_at in zip(made["masks"], made["epochs"], strict=True) if made_at == epoch])
    inside = torch.stack([masks[:, classes == grid_class].sum(dim=1) for grid_class in range(4)], dim=1)
    return float((((inside != 0) & (inside != 49)).sum(dim=1) <= 1).float().mean())


@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_resume_continues_exactly(clone: Clone, recipe: str) -> None:
    """Epochs 1 and 2 after a resume from epoch 0 are those of the uninterrupted run: crops, masks, losses, weights."""
    whole = clone.run(f"whole-{recipe}", f"--recipe {recipe}")
    rest = clone.run(f"rest-{recipe}", f"--recipe {recipe} --resume {clone.saved(f'whole-{recipe}', 0)}")
    assert rest["losses"] == whole["losses"][2:]
    assert_same(rest["masks"], whole["masks"][2:])
    first, second = (load(clone, f"{label}-{recipe}") for label in ("whole", "rest"))
    assert_same(first["model"], second["model"])
    assert_same(first["optimizer"]["state"], second["optimizer"]["state"])
    assert_same(first[seam.STATE_KEY], second[seam.STATE_KEY])
    assert (first[seam.STATE_KEY]["ema"] is not None) == (recipe == "authors")


def test_resume_with_other_masks_is_refused(clone: Clone) -> None:
    clone.run("whole-paper", "--recipe paper")
    flags = f"{clone.flags.format(output=clone.output('other'))} --gamma 3 --resume {clone.saved('whole-paper', 0)}"
    command = [sys.executable, "-W", "ignore", str(DRIVER), clone.name, str(clone.work / "other.pt"), clone.script]
    done = execute([*command, *flags.split()], clone.code(clone.patched))
    assert done.returncode == 2
    assert "error: the saved masks were made with other settings: gamma 2.0 -> 3.0" in done.stderr


def run_script(clone: Clone, script: str, flags: str) -> subprocess.CompletedProcess[str]:
    """No driver here: the command line as a user gives it, in the patched clone."""
    return execute([sys.executable, "-W", "ignore", script, *flags.split()], clone.code(clone.patched))


def pretrain_small(clone: Clone) -> Path:
    """One epoch of ViT-S with evolved masks, once for a clone; its checkpoint."""
    output = clone.output("small")
    if not output.exists():
        small = {"mae": "mae_vit_small_patch16", "beit": "beit_small_patch16_224_8k_vocab"}
        flags = clone.flags.format(output=output).replace("--model tiny", f"--model {small.get(clone.name)}")
        flags = re.sub(r"--epochs \d", "--epochs 1", flags)
        if clone.name == "simmim":
            (config,) = (HERE / "configs").glob("simmim_pretrain*vit_small*.yaml")
            flags = flags.replace(f"{clone.work}/tiny.yaml", str(config)) + " --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
        done = run_script(clone, clone.script, f"{flags} --mask part")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "evolved masks: part" in done.stdout
    (saved,) = output.rglob("*.pth")
    return saved


def test_small_model_runs_by_its_official_name(clone: Clone) -> None:
    weights = torch.load(pretrain_small(clone), weights_only=False)["model"]
    (key,) = [key for key in weights if key.endswith("blocks.11.norm1.weight")]
    assert weights[key].shape == (384,)


COMMON = (
    "--batch_size 2 --epochs 1 --warmup_epochs 0 --num_workers 1 --device cpu --data_path {images} --output_dir {output} "
    "--finetune {weights}"
)
MIXED = "--mixup 0.8 --cutmix 1.0"
FINE_TUNING = {
    "mae": (
        ("main_finetune.py", f"--model vit_small_patch16 {COMMON} {MIXED} --log_dir {{output}}", True),
        ("main_linprobe.py", f"--model vit_small_patch16 {COMMON} --log_dir {{output}}", False),
    ),
    "beit": (("run_class_finetuning.py", f"--model beit_small_patch16_224 {COMMON} {MIXED} --nb_classes 1000", True),),
    "simmim": (
        (
            "main_finetune.py",
            "--cfg {configs}/simmim_finetune__vit_small__img224__100ep.yaml --batch-size 2 --data-path {images} "
            "--amp-opt-level O0 --pretrained {weights} --output {output} "
            "--opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DATA.NUM_WORKERS 1",
            True,
        ),
    ),
}
"""Script, flags, and whether its encoder is trained; a linear probe leaves it as it was."""


def test_official_fine_tuning_starts_from_the_small_model(clone: Clone) -> None:
    """Every script of a clone: one epoch of 4 steps from pre-trained weights, whose checkpoint is read here as well.

    Its names are those of our encoder, and a block has weights of the pre-training: the same in a probe, near in fine-tuning.
    """
    start = pretrain_small(clone)
    before = build_encoder("vit_small_patch16", clone.name)
    load_encoder(before, start)
    for script, flags, trains in FINE_TUNING[clone.name]:
        output = clone.output(script)
        flags = flags.format(images=clone.work / "images", output=output, weights=start, configs=HERE / "configs")
        done = run_script(clone, script, flags)
        assert done.returncode == 0, script + done.stdout[-1000:] + done.stderr[-3000:]
        saved = max(output.rglob("*.pth"), key=lambda path: path.stat().st_mtime)
        weights = read_checkpoint(saved)["model"]
        tasks = {key for key in weights if not key.startswith(("head.", "fc_norm.", "norm."))}
        assert tasks == set(before.state_dict())
        after = build_encoder("vit_small_patch16", clone.name)
        load_encoder(after, saved)
        first, second = (encoder.blocks[11].attn.qkv.weight.detach() for encoder in (before, after))
        assert torch.equal(first, second) != trains, script
        assert float((first - second).abs().max()) < 0.1 * float(first.abs().max()), script


def test_checkpoints_as_really_written_are_read(clone: Clone) -> None:
    """Of unpatched and patched runs: for fine-tuning, and by --init_from of our own trainers, every tensor as it is there."""
    for label, patched in (("plain", False), ("evolved", True)):
        clone.run(label, patched=patched)
        saved, plain = clone.saved(label, EPOCHS - 1), load(clone, label)
        state = read_checkpoint(saved)
        assert state.keys() == plain.keys()
        assert (seam.STATE_KEY in state) == patched
        assert_same(state["model"], plain["model"])
        assert_same(state["optimizer"]["state"], plain["optimizer"]["state"])
        groups, theirs = (one["optimizer"]["param_groups"] for one in (state, plain))
        assert groups == theirs
        assert not [value for group in groups for value in group.values() if isinstance(value, np.generic)]
        tiny = {"patch_size": 16, "width": 48, "depth": 2, "heads": 3}
        load_encoder(BackboneViT(clone.name, (224, 224), **tiny), saved)
        model = OUR_MODELS[clone.name](input_size=(224, 224), **tiny)
        assert load_weights(model, saved).endswith(f"all {len(model.state_dict())} tensors")
        assert_same(dict(model.state_dict()), dict(plain["model"]))


OUR_MODELS: dict[str, Any] = {
    "mae": partial(MaskedAutoencoder, decoder_width=32, decoder_depth=1, decoder_heads=2),
    "beit": BEiT,
    "simmim": SimMIM,
}


@pytest.mark.parametrize(
    ("flags", "message", "before_data"),
    [
        ("--layers 0,99", "layers [99] do not exist: the encoder has 2 blocks", False),
        ("--mask block-official", "--mask block-official may mask fewer patches in some images", True),
    ],
)
def test_masks_that_the_model_cannot_take_die_before_the_first_epoch(
    clone: Clone, flags: str, message: str, before_data: bool
) -> None:
    if clone.name != "mae" and before_data:
        pytest.skip("takes uneven masks")
    output = clone.output("impossible")
    options = clone.flags.format(output=output)
    if before_data:
        options = options.replace(str(clone.work / "images"), "/nowhere")
    command = [sys.executable, "-W", "ignore", str(DRIVER), clone.name, str(clone.work / "impossible.pt"), clone.script]
    done = execute([*command, *options.split(), *flags.split()], clone.code(clone.patched))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{clone.script}: error: {message}")
    assert torch.load(clone.work / "impossible.pt")["losses"] == []
    assert not list(output.rglob("*.pth"))


def test_bad_value_dies_before_the_data_is_read(clone: Clone) -> None:
    flags = clone.flags.format(output=clone.output("bad")).replace(str(clone.work / "images"), "/nowhere")
    done = execute([sys.executable, "-W", "ignore", clone.script, *flags.split(), "--gamma", "-1"], clone.code(clone.patched))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"{clone.script}: error: --gamma must be above 0, got -1.0"


def test_parity_of_our_model(clone: Clone) -> None:
    """The official weights and mask in our model: loss to 1e-5, every gradient to 1e-4 of the tensor's largest.

    Signals, of the seam and of our model, to 1e-6 of what the official pass computes in each block.
    """
    ours = f"{clone.name}_evolved"
    if importlib.util.find_spec(ours) is None or importlib.util.find_spec(f"{ours}.model") is None:
        pytest.skip(f"{ours}.model is not there")
    done = execute([sys.executable, "-W", "ignore", str(PARITY), clone.name, str(HERE / "configs")], clone.code(clone.plain))
    assert done.returncode == 0, done.stderr[-4000:]
    print(f"\n{clone.name} {done.stdout.splitlines()[-1]}")
    for size, gaps in json.loads(done.stdout.splitlines()[-1]).items():
        assert gaps["tensors"] > 100, size
        assert gaps["loss"] <= 1e-5, size
        assert gaps["gradient"] <= 1e-4, size
        assert gaps["gradient_control"] > 1e-2, size  # another mask must show
        assert len(gaps["signals"]) == 8, size
        assert max(gaps["signals"].values()) <= 1e-6, gaps["signals"]
