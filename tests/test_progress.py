"""One line that says how a stage is doing."""

import io
import re

from nanolib import progress
from nanolib.progress import Line, describe
from nanolib.rundir import Run, StageDir

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


def test_a_silent_stage_is_called_out_until_it_is_done(tmp_path):
    base, silent = StageDir("base", tmp_path / "base"), {"kind": "silent", "seconds": 130.4}
    assert describe(base, [TRAIN, silent]).endswith("1:20 left  silent for 2:10")
    assert describe(base, [silent]) == "base       silent for 2:10"
    base.finish({}, seconds=133)
    assert "silent" not in describe(base, [TRAIN, silent])


def test_the_time_left_for_the_run_is_at_its_own_pace(tmp_path):
    """Base takes 0.1 ms a token here, then mid 0.2; an evaluation takes 7 s."""
    overrides = {"mid.steps": None, "sft.steps": 5}
    run = Run.open("smoke", str(tmp_path / "run"), overrides)  # 1,024 tokens a step
    run.stage("data").finish({"counted": {"mid": 10 * 1024 - 9}}, seconds=1)
    for name in ("tokenizer", "shards"):
        run.stage(name).finish({}, seconds=1)
    row = {"kind": "train", "step": 10, "steps": 20, "seconds_left": 1.024}

    def told(name: str) -> str:
        return describe(run.stage(name), [row], run).split("  ")[-1]

    seconds = 1.024 + (10 + 5) * 0.1024  # base's other half, mid, sft
    assert told("base") == f"run {progress.clock(seconds)} left without eval, grpo"
    run.stage("base").finish({}, seconds=2.048)
    run.stage("eval", "base").finish({}, seconds=7)
    run.stage("mid").finish({}, seconds=10 * 0.2048)
    seconds = 60 + 3 * 7
    row |= {"step": 2, "steps": 5, "seconds_left": 60}
    assert told("sft") == f"run {progress.clock(seconds)} left without grpo"
    for place in (run.stage("sft"), run.stage("eval", "mid")):
        place.finish({}, seconds=5)
    assert told("grpo") == f"run {progress.clock(60 + 2 * 5)} left"


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
