"""The transformer block against timm's, against the arithmetic of BEiT and SimMIM, and against explicit loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.attention import AttentionTap
from common.models import block as block_module
from common.models import timm_layers
from common.models.block import Attention, Block, LayerNorm, compile_blocks
from common.models.windows import Windows

WIDTH, HEADS = 24, 3  # 8 a head, whose scale is no power of two: scaling queries or scores rounds differently


def timm_block(drop_path: float = 0.0) -> Any:
    return timm_layers.Block(WIDTH, HEADS, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """With every parameter moved, so that no bias or table stays at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    output.square().mean().backward()
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


# --- MAE: timm's block ---


def test_start_values_are_those_of_timm() -> None:
    """From one seed: the same names in the same order, the same weights, and the generator left in the same state."""
    torch.manual_seed(0)
    ours, after = Block(Attention(WIDTH, HEADS)).state_dict(), torch.get_rng_state()
    torch.manual_seed(0)
    theirs = timm_block().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("half", [False, True])
def test_block_equals_timm_to_the_bit(drop_path: float, half: bool) -> None:
    """Values, gradients and attention, in training with the same draws of drop path, in float32 and bfloat16."""
    ours, theirs = shaken(Block(Attention(WIDTH, HEADS), drop_path=drop_path)), timm_block(drop_path)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(4, 7, WIDTH)
    outputs, maps, all_gradients = [], [], []
    for block in (ours, theirs):
        torch.manual_seed(1)
        with AttentionTap([block]) as tap, torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs.append(block(tokens))
        maps.append(tap.maps[0])
        all_gradients.append(gradients(block, outputs[-1]))
    assert torch.equal(*outputs)
    assert torch.equal(*maps)
    assert all_gradients[0].keys() == all_gradients[1].keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(value, all_gradients[1][name]) for name, value in all_gradients[0].items())


# --- BEiT and SimMIM ---


def test_block_without_extras_equals_timm() -> None:
    """No position bias, no layer scale, no key bias: timm's block with the same weights, values and gradients."""
    torch.manual_seed(0)
    ours, theirs = Block(Attention(WIDTH, HEADS, key_bias=False)), timm_block()
    torch.nn.init.normal_(ours.attn.q_bias)
    torch.nn.init.normal_(ours.attn.v_bias)
    state = {key: value for key, value in ours.state_dict().items() if "_bias" not in key}
    state["attn.qkv.bias"] = torch.cat([ours.attn.q_bias, torch.zeros(24), ours.attn.v_bias])
    theirs.load_state_dict(state)
    tokens = torch.randn(2, 5, 24)
    first, second = ours(tokens), theirs(tokens)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    first.square().mean().backward()
    second.square().mean().backward()
    torch.testing.assert_close(ours.attn.qkv.weight.grad, theirs.attn.qkv.weight.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.attn.q_bias.grad, theirs.attn.qkv.bias.grad[:24], atol=1e-5, rtol=0)


def by_hand(block: Block, tokens: Tensor, position_bias: Tensor | None) -> Tensor:
    """A block of BEiT and SimMIM step by step: scaled queries, keys without bias, position bias, layer scale."""
    attention, batch, length = block.attn, *tokens.shape[:2]
    normed = nn.functional.layer_norm(tokens, (WIDTH,), block.norm1.weight, block.norm1.bias, 1e-6)
    biases = torch.cat([attention.q_bias, torch.zeros(WIDTH), attention.v_bias])
    qkv = nn.functional.linear(normed, attention.qkv.weight, biases).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(-2, -1)
    attended = (scores if position_bias is None else scores + position_bias).softmax(dim=-1) @ value
    branch = attention.proj(attended.transpose(1, 2).reshape(batch, length, WIDTH))
    tokens = tokens + (branch if block.gamma_1 is None else block.gamma_1 * branch)
    branch = block.mlp(block.norm2(tokens))
    return tokens + (branch if block.gamma_2 is None else block.gamma_2 * branch)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_block_equals_the_steps_of_beit_to_the_bit(layer_scale: float, biased: bool) -> None:
    block = shaken(Block(Attention(WIDTH, HEADS, key_bias=False), layer_scale))
    tokens, bias = torch.randn(4, 7, WIDTH), torch.randn(HEADS, 7, 7) if biased else None
    output, expected = block(tokens, bias), by_hand(block, tokens, bias)
    assert torch.equal(output, expected)
    made, wanted = gradients(block, output), gradients(block, expected)
    assert made.keys() == wanted.keys() == dict(block.named_parameters()).keys()
    assert all(torch.equal(value, wanted[name]) for name, value in made.items())


def test_names_of_the_state_dict() -> None:
    """As in the official code: of MAE, of BEiT's and SimMIM's pre-training, and of their fine-tuning."""
    rest = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"]
    rest += ["mlp.fc2.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
    scales, separate = ["gamma_1", "gamma_2"], ["attn.q_bias", "attn.v_bias"]
    table = ["attn.relative_position_bias_table", "attn.relative_position_index"]
    windows = Windows((4, 5), 3)
    for attention, scale, names in (
        (Attention(24, 3), 0.0, ["attn.qkv.bias"]),
        (Attention(24, 3, key_bias=False), 0.1, scales + separate),
        (Attention(24, 3, key_bias=False, table_grid=(4, 5), fused=True), 0.1, scales + separate + table),
        (Attention(24, 3, key_bias=False, table_grid=(3, 3), prefix_tokens=0, windows=windows), 0.0, separate + table[:1]),
    ):
        state = Block(attention, scale).state_dict()
        assert sorted(state) == sorted(rest + names)
    assert state["attn.relative_position_bias_table"].shape == (25, 3)


def test_layer_scale_and_position_bias_act() -> None:
    block = Block(Attention(24, 3, key_bias=False), layer_scale=0.1)
    assert torch.equal(block.gamma_1, torch.full((24,), 0.1))
    tokens, bias = torch.randn(2, 5, 24), torch.randn(3, 5, 5)
    assert not torch.allclose(block(tokens), block(tokens, bias))
    with torch.no_grad():
        block.gamma_1.zero_()
        block.gamma_2.zero_()
    assert torch.equal(block(tokens, bias), tokens)
    assert Block(Attention(24, 3), layer_scale=0.0).gamma_1 is None
    with pytest.raises(ValueError, match="width 25 is not divisible by 3 heads"):
        Attention(25, 3)


# --- maps and the fused path ---


@torch.no_grad()
@pytest.mark.parametrize("key_bias", [False, True])
def test_scores_and_maps_can_be_read(key_bias: bool) -> None:
    """The scores of the tap, plus the position bias, softmax to its maps."""
    block, tokens, bias = (
        shaken(Block(Attention(WIDTH, HEADS, key_bias=key_bias))),
        torch.randn(2, 7, WIDTH),
        torch.randn(3, 7, 7),
    )
    with AttentionTap([block]) as maps, AttentionTap([block], values="scores") as scores:
        block(tokens, bias)
    torch.testing.assert_close((scores.maps[0] + bias).softmax(dim=-1), maps.maps[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("key_bias", [False, True])
@pytest.mark.parametrize("table", [None, (2, 3)])
def test_the_attribute_chooses_the_path(key_bias: bool, table: tuple[int, int] | None) -> None:
    """Fused, `attn_drop` does not run; values and gradients agree; the bias may be given or the module's own."""
    attention = shaken(Attention(WIDTH, HEADS, key_bias=key_bias, table_grid=table))
    fused = copy.deepcopy(attention)
    fused.fused_attn = True
    ran: list[nn.Module] = []
    for module in (attention, fused):
        module.attn_drop.register_forward_hook(lambda drop, *_: ran.append(drop))
    tokens, bias = torch.randn(2, 7, WIDTH), None if table else torch.randn(HEADS, 7, 7)
    explicit, in_one = attention(tokens, bias), fused(tokens, bias)
    assert ran == [attention.attn_drop]
    torch.testing.assert_close(in_one, explicit, atol=1e-5, rtol=0)
    expected = gradients(attention, explicit)
    for name, value in gradients(fused, in_one).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("values", ["softmax", "scores"])
def test_fused_attention_is_off_while_maps_are_read(values: str) -> None:
    """In the blocks that are read alone; and given back, also after an error."""
    blocks, tokens = [shaken(Block(Attention(WIDTH, HEADS, fused=True)), seed) for seed in range(2)], torch.randn(2, 7, WIDTH)
    with AttentionTap(blocks, [1], values) as tap:
        assert [block.attn.fused_attn for block in blocks] == [True, False]
        blocks[1](blocks[0](tokens))
    assert [block.attn.fused_attn for block in blocks] == [True, True]
    blocks[0].attn.fused_attn = blocks[1].attn.fused_attn = False
    with AttentionTap(blocks, [1], values) as explicit:
        blocks[1](blocks[0](tokens))
    assert not blocks[1].attn.fused_attn
    torch.testing.assert_close(tap.maps[0], explicit.maps[0], atol=1e-6, rtol=1e-5)
    blocks[1].attn.fused_attn = True
    with pytest.raises(ZeroDivisionError), AttentionTap(blocks):
        raise ZeroDivisionError
    assert blocks[1].attn.fused_attn


# --- some tokens only ---


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias", "table"])
@pytest.mark.parametrize("shared", [False, True])
def test_tokens_at_places_are_those_of_the_whole_block(kind: str, shared: bool, fused: bool) -> None:
    """Values, and gradients of every parameter, the tokens and the bias; each row has its own places, or all share a slice."""
    torch.manual_seed(0)
    table = (2, 3) if kind == "table" else None
    attention = Attention(WIDTH, HEADS, key_bias=kind == "plain", table_grid=table, fused=fused)
    block = shaken(Block(attention, 0.0 if kind == "plain" else 0.1))
    places = slice(4, None) if shared else torch.tensor([[6, 0, 2], [1, 1, 5]])
    index = torch.tensor([[4, 5, 6], [4, 5, 6]]) if shared else places
    found = []
    for short in (True, False):
        tokens = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias = torch.linspace(-1, 1, HEADS * 49).reshape(HEADS, 7, 7).requires_grad_() if kind == "bias" else None
        output = block(tokens, bias, places) if short else block(tokens, bias)[torch.arange(2)[:, None], index]
        own = {"tokens": tokens, "bias": bias} if kind == "bias" else {"tokens": tokens}
        made = gradients(block, output)
        found.append({"output": output, **made, **{name: value.grad for name, value in own.items()}})
    assert len(found[0]) == len(dict(block.named_parameters())) + (3 if kind == "bias" else 2)
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_windows_give_all_tokens() -> None:
    attention = Attention(24, 2, windows=Windows((4, 5), 3))
    with pytest.raises(ValueError, match="attention in windows gives all tokens"):
        attention(torch.randn(1, 20, 24), places=slice(0, 3))


# --- compiled ---


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Blocks compiled without code generation, which takes minutes: the graphs that dynamo made, each whole (fullgraph)."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph

    compiled = torch.compile(Block.branches, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(block_module, "_compiled_branches", lambda: compiled)
    yield made
    torch.compiler.reset()


@pytest.mark.parametrize("biased", [False, True])
def test_compiled_blocks_share_their_graphs_and_change_nothing(biased: bool, graphs: list[Any]) -> None:
    """Whole blocks, in as few graphs as there are kinds, rates of drop path apart; the draws, values and gradients of eager ones.

    No gradients recorded, or attention being read: not compiled.
    """
    torch.manual_seed(0)
    rates, bias = (0.0, 0.2, 0.3, 0.4), torch.randn(HEADS, 7, 7) if biased else None
    blocks = nn.ModuleList(
        shaken(Block(Attention(WIDTH, HEADS, key_bias=not biased, fused=True), 0.1 if biased else 0.0, rate), seed)
        for seed, rate in enumerate(rates)
    )
    compiled = copy.deepcopy(blocks)
    compile_blocks(compiled)
    tokens, found = torch.randn(6, 7, WIDTH), []
    for some in (blocks, compiled):
        torch.manual_seed(1)
        output = tokens
        for block in some:
            output = block(output, bias, slice(5, None) if block is some[-1] else None)
        found.append({"output": output, **gradients(some, output)})
    assert len(graphs) == 3  # without drop path, with it, and the last block
    assert len(found[0]) == len(dict(blocks.named_parameters())) + 1
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-5, msg=name)
    with torch.no_grad():
        compiled[1](tokens[:3], bias)
    with AttentionTap(compiled, [1]) as tap:
        compiled[1](tokens[:2], bias)
    assert tap.maps[0].shape == (2, HEADS, 7, 7)
    assert len(graphs) == 3


def test_a_model_without_blocks_is_compiled_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compile_blocks(model)
    assert model._compiled_call_impl is not None
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


# --- drop path ---


@pytest.mark.parametrize("rate", [0.5, 0.99])
@pytest.mark.parametrize("scaled", [False, True])
def test_dropped_branches_are_not_computed_and_change_nothing(rate: float, scaled: bool) -> None:
    """The sample's whole branch is left out: values and gradients of timm's drop path on the same draws; also of places.

    At 0.99 no sample keeps a branch: every parameter has a gradient all the same (ranks exchange them all), and it is 0.
    """
    torch.manual_seed(0)
    fused = shaken(Block(Attention(WIDTH, HEADS, fused=True), 0.1 if scaled else 0.0, rate))
    drop, rows = timm_layers.DropPath(rate), []
    fused.norm2.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    tokens, places = torch.randn(8, 7, WIDTH), torch.arange(8 * 3).reshape(8, 3) % 7
    for part in (None, places):
        torch.manual_seed(1)
        output = fused(tokens, None, part)
        made = gradients(fused, output)
        torch.manual_seed(1)
        attended = fused.attn(fused.norm1(tokens))
        middle = tokens + drop(attended if fused.gamma_1 is None else fused.gamma_1 * attended)
        mixed = fused.mlp(fused.norm2(middle))
        expected = middle + drop(mixed if fused.gamma_2 is None else fused.gamma_2 * mixed)
        if part is not None:
            expected = expected[torch.arange(8)[:, None], part]
        wanted = gradients(fused, expected)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
        assert made.keys() == wanted.keys() == dict(fused.named_parameters()).keys()
        for name, value in made.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
        if rate == 0.99:
            assert not any(value.any() for value in made.values())
    assert rows[0] < 8


def test_one_position_bias_only() -> None:
    attention = Attention(WIDTH, HEADS, table_grid=(2, 3))
    with pytest.raises(ValueError, match="position_bias is given to an attention that has a table of its own"):
        attention(torch.randn(2, 7, WIDTH), torch.zeros(HEADS, 7, 7))


# --- windows ---


def grid_attention(grid: tuple[int, int], window: int, biased: bool, fused: bool) -> Attention:
    """Without class token: over the grid, or in windows of it if `window` is not 0."""
    table = ((window, window) if window else grid) if biased else None
    windows = Windows(grid, window) if window else None
    return Attention(24, 2, key_bias=not biased, table_grid=table, prefix_tokens=0, windows=windows, fused=fused)


def attention_among(attention: Attention, tokens: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Attention among the tokens [n, D] at grid places, head by head from its definition, without class token."""
    width, heads = tokens.shape[1], attention.num_heads
    bias = torch.cat([attention.q_bias, torch.zeros(width), attention.v_bias]) if not attention.key_bias else attention.qkv.bias
    query, key, value = (tokens @ attention.qkv.weight.T + bias).split(width, dim=1)
    high, wide = attention.table_grid or (0, 0)
    mixed = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = query[:, part] @ key[:, part].T / (width // heads) ** 0.5
        if attention.table_grid:
            for i, (row, column) in enumerate(places):
                for j, (other_row, other_column) in enumerate(places):
                    offset = (row - other_row + high - 1) * (2 * wide - 1) + column - other_column + wide - 1
                    scores[i, j] += attention.relative_position_bias_table[offset, head]
        mixed.append(scores.softmax(dim=1) @ value[:, part])
    return attention.proj(torch.cat(mixed, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((5, 7), 3), ((6, 3), 3), ((4, 6), 5), ((3, 5), 0), ((2, 3), 4)])
def test_attention_by_its_definition(biased: bool, fused: bool, grid: tuple[int, int], window: int) -> None:
    """Each token attends to the tokens of its own window that exist, and to no other; window 0 is the whole grid."""
    torch.manual_seed(0)
    attention = shaken(grid_attention(grid, window, biased, fused))
    tokens = torch.randn(2, grid[0] * grid[1], 24)
    expected = torch.full_like(tokens, float("nan"))
    side = window or 99
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            rows, columns = range(top, min(top + side, grid[0])), range(left, min(left + side, grid[1]))
            places = [(row, column) for row in rows for column in columns]
            ids = [row * grid[1] + column for row, column in places]
            for image in range(2):
                expected[image, ids] = attention_among(attention, tokens[image, ids], places)
    torch.testing.assert_close(attention(tokens), expected, atol=1e-5, rtol=0)
