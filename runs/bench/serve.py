"""Load test of the server: concurrent chats, time to first token and to the end, memory.

    uv run nanolib bench serve --run RUN [--clients 1 8 50 200] [--rounds 3] [--requests 10000] [--old DIR]

Starts `nanolib serve` and sends requests over HTTP. --old: a checkout of the version before the API
(commit 4c8a548), whose server gets the same requests in turns with the new one. --requests: the number
of short requests, eight at a time, with the server's memory before, in the middle and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanolib.config import REPOSITORY

QUESTIONS = (
    "Where does Ada live?",
    "What is {} + {}?",
    "Who are you?",
    "What does {} times {} make?",
)


class Chat(NamedTuple):
    """Seconds to the first token and to the end, and the number of tokens."""

    first: float
    last: float
    tokens: int


class Server:
    """A server process for a run, from one checkout."""

    def __init__(self, checkout: Path, run: str):
        self.old = not (checkout / "nanolib" / "decoding.py").exists()
        command = [sys.executable, "-m", "nanolib", "serve", "--run", run, "--port", "0"]
        env = {**os.environ, "PYTHONPATH": str(checkout)}
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

    async def chat(self, number: int, **options) -> Chat:
        """One question on its own connection."""
        text = QUESTIONS[number % len(QUESTIONS)].format(number % 50, number % 7 + 2)
        body = {"messages": [{"role": "user", "content": text}], "seed": number, **options}
        path, mark = "/chat", b'"type": "piece"'
        if not self.old:
            path, mark = "/v1/chat/completions", b'"parts": [{'
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        began, first, tokens = time.perf_counter(), None, 0
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        while line := await reader.readline():
            if mark in line:
                first = first or time.perf_counter() - began
                tokens += self.old
            if found := re.search(rb'"completion_tokens": (\d+)', line):
                tokens = int(found[1])
        writer.close()
        return Chat(first or time.perf_counter() - began, time.perf_counter() - began, tokens)

    async def at_once(self, clients: int) -> tuple[float, list[Chat]]:
        """One chat for each of `clients` concurrent clients: total seconds, and the chats."""
        began = time.perf_counter()
        chats = await asyncio.gather(*map(self.chat, range(clients)))
        return time.perf_counter() - began, chats

    async def in_a_row(self, requests: int) -> float:
        """Seconds for short requests, eight at a time."""
        numbers, began = iter(range(requests)), time.perf_counter()

        async def client() -> None:
            for number in numbers:
                await self.chat(number, **({} if self.old else {"max_tokens": 4}))

        await asyncio.gather(*(client() for _ in range(8)))
        return time.perf_counter() - began

    def close(self) -> int:
        self.process.terminate()
        return self.process.wait()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="nanolib bench serve", description=__doc__)
    parser.add_argument("--run", default="demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--old", type=Path)
    given = parser.parse_args(argv)
    servers = {"new": Server(REPOSITORY, given.run)}
    if given.old:
        servers["old"] = Server(given.old, given.run)
    try:
        for clients in given.clients:
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


if __name__ == "__main__":
    main(sys.argv[1:])
