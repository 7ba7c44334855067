"""One line that says how a stage is doing."""

import io
import re

from nanolib import progress
from nanolib.progress import Line, describe
from nanolib.rundir import StageDir

TRAIN = {"kind": "train", "step": 12, "steps": 1500, "loss": 2.3139}
TRAIN |= {"tokens_per_second": 11_532.4, "seconds_left": 80.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_clock():
    told = [progress.clock(seconds) for seconds in (0, 59.6, 65, 3600, 3725)]
    assert told == ["0:00", "1:00", "1:05", "1:00:00", "1:02:05"]


def test_describe(tmp_path):
    base, score = StageDir("base", tmp_path / "base"), StageDir("eval", tmp_path / "eval" / "sft")
    rows = [{"kind": "eval", "step": 0, "bpb": 0.4116}, TRAIN]
    assert re.split(" {2,}", describe(base, rows))[1:] == [
        "12/1,500",
        "loss 2.314",
        "11,532 tokens/s",
        "1:20 left",
        "bpb 0.412",
    ]
    row = {"kind": "progress", "step": 1, "steps": 3, "message": "mmlu"}
    assert describe(score, [row]) == "eval of sft  1/3  mmlu"
    score.finish({}, seconds=61)
    assert describe(score, [row]) == "eval of sft  done in 1:01"
    base.finish({}, seconds=133)
    assert describe(base, rows).endswith(
        "12/1,500  loss 2.314  11,532 tokens/s  bpb 0.412  done in 2:13"
    )


def test_lines_come_every_few_seconds_and_at_the_end(tmp_path):
    out, stage = io.StringIO(), StageDir("base", tmp_path / "base")
    line = Line(out, every=60)
    line(stage, [])
    for step in range(1, 10):
        line(stage, [TRAIN | {"step": step}])
    assert [text.split()[1] for text in out.getvalue().splitlines()] == ["1/1,500"]
    stage.finish({}, seconds=1)
    line(stage, [TRAIN | {"step": 10}])
    line(stage, [TRAIN | {"step": 10}])
    line(StageDir("sft", tmp_path / "sft"), [TRAIN])  # another stage shows at once
    assert [text.split()[:2] for text in out.getvalue().splitlines()] == [
        ["base", "1/1,500"],
        ["base", "10/1,500"],
        ["sft", "12/1,500"],
    ]


def test_a_terminal_rewrites_its_line(tmp_path):
    out = Terminal()
    line = Line(out)
    for name, step in (("base", 1), ("base", 2), ("sft", 1)):
        line(StageDir(name, tmp_path / name), [TRAIN | {"step": step}])
    line.say("over")
    assert out.getvalue().count("\r") == 3 and out.getvalue().count("\n") == 3
    assert out.getvalue().endswith("\nover\n")
