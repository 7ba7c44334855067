"""The climb's table: whatever was started is a row, and gains are the questions' own."""

import argparse

import pytest

from runs.bench import climb

ABOUT = {"terms": 4, "sft": {"sft.epochs": 8}, "given": {}}
KEYS = ("sampled", "greedy", "sampled_of_formatted", "formatted", "pass@4", "pass@16", "tokens")


@pytest.fixture
def bench(tmp_path):
    return climb.Bench(tmp_path, "smoke", str(tmp_path / "parent"), None, {})


def scores(right, **others):
    return dict.fromkeys((*KEYS, "entropy", "kl", "no_signal"), 0.5) | {"right": right} | others


def test_every_trial_that_was_started_is_a_row(bench):
    for seed, arm in ((1, "grpo"), (1, "shuffled"), (2, "grpo")):
        bench.file(ABOUT | {"seed": seed, "arm": arm}).append(
            kind="started", step=0, seed=seed, arm=arm, **ABOUT
        )
    before, after = scores([0, 8, 16, 4]), scores([4, 12, 16, 12], sampled=0.75, kl=0.125)
    bench.file(ABOUT | {"seed": 1, "arm": "grpo"}).append(
        kind="scored", step=2, seed=1, arm="grpo", **ABOUT, before=before, after=after,
        final_seed=7, problems=4, device="none", seconds={"sft": 60, "grpo": 120},
    )  # fmt: skip
    lines = climb.table(bench).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert [[*row[:3], row[4]] for row in cells] == [
        ["grpo", "1", "4", "0.500 → 0.750"],
        ["grpo", "2", "4", "not finished"],
        ["shuffled", "1", "4", "not finished"],
    ]
    # Gains of 0.25, 0.25, 0 and 0.5: their deviation of 0.177 divided by √4.
    assert cells[0][5] == "+25.0 ± 8.8"
    assert cells[0][13] == "0.125" and cells[0][-1] == "3.0 min"


def test_the_pilot_tries_every_sft_and_training_every_arm_and_seed(bench):
    given = argparse.Namespace(rows=[200, 400], epochs=[4], lr=[0.02, 0.1], command="pilot")
    assert [job["sft"]["sft.lr"] for job in climb.jobs(bench, given)] == [0.02, 0.1] * 2
    given = argparse.Namespace(
        rows=[400], epochs=[4], lr=[0.1], command="train", arms=["grpo", "shuffled"], seeds=[1, 2]
    )
    found = [(job["arm"], job["seed"]) for job in climb.jobs(bench, given)]
    assert found == [("grpo", 1), ("grpo", 2), ("shuffled", 1), ("shuffled", 2)]


@pytest.mark.parametrize("arm", climb.ARMS)
def test_every_arm_is_made_of_settings(arm):
    settings = climb.SFT | climb.GRPO | climb.ARMS[arm]
    assert climb.config.resolve("h100", settings).recipe.grpo.task == "sums"
