"""Benchmark of BPE trainers: `nanolib bench tokenizer --mirror FOLDER`.

Each measurement runs in its own process, and ours runs right before each peer, so that both see the
same machine. Peers are installed from PyPI into a temporary environment; those that cannot be
installed are skipped. A measurement prints one JSON line; a Markdown table follows at the end.

This file is also the program of the measuring processes, which do without nanolib: importing it needs
only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

PEERS = {
    "rustbpe": "rustbpe==0.1.0",
    "tokenizers": "tokenizers==0.23.3",
    "gigabpe": "gigabpe==0.1.0",
}
REPOSITORY = Path(__file__).resolve().parents[2]


# --- one measurement, in a process of its own ------------------------------------------------


def train_nanolib(documents: Iterable[str], files: Path, job: dict) -> list[str]:
    import rust_tokenizer

    merges, _ = rust_tokenizer.train(
        documents, job["vocab_size"] - 256, job["pattern"], threads=job["threads"]
    )
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return [token.hex() for token in tokens]


def train_rustbpe(documents: Iterable[str], files: Path, job: dict) -> list[str]:
    import rustbpe  # ty: ignore[import-not-found]

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents, job["vocab_size"], pattern=job["pattern"])
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda ranked: ranked[1])
    return [bytes(token).hex() for token, _ in ranks]


def train_tokenizers(documents: Iterable[str], files: Path, job: dict) -> list[str]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(job["pattern"]), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=job["vocab_size"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return []  # breaks ties differently


def train_gigabpe(documents: Iterable[str], files: Path, job: dict) -> list[str]:
    import gigabpe  # ty: ignore[import-not-found]

    paths = sorted(map(str, files.glob("*.txt")))  # accepts only files, splits like GPT-2
    gigabpe.train_bpe(paths, job["vocab_size"], threads=job["threads"])
    return []


TRAINERS = {
    "nanolib": train_nanolib,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "gigabpe": train_gigabpe,
}


def read_documents(corpus: Path) -> list[str]:
    """Documents separated by NUL, read in chunks, so that there is no second copy in memory."""
    documents, rest = [], ""
    with corpus.open(encoding="utf-8", newline="") as file:
        while part := file.read(1 << 20):
            *whole, rest = (rest + part).split("\0")
            documents += whole
    return [*documents, rest]


def memory(field: str) -> float:
    """A field of this process's /proc status in MB; nan if there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def measure(job: dict) -> dict:
    """Train once. Memory: the peak above the usage after exhausting the same iterator."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-job["threads"] :]))
    corpus = Path(job["corpus"])
    # gigabpe reads files and needs no list of documents
    documents = [] if job["trainer"] == "gigabpe" else read_documents(corpus)
    for _ in (document for document in documents):
        pass
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    used, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
    tokens = TRAINERS[job["trainer"]]((d for d in documents), corpus.parent / "files", job)
    return {
        "trainer": job["trainer"],
        "threads": job["threads"],
        "vocab_size": job["vocab_size"],
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_mb": round(memory("VmHWM") - used),
        "tokens": hash_of(tokens),
    }


def hash_of(tokens: list[str]) -> str:
    return hashlib.sha256(" ".join(tokens).encode()).hexdigest()[:16] if tokens else ""


# --- the corpus -----------------------------------------------------------------------------


def permuted(text: str, shift: int) -> str:
    """Rotate vowels and consonants separately: different words with the same statistics."""
    table = {}
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        for kind in (letters, letters.upper()):
            table |= {ord(a): kind[(i + shift) % len(kind)] for i, a in enumerate(kind)}
    return text.translate(table)


def corpus_documents(mirror: Path, num_bytes: int) -> Iterator[str]:
    """The mirror's training text, then permuted copies of it, up to `num_bytes`."""
    import pyarrow.parquet as pq

    shards = sorted((mirror / "text").glob("*.parquet"))[:-1]
    if not shards:
        raise ValueError(f"{mirror}/text has no training shards: give a mirror with --mirror")
    left = num_bytes
    for shift in range(100):
        for shard in shards:
            for document in pq.read_table(shard, columns=["text"])["text"].to_pylist():
                text = permuted(document, shift) if shift else document
                yield text.replace("\0", " ")
                left -= len(text.encode())
                if left <= 0:
                    return


def write_corpus(mirror: Path, folder: Path, num_bytes: int) -> tuple[int, int]:
    """``corpus`` for iterators and ``files/*.txt`` for readers of files; (bytes, documents)."""
    (folder / "files").mkdir()
    total = documents = 0
    corpus = (folder / "corpus").open("w", encoding="utf-8", newline="")
    texts = (folder / "files" / "corpus.txt").open("w", encoding="utf-8", newline="")
    with corpus, texts:
        for text in corpus_documents(mirror, num_bytes):
            corpus.write("\0" + text if documents else text)
            texts.write(text + "\n")
            total += len(text.encode())
            documents += 1
    return total, documents


# --- the race -------------------------------------------------------------------------------


def peer_python(folder: Path, wanted: list[str]) -> tuple[Path, list[str]]:
    """A temporary environment with the wanted peers that can be installed."""
    python = folder / "peers" / "bin" / "python"
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, folder / "peers"], check=True)
    found = []
    for name in wanted:
        requirement = PEERS[name]
        command = ["uv", "pip", "install", "-q", "--python", python, requirement]
        if subprocess.run(command, cwd=folder).returncode == 0:
            found.append(name)
        else:
            print(f"{requirement} cannot be installed: left out", file=sys.stderr)
    return python, found


def run(python: Path | str, **job: object) -> dict:
    threads = str(job["threads"])
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    command = [python, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def race(python: Path, peers: list[str], threads: list[int], rounds: int, job: dict) -> list[dict]:
    """Each peer's row has our preceding measurement as `ours`, and the ratios to it."""
    rows = []
    for _ in range(rounds):
        for count in threads:
            for peer in peers or [None]:
                ours = run(sys.executable, **job, trainer="nanolib", threads=count)
                rows.append(ours)
                if peer is not None:
                    rows.append(run(python, **job, trainer=peer, threads=count) | {"ours": ours})
    return rows


COLUMNS = {"seconds": "s", "cpu_seconds": "CPU s", "peak_mb": "MB"}


def table(rows: list[dict], threads: list[int]) -> str:
    """One line per trainer and number of threads: the best of each, and in brackets the ratio to
    ours, the median over pairs."""
    lines = [f"| trainer | threads | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|---|"]
    for count in threads:
        for trainer in dict.fromkeys(row["trainer"] for row in rows):
            mine = [r for r in rows if (r["trainer"], r["threads"]) == (trainer, count)]
            cells = []
            for field in COLUMNS:
                ratios = [r[field] / max(r["ours"][field], 1e-9) for r in mine if "ours" in r]
                times = f" ({statistics.median(ratios):.1f} ×)" if ratios else ""
                cells.append(f"{min(r[field] for r in mine):g}{times}")
            lines.append(f"| {trainer} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def more(rows: list[dict], threads: list[int], job: dict) -> str:
    """Further results: equal merges, counting only, a vocabulary twice as large."""
    lines = []
    if any(row["trainer"] == "rustbpe" for row in rows):
        hashes = {row["tokens"] for row in rows if row["tokens"]}
        same = "the same" if len(hashes) == 1 else "DIFFERENT"
        lines.append(f"rustbpe and nanolib trained {same} tokens in the same order.\n")
    for count in threads:
        for vocab_size in (256, job["vocab_size"], 2 * job["vocab_size"]):
            again = job | {"vocab_size": vocab_size}
            runs = [run(sys.executable, **again, trainer="nanolib", threads=count) for _ in "123"]
            seconds, cpu = (min(row[field] for row in runs) for field in ("seconds", "cpu_seconds"))
            what = "counting alone" if vocab_size == 256 else f"vocabulary {vocab_size:,}"
            lines.append(f"- nanolib, {what}, threads {count}: {seconds:.2f} s, CPU {cpu:.2f} s")
    return "\n".join(lines)


def microbenchmark(corpus: Path) -> str | None:
    """The crate's benchmark of reading, scanning and counting, if cargo is available."""
    command = ["cargo", "bench", "--quiet", "--bench", "throughput"]
    environment = os.environ | {"CORPUS": str(corpus)}
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY / "rust_tokenizer",
            env=environment,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def report(folder: Path, options: argparse.Namespace) -> str:
    from nanolib.runtime import processor
    from nanolib.tokenizer import PATTERN

    total, documents = write_corpus(options.mirror, folder, round(options.megabytes * 1e6))
    job = {"corpus": str(folder / "corpus"), "vocab_size": options.vocab_size, "pattern": PATTERN}
    python, peers = peer_python(folder, options.peers) if options.peers else (Path(), [])
    load = os.getloadavg()[0]
    rows = race(python, peers, options.threads, options.rounds, job)
    extra = more(rows, options.threads, job)
    micro = microbenchmark(folder / "corpus")
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    parts = [
        "# BPE trainers",
        f"{when}, {processor()}, {os.cpu_count()} cores, load {load:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end. {total / 1e6:.0f} MB, {documents:,} documents: the "
        "training text of the mirror once, then copies of it with vowels and consonants moved on "
        "among themselves, so that the words are new and as long and as frequent as real ones. "
        f"Vocabulary {options.vocab_size:,}, the course's split pattern, from a Python generator "
        "over documents in memory; gigabpe reads one file and splits as GPT-2 does. Each trainer "
        f"is a process of its own on as many cores as threads, best of {options.rounds}; in "
        "brackets how many times ours, which ran right before. CPU s is processor time, which "
        "other programs disturb less than s, the time on the clock. MB is the peak above the "
        "memory in use after draining the same generator.",
        table(rows, options.threads),
        extra,
    ]
    if micro:
        parts += ["The crate's microbenchmark on the same corpus:", f"```\n{micro}\n```"]
    command = "uv run nanolib bench tokenizer --mirror FOLDER"
    return "\n\n".join([*parts, f"Made by `{command}`."]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nanolib bench tokenizer", description=__doc__)
    parser.add_argument("--mirror", type=Path, help="folder with text/*.parquet")
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1, help="take the best of this many races")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        print(json.dumps(measure(json.loads(options.job))))
        return
    if options.mirror is None:
        raise ValueError("no corpus: give a folder with text/*.parquet as --mirror")
    with tempfile.TemporaryDirectory() as folder:
        text = report(Path(folder), options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
