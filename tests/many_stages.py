"""The real worker for several stages, one after the other: starting ranks takes longer than they do.

The stages of $MANY_STAGES, a JSON list of [stage, run's directory], come before the one asked for.
GRPO's answers are graded by their length: random weights never give a right one.
"""

import json
import os
import sys

import torch.distributed as dist

from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.stages import worker
from nanolib.tasks import GSM8K


def by_length(task: GSM8K, i: int, answer: str) -> float:
    return len(answer) % 7 / 7


if __name__ == "__main__":
    GSM8K.grade = by_length
    Runtime.close = lambda self: None  # the ranks stay joined between the stages
    machine = {"machine.ranks": int(os.environ["WORLD_SIZE"]), "machine.threads": 1}
    for stage, path in json.loads(os.environ["MANY_STAGES"]):
        worker.work(stage, Run.load(path, machine))
    code = worker.main()
    dist.destroy_process_group()
    sys.exit(code)
