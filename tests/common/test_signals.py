"""Signals of an encoder: what runs, what is read, and the graph rows that are made of it."""

import numpy as np
import pytest
import torch
from torch import nn

from common.attention import patch_graph, stream_attention
from common.evolved_mask import EvolvedMask, signal_graph, stream_signal
from common.mask_config import MaskConfig
from common.models.block import Attention
from common.models.block import Block as OurBlock
from common.models.mask_token_encoder import MaskTokenEncoder
from common.models.timm_layers import Block
from common.signals import PROJECTIONS
from mae_evolved.model import MaskedAutoencoder
from simmim_evolved.model import SimMIM

WIDTH, HEADS, SIZE, TOKENS = 12, 3, 4, 7
GRAPHS = ("attention", "tokens", *PROJECTIONS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_blocks(depth=3, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList([Block(WIDTH, HEADS, qkv_bias=True) for _ in range(depth)]).eval()


def make_tokens(seed=1, batch=2, tokens=TOKENS):
    return torch.randn(batch, tokens, WIDTH, generator=seeded(seed))


def shaken(model):
    """Every parameter moved from its start value, so that no bias is 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model.eval()


# --- What is read, and what runs for it --------------------------------------------------------------------------


def hooked(blocks, call):
    """What forward hooks on whole blocks and on their first norm saw while `call` ran the whole encoder."""
    outputs, normed, handles = [], [], []
    for block in blocks:
        handles.append(block.register_forward_hook(lambda m, args, out: outputs.append(out.detach())))
        handles.append(block.norm1.register_forward_hook(lambda m, args, out: normed.append(out.detach())))
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return outputs, normed


def by_hand(graph, block, output, normed):
    """The signal of one block in double precision, head by head, from what its hooks saw and from its named parameters."""
    if graph == "tokens":
        return output.double()
    state = {name: value.double().numpy() for name, value in block.attn.state_dict().items()}
    width, heads = normed.shape[2], block.attn.num_heads
    third, size = PROJECTIONS.index(graph), width // heads
    named = {"queries": state.get("q_bias"), "keys": None, "values": state.get("v_bias")}
    bias = state["qkv.bias"][third * width : (third + 1) * width] if "qkv.bias" in state else named[graph]
    made = []
    for head in range(heads):
        rows = slice(third * width + head * size, third * width + (head + 1) * size)
        made.append(normed.double().numpy() @ state["qkv.weight"][rows].T)
        made[-1] += 0 if bias is None else bias[head * size : (head + 1) * size]
    return torch.from_numpy(np.stack(made, axis=1))


def models():
    """The three encoders: one with positions, two with relative position biases, the last at an uneven grid."""
    sizes = {"patch_size": 4, "width": WIDTH, "depth": 3, "heads": HEADS}
    decoder = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
    return {
        "mae": MaskedAutoencoder(input_size=(12, 12), **sizes, **decoder),
        "beit": MaskTokenEncoder(input_size=(12, 12), **sizes),
        "simmim": SimMIM(input_size=(8, 16), layer_scale=0.0, **sizes),
    }


@pytest.mark.parametrize("layers", ["all", "last", [0, 1]])
@pytest.mark.parametrize("graph", GRAPHS[1:])
@pytest.mark.parametrize("name", models())
def test_signal_of_a_model_is_what_hooks_see(name, graph, layers):
    """Each block to 1e-6 of the values of a whole pass, biases of queries and values in them (seeds 0 and 5)."""
    model = shaken(models()[name])
    encoder = getattr(model, "encoder", model)
    images = torch.randn(2, 3, *(4 * side for side in model.grid_size), generator=seeded(5))
    if name == "mae":
        everything = torch.arange(9).expand(2, -1)
        outputs, normed = hooked(encoder.blocks, lambda: model.encode(images, everything))
    else:
        outputs, normed = hooked(encoder.blocks, lambda: encoder.encode(images))
    read = list(model.signal(images, graph, layers))
    places = {"all": [0, 1, 2], "last": [2]}.get(layers if isinstance(layers, str) else "", layers)
    assert len(read) == len(places)
    for signal, place in zip(read, places, strict=True):
        assert not signal.requires_grad
        torch.testing.assert_close(
            signal.double(), by_hand(graph, encoder.blocks[place], outputs[place], normed[place]), rtol=1e-5, atol=1e-6
        )


def count_runs(blocks, call):
    """(block, name of a leaf module, or "block") in the order in which they ran."""
    ran, handles = [], []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if not name or not list(module.children()):
                handles.append(module.register_forward_hook(lambda *_, place=(index, name or "block"): ran.append(place)))
    call()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("graph", PROJECTIONS)
def test_pass_ends_inside_the_last_block_that_is_read(graph):
    """Of that block the first norm runs and no other module: no attention, no MLP; later blocks do not run at all."""
    blocks, tokens = make_blocks(4), make_tokens()
    ran = count_runs(blocks, lambda: list(stream_signal(blocks, tokens, graph, [0, 2])))
    assert [name for index, name in ran if index == 2] == ["norm1"]
    assert {index for index, _ in ran} == {0, 1, 2}
    assert [place for place in ran if place[1] == "block"] == [(0, "block"), (1, "block")]
    assert count_runs(blocks, lambda: list(stream_signal(blocks, tokens, graph, [0]))) == [(0, "norm1")]


def test_tokens_end_with_their_block():
    """The output of block l needs block l and none after it."""
    blocks, tokens = make_blocks(4), make_tokens()
    ran = count_runs(blocks, lambda: list(stream_signal(blocks, tokens, "tokens", [1])))
    assert [place for place in ran if place[1] == "block"] == [(0, "block"), (1, "block")]
    assert {index for index, _ in ran} == {0, 1}


@pytest.mark.parametrize("graph", GRAPHS[1:])
def test_no_attention_map_is_needed(graph):
    """With fused attention everywhere `attn_drop` never runs, and the signals are those of the step-by-step blocks."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(OurBlock(Attention(WIDTH, HEADS)) for _ in range(3)).eval()
    tokens = make_tokens()
    explicit = list(stream_signal(blocks, tokens, graph))
    for block in blocks:
        block.attn.fused_attn = True
    fused = []
    ran = count_runs(blocks, lambda: fused.extend(stream_signal(blocks, tokens, graph)))
    assert not [place for place in ran if place[1] == "attn.attn_drop"]
    for one, other in zip(explicit, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_attention_is_that_of_stream_attention(values):
    blocks, tokens = make_blocks(), make_tokens()
    for one, other in zip(
        stream_signal(blocks, tokens, "attention", [0, -1], values),
        stream_attention(blocks, tokens, [0, -1], values),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_block_inputs_are_handed_on():
    """A relative position bias moves what the second block sees."""
    model = shaken(models()["beit"])
    images = torch.randn(1, 3, 12, 12, generator=seeded(2))
    before = list(model.signal(images, "keys"))
    with torch.no_grad():
        model.rel_pos_bias.relative_position_bias_table.add_(torch.randn(30 - 2, HEADS, generator=seeded(3)))
    after = list(model.signal(images, "keys"))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


class Separate(nn.Module):
    """A block with linear layers of their own for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.Identity(), nn.Identity()


def test_what_cannot_be_read_is_named():
    with pytest.raises(TypeError, match=r"block 1 \(Separate\) has no layer attn.qkv"):
        list(stream_signal([make_blocks(1)[0], Separate()], make_tokens(), "keys"))
    with pytest.raises(ValueError, match="graph must be one of attention, tokens, queries, keys, values, not 'key'"):
        list(stream_signal(make_blocks(), make_tokens(), "key"))
    with pytest.raises(ValueError, match=r"layers \[3\] do not exist"):
        list(stream_signal(make_blocks(), make_tokens(), "keys", [3]))


# --- Graph rows --------------------------------------------------------------------------------------------------


def cosine_by_hand(vectors):
    """Cosine similarity of the rows of one [N, d] without their mean, pair by pair."""
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=1))
    return torch.from_numpy(np.array([[a @ b / (x * y) for b, y in zip(centred, length, strict=True)] for a, x in
                                      zip(centred, length, strict=True)]))  # fmt: skip


def test_cosine_of_tokens_by_hand():
    """Prefix tokens dropped, centred over the patches, mean or sum over the blocks (seed 3)."""
    blocks = [torch.randn(2, 6, 5, generator=seeded(3 + block)) + 4 for block in range(2)]
    for reduction, share in (("mean", 0.5), ("sum", 1.0)):
        graph = signal_graph(blocks, "tokens", 2, reduction=reduction)
        assert graph.dtype == torch.float32
        for image in range(2):
            expected = sum(cosine_by_hand(block[image, 2:]) for block in blocks) * share
            torch.testing.assert_close(graph[image].double(), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_cosine_by_hand():
    """mean: of the heads' similarities; concat: one similarity of the vectors side by side (seed 4)."""
    keys = torch.randn(2, 3, 7, 4, generator=seeded(4)) * torch.tensor([1.0, 3.0, 9.0])[None, :, None, None]
    mean, concat = signal_graph(keys, "keys"), signal_graph(keys, "keys", heads="concat")
    for image in range(2):
        by_head = [cosine_by_hand(keys[image, head, 1:]) for head in range(3)]
        torch.testing.assert_close(mean[image].double(), sum(by_head) / 3, rtol=1e-5, atol=1e-5)
        joined = torch.cat([keys[image, head, 1:] for head in range(3)], dim=1)
        torch.testing.assert_close(concat[image].double(), cosine_by_hand(joined), rtol=1e-5, atol=1e-5)


def test_vectors_by_hand():
    """Centred over the patches, root mean square 1 for each block, blocks and heads side by side (seed 6)."""
    values = [torch.randn(2, 3, 7, 4, generator=seeded(6 + block)) * 10**block + 5 for block in range(2)]
    graph = signal_graph(values, "values", similarity="vectors", heads="concat")
    assert graph.shape == (2, 6, 24)
    for image in range(2):
        for block in range(2):
            joined = torch.cat([values[block][image, head, 1:] for head in range(3)], dim=1).double()
            joined = joined - joined.mean(dim=0)
            expected = joined / joined.square().mean().sqrt()
            torch.testing.assert_close(graph[image, :, 12 * block : 12 * block + 12].double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_graph_is_equation_7(random_attention):
    maps = [random_attention(seed, 2, 7) for seed in range(2)]
    for options in ({}, {"direction": "column", "reduction": "sum"}, {"heads": "concat"}):
        assert torch.equal(signal_graph(maps, "attention", 1, **options), patch_graph(maps, 1, **options))


def test_alike_vectors_give_zeros():
    """A blank image has no direction: no rounding noise is blown up, and a graph of zeros can be cut."""
    tokens = torch.full((1, 10, 4), 3.0)
    tokens[0, 4] += 2e-7
    for similarity in ("cosine", "vectors"):
        assert not signal_graph(tokens, "tokens", similarity=similarity).any()
    made = EvolvedMask((3, 3), 5, 10, graph="tokens", mask="part", num_parts=3)(torch.arange(1), lambda rows: tokens[rows])
    assert made.mask.sum() == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graph_is_float32_under_autocast(dtype):
    """The similarity is computed in float32 from half-precision vectors (seed 8)."""
    keys = torch.randn(2, 3, 7, 4, generator=seeded(8)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = signal_graph(keys, "keys")
    assert torch.equal(graph, signal_graph(keys.float(), "keys"))


@pytest.mark.parametrize(
    ("signal", "options", "message"),
    [
        ([], {"graph": "keys"}, "no vectors"),
        (torch.zeros(2, 3), {"graph": "tokens"}, r"\[batch, tokens, width\].*\[2, 3\]"),
        (torch.zeros(1, 2, 5, 3), {"graph": "keys", "similarity": "vectors"}, "heads must be concat or select"),
        (torch.zeros(1, 5, 3), {"graph": "tokens", "similarity": "dot"}, "similarity must be"),
        (torch.zeros(1, 5, 3), {"graph": "token"}, "graph must be one of"),
    ],
)
def test_what_is_no_graph_is_refused(signal, options, message):
    with pytest.raises(ValueError, match=message):
        signal_graph(signal, **options)


# --- Masks from it ------------------------------------------------------------------------------------------------

MEANINGLESS = [
    ({"graph": "keys", "mask": "attn-high"}, "graph must be attention with mask attn-high"),
    ({"similarity": "vectors"}, "similarity must be cosine with graph attention"),
    ({"remove_position": True}, "remove_position must be off with graph attention"),
    ({"graph": "keys", "attention_values": "scores"}, "attention_values must be softmax with graph keys, got 'scores'"),
    ({"graph": "tokens", "direction": "column"}, "direction must be row with graph tokens"),
    ({"graph": "tokens", "heads": "select"}, "heads must be mean with graph tokens"),
    ({"graph": "tokens", "heads": "concat"}, "heads must be mean with graph tokens"),
    ({"graph": "values", "similarity": "vectors"}, "heads must be concat or select with similarity vectors"),
    ({"graph": "tokens", "similarity": "vectors", "reduction": "sum"}, "reduction must be mean with similarity vectors"),
    (
        {"graph": "tokens", "similarity": "vectors", "estimator": "vmf", "start": "random"},
        r"similarity must be cosine with random directions \(estimator vmf, start random\)",
    ),
]


@pytest.mark.parametrize(("options", "message"), MEANINGLESS)
def test_options_that_mean_nothing_together_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MaskConfig(**options)


MEANINGFUL = [
    {"graph": "tokens"},
    {"graph": "tokens", "similarity": "vectors", "layers": "0,2"},
    {"graph": "queries", "heads": "concat", "reduction": "sum"},
    {"graph": "keys", "heads": "select"},
    {"graph": "values", "similarity": "vectors", "heads": "select"},
    {"graph": "keys", "similarity": "vectors", "heads": "concat", "estimator": "vmf"},
    {"graph": "keys", "heads": "concat", "estimator": "vmf", "start": "random"},
    {"heads": "select"},
    {"heads": "select", "estimator": "vmf", "start": "random", "direction": "column"},
]


@pytest.mark.parametrize("options", MEANINGFUL)
def test_masks_of_every_signal_spare_passes_and_belong_to_the_sample(options):
    """One function makes the graph: with and without the shortcut, alone and in a batch, masks are the same; parts differ."""
    model = shaken(models()["mae"])
    images = torch.randn(24, 3, 12, 12, generator=seeded(9))
    ids = torch.arange(24) * 3

    def masks(rows, **more):
        maker = EvolvedMask((3, 3), 6, 10, parts_start=4, parts_end=2, **options, **more)
        maker.set_epoch(4)
        with torch.no_grad():
            return maker(images[rows], lambda part: model.signal(part, **maker.config.signal), ids[rows])

    everything = torch.arange(24)
    quick, slow = masks(everything), masks(everything, shortcut=False)
    assert 0 < quick.skipped.sum() < 24
    assert torch.equal(quick.mask, slow.mask)
    assert quick.mask.sum(dim=1).tolist() == [6] * 24
    assert torch.equal(masks(everything[5:9]).mask, quick.mask[5:9])
    assert len({tuple(row.tolist()) for row in slow.parts}) > 4


def test_a_signal_of_another_grid_is_named():
    maker = EvolvedMask((3, 3), 6, 10, graph="keys", mask="part", num_parts=2)
    with pytest.raises(ValueError, match="the keys have 6 patch tokens, but the mask's grid is 3x3 = 9"):
        maker(torch.arange(2), lambda rows: torch.randn(len(rows), 3, 7, 4))


def test_a_state_from_before_the_signals_goes_on():
    """Options added since count as attention; another signal is named."""
    state = EvolvedMask((6, 6), 20, 10, num_parts=5).state_dict()
    for name in ("graph", "similarity", "remove_position"):
        del state["config"][name]
    EvolvedMask((6, 6), 20, 10, num_parts=5).load_state_dict(state)
    with pytest.raises(ValueError, match="graph 'attention' -> 'keys'"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, graph="keys").load_state_dict(state)


# --- Without what depends on the place ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"heads": "concat"}, {"heads": "concat", "similarity": "vectors"}])
def test_what_depends_on_the_place_is_taken_out(options):
    """A vector added to a position in every image changes the graph, but not with remove_position (seeds 10, 11)."""
    keys, places = torch.randn(5, 3, 7, 4, generator=seeded(10)), 3 * torch.randn(1, 3, 7, 4, generator=seeded(11))
    plain = signal_graph(keys, "keys", remove_position=True, **options)
    torch.testing.assert_close(signal_graph(keys + places, "keys", remove_position=True, **options), plain, rtol=1e-4, atol=1e-5)
    by_hand = signal_graph(keys - keys.mean(dim=0), "keys", **options)
    torch.testing.assert_close(plain, by_hand, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(signal_graph(keys + places, "keys", **options), plain, atol=0.1)


def test_a_batch_of_one_keeps_its_positions():
    """The mean over one image is that image: nothing would be left of it."""
    tokens = torch.randn(1, 7, 4, generator=seeded(12))
    assert torch.equal(signal_graph(tokens, "tokens", remove_position=True), signal_graph(tokens, "tokens"))


def test_removed_positions_tie_an_image_to_its_batch():
    """The promise that is given up: parts of an image depend on the rows that get a pass with it, and on those alone."""
    tokens = torch.randn(24, 10, 6, generator=seeded(13)) + 4 * torch.randn(1, 10, 6, generator=seeded(14))
    ids = torch.arange(24)

    def made(rows, **options):
        maker = EvolvedMask((3, 3), 6, 10, graph="tokens", num_parts=3, **options)
        maker.set_epoch(5)
        return maker(rows, lambda part: tokens[part], ids[rows])

    for removed in (False, True):
        whole, half = (
            made(ids, mask="part", remove_position=removed).parts,
            made(ids[:12], mask="part", remove_position=removed).parts,
        )
        assert torch.equal(whole[:12], half) is not removed
    quick = made(ids, remove_position=True)
    rows = (~quick.skipped).nonzero()[:, 0]
    assert 0 < len(rows) < 24
    assert torch.equal(quick.parts[rows], made(rows, remove_position=True, shortcut=False).parts)
