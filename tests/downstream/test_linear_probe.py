"""Linear probes: frozen encoder, features, heads of several layers, k-NN, resume, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional

from common.training.data import Batch
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream import linear_probe
from downstream.classification.labelled import middle, open_labelled
from downstream.linear_probe import ProbeConfig
from downstream.probing.features import extract
from downstream.probing.heads import Probes, probe_loss
from downstream.probing.knn import knn_votes
from downstream.probing.lars import LARS
from downstream.vit import METHODS, BackboneViT, Method
from tests.conftest import assert_same, free_ports, read_log, run_module
from tests.downstream.labelled_folder import ONE, SMALL, assert_refused, result, saved, shake, shrink_models, write_set
from tests.downstream.test_weights import pretrained


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_set(tmp_path / "images")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_models(monkeypatch)


@pytest.fixture
def probe(images: Path, tmp_path: Path, small: None) -> Callable[..., Path]:
    """Probes a small model: `probe("name", "--flag value ...")`."""

    def run(name: str, flags: str = "", epochs: int = 2) -> Path:
        output = tmp_path / name
        common = f"{SMALL} --data_path {images} --batch_size 7 --lr 5 --epochs {epochs} --knn 3 --pictures 0"
        linear_probe.main([word.replace("NONE", "") for word in f"{common} --output_dir {output} {flags}".split()])
        return output

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A pre-training checkpoint of a small model."""

    def write(method: Method = "mae") -> Path:
        path = tmp_path / f"{method}.pth"
        torch.save({"model": pretrained(method, (16, 16)).state_dict()}, path)
        return path

    return write


def config_for(images: Path, **values: Any) -> ProbeConfig:
    sizes: dict[str, Any] = {"model": "vit_tiny_patch4", "input_size": "16", "num_workers": 0, "data_path": str(images)}
    return ProbeConfig(**{**sizes, "batch_size": 8, **values})


def small_probes(layers: tuple[int, ...], pool: str = "cls", norm: bool = True, method: Method = "mae") -> Probes:
    torch.manual_seed(0)
    encoder = shake(BackboneViT(method, (16, 16), patch_size=4, width=24, depth=3, heads=2, drop_path=0.5))
    return Probes(encoder, layers, pool, shake(nn.LayerNorm(24, eps=1e-6)) if norm else None, 7)


# --- the model ---


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("norm", [True, False])
def test_features_by_hand(method: Method, pool: str, norm: bool) -> None:
    """Of each layer, pooled; the norm is applied to the last block's tokens only, before pooling."""
    images = torch.randn(3, 3, 16, 16)
    model = small_probes((0, 2), pool, norm, method).train()
    first, last = model.encoder(images, [0, 2])
    if norm:
        assert model.norm is not None
        last = functional.layer_norm(last, (24,), model.norm.weight, model.norm.bias, 1e-6)
    expected = [one[:, 0] if pool == "cls" else one[:, 1:].mean(dim=1) for one in (first, last)]
    torch.testing.assert_close(model.features(images), torch.stack(expected, dim=1))
    middle_only = small_probes((1,), pool, norm, method)
    (inner,) = middle_only.encoder(images, [1])
    torch.testing.assert_close(middle_only.features(images)[:, 0], inner[:, 0] if pool == "cls" else inner[:, 1:].mean(dim=1))
    assert not model.encoder.training, "drop path would make features random"


def test_only_heads_learn_and_batch_norms_have_no_affine() -> None:
    model = small_probes((0, 1, 2))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"heads.{place}.1.{kind}" for place in range(3) for kind in ("weight", "bias")}
    for head in model.heads:
        assert (head[0].affine, head[0].weight, head[0].eps) == (False, None, 1e-6)
        assert float(head[1].weight.detach().std()) == pytest.approx(0.01, rel=0.25)
        assert not head[1].bias.detach().any()
    probe_loss(model.train(), batch(5)).backward()
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())


def batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return Batch((images, torch.arange(count) % 7), torch.arange(count), [""] * count, [])


def test_several_layers_learn_as_if_alone() -> None:
    """Steps of three heads at once equal those of three models with one of these heads each."""
    together, alone = small_probes((0, 1, 2)), [small_probes((layer,)) for layer in range(3)]
    start = [head[1].weight.detach().clone() for head in together.heads]
    for layer, one in enumerate(alone):
        one.heads[0].load_state_dict(together.heads[layer].state_dict())
    optimizers = [LARS([v for v in model.parameters() if v.requires_grad], lr=50.0) for model in (together, *alone)]
    for step in range(4):
        for model, optimizer in zip((together, *alone), optimizers, strict=True):
            optimizer.zero_grad()
            probe_loss(model.train(), batch(6, seed=step)).backward()
            optimizer.step()
    for layer, one in enumerate(alone):
        for key, value in one.heads[0].state_dict().items():
            torch.testing.assert_close(together.heads[layer].state_dict()[key], value, atol=1e-5, rtol=2e-4)
        assert not torch.allclose(one.heads[0].state_dict()["1.weight"], start[layer], atol=1e-3)


# --- features of a set, and k-NN ---


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_features_of_a_set_are_those_of_its_middles(images: Path) -> None:
    """In the order of the set, for every layer: what the uncached model computes for the middle crop of each image."""
    config = config_for(images)
    model, val = small_probes((0, 1, 2)), open_labelled(config, train=False)
    features, labels = extract(model, val, config, Run(config, ONE))
    assert labels.tolist() == val.labels
    assert features.shape == (21, 3, 24)
    for index in (0, 7, 20):
        image, _ = middle(config)(val.load(index))
        torch.testing.assert_close(features[index], model.features(image[None])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.eval()(features), model(torch.stack([middle(config)(val.load(i))[0] for i in range(21)])),
                               atol=1e-4, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_votes_are_those_of_scikit_learn(k: int) -> None:
    """KNeighborsClassifier with cosine distances and weights exp((cosine - 1) / .07): the same shares and classes."""
    generator = np.random.default_rng(k)
    bank, labels = generator.normal(size=(60, 5)), generator.integers(0, 6, 60)
    queries = generator.normal(size=(33, 5))
    votes = knn_votes(torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), k, 6, chunk=10)
    near = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp(-far / 0.07)).fit(bank, labels)
    shares = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares, near.predict_proba(queries), atol=1e-5)
    assert (votes.argmax(dim=1).numpy() == near.predict(queries)).all()


def cosine_knn(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int) -> float:
    near = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp(-far / 0.07)).fit(bank.numpy(), labels.numpy())
    return 100 * float(near.score(queries.numpy(), truth.numpy()))


# --- runs ---


@pytest.mark.parametrize("cache", ["--cache", "--no_cache"])
@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_frozen(cache: str, method: Method, probe: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    """To the bit that of the checkpoint, norm too; the heads are not what they were, their statistics neither."""
    path = checkpoint(method)
    output = probe("out", f"--init_from {path} {cache} --layer all --save_freq 1")
    theirs = {key.removeprefix("encoder."): value for key, value in torch.load(path, weights_only=True)["model"].items()}
    first, last = torch.load(output / "checkpoint-0.pth", weights_only=True)["model"], saved(output)["model"]
    for key, value in last.items():
        if key.startswith("heads."):
            assert "num_batches" in key or not torch.equal(value, first[key]), key
            continue
        assert torch.equal(value, first[key]), key
        inner = key.removeprefix("encoder.")
        shared = "rel_pos_bias." + inner.split(".attn.")[-1]
        assert torch.equal(value, theirs[shared if shared in theirs else inner]), key
    assert saved(output)["config"]["method"] == method


def test_numbers_of_a_run(
    probe: Callable[..., Path], images: Path, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """result.json: each layer's accuracy and k-NN recomputed from the saved model; the plain names are the last layer's.

    The table on the screen holds the same, and names the best layer.
    """
    output = probe("out", f"--init_from {checkpoint()} --layer all --knn 1,3 --pool mean --cache", epochs=3)
    held, numbers = saved(output), result(output)["metrics"]
    model = Probes(
        BackboneViT("mae", (16, 16), patch_size=4, width=24, depth=3, heads=2), (0, 1, 2), "mean", nn.LayerNorm(24, 1e-6), 7
    )
    model.load_state_dict(held["model"])
    config = config_for(images)
    sets = (open_labelled(config, train=part) for part in (True, False))
    (bank, labels), (features, truth) = (extract(model, images, config, Run(config, ONE)) for images in sets)
    logits = model.eval()(features).detach()
    expected: dict[str, float] = {"epoch": 2}
    for layer in (0, 1, 2):
        order = logits[:, layer].argsort(dim=1, descending=True)
        for k, name in ((1, "top1"), (5, "top5")):
            expected[f"{name}_layer{layer}"] = 100 * float((order[:, :k] == truth[:, None]).any(dim=1).double().mean())
        for k in (1, 3):
            expected[f"knn{k}_layer{layer}"] = cosine_knn(bank[:, layer], labels, features[:, layer], truth, k)
    expected |= {name: expected[f"{name}_layer2"] for name in ("top1", "top5", "knn1", "knn3")}
    assert numbers == pytest.approx(expected)
    assert result(output)["task"] == "linear probing"
    written, said = result(output), capsys.readouterr().out.splitlines()
    table = {layer: {name: expected[f"{name}_layer{layer}"] for name in ("top1", "top5", "knn1", "knn3")} for layer in (0, 1, 2)}
    assert {int(layer): pytest.approx(scores) for layer, scores in written["layers"].items()} == table
    best = max(table, key=lambda layer: (table[layer]["top1"], -layer))
    assert written["best_layer"]["top1"] == {"layer": best, "value": pytest.approx(table[best]["top1"])}
    start = said.index(next(line for line in said if line.split() == ["layer", "top1", "top5", "knn1", "knn3"]))
    for layer, line in enumerate(said[start + 1 : start + 4]):
        assert line.replace("*", "").split() == [str(layer), *(f"{table[layer][name]:.2f}" for name in table[layer])]
    assert not [line for line in said if "_layer" in line], "epochs and the summary speak of the last layer"
    assert said[start + 4].startswith(f"best layer   {best} (top1 {table[best]['top1']:.2f}), ")


def test_one_layer_has_plain_names(probe: Callable[..., Path]) -> None:
    assert set(result(probe("out", "--layer 1"))["metrics"]) == {"epoch", "top1", "top5", "knn3"}
    assert set(result(probe("none", "--knn NONE"))["metrics"]) == {"epoch", "top1", "top5"}


def test_it_learns(probe: Callable[..., Path]) -> None:
    """Colours of the classes can be read from the mean of the embedded patches after a block with random weights."""
    numbers = result(probe("out", "--layer 0 --pool mean --cache --repeat 8 --lr 20", epochs=12))["metrics"]
    assert numbers["top1"] > 60


def test_exact_resume(probe: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    """Four epochs are two and two; also when --init_from is not given again: features come from the run's own encoder."""
    flags = f"--init_from {checkpoint()} --layer all --cache --save_freq 1"
    whole = probe("whole", flags, epochs=4)
    for name, again in (("same", flags), ("without", flags.replace(f"--init_from {checkpoint()}", ""))):
        half = probe(name, f"{again} --resume {whole}/checkpoint-1.pth", epochs=4)
        for key in ("model", "optimizer", "scores", "best"):
            assert_same(saved(whole)[key], saved(half)[key], key)
        assert read_log(half) == read_log(whole)[2:]
        assert result(half)["metrics"] == result(whole)["metrics"]


def test_evaluation_only(probe: Callable[..., Path], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a finished run all numbers; of a checkpoint without heads k-NN alone, and no number of untrained heads."""
    output = probe("out", f"--init_from {checkpoint()} --norm")
    numbers = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("linear probing: top1"))
    probe("other", f"--eval_only --resume {output}/checkpoint-last.pth", epochs=5)
    assert numbers in capsys.readouterr().out.splitlines()
    probe("other", f"--eval_only --init_from {checkpoint()}")
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("linear probing:")] == ["linear probing: knn3" + numbers.split("knn3")[1]]
    with pytest.raises(
        BadInput, match=r"--eval_only: no trained heads .--resume. and no neighbours .--knn., nothing to evaluate"
    ):
        probe("other", f"--eval_only --init_from {checkpoint()} --knn NONE")
    assert_refused(output.parent / "other")


def test_norm_is_asked_for_only_where_it_is_used(probe: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint without the last norm will do for inner layers, or with --no_norm."""
    weights = pretrained("mae", (16, 16)).state_dict()
    torch.save({"model": {key: value for key, value in weights.items() if not key.startswith("norm.")}}, tmp_path / "bare.pth")
    probe("inner", f"--init_from {tmp_path}/bare.pth --layer 0,1", epochs=1)
    probe("bare", f"--init_from {tmp_path}/bare.pth --no_norm", epochs=1)
    with pytest.raises(BadInput, match=r"missing: norm\.weight, norm\.bias"):
        probe("last", f"--init_from {tmp_path}/bare.pth", epochs=1)
    assert_refused(tmp_path / "last")


def test_a_probe_is_a_checkpoint_of_its_encoder(probe: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    output = probe("out", f"--init_from {checkpoint('beit')}", epochs=1)
    again = probe("again", f"--init_from {output}/checkpoint-last.pth", epochs=1)
    assert saved(again)["config"]["method"] == "beit"
    assert result(again)["metrics"]["knn3"] == result(output)["metrics"]["knn3"]


@pytest.mark.slow
def test_two_processes_find_the_same_neighbours(images: Path, tmp_path: Path) -> None:
    """Shares of 10 and 11 validation images, features of 28 training images gathered from both.

    Batch norms see the images of their rank only, as in the official code, so the heads differ.
    """
    flags = "downstream.linear_probe --model vit_tiny_patch8 --input_size 16 --device cpu --num_workers 0 --epochs 1 "
    flags += f"--warmup_epochs 0 --pictures 0 --knn 1,5 --layer 2,-1 --cache --data_path {images}"
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m"
    for start, size, name in (("", 8, "one"), (launch, 4, "two")):
        run = run_module(f"{start} {flags} --batch_size {size} --output_dir {tmp_path}/{name}".strip())
        assert run.returncode == 0, run.stderr
    first, second = (result(tmp_path / name)["metrics"] for name in ("one", "two"))
    assert first.keys() == second.keys()
    for key in first:
        if key.startswith("knn"):
            assert first[key] == second[key]
    counts = [second[key] * 21 / 100 for key in second if key.startswith("top")]
    assert counts == pytest.approx(np.round(counts), abs=1e-9), "each of the 21 images is counted once"


# --- flags ---


@pytest.mark.parametrize(
    ("layer", "expected"),
    [("-1", (2,)), ("all", (0, 1, 2)), ("0", (0,)), ("2,0,-1", (0, 2)), ("-3", (0,)), (" 1 , 2 ", (1, 2))],
)
@pytest.mark.usefixtures("small")
def test_layers(layer: str, expected: tuple[int, ...]) -> None:
    assert ProbeConfig(model="vit_tiny_patch4", layer=layer).layers == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer 3", "--layer must be all, or blocks of 0 to 2 such as 5,8,-1, got '3'"),
        ("--layer 0,-4", "--layer must be all, or blocks of 0 to 2"),
        ("--layer last", "--layer must be all, or blocks of 0 to 2"),
        ("--layer 1,,2", "--layer must be all, or blocks of 0 to 2"),
        ("--knn 0", "--knn must be counts such as 10,20, or empty, got '0'"),
        ("--knn 5,x", "--knn must be counts such as 10,20, or empty"),
        ("--knn ,", "--knn must be counts such as 10,20, or empty"),
        ("--knn 3,29", "--knn 3,29: more neighbours than the 28 training images"),
        ("--knn 20 --subset 14", "--knn 20: more neighbours than the 14 training images"),
        ("--drop_path 0.1", "--drop_path has no effect on linear probing: the encoder is frozen"),
        ("--layer_decay 0.65", "--layer_decay has no effect on linear probing: the encoder is frozen"),
        ("--crop_pct 1.1", "--crop_pct must be in (0, 1], got 1.1"),
        ("--layer all --clip_grad 1", "--clip_grad must be left out for several layers: it would tie their heads together"),
        ("--subset 29", "--subset 29: there are 28 training images"),
        ("--mixup 0.8", "unrecognized arguments: --mixup 0.8"),
        ("--dataset photos", "--data_path is not read by --dataset photos: leave one of them out"),
        ("--resume /absent.pth", "checkpoint /absent.pth: no such file"),
    ],
)
def test_refused_in_one_line(
    flags: str, message: str, probe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_cli("linear_probe", lambda _: probe("out", flags), [])  # type: ignore[arg-type, return-value]
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert_refused(tmp_path / "out")


def test_a_broken_validation_image_is_found_before_anything_is_written(probe: Callable[..., Path], images: Path) -> None:
    (images / "val" / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"unreadable image .*val/cat/1.png: .*an evaluation needs all"):
        probe("out")
    assert_refused(images.parent / "out")


def test_pictures_of_layers(probe: Callable[..., Path]) -> None:
    output = probe("out", "--layer all", epochs=1)
    assert (output / "layers.png").stat().st_size > 1000


def test_help_names_the_traps(capsys: pytest.CaptureFixture[str]) -> None:
    """What others stumble over is said where they look."""
    with pytest.raises(SystemExit):
        linear_probe.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "the last block is not always the best one",
        "a layer chosen by its validation accuracy is a selection to report as such",
        "class token, or the mean of the patch tokens. Trap: numbers differ by points",
        "--no_norm",
        "Much faster, a little lower; say so beside the number",
        "it is for LARS and batch 16384; with a small batch or few epochs try more",
    ):
        assert words in said
