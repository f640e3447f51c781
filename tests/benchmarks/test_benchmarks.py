"""The benchmarks at tiny sizes: they run, and their numbers are what they say they are."""

import argparse
import json
import sys

import pytest
import torch
from scipy import ndimage

from benchmarks import cut_quality, mask_cost, mask_statistics, skipped_passes
from benchmarks.pieces import count_pieces, label_pieces
from common.evolved_mask import EvolvedMask
from common.masks import grid_classes

TINY_COST = ["--model", "mae_vit_tiny_patch8", "--input_size", "32", "--images", "4", "--batch_train", "2", "--parts", "3"]


# --- Skipped passes ---------------------------------------------------------------------------------------------


def test_skipped_share_over_a_quadratic_schedule(capsys):
    numbers = skipped_passes.main(["--epochs", "100", "--images", "300", "--compared", "2"])
    assert 0.34 < numbers["skipped"] < 0.42
    assert f"{numbers['skipped']:.1%}" in capsys.readouterr().out


def test_fewer_images_are_skipped_as_the_masks_evolve():
    numbers = skipped_passes.main(["--epochs", "40", "--images", "300", "--compared", "2"])
    shares = [row["skipped"] for row in numbers["tenths"]]
    assert shares == sorted(shares, reverse=True)
    assert numbers["by_epoch"][0] == 1
    assert shares[-1] == 0


def test_tenths_cover_the_run_once():
    numbers = skipped_passes.main(["--epochs", "23", "--images", "20", "--compared", "1"])
    rows = numbers["tenths"]
    epochs = [epoch for row in rows for epoch in range(row["epochs"][0], row["epochs"][1] + 1)]
    assert epochs == list(range(23))
    weighted = sum(row["skipped"] * (row["epochs"][1] - row["epochs"][0] + 1) for row in rows)
    assert weighted / 23 == pytest.approx(numbers["skipped"])


def test_run_shorter_than_ten_epochs_has_fewer_rows():
    numbers = skipped_passes.main(["--epochs", "3", "--images", "20", "--compared", "1"])
    assert [row["epochs"] for row in numbers["tenths"]] == [[0, 0], [1, 1], [2, 2]]


def test_no_pass_is_spared_where_the_cut_runs_through_a_grid_class():
    numbers = skipped_passes.main(["--epochs", "20", "--images", "50", "--compared", "1", "--mask_ratio", "0.6"])
    assert numbers["by_epoch"][0] == 1  # alpha = 0 needs no attention whatever the count
    assert max(numbers["by_epoch"][1:]) == 0


def test_comparison_counts_what_it_compared():
    masker = EvolvedMask((6, 8), 36, 20, num_parts=5)
    done = skipped_passes.compare_masks(masker, images=7, epochs=4)
    assert done["masks"] == 28
    assert done["epochs"] == 4
    assert 7 <= done["skipped"] < 28


def test_comparison_fails_when_the_shortcut_is_wrong(monkeypatch):
    masker = EvolvedMask((6, 8), 36, 20, num_parts=5)
    monkeypatch.setattr(masker, "decided_by_grid", lambda grid_draw, *_: torch.ones(len(grid_draw), dtype=torch.bool))
    with pytest.raises(AssertionError, match="changed a mask"):
        skipped_passes.compare_masks(masker, images=16, epochs=4)


@pytest.mark.parametrize("text", ["14", "14x", "x14", "0x4", "14xa", "-2x3"])
def test_grid_flag_refuses_what_is_no_grid(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
        skipped_passes.grid_size(text)


# --- Statistics of masks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mask_numbers():
    return mask_statistics.main(["--images", "16"])


def test_table_has_all_rows_and_shares_that_add_up(mask_numbers):
    rows = mask_numbers["rows"]
    assert [name for name in rows if name.startswith("alpha")] == [f"alpha = {alpha:g}" for alpha in mask_statistics.ALPHAS]
    assert list(rows)[len(mask_statistics.ALPHAS) :] == list(mask_statistics.OTHERS)
    for row in rows.values():
        assert row["parts_masked"] + row["parts_visible"] + row["parts_mixed"] == pytest.approx(1)


def test_masks_move_from_the_grid_to_whole_parts(mask_numbers):
    rows = mask_numbers["rows"]
    grid, parts = rows["alpha = 0"], rows["alpha = 1"]
    assert grid["equal_to_grid"] == 1
    assert grid["same_neighbours"] == pytest.approx(0.5, abs=0.01)
    assert grid["visible_piece"] == 1  # patches of one grid class never touch
    assert parts["equal_to_grid"] < 0.75
    assert parts["same_neighbours"] > 0.8
    assert parts["parts_mixed"] <= 1 / parts["num_parts"] + 1e-9 < grid["parts_mixed"]  # at most one part is cut


def test_other_strategies_do_what_their_names_say(mask_numbers):
    """One visible block has the largest visible pieces, squares larger ones than random; semantic begins with mixed parts."""
    rows = mask_numbers["rows"]
    pieces = {name: row["visible_piece"] for name, row in rows.items()}
    assert max(pieces, key=pieces.get) == "inverse-block"
    assert pieces["squares"] > pieces["random"]
    assert rows["semantic"]["parts_mixed"] > rows["random"]["parts_mixed"]


def test_table_depends_on_the_seed_alone(mask_numbers):
    assert mask_statistics.main(["--images", "16"]) == mask_numbers
    assert mask_statistics.main(["--images", "16", "--seed", "1"])["rows"] != mask_numbers["rows"]


def test_table_on_a_small_grid_that_is_not_square():
    rows = mask_statistics.main(["--images", "3", "--grid", "4x7"])["rows"]
    assert rows["alpha = 0"]["num_parts"] == 28
    assert rows["alpha = 0"]["equal_to_grid"] == 1


def test_statistics_of_masks_drawn_by_hand():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)[None]
    assert mask_statistics.equal_neighbours(mask) == pytest.approx(5 / 12)
    assert mask_statistics.piece_size(mask) == pytest.approx(4 / 3)
    assert mask_statistics.piece_size(~mask) == 5
    assert mask_statistics.next_to_visible(mask) == 1
    assert mask_statistics.next_to_visible(torch.tensor([[[True, True, False]]])) == pytest.approx(1 / 2)


def test_pieces_do_not_join_two_images():
    assert mask_statistics.piece_size(torch.ones(2, 3, 3, dtype=torch.bool)) == 9


def test_part_shares_leave_empty_parts_out():
    mask = torch.tensor([[True, True, False, False, True, False]])
    parts = torch.tensor([[0, 0, 1, 1, 3, 3]])
    assert mask_statistics.part_shares(mask, parts, 5) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_attention_rows_add_up_and_favour_near_patches():
    edges = mask_statistics.blob_attention(2, 6, 8, seed=0)[:, 0, 1:, 1:]
    assert torch.allclose(edges.sum(dim=2), torch.ones(2, 48))
    assert (edges[:, 0, 1] > edges[:, 0, 47]).all()
    assert (edges.argmax(dim=2) == torch.arange(48)).all()


# --- Cost -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost_numbers(tmp_path_factory):
    file = tmp_path_factory.mktemp("cost") / "cost.json"
    numbers = mask_cost.main([*TINY_COST, "--epochs", "20", "--repeats", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == numbers
    return numbers


def test_every_stage_is_timed(cost_numbers):
    stages = cost_numbers["stages"]
    assert {mask_cost.PASS, mask_cost.FORWARD, mask_cost.EM, mask_cost.SELECTION, mask_cost.STEP} <= set(stages)
    for cost in stages.values():
        assert 0 < cost["fastest"] <= cost["seconds"] <= cost["slowest"]
        assert cost["runs"] >= 1


@pytest.mark.parametrize(("time", "value"), [("seconds", "value"), ("fastest", "fastest")])
def test_ratios_follow_from_the_costs_of_the_run(cost_numbers, time, value):
    seconds = {name: cost[time] for name, cost in cost_numbers["stages"].items()}
    values = {one["name"]: one[value] for one in cost_numbers["ratios"]}
    assert values[mask_cost.EM_SHARE] == seconds[mask_cost.EM] / seconds[mask_cost.FORWARD]
    spared = values[mask_cost.SPARED]
    dear, cheap, step = seconds[mask_cost.PASS] + seconds[mask_cost.EM], seconds[mask_cost.SELECTION], seconds[mask_cost.STEP]
    assert values[mask_cost.MASK_SHARE] == pytest.approx((dear + cheap) / step)
    assert values[mask_cost.MASK_SHARE_SPARED] == pytest.approx((dear * (1 - spared) + cheap) / step)


def test_targets_are_not_judged_at_other_sizes(cost_numbers):
    assert {one["verdict"] for one in cost_numbers["ratios"] if one["target"]} == {"not at these sizes"}


@pytest.mark.parametrize(("em", "verdict"), [(0.03, "met"), (0.031, "missed")])
def test_targets_are_judged_at_the_promised_sizes(em, verdict):
    names = (mask_cost.PASS, mask_cost.FORWARD, mask_cost.SELECTION, mask_cost.STEP)
    costs = {name: mask_cost.Cost(1.0, 1.0, 1.0, 1, None) for name in names}
    costs[mask_cost.EM] = mask_cost.Cost(em, em, em, 1, None)
    found = mask_cost.ratios(costs, spared=0.4, promised=True)
    assert [(one.target, one.verdict) for one in found if one.target] == [("at most 3%", verdict)]


def test_without_scikit_learn_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(mask_cost.importlib.util, "find_spec", lambda name: None)
    numbers = mask_cost.main([*TINY_COST, "--epochs", "5", "--repeats", "1"])
    assert not any(name.startswith("scikit-learn") for name in numbers["stages"])
    assert "pip install scikit-learn" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_added_memory_sees_an_allocation_that_is_gone_again():
    def stage():
        torch.ones(32 * 2**20 // 4).sum()  # 32 MiB

    added = mask_cost.added_memory(stage, torch.device("cpu"))
    assert added is None or 30 * 2**20 <= added <= 48 * 2**20


def test_training_step_updates_the_weights_and_leaves_no_gradient():
    args = mask_cost.parse(TINY_COST)
    work = mask_cost.build(args, torch.device("cpu"))
    before = work.model.blocks[0].mlp.fc1.weight.detach().clone()
    work.training_step()
    assert not torch.equal(before, work.model.blocks[0].mlp.fc1.weight)
    assert all(parameter.grad is None for parameter in work.model.parameters())


def test_selection_stage_makes_grid_masks():
    args = mask_cost.parse(TINY_COST)
    work = mask_cost.build(args, torch.device("cpu"))
    classes = grid_classes(*work.model.grid_size)
    for mask in work.draws_and_selection():
        assert len(classes[~mask].unique()) == 1


# --- Quality of the cut ------------------------------------------------------------------------------------------


def test_planted_graphs_are_attention_with_known_parts():
    """Rows sum to 1, every region that owns a patch is counted, and without noise the cut finds them all (seed 3)."""
    graphs, regions = cut_quality.plant(cut_quality.Planted(5, 5, 0.0, (6, 7)), 4, 3)
    assert graphs.shape == (4, 42, 42)
    assert torch.allclose(graphs.sum(dim=2), torch.ones(4, 42))
    assert regions.unique().tolist() == [0, 1, 2, 3, 4]
    assert cut_quality.rand_index(regions, cut_quality.ours()(graphs, 5, 0)) > 0.99
    assert cut_quality.rand_index(regions, torch.randint(5, (4, 42), generator=torch.Generator().manual_seed(0))) < 0.1


def test_cut_quality_compares_with_scikit_learn(tmp_path):
    """A small form of the table: one row of two settings, each column there, the verdict from the means."""
    numbers = cut_quality.main(["--graphs", "3", "--seeds", "2", "--settings", "1", "--json", str(tmp_path / "n.json")])
    scores = numbers["table"][0]["scores"]
    assert set(scores) == {"ours", "version 0.1.0", *cut_quality.SKLEARN}
    assert all(len(values) == 2 and max(values) <= 1 for values in scores.values())
    means = {name: sum(values) / 2 for name, values in scores.items()}
    assert numbers["worst_gap"] == pytest.approx(means["ours"] - max(means[name] for name in cut_quality.SKLEARN))
    assert json.loads((tmp_path / "n.json").read_text())["above"] == numbers["above"]


def test_the_table_of_the_prior(tmp_path):
    """--smooth: without the prior the scores of "ours" in the other table; with the strongest one the parts have fewer pieces."""
    options = ["--graphs", "3", "--seeds", "2", "--settings", "1"]
    rows = cut_quality.main([*options, "--smooth", "--json", str(tmp_path / "n.json")])["table"]
    assert [row["beta"] for row in rows] == list(cut_quality.BETAS)
    plain = cut_quality.score(cut_quality.SETTINGS[:1], {"ours": cut_quality.ours()}, 3, 2)
    assert rows[0]["rand"] == plain[0]["scores"]["ours"]
    assert sum(rows[-1]["pieces"]) < sum(rows[0]["pieces"])
    assert json.loads((tmp_path / "n.json").read_text())["table"] == rows


def test_pieces_by_hand():
    """Two images of 3 x 4: pieces do not join over corners, over the edge of the grid, or with the next image."""
    first = [0, 0, 1, 2, 1, 0, 1, 2, 1, 1, 0, 0]
    parts = torch.tensor([first, [2] * 12])
    labels = label_pieces(parts, (3, 4))
    assert labels[0].tolist() == [labels[0][0], labels[0][0], *labels[0][2:4], labels[0][4], labels[0][0], *labels[0][2:4],
                                  labels[0][4], labels[0][4], labels[0][10], labels[0][10]]  # fmt: skip
    assert len(labels[0].unique()) == 5
    assert labels[1].unique().numel() == 1
    assert not set(labels[1].tolist()) & set(labels[0].tolist())
    pieces = count_pieces(parts, (3, 4))
    assert pieces.a_part == pytest.approx(6 / 4)  # parts 0, 1, 2 of the first image, part 2 of the second
    assert (pieces.single_parts, pieces.single_pieces) == (0.0, 0.0)
    lonely = count_pieces(torch.tensor([[0, 1, 0, 0], [3, 3, 3, 3]]), (1, 4))
    assert lonely.single_parts == pytest.approx(1 / 3)  # part 1 of the first image
    assert lonely.single_pieces == pytest.approx(2 / 4)


def test_pieces_equal_scipys_labels():
    """Random part maps (seed 2): as many pieces as ndimage.label finds part by part."""
    parts = torch.randint(4, (6, 35), generator=torch.Generator().manual_seed(2))
    maps = parts.reshape(6, 5, 7).numpy()
    found = sum(ndimage.label(image == part)[1] for image in maps for part in range(4))
    assert len(label_pieces(parts, (5, 7)).unique()) == found


def test_time_of_the_cut(capsys):
    numbers = cut_quality.main(["--time", "--images", "4", "--parts", "5"])
    assert min(numbers["seconds"].values()) > 0
    quarter = numbers["seconds"][cut_quality.FOUR_TIMES]
    assert numbers["four_times"] == pytest.approx(4 * quarter / numbers["seconds"]["ours"])
    assert "of ours" in capsys.readouterr().out
