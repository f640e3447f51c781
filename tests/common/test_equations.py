"""The equations that are read are the equations that run: every step of EvolvedMask is one of the public functions."""

import hashlib
import inspect

import pytest
import torch
from torch import Tensor

from common import evolved_mask, parts, signals
from common.draws import Stream, hash_uniform, uniform_numbers
from common.evolved_mask import (
    EvolvedMask,
    MaskConfig,
    alpha_at,
    blend,
    grid_probability,
    num_parts_at,
    part_probability,
    partition_parts,
    patch_graph,
    select_masked,
)
from common.mask_config import FORMER_DEFAULTS, WORDS
from common.masks import RULES
from common.parts import start_draws

EQUATIONS = (
    "alpha_at", "num_parts_at", "patch_graph", "partition_parts", "part_probability", "grid_probability", "blend",
    "select_masked",
)  # fmt: skip
STATIC = ("num_parts_at", "grid_probability", "blend", "select_masked")
GRID, MASKED, EPOCHS, EPOCH, BATCH, SEED = (6, 8), 28, 10, 6, 5, 4
USED = {
    "evolved": set(EQUATIONS),
    "part": set(EQUATIONS) - {"alpha_at"},
    "grid-to-block": {"alpha_at", *STATIC},
    **{
        strategy: set(STATIC)
        for strategy in ("grid", "random", "block", "random-units", "inverse-block", "squares", "attn-high", "attn-low")
    },
    "semantic": set(EQUATIONS),
    "block-official": {"num_parts_at", "grid_probability"},
}
"""Which equations the masks of each strategy come from. All report K, which static masks do not use."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Recorder:
    """Stands in the place of a function: calls it, and keeps every call's arguments by name and its result."""

    def __init__(self, function):
        self.function, self.signature, self.calls = function, inspect.signature(function), []

    def __call__(self, *args, **named):
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        result = self.function(*args, **named)
        self.calls.append((bound.arguments, result))
        return result


@pytest.fixture
def recorded(monkeypatch):
    """Each equation by name, recorded in the file in which EvolvedMask looks it up."""
    recorders = {name: Recorder(getattr(evolved_mask, name)) for name in EQUATIONS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(signals if name == "patch_graph" else evolved_mask, name, recorder)
    return recorders


def masks_of(strategy, attention, ids=True, **options):
    maker = EvolvedMask(GRID, MASKED, EPOCHS, mask=strategy, parts_start=9, parts_end=3, seed=SEED, shortcut=False, **options)
    maker.set_epoch(EPOCH)
    return maker(torch.arange(BATCH), lambda rows: attention[rows], torch.arange(BATCH) * 77 if ids else None)


@pytest.mark.parametrize("strategy", USED)
def test_the_call_is_a_walk_through_the_equations(strategy, recorded, random_attention):
    """Each result is the very tensor that the next equation takes, and the last is the mask; no equation is left out."""
    attention = random_attention(3, BATCH, 49)
    made = masks_of(strategy, attention)
    assert {name for name, recorder in recorded.items() if recorder.calls} == USED[strategy]
    assert made.num_parts == recorded["num_parts_at"].calls[-1][1]
    if "alpha_at" in USED[strategy]:
        assert made.alpha == recorded["alpha_at"].calls[-1][1]
    if "select_masked" not in USED[strategy]:
        return
    (selection, mask), (blended, probability) = recorded["select_masked"].calls[0], recorded["blend"].calls[0]
    assert made.mask is mask
    assert (selection["probability"] is probability) == (strategy != "semantic")  # SemMAE's schedule stands in its place
    assert blended["alpha"] == made.alpha
    assert blended["p_grid"] is recorded["grid_probability"].calls[0][1]
    if "partition_parts" in USED[strategy]:
        (cut, labels), (spread, p_part) = recorded["partition_parts"].calls[0], recorded["part_probability"].calls[0]
        (read, graph) = recorded["patch_graph"].calls[0]
        assert blended["p_part"] is p_part
        assert torch.equal(spread["parts"], labels)
        assert torch.equal(made.parts, labels)
        assert cut["graph"] is graph
        assert torch.equal(read["attention"], attention)
    assert all(len(recorder.calls) <= 1 for name, recorder in recorded.items() if name not in ("alpha_at", "num_parts_at"))


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("strategy", ["evolved", "part"])
def test_the_equations_by_hand_give_the_mask(strategy, ids, recorded, random_attention):
    """The public functions, called from outside with the published draws alone, make the mask of the call."""
    attention, sample_ids = random_attention(3, BATCH, 49), torch.arange(BATCH) * 77
    made = masks_of(strategy, attention, ids)
    num_parts = num_parts_at(EPOCH, EPOCHS, 9, 3)
    alpha = alpha_at(EPOCH, EPOCHS) if strategy == "evolved" else 1.0
    counts = {Stream.GRID: 4, Stream.TIES: 48, Stream.PARTS: num_parts, Stream.START: start_draws(num_parts, 48)}
    if ids:
        draws = {stream: hash_uniform(SEED, EPOCH, sample_ids, stream, count) for stream, count in counts.items()}
    else:
        generator = seeded(SEED)
        draws = {stream: torch.rand(BATCH, count, generator=generator) for stream, count in counts.items()}
    graph = patch_graph(attention)
    labels = partition_parts(graph, num_parts, uniforms=draws[Stream.START])
    p_part = part_probability(labels, num_parts, uniforms=draws[Stream.PARTS])
    p_grid = grid_probability(BATCH, *GRID, uniforms=draws[Stream.GRID])
    mask = select_masked(blend(p_grid, p_part, alpha), MASKED, uniforms=draws[Stream.TIES])
    assert torch.equal(mask, made.mask)
    assert torch.equal(labels, made.parts)


@pytest.mark.parametrize("name", ["grid_probability", "part_probability", "blend", "partition_parts"])
def test_another_equation_is_another_mask(name, monkeypatch, random_attention):
    """The masks change with each function: what it returns is what is used."""
    attention = random_attention(3, BATCH, 49)
    before = masks_of("evolved", attention).mask
    plain = getattr(evolved_mask, name)
    monkeypatch.setattr(evolved_mask, name, lambda *args, **named: plain(*args, **named).flip(1))
    assert not torch.equal(masks_of("evolved", attention).mask, before)


def test_the_start_of_em_is_decided_by_the_draws_of_the_call(monkeypatch, random_attention):
    """What seeds the parts is the stream START and nothing else."""
    attention, starts = random_attention(3, BATCH, 49), []
    plain = parts._nearest_seed
    monkeypatch.setattr(parts, "_nearest_seed", lambda *args: starts.append(args[2]) or plain(*args))
    made = masks_of("evolved", attention)
    assert torch.equal(
        starts[0], hash_uniform(SEED, EPOCH, torch.arange(BATCH) * 77, Stream.START, start_draws(made.num_parts, 48))
    )


# --- A generator, or the numbers themselves ---------------------------------------------------------------------

CALLS = {
    "grid_probability": (lambda **draw: grid_probability(3, 4, 5, **draw), (3, 4)),
    "part_probability": (lambda **draw: part_probability(torch.tensor([[0, 2, 1], [1, 1, 0]]), 3, **draw), (2, 3)),
    "select_masked": (lambda **draw: select_masked(torch.zeros(4, 9), 5, **draw), (4, 9)),
    "partition_parts": (lambda **draw: partition_parts(torch.eye(8).repeat(2, 1, 1), 3, **draw), (2, start_draws(3, 8))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_generator_draws_the_uniforms(name):
    """With a generator the result is that of the numbers which it draws."""
    call, shape = CALLS[name]
    for seed in range(5):
        assert torch.equal(call(generator=seeded(seed)), call(uniforms=torch.rand(shape, generator=seeded(seed))))


@pytest.mark.parametrize("name", ["grid_probability", "part_probability", "select_masked"])
def test_something_must_be_drawn_from(name):
    """Without generator and numbers, or with numbers of another shape, a call is refused."""
    call, (rows, columns) = CALLS[name]
    with pytest.raises(ValueError, match="generator"):
        call()
    with pytest.raises(ValueError, match=rf"uniforms must be \[{rows}, {columns}\], got \[{rows}, {columns + 1}\]"):
        call(uniforms=torch.rand(rows, columns + 1))


def test_results_lie_where_the_tensors_lie():
    """A generator of the CPU serves tensors of another device (here the one that holds no numbers)."""
    elsewhere = torch.device("meta")
    labels, probability = torch.zeros(2, 6, dtype=torch.int64, device=elsewhere), torch.rand(2, 6, device=elsewhere)
    assert part_probability(labels, 3, seeded(0)).device == elsewhere
    assert select_masked(probability, 3, seeded(0)).device == elsewhere
    assert grid_probability(2, 2, 3, seeded(0), device=elsewhere).device == elsewhere
    assert grid_probability(2, 2, 3, seeded(0)).device == torch.device("cpu")
    assert uniform_numbers((2, 3), seeded(0), device=elsewhere).device == elsewhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("numbers", "tensors"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_generator_of_one_device_and_tensors_of_another(numbers, tensors):
    """Masks of both devices from one generator are the same."""
    graph = torch.rand(2, 8, 8, generator=seeded(0))

    def mask(device):
        generator = torch.Generator(numbers).manual_seed(0)
        labels = partition_parts(graph.to(device), 3, generator=generator)
        p_part = part_probability(labels, 3, generator)
        p_grid = grid_probability(2, 2, 4, generator, device=labels.device)
        return select_masked(blend(p_grid, p_part, 0.5), 4, generator)

    assert mask(tensors).device.type == tensors
    assert torch.equal(mask("cuda").cpu(), mask("cpu"))


# --- The table of strategies, and the masks of the releases before ----------------------------------------------


def test_every_strategy_has_a_rule():
    """The words of --mask are the entries of the table, and the walk above covers all that make masks."""
    assert set(RULES) == set(WORDS["mask"])
    assert set(USED) == set(RULES) - {"official"}


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def golden(recipe, strategy, ids):
    """Masks, parts and generator of three epochs, from exact arithmetic: attention of few bits, parts far apart."""
    options = FORMER_DEFAULTS if recipe == "paper" else {}
    config = MaskConfig.from_recipe(recipe, mask=strategy, num_parts=4, schedule_epochs=10, **options)
    maker, tensors = EvolvedMask(GRID, MASKED, EPOCHS, config, seed=SEED, num_prefix_tokens=0), []
    planted = torch.arange(48) % 4
    attention = (planted[:, None] == planted).float().repeat(BATCH, 2, 1, 1) / 8
    for epoch in (0, 5, 9):
        maker.set_epoch(epoch)
        made = maker(torch.arange(BATCH), lambda rows: attention[rows], torch.arange(BATCH) * 77 if ids else None)
        tensors += [made.mask, made.parts, made.skipped]
    return digest(*tensors, maker.generator.get_state())


GOLDEN = {
    ("paper", "evolved", True): "edcd88782ed8eaa5",
    ("paper", "evolved", False): "45937f7af3a538dd",
    ("paper", "part", True): "2fce3218d5bef5e0",
    ("paper", "part", False): "c5eeecca259e89ec",
    ("paper", "grid", True): "fd4b7f9f561ce0dc",
    ("paper", "grid", False): "e6a0ff6209fe6080",
    ("paper", "random", True): "49e9b5d91efe33e7",
    ("paper", "random", False): "07c8e480094803b9",
    ("paper", "block", True): "639799c37d625068",
    ("paper", "block", False): "766bb3d8fc9aa49e",
    ("paper", "grid-to-block", True): "469e73b8266d18c8",
    ("paper", "grid-to-block", False): "c6abce5bfd7e2b6c",
    ("paper", "random-units", True): "5b03702bb2c13af8",
    ("paper", "random-units", False): "5fcdc4dfcbc40f44",
    ("paper", "block-official", True): "249506eef8704293",
    ("paper", "block-official", False): "ad40c1a16821a634",
    ("paper", "semantic", True): "efa3900d897608fd",
    ("paper", "semantic", False): "27f42d1489cd3566",
    ("paper", "inverse-block", True): "4613ac9d0439491d",
    ("paper", "inverse-block", False): "40940f72bdc2b682",
    ("paper", "squares", True): "5b03702bb2c13af8",
    ("paper", "squares", False): "5fcdc4dfcbc40f44",
    ("authors", "evolved", True): "b1c3d7fad665b70d",
    ("authors", "evolved", False): "d57954027bf52d85",
}


@pytest.mark.parametrize(("recipe", "strategy", "ids"), GOLDEN)
def test_masks_of_the_first_release(recipe, strategy, ids):
    """Every mask of these seeds is that of version 0.1.0 before its functions were parted (recorded there; those of other papers
    when they were added)."""
    assert golden(recipe, strategy, ids) == GOLDEN[recipe, strategy, ids]
