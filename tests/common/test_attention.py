"""Attention of an encoder: read as it runs, and reduced to the patch graph."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from common.attention import AttentionTap, attention_mode, choose_layers, patch_graph, stream_attention
from common.models.timm_layers import Block

WIDTH, HEADS, TOKENS = 12, 3, 7


def make_blocks(depth=3, seed=0, **options):
    torch.manual_seed(seed)
    return nn.ModuleList([Block(WIDTH, HEADS, qkv_bias=True, **options) for _ in range(depth)]).eval()


def make_tokens(seed=1, batch=2):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(blocks, tokens):
    for block in blocks:
        tokens = block(tokens)
    return tokens


def scores_by_hand(block, tokens):
    """Scaled dot products of a timm block from its weights, head by head, in double precision."""
    tokens = block.norm1(tokens).detach().double().numpy()
    weight, bias = block.attn.qkv.weight.detach().double().numpy(), block.attn.qkv.bias.detach().double().numpy()
    size, scores = WIDTH // HEADS, []
    for head in range(HEADS):
        q, k = slice(head * size, (head + 1) * size), slice(WIDTH + head * size, WIDTH + (head + 1) * size)
        query, key = tokens @ weight[q].T + bias[q], tokens @ weight[k].T + bias[k]
        scores.append(query @ key.transpose(0, 2, 1) / np.sqrt(size))
    return torch.from_numpy(np.stack(scores, axis=1))


def hooks_of(blocks):
    return [hook for module in blocks.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


# --- Which blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [0, 1, 2, 3]), ("last", [3]), ([0, 2], [0, 2]), ([2, 0], [0, 2]), ([-1], [3]), ([-1, 3, 1], [1, 3]), ((-4,), [0])],
)
def test_choose_layers(layers, chosen):
    """Words, indices and negative indices: ascending, each once."""
    assert choose_layers(layers, 4) == chosen


@pytest.mark.parametrize(
    ("layers", "named"), [([4], r"\[4\].*4 blocks"), ([0, -5], r"\[-5\]"), ([], "empty"), ("first", "'first'")]
)
def test_choose_layers_refuses(layers, named):
    """Blocks that do not exist, no block, and unknown words are named."""
    with pytest.raises(ValueError, match=named):
        choose_layers(layers, 4)


# --- The tap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_tap_equals_attention_by_hand(values):
    """Each map is softmax(q k^T / sqrt(d)), or the scores before it, computed from the weights of its block."""
    blocks, tokens = make_blocks(), make_tokens()
    with AttentionTap(blocks, values=values) as tap:
        run(blocks, tokens)
    assert len(tap.maps) == 3
    for block, attention in zip(blocks, tap.maps, strict=True):
        expected = scores_by_hand(block, tokens)
        if values == "softmax":
            expected = expected.softmax(dim=-1)
        torch.testing.assert_close(attention, expected.float(), rtol=1e-4, atol=1e-5)
        tokens = block(tokens)


@pytest.mark.parametrize(
    ("layers", "which"), [("all", [0, 1, 2]), ("last", [2]), ([0, 2], [0, 2]), ([-2], [1]), ([2, 0], [0, 2])]
)
def test_tap_reads_the_chosen_layers(layers, which):
    """Only the chosen blocks are read, in the order of execution."""
    blocks, tokens = make_blocks(), make_tokens()
    with AttentionTap(blocks) as every, AttentionTap(blocks, layers) as tap:
        run(blocks, tokens)
    assert len(tap.maps) == len(which)
    assert all(torch.equal(tap.maps[n], every.maps[i]) for n, i in enumerate(which))


def test_tap_keeps_every_pass():
    """Two passes give two maps a block, in the order in which they ran."""
    blocks = make_blocks(2)
    with AttentionTap(blocks) as tap:
        run(blocks, make_tokens(1))
        run(blocks, make_tokens(2))
    assert len(tap.maps) == 4
    torch.testing.assert_close(tap.maps[2], scores_by_hand(blocks[0], make_tokens(2)).softmax(dim=-1).float())


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_tap_changes_nothing(values):
    """Output and gradients of the blocks are the same with the tap; the maps carry no gradient."""
    blocks, tokens = make_blocks(), make_tokens().requires_grad_()
    plain = run(blocks, tokens)
    (gradient,) = torch.autograd.grad(plain.square().sum(), tokens)
    with AttentionTap(blocks, values=values) as tap:
        tapped = run(blocks, tokens)
    assert torch.equal(tapped, plain)
    assert torch.equal(torch.autograd.grad(tapped.square().sum(), tokens)[0], gradient)
    assert not any(attention.requires_grad for attention in tap.maps)


def test_tap_reads_before_dropout():
    """In training mode the map is the attention before its dropout: rows still sum to 1."""
    blocks = make_blocks(1, attn_drop=0.5).train()
    with AttentionTap(blocks) as tap:
        run(blocks, make_tokens())
    torch.testing.assert_close(tap.maps[0], scores_by_hand(blocks[0], make_tokens()).softmax(dim=-1).float())


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_tap_leaves_no_hook(values):
    """After the block, and after an exception inside it, no hook remains, and later passes are not read."""
    blocks = make_blocks()
    with AttentionTap(blocks, values=values) as tap:
        assert len(hooks_of(blocks)) == 6  # what is read, and whether the attention ran
        run(blocks, make_tokens())
    assert hooks_of(blocks) == []
    run(blocks, make_tokens())
    assert len(tap.maps) == 3
    with pytest.raises(RuntimeError, match="inside"), AttentionTap(blocks, values=values):
        raise RuntimeError("inside")
    assert hooks_of(blocks) == []


class Plain(nn.Module):
    """A block without attention."""


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_tap_names_a_block_it_cannot_read(values):
    """A block without the module is a TypeError naming the block, and the hooks set before it are gone."""
    blocks = nn.ModuleList([*make_blocks(1), Plain()])
    with pytest.raises(TypeError, match=r"Plain.*attn_drop"), AttentionTap(blocks, values=values):
        pass
    assert hooks_of(blocks) == []


def test_tap_scores_need_qkv():
    """Scores are computed from `attn.qkv`; a block that has only `attn.attn_drop` cannot give them."""
    block = OtherBlock()
    block.attn.num_heads, block.attn.scale = 1, 1.0
    with pytest.raises(TypeError, match=r"OtherBlock.*qkv"), AttentionTap([block], values="scores"):
        pass
    assert hooks_of(block) == []


def test_tap_refuses_unknown_values_and_layers():
    """An unknown word is refused before any hook is set."""
    blocks = make_blocks(2)
    with pytest.raises(ValueError, match="'logits'"):
        AttentionTap(blocks, values="logits")
    with pytest.raises(ValueError, match="2 blocks"):
        AttentionTap(blocks, layers=[2])
    assert hooks_of(blocks) == []


class OtherAttention(nn.Module):
    """Uniform attention with an added bias, and nothing of timm but the module `attn_drop`."""

    def __init__(self):
        super().__init__()
        self.attn_drop = nn.Identity()

    def forward(self, tokens, bias=0.0):
        count = tokens.shape[1]
        weights = torch.full((len(tokens), 1, count, count), 1 / count) + bias
        return (self.attn_drop(weights) @ tokens[:, None])[:, 0]


class OtherBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.calls = nn.Identity(), OtherAttention(), 0

    def forward(self, tokens, bias=0.0):
        self.calls += 1
        return tokens + self.attn(self.norm1(tokens), bias=bias)


def test_tap_works_on_any_block_with_attn_drop():
    """A block of other make that merely has `attn.attn_drop` is read."""
    with AttentionTap([OtherBlock()]) as tap:
        tap.blocks[0](make_tokens(), bias=0.25)
    assert torch.equal(tap.maps[0], torch.full((2, 1, TOKENS, TOKENS), 1 / TOKENS) + 0.25)


class FusedAttention(nn.Module):
    """Fused attention that knows no `fused_attn`: `attn_drop` is there but never run, or attention is spelt out."""

    def __init__(self, fused=True):
        super().__init__()
        self.num_heads, self.scale, self.fused = 2, 6**-0.5, fused
        self.qkv, self.attn_drop = nn.Linear(12, 36), nn.Dropout(0.0)

    def forward(self, tokens):
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, 2, 6).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)) @ value
        return mixed.transpose(1, 2).reshape(batch, count, width)


class FusedBlock(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), FusedAttention(fused)

    def forward(self, tokens):
        return tokens + self.attn(self.norm1(tokens))


def test_tap_names_the_block_whose_attention_is_fused():
    """A fused block is an error on leaving the tap and where maps are asked for; the hooks are gone."""
    blocks = nn.ModuleList([FusedBlock(False), FusedBlock(False), FusedBlock()])
    with pytest.raises(RuntimeError, match=r"block 2 \(FusedBlock\).*attn_drop.*fused"), AttentionTap(blocks):
        run(blocks, make_tokens())
    assert hooks_of(blocks) == []
    tap = AttentionTap(blocks, "last")
    tap.__enter__()
    run(blocks, make_tokens())
    with pytest.raises(RuntimeError, match=r"block 2 \(FusedBlock\)"):
        len(tap.maps)
    tap.__exit__(ZeroDivisionError, None, None)
    with AttentionTap(blocks, [0, 1]) as tap:
        run(blocks, make_tokens())
    assert len(tap.maps) == 2
    blocks[2].attn.fused = False
    with AttentionTap(blocks) as tap:
        run(blocks, make_tokens())
    assert len(tap.maps) == 3


def test_tap_reads_scores_of_a_fused_block():
    """Scores come from `attn.qkv`, which a fused block runs; a block that goes round that module is named."""
    blocks = nn.ModuleList([FusedBlock()])
    with AttentionTap(blocks, values="scores") as tap:
        run(blocks, make_tokens())
    query, key, _ = blocks[0].attn.qkv(blocks[0].norm1(make_tokens())).reshape(2, TOKENS, 3, 2, 6).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(tap.maps[0], (query @ key.transpose(-2, -1) * 6**-0.5).detach())
    around = OtherBlock()
    around.attn.num_heads, around.attn.scale, around.attn.qkv = 1, 1.0, nn.Identity()
    with pytest.raises(RuntimeError, match=r"block 0 \(OtherBlock\).*attn\.qkv"), AttentionTap([around], values="scores"):
        around(make_tokens())


def test_stream_names_the_block_whose_attention_is_fused():
    """Its index is that in the encoder, whether it is the last chosen block or one before."""
    blocks = [FusedBlock(False), FusedBlock()]
    with pytest.raises(RuntimeError, match=r"block 1 \(FusedBlock\).*attn_drop"):
        list(stream_attention(blocks, make_tokens()))
    with pytest.raises(RuntimeError, match=r"block 0 \(FusedBlock\).*attn_drop"):
        list(stream_attention(blocks[::-1], make_tokens()))


def test_tap_without_a_forward_pass_says_so():
    """No pass is another error than a fused one, when maps are asked for; and so is a block that alone did not run."""
    blocks = make_blocks(2)
    with AttentionTap(blocks) as tap:
        pass
    with pytest.raises(RuntimeError, match=r"none of the 2 chosen blocks ran"):
        len(tap.maps)
    with pytest.raises(RuntimeError, match=r"block 1 \(Block\) did not run"), AttentionTap(blocks):
        blocks[0](make_tokens())


def test_tap_keeps_the_error_of_the_pass():
    """What goes wrong inside is not hidden by a complaint about maps."""
    blocks = [FusedBlock(), OtherBlock()]

    def fail():
        with AttentionTap(blocks):
            blocks[0](make_tokens())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_tap_reads_a_block_run_twice():
    """A block that stands twice in an encoder gives one map a run; one run fused and the other not is an error."""
    block = make_blocks(1)[0]
    with AttentionTap([block, block]) as tap:
        run([block, block], make_tokens())
    assert len(tap.maps) == 2
    expected = [
        scores_by_hand(block, tokens).softmax(dim=-1).float() for tokens in (make_tokens(), block(make_tokens()).detach())
    ]
    for attention, by_hand in zip(tap.maps, expected, strict=True):
        torch.testing.assert_close(attention, by_hand, rtol=1e-4, atol=1e-5)
    assert len(list(stream_attention([block, block], make_tokens()))) == 2
    changing = FusedBlock(False)

    def turn_fused():
        with AttentionTap([changing]):
            changing(make_tokens())
            changing.attn.fused = True
            changing(make_tokens())

    with pytest.raises(RuntimeError, match=r"block 0 \(FusedBlock\)"):
        turn_fused()


# --- Block by block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["softmax", "scores"])
@pytest.mark.parametrize("layers", ["all", "last", [0, 2], [1], [-3]])
def test_stream_equals_tap(layers, values):
    """Streaming gives the maps of a tap on a full pass, to the bit, and leaves no hook."""
    blocks, tokens = make_blocks(), make_tokens()
    with AttentionTap(blocks, layers, values) as tap:
        run(blocks, tokens)
    streamed = list(stream_attention(blocks, tokens, layers, values))
    assert len(streamed) == len(tap.maps)
    assert all(torch.equal(attention, tapped) for attention, tapped in zip(streamed, tap.maps, strict=True))
    assert hooks_of(blocks) == []


def test_stream_hands_on_block_inputs():
    """What blocks take besides the tokens (a position bias) reaches the blocks and the last attention."""
    maps = list(stream_attention([OtherBlock(), OtherBlock()], make_tokens(), bias=0.5))
    assert all(torch.equal(attention, torch.full((2, 1, TOKENS, TOKENS), 1 / TOKENS) + 0.5) for attention in maps)


def test_stream_runs_no_more_than_needed():
    """Blocks after the last chosen one do not run, of that one only the attention, and each only when asked for."""
    blocks = [OtherBlock() for _ in range(4)]
    stream = stream_attention(blocks, make_tokens(), [0, 2])
    next(stream)
    assert [block.calls for block in blocks] == [1, 0, 0, 0]
    next(stream)
    assert [block.calls for block in blocks] == [1, 1, 0, 0]
    assert list(stream) == []
    assert [block.calls for block in blocks] == [1, 1, 0, 0]


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_stream_ends_inside_the_last_block(values):
    """Once the map is read: of the last chosen block neither the output layer of the attention nor the MLP runs."""
    blocks, ran = make_blocks(), []
    for index, block in enumerate(blocks):
        for name, module in (("qkv", block.attn.qkv), ("proj", block.attn.proj), ("mlp", block.mlp)):
            module.register_forward_hook(lambda *_, what=f"{name} {index}": ran.append(what))
    assert len(list(stream_attention(blocks, make_tokens(), [0, 1], values))) == 2
    assert ran == ["qkv 0", "proj 0", "mlp 0", "qkv 1"]


def test_stream_that_is_dropped_leaves_no_hook():
    """A consumer may stop early."""
    blocks = make_blocks()
    stream = stream_attention(blocks, make_tokens())
    next(stream)
    stream.close()
    assert hooks_of(blocks) == []


# --- Mode of the pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_attention_mode_restores_mixed_modes(mode, fails):
    """Every module is in the asked mode inside, and has its own mode back after, also when the pass raises."""
    blocks = make_blocks(attn_drop=0.5).train()
    blocks[1].eval()
    blocks[2].attn.attn_drop.eval()
    before = [module.training for module in blocks.modules()]
    try:
        with attention_mode(blocks, mode):
            assert {module.training for module in blocks.modules()} == {mode == "train"}
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert [module.training for module in blocks.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attention_mode_takes_no_gradient(mode):
    """The pass builds no graph of gradients, and gradients are on again after it."""
    blocks, tokens = make_blocks(), make_tokens().requires_grad_()
    with attention_mode(blocks, mode):
        assert not run(blocks, tokens).requires_grad
    assert run(blocks, tokens).requires_grad


@pytest.mark.parametrize(("mode", "same"), [("eval", True), ("train", False)])
def test_attention_mode_decides_on_dropout(mode, same):
    """Two passes of a model with dropout agree in mode `eval`, and differ in `train` (the released code)."""
    blocks, tokens = make_blocks(drop=0.5, drop_path=0.5).train(), make_tokens(batch=16)
    torch.manual_seed(0)
    with attention_mode(blocks, mode):
        first, second = (next(stream_attention(blocks, tokens, "last")) for _ in range(2))
    assert torch.equal(first, second) is same


# --- The graph (Eq. 7) ------------------------------------------------------------------------------------------

BY_HAND = torch.tensor([[[9.0, 9, 9], [9, 0.5, -2.0], [9, 1.0, 3.0]], [[9.0, 9, 9], [9, 1.5, 4.0], [9, -7.0, 0.0]]])[None]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("row", [[1.0, 2.0], [0.5, 1.5]]),
        ("column", [[1.0, 0.5], [2.0, 1.5]]),
        ("symmetric", [[1.0, 1.25], [1.25, 1.5]]),
    ],
)
def test_patch_graph_by_hand(direction, expected):
    """The class token is dropped, negative values are cut head by head, heads averaged; rows, columns or their mean."""
    assert patch_graph(BY_HAND, 1, direction).tolist() == [expected]


def test_patch_graph_prefix_tokens():
    """P tokens in front are dropped from queries and keys, none with P = 0; a map without heads is its own mean."""
    attention = torch.arange(50.0).reshape(2, 5, 5)
    for prefix in range(4):
        assert torch.equal(patch_graph(attention, prefix), attention[:, prefix:, prefix:])
    assert torch.equal(patch_graph(attention[:, None].repeat(1, 3, 1, 1), 2), attention[:, 2:, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_patch_graph_averages_in_float32(dtype, random_attention):
    """Half-precision maps are widened before the mean over heads."""
    attention = random_attention(0, 2, 9, heads=7).to(dtype)
    graph = patch_graph(attention)
    assert graph.dtype == torch.float32
    torch.testing.assert_close(graph, attention.double().mean(dim=1)[:, 1:, 1:].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 5), (1, 1, 1, 4, 4)])
def test_patch_graph_refuses_other_shapes(shape):
    """Only square maps are attention."""
    with pytest.raises(ValueError, match="attention must be"):
        patch_graph(torch.zeros(shape))


def test_unknown_direction():
    """An unknown direction is named."""
    with pytest.raises(ValueError, match="'diagonal'"):
        patch_graph(BY_HAND, 1, "diagonal")


# --- Several blocks ---------------------------------------------------------------------------------------------


def reduced(maps, direction, heads, reduction):
    """The graph of several blocks with numpy, from all maps at once: [B, N, N] or [B, N, h*N]."""
    stacked = np.stack([attention.double().numpy() for attention in maps])[..., 1:, 1:].clip(min=0)  # [L, B, h, N, N]
    total = stacked.mean(axis=0) if reduction == "mean" else stacked.sum(axis=0)
    if heads == "mean":
        total = (total.mean(axis=1) if reduction == "mean" else total.sum(axis=1))[:, None]
    turned = total.swapaxes(-1, -2)
    total = {"row": total, "column": turned, "symmetric": (total + turned) / 2}[direction]
    return torch.from_numpy(np.concatenate(list(total.swapaxes(0, 1)), axis=-1)).float()


@pytest.mark.parametrize("direction", ["row", "column", "symmetric"])
@pytest.mark.parametrize("heads", ["mean", "concat"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_patch_graph(direction, heads, reduction):
    """A running reduction of 4 blocks of 3 heads (seed 0, some negative) equals numpy over all maps at once."""
    maps = list(torch.randn(4, 2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    before = [attention.clone() for attention in maps]
    graph = patch_graph(iter(maps), direction=direction, heads=heads, reduction=reduction)
    torch.testing.assert_close(graph, reduced(maps, direction, heads, reduction), rtol=1e-5, atol=1e-6)
    assert graph.shape == ((2, 5, 5) if heads == "mean" else (2, 5, 15))
    assert all(torch.equal(*pair) for pair in zip(maps, before, strict=True))


def test_one_map_needs_no_list(random_attention):
    """A single tensor is one block, and gives the graph of Eq. 7."""
    attention = random_attention(1, 2, 7)
    for direction in ("row", "column", "symmetric"):
        graph = patch_graph(attention, direction=direction)
        assert torch.equal(graph, patch_graph([attention], direction=direction))
        assert torch.equal(graph, patch_graph(attention, 1, direction))


def test_heads_side_by_side_by_hand():
    """`concat`: row i holds what patch i attends to in head 0, then in head 1."""
    graph = patch_graph(BY_HAND, heads="concat")
    assert graph.tolist() == [[[0.5, 0.0, 1.5, 4.0], [1.0, 3.0, 0.0, 0.0]]]
    turned = patch_graph(BY_HAND, heads="concat", direction="column")
    assert turned.tolist() == [[[0.5, 1.0, 1.5, 0.0], [0.0, 3.0, 4.0, 0.0]]]


def test_no_map_is_an_error():
    """An encoder that yields nothing is a ValueError."""
    with pytest.raises(ValueError, match="no attention map"):
        patch_graph(iter([]))


@pytest.mark.parametrize("heads", ["mean", "concat"])
def test_maps_are_let_go_one_by_one(heads):
    """While the next map is being made, no map before it is alive any more."""
    alive, most = [], 0

    def maps():
        nonlocal most
        for _ in range(5):
            most = max(most, 1 + sum(reference() is not None for reference in alive))
            attention = torch.rand(2, 3, 6, 6)
            alive.append(weakref.ref(attention))
            yield attention
            del attention

    patch_graph(maps(), heads=heads)
    assert most == 1


def test_streamed_maps_are_let_go_one_by_one():
    """The same through stream_attention: when a block runs, the map of the block before it is gone."""
    blocks, alive, most = make_blocks(4), [], 0

    def watch(module, args):
        nonlocal most
        most = max(most, 1 + sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(args[0].untyped_storage()))

    for block in blocks:
        block.attn.attn_drop.register_forward_pre_hook(watch)
    with torch.no_grad():
        patch_graph(stream_attention(blocks, make_tokens()))
    assert len(alive) == 4
    assert most == 1
