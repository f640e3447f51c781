"""Shims and inserted calls, on stand-ins of our own for the official code; tests/patches/test_upstream.py has the real one."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.evolved_mask import EvolvedMask
from common.masks import mae_ids
from common.models.block import LayerNorm
from common.models.timm_layers import Block
from mae_evolved.model import MaskedAutoencoder
from patches import seam
from patches.seam import add_arguments, attach, check_arguments, load_state, masks_for, saved_state, set_epoch

ROOT = Path(__file__).parents[2]
TINY = {"input_size": (32, 32), "patch_size": 4, "width": 24, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


class LikeMAE(MaskedAutoencoder):
    """Our model behind the names of MAE's seam: embeddings in, kept tokens, float mask and ids_restore out."""

    def random_masking(self, tokens: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        return seam.gather_visible(tokens, torch.rand(tokens.shape[:2]).argsort(dim=1) >= 16)

    def forward_encoder(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        tokens, mask, ids_restore = self.random_masking(self.embed(images), mask_ratio)
        tokens = self.with_class_token(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens), mask, ids_restore


class Biased(nn.Module):
    """A block with the names of BEiT's: query and value biases apart, a shared bias handed in."""

    def __init__(self) -> None:
        super().__init__()
        block = Block(24, 2, qkv_bias=False)
        self.norm1, self.attn = block.norm1, block.attn
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.attn.forward = self.attend

    def attend(self, tokens: Tensor, rel_pos_bias: Tensor) -> Tensor:
        attn = self.attn
        bias = torch.cat([attn.q_bias, torch.zeros(24), attn.v_bias])
        joined = nn.functional.linear(tokens, attn.qkv.weight, bias)
        query, key, value = joined.reshape(*tokens.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4)
        attention = attn.attn_drop((query * attn.scale @ key.transpose(-2, -1) + rel_pos_bias).softmax(dim=-1))
        return (attention @ value).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor, rel_pos_bias: Tensor) -> Tensor:
        return tokens + self.attn(self.norm1(tokens), rel_pos_bias=rel_pos_bias)


class LikeBEiT(nn.Module):
    """An encoder without positions of its own, with a shared bias."""

    def __init__(self) -> None:
        super().__init__()
        plain = MaskedAutoencoder(**TINY, **DECODER)
        self.patch_embed, self.cls_token, self.pos_embed = plain.patch_embed, plain.cls_token, None
        self.blocks = nn.ModuleList(Biased() for _ in range(2))
        self.table = nn.Parameter(torch.randn(2, 65, 65))
        self.rel_pos_bias = lambda: self.table


@pytest.fixture
def mae() -> LikeMAE:
    torch.manual_seed(0)
    return LikeMAE(**TINY, **DECODER)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def keep_generators() -> Any:
    """set_epoch seeds every generator of the process."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def arguments(flags: str = "", **more: Any) -> argparse.Namespace:
    """What a patched script's parser gives."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(flags.split())
    plain = {"epochs": 4, "seed": 3, "mask_ratio": 0.75, "num_mask_patches": 20}
    for key, value in {**plain, **more}.items():
        setattr(args, key, value)
    return args


def attached(model: nn.Module, flags: str = "", upstream: str = "mae", **more: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(upstream, model, arguments("--parts_start 8 --parts_end 3 " + flags, **more), optimizer)
    return optimizer


# --- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["softmax", "scores"])
@pytest.mark.parametrize("layers", ["all", "last", [0]])
def test_attention_of_a_timm_encoder_is_that_of_our_trainer(mae: LikeMAE, images: Tensor, layers: Any, values: Any) -> None:
    ours = list(mae.attention_maps(images, layers, values))
    streamed = list(seam.encoder_signal(mae, images, "attention", layers, values))
    assert len(streamed) == len(ours)
    for attention, expected in zip(streamed, ours, strict=True):
        torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-6)


def test_shared_bias_is_in_the_attention_and_not_in_the_scores(images: Tensor) -> None:
    torch.manual_seed(0)
    encoder = LikeBEiT()
    scores = list(seam.encoder_signal(encoder, images, "attention", "all", "scores"))
    softmax = list(seam.encoder_signal(encoder, images, "attention", "all", "softmax"))
    assert len(scores) == len(softmax) == 2
    for score, attention in zip(scores, softmax, strict=True):
        torch.testing.assert_close((score + encoder.table).softmax(dim=-1), attention)


@pytest.mark.parametrize("layers", ["all", "last", [0]])
@pytest.mark.parametrize("graph", ["tokens", "queries", "keys", "values"])
def test_signals_of_a_timm_encoder_are_those_of_our_trainer(mae: LikeMAE, images: Tensor, graph: Any, layers: Any) -> None:
    theirs = LikeMAE(**TINY, **DECODER)
    theirs.blocks = nn.ModuleList(Block(24, 2, qkv_bias=True, norm_layer=LayerNorm) for _ in range(2))  # timm's
    theirs.load_state_dict(mae.state_dict())
    ours, read = list(mae.signal(images, graph, layers)), list(seam.encoder_signal(theirs, images, graph, layers))
    assert len(read) == len(ours)
    for signal, expected in zip(read, ours, strict=True):
        torch.testing.assert_close(signal, expected, rtol=1e-5, atol=1e-6)


def test_signals_of_an_encoder_with_biases_apart(images: Tensor) -> None:
    """BEiT's names: queries and values have a bias, keys none, and the layer is used without being called (seed 0)."""
    torch.manual_seed(0)
    encoder = LikeBEiT()
    handle = encoder.blocks[1].register_forward_hook(lambda *_: pytest.fail("the last block ran"))
    read = {graph: list(seam.encoder_signal(encoder, images, graph, "all")) for graph in ("queries", "keys", "values")}
    handle.remove()
    tokens = torch.cat([encoder.cls_token.expand(4, -1, -1), encoder.patch_embed(images)], dim=1)
    outputs = list(seam.encoder_signal(encoder, images, "tokens", "all"))
    for index, block in enumerate(encoder.blocks):
        projected = block.norm1(tokens) @ block.attn.qkv.weight.T
        projected = projected + torch.cat([block.attn.q_bias, torch.zeros(24), block.attn.v_bias])
        for third, graph in enumerate(read):
            by_head = [projected[..., 24 * third + 12 * head : 24 * third + 12 * head + 12] for head in range(2)]
            torch.testing.assert_close(read[graph][index], torch.stack(by_head, dim=1), rtol=1e-5, atol=1e-6)
        tokens = block(tokens, encoder.table)
        torch.testing.assert_close(outputs[index], tokens)


# --- the calls -----------------------------------------------------------------------------------------------------


def test_official_leaves_everything_alone(mae: LikeMAE, images: Tensor) -> None:
    before = torch.get_rng_state()
    names = set(vars(mae))
    attached(mae, "--mask official")
    set_epoch(mae, 1)
    mask = torch.zeros(4, 64, dtype=torch.bool)
    assert masks_for(mae, images, mask) is mask
    assert saved_state(mae) == {}
    load_state(mae, {"model": {}})
    assert set(vars(mae)) == names
    assert torch.equal(torch.get_rng_state(), before)


def test_mae_gets_the_mask_in_the_form_of_its_own(mae: LikeMAE, images: Tensor) -> None:
    attached(mae, "--mask part")
    set_epoch(mae, 2)
    latent, mask, ids_restore = mae.forward_encoder(images, 0.75)
    assert latent.shape == (4, 17, 24)
    assert mask.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [48.0] * 4
    ids_keep, restore = mae_ids(mask.bool())
    assert torch.equal(ids_restore, restore)
    assert mask.gather(1, ids_keep).sum() == 0
    latent.sum().backward()
    assert all(value.grad is not None for value in mae.blocks.parameters())
    assert mae.training


GRAPHS = {
    "tokens": "--similarity vectors",
    "queries": "--heads select",
    "keys": "--layers 0 --remove_position",
    "values": "--similarity vectors --heads concat --layers last",
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_another_signal_comes_through_the_flags(mae: LikeMAE, images: Tensor, graph: str) -> None:
    """The mask is that of an EvolvedMask with these options, given our model's signal; no map of the whole image is made."""
    mae.blocks = nn.ModuleList(Block(24, 2, qkv_bias=True, norm_layer=LayerNorm) for _ in range(2)).eval()  # timm's
    attached(mae, f"--mask part --graph {graph} {GRAPHS[graph]}")
    set_epoch(mae, 2)
    maps: list[int] = []
    for block in mae.blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0].shape[-1]))
    by_hand = EvolvedMask((8, 8), 48, 4, seam.RUNS[mae].mask.config, seed=3)
    by_hand.set_epoch(2)
    by_hand.generator.set_state(seam.RUNS[mae].mask.generator.get_state())
    _, mask, _ = mae.forward_encoder(images, 0.75)
    assert maps.count(65) == {"tokens": 2, "queries": 1, "keys": 0, "values": 1}[graph]
    with torch.no_grad():
        expected = by_hand(images, lambda rows: mae.signal(rows, **by_hand.config.signal)).mask
    assert torch.equal(mask.bool(), expected)


def test_masks_come_in_shape_and_type_of_the_given(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = LikeBEiT()  # as SimMIM wraps its encoder
    attached(model, upstream="beit")
    for epoch in (0, 3):
        set_epoch(model, epoch)
        mask = masks_for(model, images, torch.zeros(4, 8, 8, dtype=torch.int64))
        assert (mask.shape, mask.dtype) == ((4, 8, 8), torch.int64)
        assert mask.flatten(1).sum(dim=1).tolist() == [20] * 4


@pytest.mark.parametrize("mask", ["attn-high", "attn-low", "semantic", "inverse-block", "squares"])
def test_maskers_of_other_papers_in_every_script(mae: LikeMAE, images: Tensor, mask: str) -> None:
    """The exact count in MAE and BEiT, in the first epoch and in a later one; attn-high masks what the class token looks at."""
    flags = f"--mask {mask} --layers last --smooth 2"
    attached(mae, flags)
    torch.manual_seed(0)
    beit = LikeBEiT()
    attached(beit, flags, upstream="beit")
    for epoch in (0, 3):
        set_epoch(mae, epoch)
        set_epoch(beit, epoch)
        mask_of_mae = mae.forward_encoder(images, 0.75)[1].bool()
        assert mask_of_mae.sum(dim=1).tolist() == [48] * 4
        assert masks_for(beit, images, torch.zeros(4, 64, dtype=torch.bool)).sum(dim=1).tolist() == [20] * 4
    if mask.startswith("attn"):
        (attention,) = seam.encoder_signal(mae, images, "attention", "last")
        received = attention[:, :, 0, 1:].mean(dim=1)
        ranked = received.argsort(dim=1, descending=mask == "attn-high")
        assert mask_of_mae.gather(1, ranked)[:, :48].all()


def test_drawn_mask_ratios(mae: LikeMAE, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its own for each image in BEiT, one for a batch in MAE: 32 to 57 of 64 patches."""
    attached(mae, "--mask random --mask_ratio_range 0.5,0.9 --ratio_draw batch")
    assert "32 to 57 of 8x8 patches" in capsys.readouterr().out
    beit = LikeBEiT()
    attached(beit, "--mask random --mask_ratio_range 0.5,0.9", upstream="beit")
    seen = set()
    for epoch in range(4):
        set_epoch(mae, epoch)
        set_epoch(beit, epoch)
        (count,) = mae.forward_encoder(images, 0.75)[1].sum(dim=1).unique().tolist()
        counts = masks_for(beit, images, torch.zeros(4, 64, dtype=torch.bool)).sum(dim=1)
        assert 32 <= min(count, *counts.tolist()) <= max(count, *counts.tolist()) <= 57
        assert len(counts.unique()) > 1
        seen.add(count)
    assert len(seen) > 1


def test_gradients_survive_autocast_around_the_mask(mae: LikeMAE, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps the weights that it cast; those cast without gradient must not reach the training pass."""
    attached(mae, "--mask part")
    set_epoch(mae, 2)
    plain, during = seam.encoder_signal, []

    def watched(*args: Any, **named: Any) -> Any:
        during.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_grad_enabled()))
        return plain(*args, **named)

    monkeypatch.setattr(seam, "encoder_signal", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent, _, _ = mae.forward_encoder(images, 0.75)
        loss = latent.float().square().sum()
    loss.backward()
    assert during == [(True, False, False)]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in mae.blocks[1].attn.qkv.parameters())


def test_an_epoch_draws_the_same_whatever_came_before(mae: LikeMAE, images: Tensor) -> None:
    attached(mae)
    drawn = []
    for before in (0, 3):
        set_epoch(mae, 0)
        for _ in range(before):
            mae.forward_encoder(images, 0.75)
            torch.rand(5), random.random(), np.random.rand()
        set_epoch(mae, 2)
        drawn.append((mae.forward_encoder(images, 0.75)[1], torch.rand(2), random.random(), np.random.rand()))
    (mask, *numbers), (again, *same) = drawn
    assert torch.equal(mask, again)
    assert torch.equal(numbers[0], same[0])
    assert numbers[1:] == same[1:]


def test_epochs_and_ranks_draw_apart(mae: LikeMAE, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    attached(mae, "--mask random")
    masks = []
    for rank, epoch in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(seam, "_rank", lambda rank=rank: rank)
        set_epoch(mae, epoch)
        masks.append(mae.forward_encoder(images, 0.75)[1])
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_state_goes_through_a_checkpoint(mae: LikeMAE, images: Tensor, tmp_path: Path) -> None:
    optimizer = attached(mae, "--recipe authors --ema_decay 0.5")
    set_epoch(mae, 1)
    mae.forward_encoder(images, 0.75)[0].sum().backward()
    optimizer.step()
    torch.save({"model": mae.state_dict(), **saved_state(mae)}, tmp_path / "checkpoint.pth")
    again = LikeMAE(**TINY, **DECODER)
    attached(again, "--recipe authors --ema_decay 0.5")
    checkpoint = torch.load(tmp_path / "checkpoint.pth")
    again.load_state_dict(checkpoint["model"])
    load_state(again, checkpoint)
    set_epoch(mae, 2)
    set_epoch(again, 2)
    assert torch.equal(mae.forward_encoder(images, 0.75)[1], again.forward_encoder(images, 0.75)[1])
    average = seam.RUNS[again].ema
    assert average is not None
    assert not torch.equal(average.model.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert mae.state_dict().keys() == LikeMAE(**TINY, **DECODER).state_dict().keys()


def test_average_moves_with_the_optimiser_only(mae: LikeMAE) -> None:
    optimizer = attached(mae, "--attention_from ema --ema_decay 0.5")
    average = seam.RUNS[mae].ema
    assert average is not None
    start = mae.cls_token.detach().clone()
    assert torch.equal(average.model.cls_token, start)
    mae.cls_token.grad = torch.ones_like(mae.cls_token)
    optimizer.step()
    torch.testing.assert_close(average.model.cls_token, (start + mae.cls_token.detach()) / 2)


def test_a_checkpoint_without_masks_starts_the_average_from_its_weights(mae: LikeMAE) -> None:
    attached(mae, "--attention_from ema")
    with torch.no_grad():
        mae.cls_token.add_(1)  # as loading weights does
    load_state(mae, {"model": mae.state_dict()})
    average = seam.RUNS[mae].ema
    assert average is not None
    assert torch.equal(average.model.cls_token, mae.cls_token)


def stopped(capsys: pytest.CaptureFixture[str], call: Callable[[], None]) -> str:
    """The one line with which a call ends the script."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gamma -1", "--gamma must be above 0, got -1.0"),
        ("--layers what", "--layers must be"),
        ("--alpha 2", "--alpha must be"),
        ("--graph keys --attention_values scores", "--attention_values must be softmax with graph keys, got 'scores'"),
        ("--graph tokens --heads select", "--heads must be mean with graph tokens, which have none, got 'select'"),
        (
            "--mask_ratio_range 0.6,0.9",
            "--mask_ratio_range masks another number of patches in every image, which this model cannot",
        ),
        ("--mask_ratio_range 0.9,0.6", "--mask_ratio_range must be LOW,HIGH with 0 < LOW <= HIGH < 1, such as 0.6,0.9"),
        ("--mask block-official", "--mask block-official may mask fewer patches in some images, which this model cannot take"),
    ],
)
def test_bad_values_stop_before_anything_is_built(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert message in stopped(capsys, lambda: check_arguments("mae", arguments(flags)))


def test_uneven_masks_are_refused_where_they_cannot_be_taken_only() -> None:
    for upstream in ("beit", "simmim"):
        check_arguments(upstream, arguments("--mask block-official"))
    check_arguments("mae", arguments("--mask official"))


@pytest.mark.parametrize("mask", ["evolved", "part"])
@pytest.mark.parametrize("layers", ["0,99", "0,-3", "2"])
def test_blocks_that_do_not_exist_are_refused_at_the_start(
    mae: LikeMAE, capsys: pytest.CaptureFixture[str], mask: str, layers: str
) -> None:
    """Also where no image of the run would need its attention, as in the first epoch of evolved masks."""
    wrong = layers.split(",")[-1]
    line = stopped(capsys, lambda: attached(mae, f"--mask {mask} --layers={layers}"))
    assert line.endswith(f"error: layers [{wrong}] do not exist: the encoder has 2 blocks")
    assert mae not in seam.RUNS
    attached(mae, f"--mask {mask} --layers=0,-1")
    assert mae in seam.RUNS


def test_what_only_the_model_shows_is_one_line_too(mae: LikeMAE, capsys: pytest.CaptureFixture[str]) -> None:
    assert "K = 65 parts is above the N = 64" in stopped(capsys, lambda: attached(mae, "--num_parts 65"))
    assert "Linear has no patch_embed" in stopped(capsys, lambda: attached(nn.Linear(2, 2)))
    assert "mask_ratio must be inside" in stopped(capsys, lambda: attached(mae, mask_ratio=1.5))
    attached(mae, "--gamma 2")
    state = saved_state(mae)
    attached(mae, "--gamma 3")
    assert "other settings: gamma 2.0 -> 3.0" in stopped(capsys, lambda: load_state(mae, state))


def test_simmim_keeps_the_choices_in_its_configuration() -> None:
    class Node(dict):  # the part of a yacs configuration that is used
        frozen = True
        __getattr__ = dict.__getitem__

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "frozen" and self.frozen:
                raise AttributeError(name)
            super().__setattr__(name, value) if name == "frozen" else self.__setitem__(name, value)

        def defrost(self) -> None:
            self.frozen = False

        def freeze(self) -> None:
            self.frozen = True

    config = Node(TRAIN=Node(EPOCHS=7), SEED=5, DATA=Node(MASK_RATIO=0.6), AMP_OPT_LEVEL="O1")
    check_arguments("simmim", arguments("--mask official"), config)
    assert seam.READERS["simmim"](config).options == {"mask": "official"}
    check_arguments("simmim", arguments("--gamma 3"), config)
    wanted = seam.READERS["simmim"](config)
    assert wanted.options == {"gamma": 3.0}
    assert (wanted.total_epochs, wanted.seed, wanted.count(196), wanted.autocast) == (7, 5, 117, torch.bfloat16)
    config["AMP_OPT_LEVEL"] = "O0"
    assert seam.READERS["simmim"](config).autocast is None


@pytest.mark.parametrize(
    ("beside", "kind", "name", "options"),
    [
        ("mae_vit_base_patch16", "MaskedAutoencoderViT", "mae_vit_small_patch16", {"decoder_embed_dim": 512}),
        ("vit_base_patch16", "VisionTransformer", "vit_small_patch16", {"qkv_bias": True}),
        (
            "beit_base_patch16_224_8k_vocab",
            "VisionTransformerForMaskedImageModeling",
            "beit_small_patch16_224_8k_vocab",
            {"qkv_bias": True, "vocab_size": 8192},
        ),
        ("beit_base_patch16_224", "VisionTransformer", "beit_small_patch16_224", {"qkv_bias": True}),
    ],
)
def test_small_models_get_their_official_names(
    monkeypatch: pytest.MonkeyPatch, beside: str, kind: str, name: str, options: dict[str, Any]
) -> None:
    """Found in the module, or by timm's name; a second call leaves the first model there."""
    built: list[dict[str, Any]] = []
    theirs = types.ModuleType(f"models_beside_{beside}")
    vars(theirs).update({beside: None, kind: lambda **sizes: built.append(sizes)})
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    seam.add_small_model(theirs)
    first = getattr(theirs, name)
    seam.add_small_model(theirs)
    assert getattr(theirs, name) is first
    from timm.models import create_model

    given = {"drop_path_rate": 0.1}
    create_model(name, **given) if name.startswith("beit") else first(**given)
    assert len(built) == 1
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4}
    assert built[0].items() >= {**sizes, **options, **given}.items()
    assert built[0]["norm_layer"](8).eps == 1e-6


# --- shims ---------------------------------------------------------------------------------------------------------

SHIMS_TWICE = """
import argparse, sys, warnings
warnings.simplefilter("ignore")
sys.argv += {argv!r}
from patches import seam
import numpy, timm, torch
def watched():
    import torch.distributed, torch.nn as nn
    from timm.models.vision_transformer import Block
    return [id(function) for function in (
        torch.load, torch.cuda.synchronize, torch.cuda.set_device, torch.amp.GradScaler.state_dict, torch.Tensor.cuda,
        nn.Module.cuda, nn.parallel.DistributedDataParallel.__init__, torch.distributed.init_process_group,
        Block.__init__, timm.__version__, sys.modules.get("torch._six"), sys.modules.get("apex"),
        timm.data.mixup.mixup_target, timm.data.auto_augment.NAME_TO_OP["Posterize"],
        vars(numpy).get("float"), vars(numpy).get("int"))] + sys.argv
seam.prepare({upstream!r})
first = watched()
seam.prepare({upstream!r})
assert watched() == first
"""


def shimmed(upstream: str, code: str = "", argv: tuple[str, ...] = (), **environment: str) -> list[str]:
    """Words printed by `code` in a fresh process, after the shims of an upstream were applied twice."""
    script = SHIMS_TWICE.format(upstream=upstream, argv=list(argv)) + code
    plain = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_shims_of_mae(tmp_path: Path) -> None:
    code = """
from torch._six import inf
from timm.models.vision_transformer import Block
assert timm.__version__ == "0.3.2" and timm.__version__ == "0.4.12" and timm.__version__ != "0.3.1"
assert not timm.__version__ != "0.3.2" and f"{timm.__version__}" == "0.4.12" and {"0.4.12": 1}[timm.__version__]
Block(8, 2, 4.0, qkv_bias=True, qk_scale=None)
try:
    Block(8, 2, qk_scale=0.5)
except TypeError as error:
    print("refused")
torch.cuda.synchronize()
from torchvision.transforms import functional
functional._get_image_size(torch.zeros(3, 4, 5))
torch.save({"args": argparse.Namespace(lr=1.0)}, sys.argv[-1])
print(inf, numpy.arange(2, dtype=numpy.float).dtype, torch.load(sys.argv[-1])["args"].lr, sys.argv[1], sys.argv[2])
"""
    printed = shimmed("mae", code, ("--local-rank=3", "--other", str(tmp_path / "checkpoint.pth")))
    assert printed == ["refused", "inf", "float64", "1.0", "--local_rank=3", "--other"]


def test_shims_of_beit() -> None:
    code = """
print(numpy.zeros(2, dtype=numpy.int).dtype, torch.amp.GradScaler("cuda").state_dict()["scale"])
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
print(len(scaler.state_dict()), scaler.state_dict()["scale"], "apex" in sys.modules)
"""
    assert shimmed("beit", code) == ["int64", "1.0", "5", "8.0", "False"]


def test_shims_of_simmim_stay_on_the_cpu() -> None:
    code = """
from apex import amp
from torch import nn
torch.cuda.set_device(0)
torch.distributed.init_process_group(backend="nccl", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
model, optimizer = amp.initialize(nn.Linear(2, 1).cuda(), None, opt_level="O1")
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)
loss = wrapped(torch.ones(3, 2).cuda(non_blocking=True)).sum()
with amp.scale_loss(loss, optimizer) as scaled:
    scaled.backward()
print(torch.distributed.get_backend(), len(list(amp.master_params(optimizer))), float(model.bias.grad), sys.argv[-1])
"""
    assert shimmed("simmim", code, LOCAL_RANK="0") == ["gloo", "2", "3.0", "--local_rank=0"]


def test_simmim_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    code = """
import os, pickle
class Bad:
    def __reduce__(self):
        return os.system, ("echo ran",)
torch.save({"config": Bad(), "model": torch.ones(1)}, sys.argv[1])
try:
    torch.load(sys.argv[1], map_location="cpu")
except pickle.UnpicklingError as error:
    print("refused", str(error).split()[0])
torch.save({"model": {"w": torch.ones(1)}}, sys.argv[1])
print(torch.load(sys.argv[1], map_location="cpu")["model"]["w"].item())
"""
    assert shimmed("simmim", code, (str(tmp_path / "bad.pth"), "--local_rank=0")) == ["refused", "posix.system", "1.0"]


@pytest.mark.parametrize("upstream", ["mae", "beit", "simmim"])
def test_labels_are_mixed_on_the_cpu(upstream: str) -> None:
    code = """
from timm.data.mixup import Mixup
images, labels = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]))
print(labels.device, round(float(labels.sum()), 3))
"""
    assert shimmed(upstream, code, LOCAL_RANK="0") == ["cpu", "2.0"]


@pytest.mark.parametrize("upstream", ["mae", "beit", "simmim"])
def test_the_strongest_posterisation_leaves_black(upstream: str) -> None:
    """Each operation of RandAugment that posterises, from no bit, which Pillow 13 refuses, to all."""
    code = """
from PIL import Image
from timm.data import auto_augment
image, names = Image.new("RGB", (2, 2), (255, 130, 1)), [name for name in auto_augment.NAME_TO_OP if "Posterize" in name]
for name in names:
    posterize = auto_augment.NAME_TO_OP[name]
    print(*[value for bits in (0, 1, 8) for value in posterize(image, bits).getpixel((1, 1))])
"""
    assert shimmed(upstream, code, LOCAL_RANK="0") == 3 * ["0", "0", "0", "128", "128", "0", "255", "130", "1"]


def test_with_a_gpu_the_cpu_shims_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data import mixup

    from patches import shims

    def watched() -> list[Any]:
        calls = [torch.cuda.synchronize, torch.Tensor.cuda, torch.distributed.init_process_group, mixup.mixup_target]
        return [*calls, torch.amp.GradScaler.state_dict]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = watched()
    for shim in (shims.shim_cuda_calls, shims.shim_cuda_only_script, shims.shim_loss_scale, shims.shim_mixup_device):
        shim()
    assert watched() == before
