"""The checks of chapter 06's exercises. Spoilers ahead."""

import torch

from checks import Build, Exercise, Value
from nanolib import tasks

# ---------------------------------------------------------------------------- 6.1 parts


def marked(generator: torch.Generator) -> list[tuple[str]]:
    a, b, c = torch.randint(10, 99, (3,), generator=generator).tolist()
    two = f"First <<{a}+{b}={a + b}>>{a + b}, then <<{a + b}-{c}={a + b - c}>>{a + b - c}."
    texts = [two, f"<<{a}*{b}={a * b}>>", "No sum here.", "", f"Is it <<{a}=={b}=False>>so?"]
    return [(text,) for text in texts]


def parts_of(text):
    return [(part.kind, part.text) for part in tasks.calculator_parts(text)]


def cut_at_first_equals(text):
    parts, result = [], ""
    for kind, piece in parts_of(text):
        if kind == "python":
            piece, _, result = piece.partition("=")
        elif kind == "output" and result:
            piece = f"{result}={piece}"
        parts.append((kind, piece))
    return parts


def with_empty_text(text):
    parts = []
    while "<<" in text:
        said, _, rest = text.partition("<<")
        call, _, text = rest.partition(">>")
        source, _, result = call.rpartition("=")
        parts += [("text", said), ("python", source), ("output", result)]
    return [*parts, ("text", text)]


def last_text_forgotten(text):
    parts = with_empty_text(text)[:-1]
    return [part for part in parts if part[0] != "text" or part[1]]


def whole_call(text):
    parts = parts_of(text)
    results = [piece for kind, piece in parts if kind == "output"]
    return [
        (kind, f"{piece}={results.pop(0)}" if kind == "python" else piece)
        for kind, piece in parts
        if kind != "output"
    ]


# ---------------------------------------------------------------------------- 6.2 render

MARKERS = ["<|bos|>"]
for whose in ("user", "assistant", "python", "output"):
    MARKERS += [f"<|{whose}_start|>", f"<|{whose}_end|>"]


def encode(text):
    return list(text.encode())


def special(name):
    return 256 + MARKERS.index(name)


def dialogues(generator: torch.Generator) -> list[tuple]:
    a, b = torch.randint(10, 99, (2,), generator=generator).tolist()
    ask, sum_ = ("user", [("text", f"{a} plus {b}?")]), ("python", f"{a}+{b}")
    called = ("assistant", [("text", "It is "), sum_, ("output", f"{a + b}"), ("text", ".")])
    plain = ("assistant", [("text", "Hello")])
    talks = [[ask, called], [("user", [("text", "Hi")]), plain, ask, called], [ask]]
    return [(talk, encode, special) for talk in talks]


def render(messages, encode, special, bos=True, inner=True, ends=True):
    ids = [special("<|bos|>")] if bos else []
    for role, parts in messages:
        ids.append(special(f"<|{role}_start|>"))
        for kind, text in parts:
            piece = encode(text)
            if kind != "text" and inner:
                piece = [special(f"<|{kind}_start|>"), *piece, special(f"<|{kind}_end|>")]
            ids += piece
        ids += [special(f"<|{role}_end|>")] if ends else []
    return ids


def without_bos(messages, encode, special):
    return render(messages, encode, special, bos=False)


def without_part_markers(messages, encode, special):
    return render(messages, encode, special, inner=False)


def without_ends(messages, encode, special):
    return render(messages, encode, special, ends=False)


def markers_encoded(messages, encode, special):
    text = "<|bos|>"
    for role, parts in messages:
        text += f"<|{role}_start|>"
        for kind, piece in parts:
            text += piece if kind == "text" else f"<|{kind}_start|>{piece}<|{kind}_end|>"
        text += f"<|{role}_end|>"
    return encode(text)


def bos_each_message(messages, encode, special):
    return [id for message in messages for id in render([message], encode, special)]


def where_it_differs(got, expected, messages, encode, special) -> str | None:
    names = {special(name): name for name in MARKERS}
    for place, (g, e) in enumerate(zip(got, expected, strict=False)):
        if g != e:
            found = names.get(g, "an id of text")
            return f"the first {place} ids are right; the next is {found}, which is not due there"
    return None


# ---------------------------------------------------------------------------- 6.4 verdict


def answers(generator: torch.Generator) -> list[tuple]:
    a, b = torch.randint(30, 60, (2,), generator=generator).tolist()
    call = [("text", "It is "), ("python", f"{a}+{b}"), ("output", f"{a + b}")]
    again = [
        *call,
        ("text", f"{a + b}, then "),
        ("python", f"{a + b}-9"),
        ("output", f"{a + b - 9}"),
    ]
    found = [
        [*call, ("text", f"{a + b}.\n#### {a + b}")],
        [*call, ("text", f"{a + b + 1}.\n#### {a + b + 1}")],
        [*call, ("text", f"{a + b}.\n#### {a}")],
        [*again, ("text", f"{a + b - 9}.\n#### {a + b - 9}")],
        [*again, ("text", f"{a + b}.\n#### {a + b}")],
        [*call, ("text", f"{a + b}")],
        [("text", f"{a + b}.\n#### {a + b}")],
        [("text", "Hello")],
    ]
    return [(parts,) for parts in found]


def verdict(parts, which=-1, said="after"):
    results = [text for kind, text in parts if kind == "output"]
    if not results:
        return "no call"
    text = "".join(text for kind, text in parts if kind == "text")
    _, mark, number = text.rpartition("####")
    if said == "anywhere":
        return "believes" if results[which] in text else "ignores"
    return "believes" if mark and number.strip() == results[which] else "ignores"


def first_result(parts):
    return verdict(parts, which=0)


def said_anywhere(parts):
    return verdict(parts, said="anywhere")


def never_no_call(parts):
    found = verdict(parts)
    return "ignores" if found == "no call" else found


def the_mark_not_needed(parts):
    results = [text for kind, text in parts if kind == "output"]
    text = "".join(text for kind, text in parts if kind == "text")
    if not results:
        return "no call"
    number = text.rpartition("####")[2].rpartition(" ")[2].strip()
    return "believes" if number == results[-1] else "ignores"


# ---------------------------------------------------------------------------- all

EXERCISES: dict[str, Exercise] = {
    "6.1": Build(
        parts_of,
        marked,
        {
            "You cut at the first =; a source may contain one (==), so cut at the last: "
            "rpartition.": cut_at_first_equals,
            "There are empty text pieces in your list: leave them out.": with_empty_text,
            "The text after the last mark is missing.": last_text_forgotten,
            "Your program still contains the result: the model would be given the answer it is to "
            "ask for.": whole_call,
        },
    ),
    "6.2": Build(
        render,
        dialogues,
        {
            "<|bos|> is missing: every document begins with it, a conversation too.": without_bos,
            "<|bos|> stands once, before the whole conversation, not before each "
            "message.": bos_each_message,
            "Programs and results have lost their markers: the model cannot know whose they "
            "are.": without_part_markers,
            "Your messages have no closing marker: the model never learns to stop.": without_ends,
            "You encode the markers as text; they are single ids, from special().": markers_encoded,
        },
        explain=where_it_differs,
    ),
    "6.3": Value(
        "60254105e543",
        {
            20_000: "Each question has two targets, not one.",
            9_000: "That makes a tenth of the 180,000; it should be a tenth of the sum.",
            18_000: "A tenth of the sum, not of the 180,000, and two targets each.",
        },
    ),
    "6.4": Build(
        verdict,
        answers,
        {
            "You compare with the first result; an answer of two steps ends with the "
            "last.": first_result,
            "You look for the result anywhere; an answer can repeat it and still end in another "
            "number.": said_anywhere,
            "An answer that never asks cannot ignore a result: that is 'no call'.": never_no_call,
            "An answer that is cut off before #### gave no number: it did not "
            "believe.": the_mark_not_needed,
        },
    ),
}
