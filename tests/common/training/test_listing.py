"""Names as packed bytes, and one scan for all ranks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.training import listing
from common.training.distributed import Processes, start_processes
from common.training.errors import BadInput
from common.training.listing import PackedNames, find_images, list_for_all, scan_images, training_files
from tests.conftest import free_ports, write_images

NAMES = st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name).map(os.fsdecode))


@given(NAMES, NAMES)
def test_names_come_back_as_they_were(first: list[str], second: list[str]) -> None:
    """Any bytes that a file's name can have: by number, from the end, in slices, joined and pickled."""
    names = PackedNames.joined([PackedNames.of(first), PackedNames.of(second)])
    both = [*first, *second]
    assert list(names) == both
    assert [names[place] for place in range(-len(both), 0)] == both
    assert names[1:3] == both[1:3]
    assert list(pickle.loads(pickle.dumps(names))) == both
    assert names.nbytes == sum(len(os.fsencode(name)) for name in both) + 8 * len(both)
    with pytest.raises(IndexError):
        names[len(both)]


def test_files_with_odd_names_are_found_in_the_order_of_paths(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, spaces, and folders that sort otherwise as text than part by part."""
    odd = os.fsdecode(b"caf\xe9 \xff.jpg")
    for place in ("a/a b", "a/a-b", "a/a", "a"):
        write_images(tmp_path / place, 1)
        (tmp_path / place / "image_00.jpg").rename(tmp_path / place / odd)
    found = find_images(tmp_path)
    assert found == sorted(found)
    assert [str(path.parent.relative_to(tmp_path)) for path in found] == ["a/a", "a/a b", "a/a-b", "a"]
    files = training_files(tmp_path)
    assert list(files.names) == [str(path) for path in found]
    assert files.summary().startswith(f"4 image files in 4 folders under {tmp_path}; ")
    assert len(scan_images(tmp_path / "a")) == 4


def _list(rank: int, port: int, root: str, answers: str) -> None:
    """A rank of two; the second cannot scan."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = start_processes("cpu", 1)
    if rank:
        listing.training_files = None  # type: ignore[assignment]
    refused = ""
    try:
        list_for_all(Path(root) / "nowhere", processes)
    except BadInput as error:
        refused = str(error)
    torch.save([refused, *map(list, list_for_all(Path(root), processes))], f"{answers}/{rank}")
    processes.close()


def test_two_ranks_list_once(tmp_path: Path) -> None:
    """Both have the main one's names and line, or its refusal; the other one would fail if it looked itself."""
    write_images(tmp_path / "images" / "a", 3)
    write_images(tmp_path / "images", 2)
    (tmp_path / "images" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    given = (free_ports(), str(tmp_path / "images"), str(tmp_path))
    torch.multiprocessing.start_processes(_list, given, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first == second
    names, line = list_for_all(tmp_path / "images", Processes(0, 1, 0, torch.device("cpu")))
    assert first == [f"--data_path {tmp_path / 'images'}/nowhere: no such folder", list(names), list(line)]
    assert len(names) == 6
