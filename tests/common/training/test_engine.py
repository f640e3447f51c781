"""The training loop by real short runs: exact resume, accumulation, failures, precision, what is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.evolved_mask import EvolvedMask, MaskConfig
from common.mask_config import ADDED, FORMER_DEFAULTS
from common.training.checkpoint import LAST
from common.training.data import Batch
from common.training.engine import reconstruction_loss
from common.training.errors import BadInput, NonFiniteLoss
from common.training.interrupt import Interrupted
from common.training.loop import BEFORE_FAILURE, Loop
from common.training.mask import describe_end
from mae_evolved import main_pretrain
from tests import methods
from tests.conftest import assert_same, read_log

Train = Callable[..., Path]

SIGNAL = "--graph keys --heads select --layers 0,-1 --remove_position"
TRAINED = ("model", "optimizer", "scaler", "epoch", "update", "mask", "ema", "meters")


def trained_state(output: Path) -> dict[str, object]:
    state = torch.load(output / LAST, weights_only=True)
    return {key: state[key] for key in TRAINED}


def stop_at_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ends the process's work at the start of an epoch, as a time limit would."""
    original = Loop._train_epoch

    def cut(self: Loop, current: int, loader: object) -> None:
        if current == epoch:
            raise KeyboardInterrupt
        original(self, current, loader)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_train_epoch", cut)


@pytest.mark.parametrize(
    "flags", ["", "--recipe authors --schedule_epochs 4", "--mask block --accum_iter 2", "--num_workers 2", SIGNAL]
)
def test_four_epochs_equal_two_and_a_resume(train: Train, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """Weights, optimiser, masks, moving average and log are equal to the bit."""
    whole = train("whole", flags)
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train("parts", flags)
    parts = train("parts", flags)
    assert_same(trained_state(whole), trained_state(parts))
    assert read_log(whole) == read_log(parts)
    assert len(read_log(parts)) == 4


def test_a_run_that_began_under_other_defaults_goes_on_with_them(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started by version 0.1.0, continued by the same command today: the masks of then, said in the log, to the bit."""
    then = " ".join(f"--{name} {value}" for name, value in FORMER_DEFAULTS.items())
    whole = train("whole", then)
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train("parts", then)
    written = torch.load(whole.parent / "parts" / LAST, weights_only=True)
    for options in (written["mask_config"], written["mask"]["config"]):
        for added in ADDED:
            del options[added]
    torch.save(written, whole.parent / "parts" / LAST)
    parts = train("parts", "")
    assert_same(trained_state(whole), trained_state(parts))
    assert read_log(whole) == read_log(parts)
    said = capsys.readouterr().out.split("goes on with them: ")[1].split("\n")[0]
    assert sorted(said.split()) == sorted(then.split())


def test_a_run_older_than_the_loader_goes_on_with_pil(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint says no loader: it ends as with PIL throughout, to the bit, and its next checkpoint says PIL."""
    short = "--epochs 2"
    whole = train("whole", f"{short} --loader pil")
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train("parts", f"{short} --loader pil")
    last = whole.parent / "parts" / LAST
    written = torch.load(last, weights_only=True)
    del written["loader"], written["config"]["loader"]
    torch.save(written, last)
    with pytest.raises(BadInput, match=r"made with other settings: --loader pil -> torchvision \(--resume none"):
        train("parts", f"{short} --loader torchvision")
    parts = train("parts", short)
    assert "the run began with --loader pil and goes on with it" in capsys.readouterr().out
    assert_same(trained_state(whole), trained_state(parts))
    assert read_log(whole) == read_log(parts)
    assert torch.load(last, weights_only=True)["loader"] == "pil"
    assert torch.load(train("none", f"{short} --resume none") / LAST, weights_only=True)["loader"] == "torchvision"


def test_resume_in_the_middle_of_an_epoch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """--save_steps: cut off after update 3 of 4 of epoch 1, a run goes on from update 2 and ends the same."""
    whole = train("whole")
    original = Loop._train_update

    def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == (1, 3):
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            train("parts", "--save_steps 2")
    state = torch.load(whole.parent / "parts" / LAST, weights_only=True)
    assert (state["epoch"], state["update"]) == (0, 2)
    parts = train("parts", "--save_steps 2")
    assert_same(trained_state(whole), trained_state(parts))
    assert read_log(whole) == read_log(parts)


@pytest.mark.parametrize("method", methods.MAINS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 0,99", r"--layers \[99\] do not exist: the encoder has 12 blocks"),
        ("--layers 12 --alpha 0", r"--layers \[12\] do not exist"),  # every pass is spared: nothing would ever read them
        ("--parts_start 17", r"K = 17 parts is above the N = 16 patches .*--parts_start"),
        ("--mask random-units --mask_unit 3", "--mask_unit"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_before_data_and_device(tmp_path: Path, method: str, flags: str, message: str) -> None:
    """There are no data and no such device: neither is looked at first, and nothing is written."""
    needed = "--tokenizer nowhere" if method == "beit" else ""
    places = f"--data_path {tmp_path}/nowhere --output_dir {tmp_path}/out --device cuda:77 {needed}"
    with pytest.raises(BadInput, match=message):
        methods.MAINS[method](f"--model {methods.MODELS[method]} {methods.COMMON} {places} {flags}".split())
    assert not list(tmp_path.iterdir())


def test_shortcut_and_workers_change_nothing(train: Train) -> None:
    """The run without the shortcut and with loader processes has the same weights."""
    first, second = train("first"), train("second", "--no_shortcut --num_workers 2")
    assert_same(trained_state(first)["model"], trained_state(second)["model"])
    spared = [line["skipped_attention"] for line in read_log(first)]
    assert spared[0] == 1.0
    assert [line["skipped_attention"] for line in read_log(second)] == [0.0] * 4


def test_accumulation_equals_one_large_batch(train: Train) -> None:
    """2 x 8 images an update give the loss of 16 at every epoch, up to rounding."""
    large, small = train("large", "--batch_size 16"), train("small", "--batch_size 8 --accum_iter 2")
    for whole, split in zip(read_log(large), read_log(small), strict=True):
        assert whole["train_loss"] == pytest.approx(split["train_loss"], rel=1e-5)
        assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mask", ["evolved", "part", "grid", "random", "block", "grid-to-block"])
def test_loss_falls_with_every_mask(train: Train, mask: str) -> None:
    log = read_log(train("run", f"--mask {mask} --repeat 4 --epochs 6"))
    assert float(str(log[-1]["train_loss"])) < 0.95 * float(str(log[0]["train_loss"]))


def test_other_precisions_train(train: Train) -> None:
    """bf16 autocast on the CPU stays near fp32; the graph and the EM stay fp32."""
    exact, rough = read_log(train("exact")), read_log(train("rough", "--precision bf16"))
    assert exact != rough
    assert exact[-1]["train_loss"] == pytest.approx(rough[-1]["train_loss"], rel=0.05)


def test_nonfinite_loss_stops_with_place_names_and_state(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names epoch, update and images; the checkpoint is the state before, and a resume repeats the step."""
    clean = train("clean")
    calls = 0

    def poisoned(model: torch.nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss, _ = model(batch.images, mask, mask)
        return loss * (float("nan") if calls == 7 else 1.0)  # update 2 of epoch 1

    with monkeypatch.context() as patch:
        patch.setattr(main_pretrain, "_loss", poisoned)
        with pytest.raises(NonFiniteLoss, match=r"loss became nan at epoch 1, update 2 \(step 6\).*\.jpg"):
            train("broken")
    saved = clean.parent / "broken" / BEFORE_FAILURE
    state = torch.load(saved, weights_only=True)
    assert (state["epoch"], state["update"]) == (0, 2)
    again = train("again", f"--resume {saved}")
    assert_same(trained_state(clean), trained_state(again))


def decoded_patches(train: Train, monkeypatch: pytest.MonkeyPatch, name: str, flags: str) -> dict[tuple[int, int], list[int]]:
    """(times that a sample was seen, sample) -> the patches of it that were predicted, of a run."""
    seen: dict[tuple[int, int], list[int]] = {}
    times: dict[int, int] = {}

    def loss(model: torch.nn.Module, batch: Batch, mask: Tensor, *decoded: Tensor) -> Tensor:
        if not decoded:
            assert "0.5" not in flags
            return reconstruction_loss(model, batch, mask)
        assert not (decoded[0] & ~mask).any()
        for sample, row in zip(batch.sample_ids.tolist(), decoded[0], strict=True):
            times[sample] = times.get(sample, 0) + 1
            seen[times[sample], sample] = row.nonzero()[:, 0].tolist()
        made: Tensor = model(batch.images, mask, *decoded)[0]
        return made

    with monkeypatch.context() as patch:
        patch.setattr(main_pretrain, "_loss", loss)
        train(name, f"--mask grid --epochs 2 {flags}")
    return seen


def test_predicted_share_belongs_to_the_sample(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """--decode_share 0.5 predicts 6 of 12 masked patches, by (seed, epoch, sample) alone; 1 is the plain method's call."""
    first = decoded_patches(train, monkeypatch, "four", "--decode_share 0.5")
    assert len(first) == 32
    assert all(len(patches) == 6 for patches in first.values())
    assert decoded_patches(train, monkeypatch, "eight", "--decode_share 0.5 --batch_size 8") == first
    assert any(first[1, sample] != first[2, sample] for sample in range(16))
    assert decoded_patches(train, monkeypatch, "whole", "--decode_share 1") == {}
    with pytest.raises(BadInput, match="--decode_share must be above 0 and at most 1, got 0"):
        train("none", "--decode_share 0")


def test_nan_in_given_weights_is_not_blamed_on_images(train: Train, tmp_path: Path) -> None:
    """Neither in --init_from nor in a checkpoint to resume: the file and the weight are named, before an image is read."""
    output = train("run", "--mask grid --epochs 1")
    state = torch.load(output / LAST, weights_only=True)
    state["model"]["blocks.3.mlp.fc1.bias"][2] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    for name in ("init_from", "resume"):
        with pytest.raises(BadInput, match=r"nan.pth: holds weights that are NaN or infinite: blocks.3.mlp.fc1.bias$"):
            train("other", f"--mask grid --epochs 1 --{name} {tmp_path / 'nan.pth'}")
    assert not (tmp_path / "other").exists()


def test_weights_that_became_nan_are_not_blamed_on_images(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update before did it; no checkpoint of that state is written."""
    original = Loop._step

    def spoil(self: Loop, norm: Tensor) -> None:
        original(self, norm)
        self.task.model.get_parameter("decoder_pred.bias").data[0] = float("nan")

    monkeypatch.setattr(Loop, "_step", spoil)
    with pytest.raises(NonFiniteLoss, match=r"weights were NaN or infinite already at epoch 0, update 1 .*: decoder_pred.bias$"):
        train("run", "--mask grid")


def test_nonfinite_loss_names_each_image_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --repeat an image comes several times in a batch; at most eight are named, and the others counted."""

    def poisoned(model: torch.nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        return model(batch.images, mask)[0] * float("inf")

    monkeypatch.setattr(main_pretrain, "_loss", poisoned)
    with pytest.raises(NonFiniteLoss) as error:
        train("broken", "--mask grid --repeat 4 --batch_size 64")
    message = str(error.value)
    assert message.startswith("loss became inf at epoch 0, update 0 (step 0); state before it: ")
    names = message.split("images: ")[1].split(", ")
    assert len(set(names)) == len(names) == 8 + 1
    assert names[-1] == "and 8 more"
    assert "\n" not in message


def test_nonfinite_gradient_stops(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: torch.nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        loss, _ = model(batch.images, mask)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(main_pretrain, "_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="gradient norm became"):
        train("broken")


def test_clip_limits_the_update(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --clip_grad the norm of the gradient that reaches the optimiser is at most that."""
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *rest: object) -> object:
        gradients = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return original(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    log = read_log(train("run", "--clip_grad 0.01"))
    assert max(norms) <= 0.0101
    assert float(str(log[0]["grad_norm"])) > 0.1  # the log has the norm before clipping


def test_moving_average_makes_other_masks_and_is_saved(train: Train) -> None:
    """--attention_from ema: the encoder's average alone is kept, and it is not the live model."""
    state = trained_state(train("run", "--attention_from ema --ema_decay 0.9"))
    average, live = state["ema"], state["model"]
    assert isinstance(average, dict)
    assert isinstance(live, dict)
    assert not any(key.startswith("decoder_blocks") for key in average)
    assert any(not torch.equal(average[key], live[key]) for key in average if key.startswith("blocks"))


def test_run_describes_itself(train: Train) -> None:
    """run.json, log.txt and events hold what they should; a resume is added to run.json."""
    output = train("run", "--picture_epochs 2 --picture_images 3")
    facts = json.loads((output / "run.json").read_text())
    assert facts["config"]["batch_size"] == 4
    assert facts["mask"]["gamma"] == 2.0
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    assert facts["device"]["type"] == "cpu"
    assert facts["effective_batch"] == 4
    assert facts["lr"] == pytest.approx(1e-2 * 4 / 256)
    assert facts["samples"] == 16
    assert (output / "masks" / "evolution.png").stat().st_size > 10_000
    assert sorted(path.name for path in (output / "masks").glob("*.npz")) == ["epoch_0000.npz", "epoch_0004.npz"]
    line = read_log(output)[1]
    assert line["alpha"] == pytest.approx((1 / 4) ** 2)
    assert line["num_parts"] == 7  # 8 -> 3 over 4 epochs: 6.75
    assert line["images"] == 16
    train("run", "--picture_epochs 2 --picture_images 3")
    assert len(json.loads((output / "run.json").read_text())["resumed"]) == 1


def test_a_new_run_forgets_the_pictures_of_an_old_one(train: Train) -> None:
    """evolution.png shows one run: started anew in the same folder, only the new run's epochs are there."""
    train("run", "--picture_epochs 3")
    output = train("run", "--picture_epochs 2 --epochs 3 --resume none")
    assert sorted(path.name for path in (output / "masks").glob("*.npz")) == ["epoch_0000.npz", "epoch_0003.npz"]


@pytest.mark.parametrize("at", [(1, 2), (1, 3), (2, 0)], ids=["inside an epoch", "at the end of one", "in the first update"])
def test_evolution_is_there_after_a_signal_and_whole_after_a_resume(
    train: Train, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    """SIGTERM in an update: the figure of the epochs so far; the resumed run's is that of one never stopped, to the byte."""
    flags = "--picture_epochs 5 --picture_images 2"
    whole = train("whole", flags)
    original = Loop._train_update

    def signalled(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", signalled)
        with pytest.raises(Interrupted):
            train("parts", flags)
    figure = whole.parent / "parts" / "masks" / "evolution.png"
    taken = at[0] + 1
    with Image.open(figure) as image:
        assert image.width == 10 + 192 + taken * (18 + 192 + 6 + 192) + 10
    figure.unlink()
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 2 if at[1] == 3 else at[0])  # a resumed run that ends at once has rebuilt it
        with pytest.raises(KeyboardInterrupt):
            train("parts", flags)
    assert figure.exists()
    parts = train("parts", flags)
    assert figure.read_bytes() == (whole / "masks" / "evolution.png").read_bytes()
    assert len(list((parts / "masks").iterdir())) == 5 + 1
    with Image.open(figure) as image:
        assert image.width == 10 + 192 + 5 * (18 + 192 + 6 + 192) + 10


def test_a_resume_from_an_earlier_checkpoint_drops_later_pictures(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    output = train("run", "--picture_epochs 5 --save_freq 1")
    stop_at_epoch(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train("run", f"--picture_epochs 5 --save_freq 1 --resume {output}/checkpoint-1.pth")
    assert [path.name for path in sorted((output / "masks").glob("*.npz"))] == [f"epoch_000{k}.npz" for k in range(4)]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("evolved", "alpha 0.062  K 7  spared attention passes"),
        ("part", "K 7  spared attention passes"),
        ("grid-to-block", "alpha 0.062"),
        ("grid", ""),
        ("random", ""),
        ("block", ""),
    ],
)
def test_console_says_what_the_mask_has(train: Train, capsys: pytest.CaptureFixture[str], mask: str, said: str) -> None:
    """alpha where it grows, K and passes where there are parts; log.txt has the same keys for all."""
    output = train("run", f"--mask {mask} --picture_epochs 2")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2/4"))
    assert line.split(")")[-1].strip().startswith(said)
    words = ("alpha", "K ", "spared")
    assert [word in line for word in words] == [word in said for word in words]
    assert {"alpha", "num_parts", "skipped_attention"} < read_log(output)[1].keys()
    assert (output / "masks" / "evolution.png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--recipe authors", "alpha 0.12, K 7 in the last one (--schedule_epochs 4 fits it to the run)"),  # sqrt(4/300)
        ("--schedule_epochs 8", "alpha 0.14, K 6 in the last one (--schedule_epochs 4 fits it to the run)"),  # (3/8)^2
        ("--recipe authors --schedule_epochs 4", ""),
        ("--recipe authors --mask part", ""),
        ("--recipe authors --alpha 0.5", ""),
        ("", ""),
    ],
)
def test_a_run_shorter_than_its_schedule_says_where_it_ends(
    train: Train, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    """Before it begins; log.txt then has the same alpha and K."""
    output = train("run", f"{flags} --parts_jitter 0")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the schedule is for")]
    assert [line.split(": ", 1)[1] for line in lines] == ([said] if said else [])
    last = read_log(output)[-1]
    if said:
        assert f"alpha {last['alpha']:.2f}, K {last['num_parts']} " in said


def test_the_released_recipe_in_ten_epochs_ends_at_018() -> None:
    """((9 + 1) / 300)^0.5, and K after 9 of 300 epochs of 40 -> 10, rounded down."""
    config = MaskConfig.from_recipe("authors")
    assert describe_end(EvolvedMask((14, 14), 147, 10, config)).startswith(
        "the schedule is for 300 epochs and this run has 10: alpha 0.18, K 39 in the last one"
    )
    assert describe_end(EvolvedMask((14, 14), 147, 300, config)) == ""


def test_tensorboard_has_scalars_and_pictures(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train("run", "--picture_epochs 3")
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "epoch/train_loss", "epoch/alpha"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 16
    assert len(events.Images("parts_and_masks")) == 3


def events_of(output: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "scalars": 0})  # 0: keep all
    events.Reload()
    return events


def test_tensorboard_keeps_every_epoch_through_resumes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at the end of epoch 1, and started again when finished: every epoch once, with the numbers of log.txt."""
    flags = "--mask grid --picture_epochs 5 --picture_images 1"
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train("run", flags)
    for _ in range(2):
        output = train("run", flags)
        events = events_of(output)
        losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("epoch/train_loss")]
        assert [(4 * (line["epoch"] + 1) - 1, line["train_loss"]) for line in read_log(output)] == losses  # type: ignore[operator]
        assert [event.step for event in events.Scalars("train/loss")] == list(range(16))
        assert [event.step for event in events.Images("parts_and_masks")] == [0, 4, 8, 12, 16]


def test_resume_refuses_another_run(train: Train, tmp_path: Path) -> None:
    """What differs is named; nothing is overwritten."""
    output = train("run")
    before = (output / LAST).read_bytes()
    for flags, named in [
        ("--gamma 3", "--gamma 2.0 -> 3.0"),
        ("--batch_size 8", "effective_batch 4 -> 8"),
        ("--repeat 2", "samples 16 -> 32"),
        ("--epochs 5", "--epochs 4 -> 5"),
        ("--blr 1e-3", "--blr 0.01 -> 0.001"),
    ]:
        with pytest.raises(BadInput, match="other settings") as error:
            train("run", flags)
        assert named in str(error.value)
    assert (output / LAST).read_bytes() == before
    with pytest.raises(BadInput, match="no such file"):
        train("run", f"--resume {tmp_path}/none.pth")


def test_resume_precedence(train: Train) -> None:
    """A path wins over auto; auto takes checkpoint-last.pth; none starts anew; weights alone come by --init_from."""
    output = train("run", "--save_freq 2")
    second = output / "checkpoint-1.pth"
    copy = train("copy", f"--resume {second}")  # the first two epochs are not in this log
    assert [line["epoch"] for line in read_log(copy)] == [2, 3]
    assert_same(trained_state(output), trained_state(copy))
    shutil.copy(second, copy / LAST)
    assert_same(trained_state(output), trained_state(train("copy")))
    fresh = train("copy", "--resume none")
    assert [line["epoch"] for line in read_log(fresh)] == [0, 1, 2, 3]
    warm = train("warm", f"--init_from {output / LAST}")
    assert float(str(read_log(warm)[0]["train_loss"])) < float(str(read_log(output)[0]["train_loss"]))


def test_too_few_images_for_an_update_is_an_error(train: Train) -> None:
    with pytest.raises(BadInput, match="nothing would ever be updated"):
        train("run", "--accum_iter 5")


def test_unreadable_images(train: Train, image_folder: Path) -> None:
    """raise names the file; skip trains on and counts them, every epoch, and is deterministic."""
    broken = image_folder / "train" / "bird" / "image_03.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(BadInput, match=r"unreadable image .*image_03.jpg"):
        train("raises")
    first, second = train("first", "--on_bad_image skip"), train("second", "--on_bad_image skip --num_workers 2")
    assert [line["bad_images"] for line in read_log(first)] == [1, 1, 1, 1]
    assert_same(trained_state(first)["model"], trained_state(second)["model"])


def test_skipped_images_are_named_once_a_run(
    train: Train, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the screen and in log.txt, each once, also over a resume in the middle of an epoch; above the limit they are counted."""
    for index in (3, 5):
        (image_folder / "train" / "bird" / f"image_0{index}.jpg").write_bytes(b"no image")
    flags = "--mask grid --on_bad_image skip --save_steps 1 --epochs 2"
    with monkeypatch.context() as patch:
        original = Loop._train_update

        def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
            if (epoch, update) == (0, 3):
                raise KeyboardInterrupt
            original(self, epoch, update, *rest)  # type: ignore[arg-type]

        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            train("parts", flags)
    output = train("parts", flags)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unreadable, another image is in its place")]
    assert len(said) == 2
    assert {line.split("/")[-1].split(":")[0].strip("'") for line in said} == {"image_03.jpg", "image_05.jpg"}
    named = [line.get("unreadable", []) for line in read_log(output)]
    assert sorted(f"unreadable, another image is in its place: {line}" for line in named[0]) == sorted(said)  # type: ignore[attr-defined]
    assert named[1:] == [[]]
    assert read_log(output) == read_log(train("whole", flags))
    monkeypatch.setattr("common.training.loop.MOST_NAMED", 1)
    capsys.readouterr()
    train("few", f"{flags} --epochs 1")
    said = [line for line in capsys.readouterr().out.splitlines() if "unreadable" in line]
    assert [line.split()[0] for line in said] == ["unreadable,", "1", "epoch"]


def test_a_folder_without_one_readable_image(train: Train, image_folder: Path) -> None:
    """One line that says so, under --on_bad_image skip too; raise names eight, and how many more."""
    for path in image_folder.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"^no readable image found, \d+ were tried: [^;]+; [^;]+; [^;]+; and \d+ more$"):
        train("run", "--on_bad_image skip --picture_epochs 1")


def test_a_disk_that_fills_ends_all_in_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch there is no room for its checkpoint: that of the first stays, and the run goes on from it."""
    flags = "--mask grid --batch_size 8"
    whole = train("whole", flags)
    room = iter([10**9, 0])
    with monkeypatch.context() as patch:
        patch.setattr("common.training.files.free_bytes", lambda folder: next(room, 0))
        with pytest.raises(BadInput, match=rf"{LAST}: not written, it needs .* MB \(0.0 kB free\); the one .* is untouched$"):
            train("run", flags)
    output = whole.parent / "run"
    assert torch.load(output / LAST, weights_only=True)["epoch"] == 0
    assert [path.name for path in output.glob(".*")] == []
    assert_same(trained_state(train("run", flags)), trained_state(whole))
    assert read_log(output) == read_log(whole)


def test_a_log_line_that_was_cut_off_is_passed_over(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the end of the process in the middle of it: the epoch is run again and its line written anew."""
    output, flags = tmp_path / "run", "--mask grid --batch_size 8"
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train("run", flags)
    with (output / "log.txt").open("a") as log:
        log.write('{"epoch": 2, "train_l')
    assert [line["epoch"] for line in read_log(train("run", flags))] == [0, 1, 2, 3]
