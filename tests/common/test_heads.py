"""Which heads show objects: the rule, on maps made by hand."""

import pytest
import torch

from common.attention import patch_graph
from common.heads import best_heads, cosine_similarity, head_scores, take_heads
from common.signals import signal_graph

PATCHES = 24


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def groups(count, seed=0, rest=0.0):
    """Attention of patches to their own group: [N, N], `count` equal groups in random places; `rest` of the weight elsewhere."""
    label = (torch.arange(PATCHES) % count)[torch.randperm(PATCHES, generator=seeded(seed))]
    alike = (label[:, None] == label).float()
    return (1 - rest) * alike / alike.sum(dim=1, keepdim=True) + rest / PATCHES


def noise(seed, sharpness=1.0):
    return (torch.randn(PATCHES, PATCHES, generator=seeded(seed)) * sharpness).softmax(dim=1)


def neighbours():
    """Each patch attends to itself and the next ones in raster order: a window, no groups."""
    distance = (torch.arange(PATCHES)[:, None] - torch.arange(PATCHES)).abs()
    return (-distance.float().square() / 2).softmax(dim=1)


UNIFORM = torch.full((PATCHES, PATCHES), 1 / PATCHES)
SINK = torch.eye(PATCHES)[torch.full((PATCHES,), 5)]  # every patch attends to patch 5
ITSELF = torch.eye(PATCHES)


def maps(*heads, prefix=0):
    """[1, h, T, T]; prefix tokens attend, and are attended to, at random."""
    made = torch.rand(1, len(heads), PATCHES + prefix, PATCHES + prefix, generator=seeded(9))
    made[0, :, prefix:, prefix:] = torch.stack(heads)
    return made


def test_cosine_similarity_by_hand():
    """Angles of 0, 45, 90 and 180 degrees, whatever the lengths; zeros are like nothing."""
    rows = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 5.0], [-1.0, 0.0], [0.0, 0.0]])
    half = 0.5**0.5
    expected = [[1, half, 0, -1, 0], [half, 1, half, -half, 0], [0, half, 1, 0, 0], [-1, -half, 0, 1, 0], [0] * 5]
    torch.testing.assert_close(cosine_similarity(rows), torch.tensor(expected))


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_score_of_groups(count):
    """s (1 - s) with s the share of pairs of one group; 0 for a head that sees one thing, and one that sees itself alone."""
    each = PATCHES // count
    share = (each - 1) / (PATCHES - 1)
    scores = head_scores(cosine_similarity(maps(groups(count), UNIFORM, SINK, ITSELF)))[0]
    torch.testing.assert_close(scores, torch.tensor([share * (1 - share), 0.0, 0.0, 0.0]), atol=1e-6, rtol=1e-5)


def test_score_of_pairs_by_hand():
    """The variance over the six pairs of four patches, both ways of each: opposite vectors count as apart."""
    similarity = torch.tensor([[9.0, 1, 0, -1], [1, 9, 0.5, 0], [0, 0.5, 9, 1], [-1, 0, 1, 9]])[None, None]
    pairs = torch.tensor([1.0, 0, -1, 0.5, 0, 1])
    assert float(head_scores(similarity)) == pytest.approx(float(pairs.var(correction=0)))


OTHERS = {
    "uniform": UNIFORM, "sink": SINK, "itself": ITSELF, "noise": noise(1), "sharp noise": noise(2, 4.0), "window": neighbours(),
    "faint groups": groups(4, rest=0.9),
}  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("other", OTHERS)
def test_heads_of_groups_go_before_others(count, other):
    """Also where a third of the weight lies elsewhere; whatever the order of the heads (seeds 0 to 3)."""
    for order in range(2):
        clear = [groups(count, seed, rest=0.3) for seed in (0, 3)]
        heads = [*clear, OTHERS[other], OTHERS[other]] if order == 0 else [OTHERS[other], OTHERS[other], *clear]
        chosen = best_heads(head_scores(cosine_similarity(maps(*heads))))
        assert chosen.tolist() == [[0, 1] if order == 0 else [2, 3]]


@pytest.mark.parametrize(("heads", "kept"), [(1, 1), (2, 1), (3, 2), (6, 3), (12, 6)])
def test_half_of_the_heads_are_kept(heads, kept):
    """Rounded up; equal scores keep the first heads; ascending; each image by itself."""
    assert best_heads(torch.zeros(2, heads)).tolist() == [list(range(kept))] * 2
    scores = torch.rand(5, heads, generator=seeded(0))
    chosen = best_heads(scores)
    for image in range(5):
        best = sorted(range(heads), key=lambda head: -float(scores[image, head]))[:kept]
        assert chosen[image].tolist() == sorted(best)
        assert torch.equal(best_heads(scores[image : image + 1])[0], chosen[image])


def test_take_heads():
    values = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    taken = take_heads(values, torch.tensor([[0, 2], [1, 2]]))
    assert torch.equal(taken, torch.stack([values[0, [0, 2]], values[1, [1, 2]]]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_graph_of_selected_attention(reduction):
    """Prefix tokens play no part in the choice; blocks choose apart; the graph is the mean (or sum) over what is kept."""
    clear, other = groups(3, 0, rest=0.2), groups(4, 1, rest=0.2)
    first, second = maps(UNIFORM, clear, noise(1), other, prefix=2), maps(other, ITSELF, SINK, clear, prefix=2)
    graph = patch_graph([first, second], 2, heads="select", reduction=reduction)
    kept = clear + other + other + clear
    torch.testing.assert_close(graph[0], kept if reduction == "sum" else kept / 4)


def test_selected_by_what_describes_a_patch():
    """A head is judged by rows or by columns, as `direction` says: here one has groups in its columns alone (seed 1)."""
    in_columns = groups(3) * 1e-3
    in_columns[:, :6] = 1.0  # all rows look at these, so rows are alike
    heads = maps(in_columns, noise(1))
    torch.testing.assert_close(patch_graph(heads, 0, heads="select")[0], noise(1))
    torch.testing.assert_close(patch_graph(heads, 0, heads="select", direction="column")[0], in_columns.T)


@pytest.mark.parametrize("graph", ["queries", "keys", "values"])
def test_selected_heads_of_vectors(graph):
    """Two of four heads have groups: the cosine graph is the mean over them, the vectors are those two side by side (seed 7)."""
    label = torch.arange(PATCHES) % 3
    vectors = torch.randn(1, 4, PATCHES + 1, 8, generator=seeded(7))
    for head in (1, 2):
        vectors[0, head, 1:] = 10 * torch.randn(3, 8, generator=seeded(20 + head))[label] + vectors[0, head, 1:]
    clear = vectors[:, [1, 2]]
    selected = signal_graph(vectors, graph, heads="select")
    assert torch.equal(selected, signal_graph(clear, graph, heads="mean"))
    selected = signal_graph(vectors, graph, heads="select", similarity="vectors")
    assert torch.equal(selected, signal_graph(clear, graph, heads="concat", similarity="vectors"))


def test_choice_is_the_images_own():
    """An image in a batch of others gets the graph that it gets alone (seeds 0 to 5)."""
    batch = torch.cat([maps(groups(2, seed), noise(seed), UNIFORM, groups(3, seed, rest=0.5)) for seed in range(6)])
    together = patch_graph(batch, 0, heads="select")
    for image in range(6):
        torch.testing.assert_close(patch_graph(batch[image : image + 1], 0, heads="select")[0], together[image])
