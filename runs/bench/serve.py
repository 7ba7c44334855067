"""Load test of the server: concurrent chats, time to first token and to the end, memory.

    uv run nanolib bench serve --run RUN [--clients 1 8 50 200] [--rounds 3] [--requests 10000] [--old DIR]
    uv run nanolib bench serve --run RUN --clients 50 --seconds 300
    uv run nanolib bench serve --random h100 [--model.depth 12] --clients 64 --seconds 30 --tokens 512
    uv run nanolib bench serve --rollouts demo [--machine.device cuda] [--rounds 7] [--slots 32]

Starts `nanolib serve` and sends requests over HTTP.

--old: a checkout of the version before the API (commit 4c8a548), whose server gets the same requests
in turns with the new one. --requests: the number of short requests, eight at a time, with the
server's memory before, in the middle and after.

--seconds: steady load from clients in processes of their own, each of which asks one question after
the other; tokens/s counts the tokens of all answers until the last one ends. A round of one question
per client comes first and is not counted. --random: instead of a trained run, a new one of this
profile with random weights and a made-up tokenizer, in a temporary folder; needs no data.

--rollouts: no server, but the engine with random weights: the speed of answers of 16 to 256 tokens
over that of answers of equal length. Both have the same prompts of 32 tokens and the same tokens in
all, and eight times as many answers as slots, so that every slot is filled again; the engine cannot
tell the lengths in advance. They take turns in one process with one thread; the ratio is that of the
medians of CPU time, on a GPU of wall-clock time.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanolib import config
from nanolib.config import REPOSITORY

if TYPE_CHECKING:
    import torch

    from nanolib.model import GPT
    from nanolib.tokenizer import Tokenizer

QUESTIONS = (
    "Where does Ada live?",
    "What is {} + {}?",
    "Who are you?",
    "What does {} times {} make?",
)


class Chat(NamedTuple):
    """Seconds to the first token and to the end, the number of tokens, and what went wrong."""

    first: float
    last: float
    tokens: int
    error: str | None


async def chat(port: int, number: int, old: bool = False, **options: Any) -> Chat:
    """One question on its own connection."""
    text = QUESTIONS[number % len(QUESTIONS)].format(number % 50, number % 7 + 2)
    body = {"messages": [{"role": "user", "content": text}], "seed": number, **options}
    path, mark, end = "/chat", b'"type": "piece"', b""
    if not old:
        path, mark, end = "/v1/chat/completions", b'"parts": [{', b"data: [DONE]"
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    began, first, tokens, error = time.perf_counter(), None, 0, "no end"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + content)
        while line := await reader.readline():
            if mark in line:
                first = first or time.perf_counter() - began
                tokens += old
            elif re.search(rb'"error": ?{', line):
                error = line.decode().strip()
            if found := re.search(rb'"completion_tokens": (\d+)', line):
                tokens = int(found[1])
            if end in line and error == "no end":
                error = None
        writer.close()
    except OSError as broken:
        error = repr(broken)
    took = time.perf_counter() - began
    return Chat(first or took, took, tokens, error)


class Server:
    """A server process for a run, from one checkout."""

    def __init__(self, checkout: Path, run: str):
        self.old = not (checkout / "nanolib" / "decoding.py").exists()
        command = [sys.executable, "-m", "nanolib", "serve", "--run", run, "--port", "0"]
        paths = filter(None, [str(checkout), os.environ.get("PYTHONPATH")])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if found is None:
            raise RuntimeError(f"the server of {checkout} did not start: {line!r}")
        self.port = int(found[1])

    def memory(self) -> int:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024

    async def at_once(self, clients: int) -> tuple[float, list[Chat]]:
        """One chat for each of `clients` concurrent clients: total seconds, and the chats."""
        began = time.perf_counter()
        asked = [chat(self.port, number, self.old) for number in range(clients)]
        chats = await asyncio.gather(*asked)
        return time.perf_counter() - began, chats

    async def in_a_row(self, requests: int) -> float:
        """Seconds for short requests, eight at a time."""
        numbers, began = iter(range(requests)), time.perf_counter()

        async def client() -> None:
            for number in numbers:
                await chat(self.port, number, self.old, **({} if self.old else {"max_tokens": 4}))

        await asyncio.gather(*(client() for _ in range(8)))
        return time.perf_counter() - began

    def close(self) -> int:
        self.process.terminate()
        return self.process.wait()


def main(argv: Sequence[str]) -> None:
    words, overrides = config.split_settings(argv)
    parser = argparse.ArgumentParser(
        prog="nanolib bench serve",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--run", default="demo")
    parser.add_argument("--random", metavar="PROFILE")
    parser.add_argument("--rollouts", metavar="PROFILE")
    parser.add_argument("--slots", type=int, default=32, help="with --rollouts")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--processes", type=int, default=4, help="that the clients run in")
    parser.add_argument("--tokens", type=int, help="limit of each answer, with --seconds")
    parser.add_argument("--old", type=Path)
    given = parser.parse_args(words)
    if given.rollouts:
        mixed_lengths(given.rollouts, overrides, given.slots, given.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.random:
            os.environ["NANOLIB_RUNS"] = folder
            random_run(given.random, overrides)
            given.run = "random"
        servers = {"new": Server(REPOSITORY, given.run)}
        if given.old:
            servers["old"] = Server(given.old, given.run)
        try:
            for clients in given.clients:
                if given.seconds:
                    limit = {"max_tokens": given.tokens} if given.tokens else {}
                    steady(servers["new"], clients, given.processes, given.seconds, limit)
                else:
                    compare(servers, clients, given.rounds)
            if given.requests:
                row(servers["new"], given.requests)
        finally:
            codes = {name: server.close() for name, server in servers.items()}
    print(f"exit codes after SIGTERM: {codes}")


def compare(servers: dict[str, Server], clients: int, rounds: int) -> None:
    """Print medians over the rounds; in each round every server takes its turn."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            took, chats = asyncio.run(server.at_once(clients))
            tell_errors(chats)
            firsts = [chat.first for chat in chats]
            tokens = sum(chat.tokens for chat in chats)
            found[name].append((statistics.median(firsts), max(firsts), took, tokens / took))
    for name, rows in found.items():
        middle, last, took, speed = map(statistics.median, zip(*rows, strict=True))
        print(
            f"{clients} clients, {name}: first word {middle:.2f} s (median), {last:.2f} s (last); "
            f"all done {took:.2f} s; {speed:,.0f} tokens/s; {servers[name].memory()} MB",
            flush=True,
        )


def row(server: Server, requests: int) -> None:
    """Print the server's memory while it answers many short requests."""
    for part in range(4):
        took = asyncio.run(server.in_a_row(requests // 4))
        speed, memory = requests // 4 / took, server.memory()
        print(
            f"{requests // 4 * (part + 1):,} requests: {speed:.0f} a second, {memory} MB",
            flush=True,
        )


# ---------------------------------------------------------------------------- steady load


def steady(server: Server, clients: int, processes: int, seconds: float, options: dict) -> None:
    """Print speed, first tokens, errors and the server's memory under steady load."""
    spawn, processes = multiprocessing.get_context("spawn"), min(processes, clients)
    shares = [range(first, clients, processes) for first in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:

        def asked(seconds: float) -> list:
            return [pool.submit(in_turn, server.port, share, seconds, options) for share in shares]

        for future in asked(0.0):  # warm-up: one question of each client
            tell_errors(future.result())
        memory, began, futures = [server.memory()], time.perf_counter(), asked(seconds)
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(server.memory())
        chats = [chat for future in futures for chat in future.result()]
        took = time.perf_counter() - began
    firsts, tokens = sorted(chat.first for chat in chats), sum(chat.tokens for chat in chats)
    middle, most = firsts[len(firsts) // 2], firsts[int(0.95 * len(firsts))]
    print(
        f"{clients} clients in {processes} processes for {took:.1f} s: {len(chats):,} answers, "
        f"{tokens:,} tokens, {tokens / took:,.0f} tokens/s; first token {middle:.3f} s (median), "
        f"{most:.3f} s (95 %), {firsts[-1]:.3f} s (last); memory {', '.join(map(str, memory))} MB; "
        f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}",
        flush=True,
    )
    tell_errors(chats)


def in_turn(port: int, clients: Sequence[int], seconds: float, options: dict) -> list[Chat]:
    """Each client asks one question after the other until `seconds` have passed, at least one."""
    chats, until = list[Chat](), time.perf_counter() + seconds

    async def client(number: int) -> None:
        for turn in itertools.count():
            chats.append(await chat(port, number + 1001 * turn, **options))
            if time.perf_counter() >= until:
                return

    async def all_of_them() -> None:
        await asyncio.gather(*map(client, clients))

    asyncio.run(all_of_them())
    return chats


def tell_errors(chats: Sequence[Chat]) -> None:
    for error, times in Counter(chat.error for chat in chats if chat.error).items():
        print(f"ERROR, {times} times: {error}", flush=True)


# ---------------------------------------------------------------------------- random weights


def random_run(profile: str, overrides: config.Overrides) -> None:
    """A run named "random" of a profile, whose model is `random_model`."""
    import torch

    from nanolib import checkpoint
    from nanolib.optim import MuonAdamW
    from nanolib.rundir import Run
    from nanolib.runtime import Runtime

    run = Run.open(profile, "random", overrides)
    recipe, runtime = run.config.recipe, Runtime(device=torch.device("cpu"), dtype=torch.float32)
    model, tokenizer = random_model(recipe.model, recipe.tokenizer.vocab_size, runtime.device)
    tokenizer.save(run.stage("tokenizer").path / "tokenizer.json")
    about = {"recipe": config.flatten(recipe), "vocab_size": tokenizer.vocab_size}
    about["tokenizer"] = tokenizer.fingerprint()
    optimizer = MuonAdamW(model, recipe.optim, runtime)
    checkpoint.begin(run.stage("base").checkpoints, 0, model, optimizer, about).result()


def random_model(
    model_config: config.ModelConfig, size: int, device: torch.device
) -> tuple[GPT, Tokenizer]:
    """A model with random weights and a tokenizer of letters. It never writes a special token while
    top-k is less than the vocabulary."""
    import torch

    from nanolib.model import GPT
    from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer

    letters = b"abcdefghijklmnopqrstuvwxyz "
    lefts = itertools.chain(letters, itertools.count(256))
    words = ((left, letter) for left in lefts for letter in letters)
    tokenizer = Tokenizer(itertools.islice(words, size - 256 - len(SPECIAL_TOKENS)))
    model = GPT.build(model_config, size, device, 1)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
        model.head.weight.normal_(std=0.05)[tokenizer.bos :] = 0.0
    return model, tokenizer


# ---------------------------------------------------------------------------- mixed lengths


def mixed_lengths(profile: str, overrides: config.Overrides, slots: int, rounds: int) -> None:
    """Print the engine's speed with mixed and with equal lengths, and their ratio."""
    import torch

    from nanolib.engine import Engine
    from nanolib.runtime import Runtime

    settings = config.resolve(profile, {"machine.threads": 1, **(overrides or {})})
    runtime, model_config = Runtime.start(settings.machine), settings.recipe.model
    model_config = dataclasses.replace(model_config, sequence_len=512)
    size = settings.recipe.tokenizer.vocab_size
    model, tokenizer = random_model(model_config, size, runtime.device)
    engine = Engine(model, tokenizer, runtime)
    engine.max_rows, engine.ends, rows = slots, frozenset(), 8 * slots
    lengths = [16 + 240 * row // (rows - 1) for row in range(rows)]
    random.Random(1).shuffle(lengths)
    total = sum(lengths)
    equal = [total * (row + 1) // rows - total * row // rows for row in range(rows)]
    prompts = torch.randint(256, (rows, 32), generator=torch.Generator().manual_seed(1)).tolist()
    clock = time.perf_counter if runtime.device.type == "cuda" else time.process_time

    def speed(lengths: Sequence[int]) -> float:
        sampling, began = {"temperature": 1.0, "top_k": 50}, clock()
        pairs = enumerate(zip(prompts, lengths, strict=True))
        for row, (prompt, length) in pairs:
            engine.submit([prompt], seeds=[row], max_new_tokens=length, **sampling)
        while engine.busy:
            engine.step()
        return total / (clock() - began)

    found: dict[str, list[float]] = {"equal": [], "mixed": []}
    for turn in range(rounds + 1):
        for name, asked in (("equal", equal), ("mixed", lengths)):
            found[name] += [speed(asked)] * (turn > 0)  # the first turn warms up
    before, now = (statistics.median(speeds) for speeds in found.values())
    print(
        f"{rows} rows, {slots} slots, {total:,} tokens, {rounds} rounds: equal {before:,.0f}, mixed "
        f"{now:,.0f} tokens/s, ratio {now / before:.3f}; rounds "
        + " ".join(f"{b / a:.2f}" for a, b in zip(*found.values(), strict=True)),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
