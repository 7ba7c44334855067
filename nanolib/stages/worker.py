"""The worker process: one rank of one stage."""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch

from nanolib import rundir
from nanolib.guard import Guard
from nanolib.rundir import Run
from nanolib.runtime import Runtime, processor
from nanolib.stages import Context, Result, evaluate, text, training
from nanolib.train import Stopped

ON_CPU = ("data", "tokenizer", "shards")  # these run on the CPU, whatever the profile says
USERS_MISTAKE, STOPPED = 2, 75  # exit codes of the worker

WORK: dict[str, Callable[[Context], Result]] = {
    "data": text.data,
    "tokenizer": text.tokenizer,
    "shards": text.shards,
    "base": training.base,
    "mid": training.converse,
    "sft": training.converse,
    "grpo": training.grpo,
    "eval": evaluate.evaluate,
    "report": evaluate.write_report,
}


def work(name: str, run: Run, of: str | None = None) -> Result:
    """Run one rank of a stage in this process; the lead rank writes the done record."""
    stage, machine, started = run.stage(name, of), run.config.machine, rundir.now()
    stage.path.mkdir(parents=True, exist_ok=True)
    guard = Guard.start()  # first: joining dead ranks would block for minutes
    runtime = Runtime.start(replace(machine, device="cpu") if name in ON_CPU else machine)
    context = Context(run=run, stage=stage, runtime=runtime, guard=guard)
    launched = os.environ.get("NANOLIB_GUARD") == "1"  # the launcher records the attempt
    with nullcontext() if launched else rundir.recorded(stage.path, machine.dollars_per_hour):
        if name not in ("data", "report"):
            text.gather_if_gone(context)
        result = WORK[name](context)
        runtime.barrier()
    if runtime.is_lead:
        spent = rundir.spent(stage.path, now=time.time())
        # Early versions recorded no attempts, only the duration of the training steps.
        spent["seconds"] = max(spent["seconds"], result.get("seconds", 0.0))
        cuda = runtime.device.type == "cuda"
        hardware = asdict(machine) | {"ranks": runtime.world_size, "cores": os.cpu_count()}
        hardware["device"] = torch.cuda.get_device_name(runtime.device) if cuda else processor()
        hardware["dtype"] = str(runtime.dtype).removeprefix("torch.")
        hardware |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        hardware["python"] = platform.python_version()
        stage.finish(result, started=started, **spent, machine=hardware)
    runtime.close()  # not after an error: closing waits for the other ranks, which may wait for us
    return result


def main() -> int:
    """Run one rank of one stage. Exit code 2: user error; 75: stopped and saved."""
    parser = argparse.ArgumentParser("python -m nanolib.stages.worker", description=main.__doc__)
    parser.add_argument("stage", choices=WORK)
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("--of", help="the stage whose model to evaluate")
    parser.add_argument("--machine", default="{}", type=json.loads, help="settings as JSON")
    given = parser.parse_args()
    try:
        run = Run.load(os.path.abspath(given.run), machine=given.machine)
        if run.stage(given.stage, given.of).done() is None:
            work(given.stage, run, given.of)
        return 0
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    except (ValueError, FloatingPointError) as error:
        traceback.print_exc()  # for the log; the launcher shows only the last line
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USERS_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
