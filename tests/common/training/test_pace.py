"""Minutes that are left, and the lines that stand in for a progress bar, by a clock that the test turns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from common.training import runlog
from common.training.distributed import Processes
from common.training.pace import Pace
from common.training.runlog import ProgressLines, RunLog, progress
from mae_evolved.main_pretrain import MAEConfig


@dataclass
class FakeClock:
    """Seconds that go on only when told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def paced(left: int, seconds: list[float]) -> tuple[Pace, list[str]]:
    """A pace after updates that took so long, and what each of them said."""
    clock = FakeClock()
    pace, said = Pace(left, clock), []
    for each in seconds:
        clock.now += each
        said.append(pace.update_done())
    return pace, said


def test_the_estimate_comes_after_six_updates_and_leaves_out_the_first() -> None:
    """The first takes 50 s, the others 3 s: 594 that are left take 29.7 minutes."""
    pace, said = paced(600, [50.0, *[3.0] * 7])
    assert said[:5] == [""] * 5
    assert said[5] == "about 30 min left for 594 updates, by the first 6 (3 s each)"
    assert said[6:] == ["", ""]
    assert pace.words() == "about 30 min left"


def test_slow_updates_are_not_waited_for() -> None:
    """Of 40 s each: after the third, for the second and third took a minute."""
    assert paced(100, [40.0] * 3)[1] == ["", "", "about 65 min left for 97 updates, by the first 3 (40 s each)"]


def test_nothing_is_said_of_a_run_that_is_over() -> None:
    pace, said = paced(6, [1.0] * 6)
    assert said == [""] * 6
    assert pace.words() == "less than a minute left"
    assert paced(10, [1.0])[0].words() == ""


def test_a_line_a_minute() -> None:
    """25 updates of 13 s, taken up at the sixth: a line after each full minute, none at the end, where the epoch's stands."""
    clock = FakeClock()
    pace, said = Pace(100, clock), list[tuple[float, str]]()
    bar = ProgressLines(range(5, 25), 25, "epoch 2/4", lambda line: said.append((clock.now - 1000, line)), pace)
    for update in bar:
        clock.now += 13.0
        pace.update_done()
        bar.set_postfix_str(f"loss 0.{update}")
    assert [at for at, _ in said] == [65.0, 130.0, 195.0]
    assert said[0][1] == "epoch 2/4  update 10/25  loss 0.9  about 21 min left"
    assert said[2][1] == "epoch 2/4  update 20/25  loss 0.19  about 18 min left"


@pytest.mark.parametrize(("terminal", "installed"), [(True, True), (True, False), (False, True)])
def test_a_terminal_has_the_bar_and_a_file_the_lines(monkeypatch: pytest.MonkeyPatch, terminal: bool, installed: bool) -> None:
    monkeypatch.setattr(runlog.sys.stderr, "isatty", lambda: terminal, raising=False)
    if not installed:
        monkeypatch.setattr(runlog, "_tqdm", lambda: None)
    log = RunLog(MAEConfig(), Processes(0, 1, 0, torch.device("cpu")))
    bar = progress(range(3), 3, "epoch", log, Pace(3))
    assert isinstance(bar, ProgressLines) == (not (terminal and installed))
    assert list(bar) == [0, 1, 2]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runlog.sys.stderr, "isatty", lambda: True, raising=False)
    log, clock = RunLog(MAEConfig(), Processes(1, 2, 1, torch.device("cpu"))), FakeClock()
    bar = progress(range(3), 3, "epoch", log, Pace(3, clock))
    assert isinstance(bar, ProgressLines)
    for _ in bar:
        clock.now += 100
        bar.set_postfix_str("loss")
    assert capsys.readouterr() == ("", "")
