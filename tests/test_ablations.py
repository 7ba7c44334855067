"""The ablation lab: its variants exist, finished trials are not repeated, the table's arithmetic."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from nanolib import config
from runs.bench import ablations


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROWS", tmp_path / "ablations.jsonl")

    def write(variant, scores, seconds=1.0, scale="toy"):
        about = {"steps": 3, "tokens": 30, "device": "a CPU", "date": "2026-11-28"}
        with ablations.ROWS.open("a") as file:
            for seed, score in scores.items():
                row = {"scale": scale, "variant": variant, "seed": seed, "bpb": score}
                file.write(json.dumps(row | {"step_seconds": seconds} | about) + "\n")

    return write


def test_every_variant_can_be_resolved_and_every_ingredient_has_a_claim():
    for scale in ablations.SCALES.values():
        for settings in ablations.variants().values():
            config.resolve(scale.profile, scale.settings | settings)
    assert ablations.CLAIMS.keys() == config.INGREDIENTS.keys() | config.REMOVED.keys()


def test_taking_an_ingredient_out_leaves_the_others():
    settings = ablations.variants()["-x0"]
    uses = config.resolve("demo", settings).recipe.model.uses
    assert uses == set(config.PRESETS["modern"]) - {"x0"}


def test_the_table_pairs_seeds(rows, tmp_path):
    rows("classic", {1: 1.0, 2: 1.2, 3: 1.4})
    rows("+x0", {1: 0.9, 2: 1.1, 3: 1.3}, seconds=1.5)  # the seeds differ by more than the gain
    rows("+smear", {1: 1.1, 2: 1.1, 3: 1.4}, seconds=None)
    ablations.write_table()
    table = (tmp_path / "ablations.md").read_text()
    assert "| `x0` | **-0.1000** ± 0.0000, 1.50 × | — |" in table
    assert "| `smear` | +0.0000 ± 0.1155 | — |" in table
    assert "| `normuon` | — | — | helps: 0.9 of" in table
    assert (
        table.count("; removed: too little for its lines |") == 3
    )  # backout, normuon, multi_token


def test_only_what_is_missing_is_trained(rows, tmp_path, monkeypatch):
    rows("classic", {1: 1.0, 3: 1.0})
    rows("+x0", {1: 1.0, 2: 1.0, 3: 1.0})
    asked = []

    def run(command, env):
        asked.append(json.loads(command[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablations, "prepare", lambda *_: tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    ablations.main(["toy", "--only=classic,+x0,-x0", "--threads", "1", "--steps", "9"])
    without = ablations.variants()["-x0"]
    assert asked == [
        [str(tmp_path), "toy", 9, "classic", {}, [2], 1, False],
        [str(tmp_path), "toy", 9, "-x0", without, [1, 2, 3], 1, False],
    ]
