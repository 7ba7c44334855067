"""The bench of a device, on this one: its figures are there, and a failure hides no other part."""

import re

import pytest
import torch

from nanolib import planning
from runs.bench import device


@pytest.fixture
def table(capsys):
    """Runs the bench on profile smoke; what was measured -> the figure."""

    def run() -> dict[str, str]:
        words = "--profile smoke --machine.device cpu --repeats 1 --model.sequence_len 64"
        device.main(words.split())
        rows = re.findall(r"^\| (.+) \| (.+) \|$", capsys.readouterr().out, re.MULTILINE)
        return dict(rows)

    return run


def test_every_figure_is_there(table):
    found = table()
    assert found["micro-batch"].startswith("16 of base's 16 rows of 64")
    assert re.fullmatch(r"[\d,]+ tokens/s", found["forward and backward"])
    assert found["greedy rows that are the same alone and together"] == "16 of 16"
    assert found["impossible tokens drawn"] == "0 of 12,800"
    assert not any("failed" in name for name in found)


def test_an_impossible_token_is_counted_and_a_part_that_fails_is_told(table, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(planning, "fitting_rows", out_of_memory)
    monkeypatch.setattr(device, "inverse_cdf", lambda weights, uniform: weights.argmin(dim=-1))
    found = table()
    assert found["**training failed**"] == "OutOfMemoryError: no room"
    assert found["impossible tokens drawn"] == "12,800 of 12,800"
