"""Checkpoints of pre-training and fine-tuning, ours and official, in the downstream encoder."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beit_evolved.model import BEiT
from common.training.errors import BadInput
from downstream.vit import METHODS, BackboneViT, Method
from downstream.weights import LEFT_OUT, load_encoder, resized
from mae_evolved.model import MaskedAutoencoder
from simmim_evolved.model import SimMIM
from tests.downstream.test_vit import SIZES, WINDOWS, shaken

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
FLAGS = {"input_size": "20x28"}


def pretrained(method: Method, input_size: tuple[int, int] = (20, 28), **options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"input_size": input_size, **SIZES, **options}
    if method == "mae":
        return shaken(MaskedAutoencoder(**sizes, decoder_width=16, decoder_depth=1, decoder_heads=2))
    return shaken(BEiT(vocabulary=32, **sizes) if method == "beit" else SimMIM(**sizes))


def fresh(method: Method, input_size: tuple[int, int] = (20, 28), **options: Any) -> BackboneViT:
    torch.manual_seed(1)
    return BackboneViT(method, input_size, **{**SIZES, **options}).eval()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint as a trainer would: `save(weights, **more)`."""

    def write(weights: dict[str, Any], **more: Any) -> Path:
        torch.save({"model": weights, "config": FLAGS, "epoch": 3, **more}, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return write


def tokens_of_blocks(blocks: nn.ModuleList, run: Callable[[], Any]) -> list[Tensor]:
    """What each block gives out while `run` runs."""
    kept: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: kept.append(output)) for block in blocks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return kept


def assert_same_tokens(encoder: BackboneViT, images: Tensor, expected: list[Tensor]) -> None:
    with torch.no_grad():
        outputs = encoder(images, range(encoder.depth))
    for output, tokens in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, tokens, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_features_are_those_of_pretraining(method: Method, save: Callable[..., Path]) -> None:
    """After every block the tokens of the whole image are those of the pre-training model; weights are to the bit."""
    model, encoder, last = pretrained(method), fresh(method, drop_path=0.1), LayerNorm(24)
    images, inner = torch.randn(2, 3, 20, 28), getattr(model, "encoder", model)
    line = load_encoder(encoder, save(model.state_dict()), norm=last)
    assert "interpolated" not in line
    nothing_masked = [torch.arange(35).expand(2, -1)] if method == "mae" else []
    expected = tokens_of_blocks(inner.blocks, lambda: inner.encode(images, *nothing_masked))
    assert_same_tokens(encoder, images, expected)
    torch.testing.assert_close(last(encoder(images, [2])[0]), inner.norm(expected[2]), atol=2e-5, rtol=0)
    embedded = inner.embed(images)
    assert torch.equal(encoder.embed(images), inner.with_class_token(embedded) if method == "mae" else embedded)
    theirs = inner.state_dict()
    for key, value in encoder.state_dict().items():
        shared = "rel_pos_bias." + key.split(".attn.")[-1]
        assert torch.equal(value, theirs[shared if shared in theirs else key]), key


def test_the_line_says_what_was_left_out(save: Callable[..., Path]) -> None:
    lines = {method: load_encoder(fresh(method), save(pretrained(method).state_dict())) for method in METHODS}
    ours = {method: line.split("; ", 1)[1] for method, line in lines.items()}
    assert re.match(r"loaded .*checkpoint.pth: MAE encoder, 40 tensors; ", lines["mae"])
    assert ours["mae"].startswith(
        "left out: mask_token (1), decoder_pos_embed (1), norm (2), decoder_embed (2), decoder_blocks (12)"
    )
    copied = "shared position bias copied to each block; left out: mask_token (1), "
    assert ours["beit"] == copied + "norm (2), lm_head (2)"
    assert ours["simmim"] == copied + "norm (2), decoder (2)"


@pytest.mark.parametrize("method", METHODS)
def test_wrappers_and_prefixes(method: Method, tmp_path: Path) -> None:
    """Bare, under each wrapper, and from a model that ran under DDP: the same weights."""
    weights = pretrained(method, (20, 20)).state_dict()
    parallel = {f"module.{key}": value for key, value in weights.items()}
    states = []
    for state in (
        weights,
        {"model": weights},
        {"module": weights},
        {"state_dict": parallel},
        {"model": parallel, "optimizer": {}},
    ):
        torch.save(state, tmp_path / "one.pth")
        encoder = fresh(method, (20, 20))
        load_encoder(encoder, tmp_path / "one.pth", method)
        states.append(encoder.state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["blocks.2.mlp.fc1.weight"], fresh(method, (20, 20)).state_dict()["blocks.2.mlp.fc1.weight"])


# --- other grids ---


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights_between(source: int, target: int) -> np.ndarray:
    """[target, source]: share of each old place in each new one; places outside count as those at the border."""
    shares = np.zeros((target, source))
    for new in range(target):
        centre = (new + 0.5) * source / target - 0.5
        for old in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            shares[new, min(max(old, 0), source - 1)] += cubic(centre - old)
    return shares


@pytest.mark.parametrize(("source", "target"), [((5, 7), (9, 8)), ((9, 13), (5, 5)), ((3, 3), (7, 15))])
def test_interpolation_by_its_definition(source: tuple[int, int], target: tuple[int, int]) -> None:
    plane = torch.randn(source[0] * source[1], 3, dtype=torch.float64).float()
    down, across = (weights_between(*pair) for pair in zip(source, target, strict=True))
    grid = plane.reshape(*source, 3).double().numpy()
    expected = np.einsum("Hh,Ww,hwd->HWd", down, across, grid).reshape(-1, 3)
    np.testing.assert_allclose(resized(plane, source, target).numpy(), expected, atol=1e-5)


def test_interpolation_of_simple_planes() -> None:
    """The same size is the same tensor; a constant stays; a slope stays a slope, to a twentieth of a step."""
    plane = torch.randn(35, 2)
    assert resized(plane, (5, 7), (5, 7)) is plane
    torch.testing.assert_close(resized(torch.full((35, 2), 3.7), (5, 7), (11, 4)), torch.full((44, 2), 3.7))
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    slope = resized(torch.stack([rows, columns], dim=2).reshape(64, 2), (8, 8), (16, 24)).reshape(16, 24, 2)
    expected = torch.stack(
        torch.meshgrid((torch.arange(16) + 0.5) / 2 - 0.5, (torch.arange(24) + 0.5) / 3 - 0.5, indexing="ij"), dim=2
    )
    inside = (slope - expected)[3:-3, 5:-5].abs()
    assert 0 < inside.max() < 0.05


def test_positions_follow_the_grid(save: Callable[..., Path]) -> None:
    """Positions in which channel 0 is the row and channel 1 the column, on a taller and narrower grid."""
    weights = pretrained("mae").state_dict()
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    weights["pos_embed"][0, 1:, :2] = torch.stack([rows, columns], dim=2).reshape(35, 2)
    encoder = fresh("mae", (40, 24))
    line = load_encoder(encoder, save(weights))
    assert "positions 5x7 interpolated to 10x6" in line
    made = encoder.pos_embed.detach()  # type: ignore[union-attr]
    assert torch.equal(made[:, 0], weights["pos_embed"][:, 0])
    grid = made[0, 1:].reshape(10, 6, 24)
    torch.testing.assert_close(grid[..., 0], grid[:, :1, 0].expand(10, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[..., 1], grid[:1, :, 1].expand(10, 6), atol=1e-5, rtol=0)
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()
    torch.testing.assert_close(grid[3:-3, 0, 0], (torch.arange(3, 7) + 0.5) / 2 - 0.5, atol=0.05, rtol=0)


@pytest.mark.parametrize("method", ["beit", "simmim"])
def test_tables_follow_the_grid(method: Method, save: Callable[..., Path]) -> None:
    """Offset 0 stays itself, the largest offsets stay outermost, the rows of the class token stay to the bit."""
    model = pretrained(method)
    table = getattr(model, "encoder", model).rel_pos_bias.relative_position_bias_table.detach()
    encoder = fresh(method, (32, 36))
    line = load_encoder(encoder, save(model.state_dict()))
    assert "relative offsets 9x13 interpolated to 15x17; shared position bias copied to each block" in line
    down, across = weights_between(9, 15), weights_between(13, 17)
    expected = np.einsum("Hh,Ww,hwd->HWd", down, across, table[:-3].double().reshape(9, 13, 2).numpy()).reshape(-1, 2)
    for block in encoder.blocks:
        made = block.attn.relative_position_bias_table.detach()
        assert torch.equal(made[-3:], table[-3:])
        np.testing.assert_allclose(made[:-3].numpy(), expected, atol=1e-5)
        torch.testing.assert_close(made[7 * 17 + 8], table[4 * 13 + 6])
        assert torch.equal(block.attn.relative_position_index, fresh(method, (32, 36)).blocks[0].attn.relative_position_index)


@pytest.mark.parametrize("method", METHODS)
def test_windows_and_no_class_token(method: Method, save: Callable[..., Path]) -> None:
    """Whole-grid blocks keep their table but for the last three rows; windows get one of their own size."""
    model, encoder = pretrained(method), fresh(method, **WINDOWS)
    line = load_encoder(encoder, save(model.state_dict()))
    assert "cls_token (1)" in line
    if method == "mae":
        assert torch.equal(encoder.pos_embed, model.pos_embed[:, 1:])
        return
    assert "relative offsets 9x13 interpolated to 5x5" in line
    table = getattr(model, "encoder", model).rel_pos_bias.relative_position_bias_table
    first, whole, last = (block.attn.relative_position_bias_table for block in encoder.blocks)
    assert torch.equal(whole, table[:-3])
    assert torch.equal(first, last)
    assert torch.equal(first, resized(table[:-3], (9, 13), (5, 5)))


# --- fine-tuned models ---


class Task(nn.Module):
    """A task model as the tasks build it."""

    def __init__(self, encoder: BackboneViT) -> None:
        super().__init__()
        self.encoder, self.fc_norm, self.head = encoder, LayerNorm(24), nn.Linear(24, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, WINDOWS])
def test_fine_tuned_models_come_back(method: Method, options: dict[str, Any], save: Callable[..., Path]) -> None:
    """Of ours, encoder nested; of the official layout, all at top level. Tables of windows too, to the bit."""
    tuned = shaken(fresh(method, **options))
    nested = Task(tuned).state_dict()
    flat = {key.removeprefix("encoder."): value for key, value in nested.items()}
    for weights in (nested, flat, tuned.state_dict()):
        encoder = fresh(method, **options)
        line = load_encoder(encoder, save(weights))
        assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in tuned.state_dict().items())
        assert ("left out: fc_norm (2), head (2)" in line) == (len(weights) > len(tuned.state_dict()))


def test_a_flag_tells_fine_tuned_beit_from_simmim(save: Callable[..., Path]) -> None:
    """Their names are the same: either loads as either, unless the checkpoint says what it is."""
    weights = Task(fresh("beit")).state_dict()
    load_encoder(fresh("simmim"), save(weights))
    path = save(weights, config={**FLAGS, "method": "beit"})
    load_encoder(fresh("beit"), path)
    with pytest.raises(BadInput, match="holds a BEiT encoder, but the method asked for is SimMIM"):
        load_encoder(fresh("simmim"), path)
    with pytest.raises(BadInput, match="holds a BEiT or SimMIM encoder, but the method asked for is MAE"):
        load_encoder(fresh("mae"), save(weights))


# --- what is refused ---


@pytest.mark.parametrize("held", METHODS)
def test_other_methods_are_refused(held: Method, save: Callable[..., Path]) -> None:
    path = save(pretrained(held).state_dict())
    for asked in set(METHODS) - {held}:
        titles = {"mae": "MAE", "beit": "BEiT", "simmim": "SimMIM"}
        with pytest.raises(BadInput, match=f"holds a {titles[held]} encoder, but the method asked for is {titles[asked]}"):
            load_encoder(fresh(asked), path)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mae", {"width": 48}, "holds a MAE encoder 24 wide, 3 deep, patch 4; the model vit is 48 wide, 3 deep, patch 4"),
        ("mae", {"depth": 2}, "MAE encoder 24 wide, 3 deep, patch 4; the model vit is 24 wide, 2 deep, patch 4"),
        (
            "beit",
            {"heads": 3},
            "BEiT encoder 24 wide, 3 deep, 2 heads, patch 4; the model vit is 24 wide, 3 deep, 3 heads, patch 4",
        ),
        ("simmim", {"patch_size": 2}, "SimMIM encoder 24 wide, 3 deep, 2 heads, patch 4; the model vit is .* patch 2"),
        ("beit", {"layer_scale": 0.0}, "not of this model: blocks.0.gamma_1, blocks.0.gamma_2, .* and 2 more"),
    ],
)
def test_other_sizes_are_refused_in_words(
    method: Method, options: dict[str, Any], message: str, save: Callable[..., Path]
) -> None:
    path = save(pretrained(method).state_dict())
    with pytest.raises(BadInput, match=message):
        load_encoder(fresh(method, name="vit", **options), path)


def test_names_are_accounted_for(save: Callable[..., Path]) -> None:
    """Missing, left over, misshaped: each is named, and the model is as before."""
    encoder, weights = fresh("beit"), pretrained("beit").state_dict()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({}, ["blocks.1.norm1.bias"], r"\(missing: blocks.1.norm1.bias\)"),
        ({}, ["rel_pos_bias.relative_position_bias_table"], r"missing: blocks.0.attn.relative_position_bias_table, "),
        ({"pos_embed": torch.zeros(1, 36, 24)}, [], r"\(not of this model: pos_embed\)"),
        ({"blocks.0.attn.relative_position_bias_table": torch.zeros(120, 2)}, [], "not of this model: blocks.0.attn.relative"),
        ({"blocks.0.norm1.bias": torch.zeros(23)}, [], r"\(of another shape: blocks.0.norm1.bias \[23\] instead of \[24\]\)"),
        ({f"extra{i}": torch.zeros(1) for i in range(6)}, [], r"not of this model: extra0, extra1, extra2, extra3 and 2 more"),
    ]
    for added, removed, message in cases:
        changed = {key: value for key, value in {**weights, **added}.items() if key not in removed}
        with pytest.raises(BadInput, match=message):
            load_encoder(encoder, save(changed))
    no_norm = {key: value for key, value in weights.items() if not key.startswith("norm.")}
    with pytest.raises(BadInput, match=r"\(missing: norm.weight, norm.bias\)"):
        load_encoder(encoder, save(no_norm), norm=LayerNorm(24))
    spoilt = {**weights, "blocks.0.norm1.bias": torch.full((24,), float("inf"))}
    with pytest.raises(BadInput, match=r"holds weights that are NaN or infinite: blocks.0.norm1.bias$"):
        load_encoder(encoder, save(spoilt))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    load_encoder(encoder, save(no_norm))


def test_the_last_norm_beside_a_nested_encoder(save: Callable[..., Path]) -> None:
    """A task model's own norm is found; a tensor of the encoder beside it is not taken for the encoder's."""
    weights, norm = Task(fresh("mae")).state_dict(), LayerNorm(24)
    load_encoder(fresh("mae"), save({**weights, "norm.weight": torch.full((24,), 2.0), "norm.bias": torch.ones(24)}), norm=norm)
    assert torch.equal(norm.weight.detach(), torch.full((24,), 2.0))
    with pytest.raises(BadInput, match=r"\(missing: cls_token; not of this model: cls_token\)"):
        load_encoder(fresh("mae"), save({"cls_token": weights.pop("encoder.cls_token"), **weights}))


def test_class_token_cannot_be_made_up(save: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"\(missing: cls_token\)"):
        load_encoder(fresh("beit"), save(fresh("beit", class_token=False).state_dict()))


def test_grids_that_the_checkpoint_does_not_tell(save: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="35 positions are of no square grid, and no input_size in it says which"):
        load_encoder(fresh("mae"), save(pretrained("mae").state_dict(), config={}))
    with pytest.raises(BadInput, match="117 relative offsets are of no square grid"):
        load_encoder(fresh("beit"), save(pretrained("beit").state_dict(), config={"input_size": 224}))


def test_files_that_hold_no_encoder(tmp_path: Path, save: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"checkpoint .*absent.pth: no such file"):
        load_encoder(fresh("mae"), tmp_path / "absent.pth")
    for weights in ({}, {"epoch": 3}):
        with pytest.raises(BadInput, match="holds no weights, neither under model, module, state_dict nor at top level"):
            load_encoder(fresh("mae"), save(weights))
    with pytest.raises(BadInput, match=r"holds no ViT encoder \(no patch_embed.proj.weight"):
        load_encoder(fresh("mae"), save({"encoder.0.weight": torch.ones(1)}))


def test_lists_of_names_do_not_hide_the_encoder() -> None:
    """No prefix that may be left out begins a name of the encoder."""
    for method in METHODS:
        assert not [name for name in fresh(method).state_dict() if name.startswith(LEFT_OUT[method])]


# --- the official models themselves ---

OFFICIAL: dict[Method, tuple[str, str]] = {
    "mae": ("UPSTREAM_MAE", "models_vit.py"),
    "beit": ("UPSTREAM_BEIT", "beit/modeling_finetune.py"),
    "simmim": ("UPSTREAM_SIMMIM", "models/vision_transformer.py"),
}


@pytest.mark.parametrize("method", METHODS)
def test_official_fine_tuning_models(method: Method, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checkpoint in our encoder: the tokens of every block are theirs."""
    variable, file = OFFICIAL[method]
    if variable not in os.environ:
        pytest.skip(f"run it with {variable}=PATH of a clone")
    root = Path(os.environ[variable])
    spec = importlib.util.spec_from_file_location(
        f"official_{method}", next(p for p in (root / file, root / Path(file).name) if p.exists())
    )
    assert spec is not None
    assert spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, official)
    spec.loader.exec_module(official)
    sizes = {"img_size": (20, 28), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    more: dict[str, Any] = {"qkv_bias": True, "norm_layer": LayerNorm}
    if method == "mae":
        more |= {"global_pool": True}
    else:
        more |= {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    theirs, encoder, images = shaken(official.VisionTransformer(**sizes, **more)), fresh(method), torch.randn(2, 3, 20, 28)
    line = load_encoder(encoder, save(theirs.state_dict()))
    assert set(line.split("left out: ")[1].split(", ")) == {"fc_norm (2)", "head (2)"}
    assert_same_tokens(encoder, images, tokens_of_blocks(theirs.blocks, lambda: theirs(images)))
    names = {key for key in theirs.state_dict() if not key.startswith(("head.", "fc_norm.", "norm."))}
    assert names == set(encoder.state_dict())
