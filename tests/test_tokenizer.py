"""The trainer against the definition of BPE, the tokenizer against tiktoken and tokenizers."""

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import rust_tokenizer
from nanolib.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer

repeatable = settings(derandomize=True, deadline=None, max_examples=200)

WORDS = [
    "the",
    "a",
    "cat",
    "sat",
    "on",
    "mat",
    "banana",
    "aaa",
    "aaaa",
    "l'été",
    "don't",
    "2024",
    "007",
    "naïve",
    "★★",
    "日本",
    "\n",
    "\t",
    "--",
    "Ünï",
]


def corpus(seed: int, documents: int = 30, words: int = 40) -> list[str]:
    """Random documents over a few words, with odd spaces and random letters in between."""
    draw = random.Random(seed)
    joints = [" ", " ", " ", "  ", "\n", "\r\n\n", "", "'S "]
    pool = WORDS + ["".join(draw.choices("abcé", k=draw.randint(1, 12))) for _ in range(40)]
    return [
        "".join(draw.choice(pool) + draw.choice(joints) for _ in range(draw.randint(0, words)))
        for _ in range(documents)
    ]


def naive_train(documents: list[str], num_merges: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The definition: before each merge, count every pair of every word anew."""
    counts = Counter(w for text in documents for w in regex.findall(PATTERN, text, regex.V1))
    words = [(list(word.encode()), count) for word, count in counts.items()]
    merges, merge_counts = [], []
    for new in range(256, 256 + num_merges):
        pairs: Counter = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merge_counts.append(pairs[best])
        for ids, _ in words:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == best:
                    ids[at : at + 2] = [new]
                at += 1
    return merges, merge_counts


def naive_encode(word: bytes, merges: list[tuple[int, int]]) -> list[int]:
    """Replay every merge in order."""
    ids = list(word)
    for new, pair in enumerate(merges, start=256):
        at = 0
        while at < len(ids) - 1:
            if (ids[at], ids[at + 1]) == pair:
                ids[at : at + 2] = [new]
            at += 1
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(corpus(0, documents=300), 600)


@pytest.mark.parametrize("seed", range(8))
def test_training_equals_the_definition(seed):
    documents = corpus(seed)
    assert rust_tokenizer.train(documents, 150, PATTERN) == naive_train(documents, 150)


@repeatable
@given(st.lists(st.text(alphabet="ab \n'sé7", max_size=40), max_size=6), st.integers(0, 30))
def test_training_equals_the_definition_on_telling_alphabets(documents, num_merges):
    assert rust_tokenizer.train(documents, num_merges, PATTERN) == naive_train(
        documents, num_merges
    )


def test_training_does_not_depend_on_order_threads_or_batches():
    documents = corpus(3)
    expected = rust_tokenizer.train(documents, 150, PATTERN)
    for seed, (threads, batch_bytes) in enumerate([(1, 1), (2, 100), (3, 1 << 20)]):
        shuffled = random.Random(seed).sample(documents, len(documents))
        found = rust_tokenizer.train(
            iter(shuffled), 150, PATTERN, threads=threads, batch_bytes=batch_bytes
        )
        assert found == expected


def test_a_document_of_several_parts_is_one_document():
    """Documents past a million characters are copied in parts: no word may be cut there."""
    text = "né" + "abcdé 1984 " * 200_000
    assert len(text) > 2 << 20
    one = rust_tokenizer.train([text], 40, PATTERN)
    assert one == rust_tokenizer.train(
        ["néabcdé", *[" 1984 abcdé"] * 199_999, " 1984 "], 40, PATTERN
    )


def test_another_pattern_is_honoured():
    documents = corpus(4)
    merges, _ = rust_tokenizer.train(documents, 40, r"\w+|\W")
    whole, _ = rust_tokenizer.train(documents, 40, r"(?s).+")
    assert merges != whole != rust_tokenizer.train(documents, 40, PATTERN)[0]


def test_ties_go_to_the_smallest_pair():
    merges, counts = rust_tokenizer.train(["zy ba", "dc"], 9, r"\w+")
    assert merges == [(ord("b"), ord("a")), (ord("d"), ord("c")), (ord("z"), ord("y"))]
    assert counts == [1, 1, 1]


def test_vocab_size_counts_everything(tokenizer):
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.merges) == 600 - 256 - len(SPECIAL_TOKENS)
    specials = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert specials == list(range(600 - len(SPECIAL_TOKENS), 600))
    assert tokenizer.bos == specials[0]


def test_the_smallest_vocabulary_has_no_merges():
    tokenizer = Tokenizer.train(["abc"], 265)
    assert tokenizer.encode("abc") == [97, 98, 99]
    with pytest.raises(ValueError, match=r"at least 265 .* got 264"):
        Tokenizer.train(["abc"], 264)


def test_text_with_too_few_pairs_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 300, .* 268"):
        Tokenizer.train(["abc abc"], 300)


def test_iterator_errors_pass_through_unchanged():
    class Odd(Exception):
        pass

    def documents():
        yield "text"
        raise Odd("mine")

    with pytest.raises(Odd, match="mine"):
        Tokenizer.train(documents(), 300)
    with pytest.raises(TypeError):
        Tokenizer.train([b"bytes"], 300)
    with pytest.raises(ValueError, match="surrogates"):
        Tokenizer.train(["a\ud800"], 300)
    with pytest.raises(ValueError, match="pattern"):
        rust_tokenizer.train(["a"], 1, "(")


def test_errors_of_progress_pass_through_unchanged():
    def progress(*_):
        raise LookupError("mine")

    def documents():
        while True:
            yield "some text " * 1000

    with pytest.raises(LookupError, match="mine"):
        rust_tokenizer.train(documents(), 300, PATTERN, progress)
    with pytest.raises(ValueError, match="threads"):
        rust_tokenizer.train(["a"], 1, PATTERN, threads=0)
    with pytest.raises(TypeError, match="one str"):
        rust_tokenizer.train("a", 1, PATTERN)


def many_words(count: int) -> str:
    letters = str.maketrans("0123456789", "ghijklmnop")  # numbers would be split
    return random.Random(0).randbytes(6 * count).hex(" ", 6).translate(letters)


@pytest.mark.parametrize("phase", ["count", "merge"])
def test_ctrl_c_is_answered_in_the_middle(phase):
    """Before half of the work is done."""
    documents = ["some text " * 1000] * 100_000 if phase == "count" else [many_words(1_000_000)]
    pulled, calls = [], []

    def pull():
        for document in documents:
            pulled.append(document)
            yield document

    def progress(now, done, total):
        calls.append((now, done))
        if now == phase and sum(name == phase for name, _ in calls) == 1:
            threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        rust_tokenizer.train(pull(), 60_000, PATTERN, progress)
    assert calls[-1][0] == phase
    if phase == "count":
        assert len(pulled) < len(documents) / 2
    else:
        assert calls[-1][1] < 60_000 / 2


BUSY = {  # hardly any merges, hardly any counting
    "count": (["x " * 5_000_000, "é " * 2_000_000, *corpus(1, documents=200) * 20], 1),
    "merge": ([many_words(100_000)], 5_000),
}


@pytest.mark.parametrize("phase", BUSY)
def test_the_gil_is_let_go(phase):
    """Other threads run meanwhile, though nothing here calls back into Python."""
    documents, merges = BUSY[phase]
    turns, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            turns.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = len(turns)
    rust_tokenizer.train(iter(documents), merges, PATTERN)
    between = len(turns) - before
    done.set()
    watcher.join()
    assert between > 2


def test_progress_is_told_in_order():
    calls = []

    def documents():
        for number in (10, 300_000):
            yield many_words(number)
            time.sleep(0.1)  # longer than between two calls, however fast the counting

    rust_tokenizer.train(documents(), 20_000, PATTERN, lambda *now: calls.append(now))
    assert calls == sorted(calls, key=lambda call: (call[0], call[1]))
    assert {phase for phase, _, _ in calls} == {"count", "merge"}


@repeatable
@given(st.text())
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_encoding_replays_the_merges(tokenizer):
    text = "".join(corpus(7))
    expected = [
        id
        for word in regex.findall(PATTERN, text, regex.V1)
        for id in naive_encode(word.encode(), tokenizer.merges)
    ]
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_batch([text, "", "a"], threads=2) == [expected, [], [97]]


@repeatable
@given(st.lists(st.text() | st.sampled_from(corpus(7)), max_size=8), st.integers(1, 3))
def test_flat_encoding_equals_tiktoken(tokenizer, texts, threads):
    ids, offsets = tokenizer.encode_flat(texts, threads=threads)
    assert ids.dtype == np.uint16
    assert len(offsets) == len(texts) + 1
    pieces = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert pieces == tokenizer.encode_batch(texts)
    with_bos, starts = tokenizer.encode_flat(iter(texts), threads=threads, bos=True)
    assert (with_bos[starts[:-1]] == tokenizer.bos).all()
    assert len(with_bos) == len(ids) + len(texts)


def test_flat_encoding_of_everything_odd(tokenizer):
    """Every code point, long words, many batches, a vocabulary past 16 bits, errors."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    texts = [every, "", "banana" * 5000, *corpus(2, documents=400), "<|bos|>"]
    ids, offsets = tokenizer.encode_flat(texts, threads=2)
    for text, start, end in zip(texts, offsets, offsets[1:], strict=False):
        assert ids[start:end].tolist() == tokenizer.encode(text)
    wide, _ = rust_tokenizer.Encoder(tokenizer.merges, PATTERN).encode_batch(
        ["banana"], prefix=70_000, wide=True
    )
    assert np.frombuffer(wide, np.uint32).tolist() == [70_000, *tokenizer.encode("banana")]
    with pytest.raises(ValueError, match="wide"):
        rust_tokenizer.Encoder([], PATTERN).encode_batch(["a"], prefix=70_000)
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode_flat(["\ud800"])
    with pytest.raises(TypeError):
        tokenizer.encode_flat([5])
    with pytest.raises(ValueError, match="threads"):
        tokenizer.encode_flat(["a"], threads=0)


def test_hugging_face_gives_the_same_ids(tokenizer):
    """The merges load in `tokenizers` through its byte alphabet and encode everything alike."""
    import tokenizers

    alphabet = byte_alphabet()
    names = [
        "".join(alphabet[b] for b in tokenizer.token_bytes(id))
        for id in range(tokenizer.special("<|bos|>"))
    ]
    merges = [(names[left], names[right]) for left, right in tokenizer.merges]
    model = tokenizers.models.BPE({name: id for id, name in enumerate(names)}, merges)
    theirs = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    for text in [*corpus(11), "<|bos|> don'T\u017f", "a\u0301\u00a0b  \n\n c"]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(moved)) for b in range(256)]


def test_typed_special_tokens_are_ordinary_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < tokenizer.bos
        assert tokenizer.decode(ids) == f"a{name}b"
    assert tokenizer.decode([tokenizer.bos]) == "<|bos|>"


def test_special_tokens_are_never_trained():
    tokenizer = Tokenizer.train(["<|bos|>" * 50], 268)
    assert tokenizer.special("<|bos|>") == 259
    assert tokenizer.encode("<|bos|>") != [259]


def test_byte_lengths_are_measured_on_bytes(tokenizer):
    assert tokenizer.byte_lengths.dtype == np.int32
    assert (tokenizer.byte_lengths[:256] == 1).all()  # 0xC3 alone is one byte, not U+FFFD's three
    assert (tokenizer.byte_lengths[-len(SPECIAL_TOKENS) :] == 0).all()


def test_decoding_invalid_utf8_and_unknown_ids(tokenizer):
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert [tokenizer.token_bytes(id) for id in (0xC3, 0x28)] == [b"\xc3", b"("]
    for id in (-1, 600):
        with pytest.raises(ValueError, match=rf"from 0 to 599, got {id}"):
            tokenizer.decode([id])
    with pytest.raises(ValueError, match=r"<\|nope\|>"):
        tokenizer.special("<|nope|>")


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("don't") == tokenizer.encode("don't")
    saved = json.loads(path.read_text())
    assert set(saved) == {"version", "pattern", "specials", "merges"}
    assert list(tmp_path.iterdir()) == [path]
    other = Tokenizer(tokenizer.merges[:-1])
    assert other.fingerprint() != tokenizer.fingerprint()


def test_damaged_files_are_refused_by_name(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_text()
    good = json.loads(whole)
    damaged = {
        "torn": whole[: len(whole) // 2],
        "empty": "",
        "list": "[]",
        "version": json.dumps(good | {"version": 2}),
        "specials": json.dumps(good | {"specials": ["<|bos|>"]}),
        "missing": json.dumps({k: v for k, v in good.items() if k != "merges"}),
        "future": json.dumps(good | {"merges": [[97, 400]]}),
        "negative": json.dumps(good | {"merges": [[-1, 97]]}),
        "twice": json.dumps(good | {"merges": [[97, 98], [97, 98]]}),
        "type": json.dumps(good | {"merges": 5}),
        "pattern": json.dumps(good | {"pattern": "("}),
    }
    for name, text in damaged.items():
        bad = tmp_path / f"{name}.json"
        bad.write_text(text)
        with pytest.raises(ValueError, match=rf"{name}\.json"):
            Tokenizer.load(bad)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json"):
        Tokenizer.load(tmp_path / "binary.json")
    with pytest.raises(ValueError, match=r"nowhere\.json.*run the tokenizer stage"):
        Tokenizer.load(tmp_path / "nowhere.json")
