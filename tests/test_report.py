"""Report cards of run directories that were written by hand."""

from __future__ import annotations

import itertools
import math
import re
import shutil

import pytest

from nanolib import report, rundir
from nanolib.rundir import Run

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "ranks": 1, "dtype": "bfloat16", "torch": "2.11.0"}


def finish(run: Run, name: str, result: dict, of: str | None = None, **about) -> None:
    about = {
        "seconds": 90.0,
        "dollars": 0.25,
        "machine": MACHINE,
        "started": "then",
        "attempts": 1,
        **about,
    }
    run.stage(name, of).finish(result, **about)


@pytest.fixture
def run() -> Run:
    """Everything finished."""
    run = Run.open("smoke", "card", {"base.steps": 40})
    finish(run, "data", {"fingerprint": "abc123", "train_files": ["a", "b"], "text_bytes": 1234567})
    finish(run, "tokenizer", {"vocab_size": 512, "compression": {"nanolib": 2.71, "GPT-2": 3.25}})
    finish(run, "shards", {"train_tokens": 987654})
    for stage in ("base", "mid", "sft"):
        metrics = run.stage(stage).metrics
        for step in range(1, 41):
            loss = 6.2 * math.exp(-step / 12) + 1
            metrics.append(kind="train", step=step, steps=40, loss=loss, lr=1.0)
            if step % 2 == 0:
                metrics.append(kind="eval", step=step, bpb=loss / 3)
        result = {
            "steps": 40,
            "tokens": 40_960,
            "train_loss": 1.22,
            "seconds": 40.5,
            "tokens_per_second": 250_000.0,
        }
        finish(run, stage, result)
    metrics = run.stage("grpo").metrics
    for step in range(1, 11):
        said = [["What is 2 plus 3?", "5", 1.0], ["What is 2 plus 3?", "6", 0.0]]
        metrics.append(kind="rollout", step=step, reward=0.05 * step, samples=said)
        metrics.append(kind="train", step=step, steps=10, loss=-0.001, lr=1.0)
    metrics.append(kind="eval", step=10, greedy=0.5, **{"pass@1": 0.44, "pass@4": 0.75})
    finish(run, "grpo", {"steps": 10, "tokens": 4_000, "validation_greedy": 0.5})
    compression = {"bpb": 0.3131, "trigram_bpb": 0.6162}
    core = {
        "core/toy_choices": {"accuracy": 0.625, "centred": 0.5, "chance": 0.25, "questions": 48, "shots": 0, "cut": 0},
        "core/toy_facts": {"accuracy": 0.25, "centred": 0.25, "chance": 0.0, "questions": 48, "shots": 2, "cut": 0},
        "core": {"accuracy": 0.375, "tasks": 2},
    }  # fmt: skip
    finish(run, "eval", {"compression": compression, **core, "samples": {"samples": [["Ada has", " a cat. ```\n# Hi | x"]]}}, of="base")  # fmt: skip
    finish(run, "eval", {"gsm8k": {"accuracy": 0.41, "questions": 100}}, of="mid")
    finish(
        run,
        "eval",
        {
            "mmlu": {"text": 0.9375, "letters": 0.2625, "chance": 0.25, "questions": 240},
            "facts": {
                "accuracy": 0.8812,
                "questions": 160,
                "samples": [["Who?", "Ada", True], ["Where?", "There", False]],
            },
        },
        of="sft",
    )  # fmt: skip
    finish(run, "eval", {"gsm8k": {"accuracy": 0.52, "questions": 100}}, of="grpo")
    return run


def section(text: str, title: str) -> str:
    """From a heading to the next of its level."""
    return re.split(r"(?m)^#{1,2} ", text[text.index(f"## {title}") + 3 :])[0]


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_summary_of_the_toy_world_has_the_original_apart(run):
    summary, original = section(report.build(run), "Summary").split("### The original")
    assert cells(summary, "") == ["BASE", "MID", "SFT", "RL", "±", "chance"]
    assert cells(summary, "toy-MMLU, letters") == ["—", "—", "0.2625", "—", "0.0554", "0.2500"]
    assert cells(summary, "toy-MMLU, text") == ["—", "—", "0.9375", "—", "0.0312", "0.2500"]
    assert cells(summary, "facts")[:4] == ["—", "—", "0.8812", "—"]
    assert cells(summary, "toy-GSM8K") == ["—", "0.4100", "—", "0.5200", "0.0961", "—"]
    assert cells(summary, "toy-CORE")[0] == "0.3750"
    assert "toy_choices" not in summary
    assert cells(summary, "bits per byte")[:2] == ["0.3131", "—"]
    assert cells(summary, "bits per byte of a token trigram")[0] == "0.6162"
    assert "MMLU, chance" not in summary
    assert "the toy world's; they share only their form" in summary
    assert cells(original, "") == ["BASE", "MID", "SFT", "RL"]
    assert cells(original, "CORE") == ["0.2219", "—", "—", "—"]
    assert cells(original, "GSM8K") == ["—", "0.0250", "0.0455", "0.0758"]


def test_the_interval_is_wilsons_of_the_score_nearest_a_half():
    """scipy.stats.binomtest(80, 100).proportion_ci(method="wilson") is (0.71117, 0.86663)."""
    real = Run.open("laptop", "interval")
    finish(real, "eval", {"gsm8k": {"accuracy": 0.8, "questions": 100}}, of="sft")
    finish(real, "eval", {"gsm8k": {"accuracy": 1.0, "questions": 100}}, of="grpo")
    row = cells(section(report.build(real), "Summary"), "GSM8K")
    assert row[2:5] == ["0.8000", "1.0000", f"{(0.86663 - 0.71117) / 2:.4f}"]


def test_two_models_are_compared_problem_by_problem(run):
    """A p of 2 · (1 + 9) / 2^9 for one problem lost and eight gained."""
    assert "From model to model" not in report.build(run)  # an older version kept no problems
    mid = {"text": 0.5, "right": {"text": "0" * 8 + "1" * 8, "letters": "01"}}
    sft = {"text": 0.9375, "right": {"text": "1" * 15 + "0", "letters": "011"}}
    finish(run, "eval", {"mmlu": mid, "gsm8k": {"accuracy": 0.41}}, of="mid")
    finish(run, "eval", {"mmlu": sft, "core/arc_easy": {"right": {"accuracy": "11"}}}, of="sft")
    finish(run, "eval", {"mmlu": sft, "core/arc_easy": {"right": {"accuracy": "11"}}}, of="grpo")
    table = section(report.build(run), "From model to model")
    assert cells(table, "") == ["MID → SFT", "SFT → RL"]
    assert cells(table, "toy-MMLU, text") == ["+8 −1 (p 0.039)", "+0 −0 (p 1.000)"]
    assert cells(table, "toy-MMLU, letters") == ["—", "+0 −0 (p 1.000)"], "other problems"
    assert cells(table, "core/arc easy") == ["—", "+0 −0 (p 1.000)"]


def test_contamination_is_a_row_a_test_and_a_column_a_source(run):
    assert "Contamination" not in report.build(run)  # an older version did not look
    names = ["gsm8k", "core/arc_easy", "mmlu", "facts"]
    passages = [{"test": it, "source": "text", "words": 80, "text": f"```{it}"} for it in names]
    found = {
        "text": dict.fromkeys(names, 0) | {"gsm8k": 1006},
        "sft: mine": dict.fromkeys(names, 2),
    }
    kept = {"problems": dict.fromkeys(names, 1319), "found": found, "passages": passages}
    rundir.write_json(run.stage("data").path / "overlap.json", kept)
    part = section(report.build(run), "Contamination")
    assert cells(part, "") == ["text", "sft: mine"]
    assert cells(part, "toy-GSM8K") == ["1,006 of 1,319", "2 of 1,319"]
    assert cells(part, "core/arc easy") == ["0", "2 of 1,319"]
    assert "come from templates" in part
    assert "mmlu, 80 words shared with text:\n\n````text\n```mmlu\n````\n" in part
    assert part.count("80 words") == 3 and "```facts" not in part
    kept |= {"quoting": {"text": [4, 9], "sft: mine": []}, "texts": {"text": 5000, "sft: mine": 9}}
    rundir.write_json(run.stage("data").path / "overlap.json", kept)
    part = section(report.build(run), "Contamination")
    assert cells(part, "its texts that share words") == ["2 of 5,000", "0"]


def test_the_sign_test_counts_the_splits_of_a_fair_coin():
    for gained, lost in itertools.product(range(6), range(6)):
        n, fewer = gained + lost, min(gained, lost)
        splits = [sum(throws) for throws in itertools.product((0, 1), repeat=n)]
        uneven = sum(min(heads, n - heads) <= fewer for heads in splits)
        assert report.sign_test(gained, lost) == uneven / 2**n
    assert report.sign_test(7_000, 6_000) < 1e-15 < report.sign_test(6_500, 6_400) < 1


def test_the_score_without_the_question_is_beside_the_one_with_it(run):
    assert "without the question" not in report.build(run)  # an older version did not ask
    blind = "text without the question"
    mmlu = {"text": 0.9, blind: 0.275, "letters": 0.25, "chance": 0.25, "questions": 240}
    toy = {"accuracy": 0.625, "accuracy without the question": 0.3, "centred": 0.5, "chance": 0.25}
    finish(run, "eval", {"mmlu": mmlu, "core/toy_choices": toy}, of="grpo")
    text = report.build(run)
    assert cells(section(text, "Summary"), f"toy-MMLU, {blind}")[-3:] == ["0.2750", "0.0562", "0.2500"]  # fmt: skip
    assert "*Without the question*" in section(text, "Summary")
    assert cells(section(text, "CORE"), "toy_choices without the question")[-1] == "0.3000"


def test_summary_of_real_tasks_has_the_originals_beside():
    real = Run.open("laptop", "real")
    scores = {"letters": 0.2625, "text": 0.3, "chance": 0.25}
    finish(real, "eval", {"mmlu": scores, "gsm8k": {"accuracy": 0.04}}, of="sft")
    summary = section(report.build(real), "Summary")
    assert "toy" not in summary and "### The original" not in summary
    assert cells(summary, "MMLU, letters")[-2:] == ["0.3151", "—"]
    assert cells(summary, "MMLU, text")[-2:] == ["—", "—"]
    assert cells(summary, "GSM8K")[-2:] == ["0.0455", "0.0758"]


def test_every_stage_is_there_with_time_cost_and_results(run):
    text = report.build(run)
    assert "Not finished" not in text
    costs = section(text, "Time and cost")
    assert cells(costs, "stage") == [
        *("attempts", "time", "training", "tokens", "tokens/s", "MFU", "cost"),
    ]
    assert cells(costs, "data") == ["1", "1:30", "—", "—", "—", "—", "$0.25"]
    assert cells(costs, "**all**") == ["", "**16:30**", "12.3%", "", "", "", "**$2.75**"]
    speed = cells(costs, "base")
    assert speed[:5] == ["1", "1:30", "45.0%", "40,960", "250,000"]
    assert re.fullmatch(r"\d+\.\d%", speed[5])
    assert cells(costs, "sft")[5] == "—", "its tokens are only those the assistant says"
    assert cells(section(text, "Environment"), "device") == ["NVIDIA H100 80GB HBM3"]
    assert cells(section(text, "Model"), "parameters")[0] == f"{run.config.recipe.model.parameters(512):,}"  # fmt: skip
    data = section(text, "Data and tokenizer")
    assert cells(data, "fingerprint") == ["abc123"]
    assert cells(data, "compression GPT-2") == ["3.25"]
    assert cells(data, "train tokens") == ["987,654"]
    assert cells(section(text, "Training"), "train loss") == ["1.22"]
    assert cells(section(text, "Evaluations"), "toy-MMLU")[:3] == ["0.9375", "0.2625", "0.2500"]


def test_commands_are_told_beside_the_stages(run):
    """What a command took is more than its stages: kernels, lessons, work lost to a kill."""
    assert "`nanolib run`" not in report.build(run)
    (run.path / rundir.ATTEMPTS).write_text(
        '{"started": 1000.0, "dollars_per_hour": 3.0, "ended": 1528.0}\n'
        '{"started": 2000.0, "dollars_per_hour": 3.0, "ended": 2872.0}\n'
    )
    costs = section(report.build(run), "Time and cost")
    assert cells(costs, "`nanolib run`") == ["2", "23:20", "8.7%", "", "", "", "$1.17"]
    assert "Source: `attempts.jsonl`" in costs


def test_an_older_record_is_told_to_be_one(run):
    assert "an older version" not in report.build(run)
    record = run.stage("mid").done()
    result, attempt = record.pop("result"), record.pop("attempts")
    run.stage("mid").finish(result, **record)
    costs = section(report.build(run), "Time and cost")
    assert attempt == 1 and cells(costs, "mid")[:2] == ["—", "1:30"]
    assert "recorded by an older version, which counted the last attempt alone" in costs


def test_what_another_run_computed_is_not_in_the_sums(run):
    assert "taken over" not in report.build(run)
    record = run.stage("base").done()
    run.stage("base").finish(record.pop("result"), **record, taken_over="demo")
    costs = section(report.build(run), "Time and cost")
    assert cells(costs, "base (of run `demo`)")[:2] == ["1", "1:30"]
    assert cells(costs, "**all**")[1:] == ["**15:00**", "9.0%", "", "", "", "**$2.50**"]
    assert "Stages taken over from another run are not in the sums." in costs


def test_grpo_shows_its_scores_and_answers(run):
    card = report.build(run)
    assert cells(card[card.index("### grpo") :], "step") == ["greedy", "pass@1", "pass@4"]
    assert "From `grpo/metrics.jsonl`" in card
    assert "'What is 2 plus 3?'\n  '5' (reward 1)" in card


def test_core_is_a_table_of_its_own(run):
    core = section(report.build(run), "CORE")
    assert cells(core, "task") == ["shots", "questions", "chance", "BASE"]
    assert cells(core, "toy_choices") == ["0", "48", "0.2500", "0.6250"]
    assert cells(core, "**CORE** (mean of centred)")[-1] == "0.3750"
    assert "toy_choices" not in section(report.build(run), "Evaluations")


def test_levels_are_those_of_the_runs_world(run):
    levels = section(report.build(run), "Levels")
    assert cells(levels, "Reads: half of a trigram's bits per byte") == [
        "≤ 0.5",
        "0.5081",
        "not yet",
    ]
    assert cells(levels, "Calculates: two of five word problems") == ["≥ 0.4", "0.5200", "passed"]
    assert cells(levels, "Programs: one of two functions") == ["≥ 0.5", "—", "not yet"]
    assert "original's CORE" not in levels
    laptop = Run.open("laptop", "real")
    finish(laptop, "eval", {"chatcore": {"accuracy": -0.3}}, of="sft")
    finish(laptop, "eval", {"chatcore": {"accuracy": -0.2}}, of="grpo")
    real = section(report.build(laptop), "Levels")
    assert cells(real, "The original's CORE (depth 20)") == ["≥ 0.2219", "—", "not yet"]
    assert cells(real, "The original's ChatCORE") == ["≥ 0.0884", "-0.2000", "not yet"]
    assert "word problems" not in real


def test_two_runs_side_by_side(run):
    other = Run.open("smoke", "other", {"base.steps": 40, "sft.lr": 0.25, "mid.enabled": False})
    finish(other, "eval", {"gsm8k": {"accuracy": 0.5, "questions": 100}}, of="grpo")
    finish(other, "data", {"text_bytes": 5}, seconds=30.0, dollars=None)
    text = report.compare(run, other)
    assert cells(text, "sft.lr") == ["0.5", "0.25"] and "base.steps" not in text
    assert cells(text, "RL toy-GSM8K") == ["0.5200", "0.5000", "+0.0200"]
    assert cells(text, "MID toy-GSM8K") == ["0.4100", "—", "—"]
    assert cells(text, "data") == ["1:30", "0:30", "$0.25", "—"]


def test_every_table_names_its_source(run):
    """No number without the file it came from."""
    text = report.build(run)
    parts = re.split(r"(?m)^#{2,3} .*$", text)[1:]
    for part in parts:
        if "\n| " in part:
            assert "Source: " in part, part
    for name in re.findall(r"`([a-z/]+\.(?:jsonl?|md))`", text):
        assert name == "done.json" or (run.path / name).exists(), name


def test_samples_cannot_break_out_of_their_fence(run):
    text = report.build(run)
    assert "````text\n> 'Ada has'\n  ' a cat. ```\\n# Hi | x'\n````" in text
    assert "> 'Who?'\n  'Ada' (right)\n\n> 'Where?'\n  'There' (wrong)\n```" in text
    assert "\n# Hi" not in text


def test_no_value_breaks_its_table():
    assert report.table(["a"], [["x | y\n\n# Hi"], [None], [0.5], [1234]]).split("\n") == [
        *("| a |", "|---|", "| x ¦ y  # Hi |", "| — |", "| 0.5000 |", "| 1,234 |")
    ]


def test_the_card_comes_from_the_directory_alone(run, tmp_path):
    first = report.build(run)
    assert (run.path / "report.md").read_text() == first
    assert report.build(run) == first, "nothing in it depends on the clock"
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.path, moved)
    (moved / "report.md").unlink()
    again = report.build(Run.load(f"{moved}"))
    assert again == first.replace("run `card`", "run `elsewhere`")


def test_missing_stages_are_said_to_be():
    run = Run.open("smoke", "young")
    text = report.build(run)
    assert text.count("not begun") >= 11
    assert "No evaluation is finished." in text
    assert "No samples were recorded." in text

    finish(run, "data", {"text_bytes": 5}, dollars=None, machine={"device": "cpu"})
    run.stage("base").metrics.append(kind="train", step=3, steps=20, loss=2.5)
    run.stage("base").metrics.append(kind="progress", step=64, steps=200, message="questions")
    with (run.stage("base").path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a writer was killed here
    text = report.build(run)
    assert "**Not finished:** tokenizer (not begun), shards (not begun), base (unfinished, at 3 of 20)" in text  # fmt: skip
    assert cells(section(text, "Time and cost"), "data")[:2] == ["1", "1:30"]
    assert "Unfinished, at 3 of 20." in section(text, "Training")


def test_a_stage_that_is_off_is_not_missing():
    text = report.build(Run.open("smoke", "direct", {"base.enabled": False}))
    assert "base (" not in text.split("## Summary")[0]
    assert "eval/base" not in text
    assert "### base" not in text


def test_machines_that_differ_are_told_apart(run):
    finish(run, "sft", {"tokens": 1}, machine=MACHINE | {"ranks": 8})
    ranks = cells(section(report.build(run), "Environment"), "ranks")[0]
    assert "base: 1" in ranks
    assert "sft: 8" in ranks


@pytest.mark.parametrize("inside", ["no fence", "```", "````python\n```\n````"])
def test_no_text_closes_its_fence(inside):
    fence, *body, end = report.fenced(inside, "").split("\n")
    assert "\n".join(body) == inside and fence == end
    assert set(fence) == {"`"} and len(fence) >= 3 and fence not in inside
