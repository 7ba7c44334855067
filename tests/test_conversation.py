"""The grammar: render and parse are inverses, the mask covers exactly what the assistant says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolib.conversation import (
    END_NAMES,
    AnswerParser,
    Conversation,
    Message,
    Part,
    answer_parts,
    choice_question,
)
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat, the cat sat (A) (B)"] * 3, 270)

# Text as people write it, with special tokens typed out and with anything else Unicode has.
texts = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([*SPECIAL_TOKENS, "cat", " "])), max_size=5
).map("".join)
parts = st.builds(Part, st.sampled_from(["text", "python", "output"]), texts)
user = texts.map(lambda text: Message("user", (Part("text", text),)))
assistant = st.lists(parts, max_size=4).map(lambda some: Message("assistant", tuple(some)))


@st.composite
def conversations(draw):
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", (Part("text", draw(texts)),)))
    for turn in range(draw(st.integers(1, 5))):
        messages.append(draw((user, assistant)[turn % 2]))
    return Conversation(tuple(messages))


def plain(content):
    """As it is written in files."""
    return (
        content if isinstance(content, str) else [{"type": p.kind, "text": p.text} for p in content]
    )


def say(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return Conversation.from_messages(
        messages + [{"role": roles[i % 2], "content": plain(c)} for i, c in enumerate(contents)]
    )


def parse(ids):
    """The conversation that was rendered: cut the ids at the turns' markers."""
    roles = {TOKENIZER.special(f"<|{role}_start|>"): role for role in ("user", "assistant")}
    messages, at = [], 1
    while at < len(ids):
        role = roles[ids[at]]
        end = ids.index(TOKENIZER.special(f"<|{role}_end|>"), at)
        messages.append(Message(role, answer_parts(ids[at + 1 : end], TOKENIZER)))
        at = end + 1
    assert ids[0] == TOKENIZER.bos
    return Conversation(tuple(messages))


@given(conversations())
@settings(max_examples=300, deadline=None)
def test_what_was_rendered_can_be_read_back(conversation):
    rendered = conversation.render(TOKENIZER)
    assert parse(rendered.ids) == conversation.folded()
    assert parse(rendered.ids).render(TOKENIZER) == rendered


def spelled(conversation):
    """(text, said) pieces by the plainest reading of the grammar, markers spelled out."""
    pieces = [("<|bos|>", False)]
    for message in conversation.folded().messages:
        says = message.role == "assistant"
        pieces.append((f"<|{message.role}_start|>", False))
        for part in message.parts:
            if part.kind == "text":
                pieces.append((part.text, says))
            else:
                said = part.kind == "python"
                pieces += [(f"<|{part.kind}_start|>", said), (part.text, said)]
                pieces += [(f"<|{part.kind}_end|>", said)]
        pieces.append((f"<|{message.role}_end|>", says))
    return pieces


@given(conversations())
@settings(max_examples=300, deadline=None)
def test_the_mask_covers_what_the_assistant_says_and_nothing_else(conversation):
    rendered = conversation.render(TOKENIZER)
    said = [id for id, mask in zip(rendered.ids, rendered.loss_mask, strict=True) if mask]
    heard = [id for id, mask in zip(rendered.ids, rendered.loss_mask, strict=True) if not mask]
    assert (
        b"".join(map(TOKENIZER.token_bytes, said))
        == "".join(t for t, s in spelled(conversation) if s).encode()
    )
    assert (
        b"".join(map(TOKENIZER.token_bytes, heard))
        == "".join(t for t, s in spelled(conversation) if not s).encode()
    )


def test_a_rendering_spelled_out():
    conversation = say("hi", [Part("python", "1+1"), Part("output", "2"), Part("text", "two")])
    names = [TOKENIZER.decode([id]) for id in conversation.render(TOKENIZER).ids]
    assert names == [
        "<|bos|>", "<|user_start|>", "h", "i", "<|user_end|>", "<|assistant_start|>",
        "<|python_start|>", "1", "+", "1", "<|python_end|>", "<|output_start|>", "2",
        "<|output_end|>", "t", "w", "o", "<|assistant_end|>",
    ]  # fmt: skip
    mask = conversation.render(TOKENIZER).loss_mask
    assert mask == [False] * 6 + [True] * 5 + [False] * 3 + [True] * 4


@given(texts)
@settings(max_examples=200, deadline=None)
def test_special_tokens_typed_by_a_user_are_ordinary_text(text):
    specials = {TOKENIZER.special(name) for name in SPECIAL_TOKENS}
    ids = say(text).render(TOKENIZER).ids
    assert [id for id in ids if id in specials] == [
        TOKENIZER.bos,
        TOKENIZER.special("<|user_start|>"),
        TOKENIZER.special("<|user_end|>"),
    ]


def test_the_system_message_stands_before_the_first_user_text():
    conversation = say("hi", "yes", "and?", system="Be kind.")
    assert conversation.folded() == say("Be kind.\n\nhi", "yes", "and?")
    assert conversation.render(TOKENIZER) == conversation.folded().render(TOKENIZER)


def test_too_long_is_cut_and_counted():
    whole = say("the cat", "sat on the mat").render(TOKENIZER)
    for limit in range(1, len(whole.ids) + 3):
        cut = say("the cat", "sat on the mat").render(TOKENIZER, max_tokens=limit)
        assert cut.ids == whole.ids[:limit]
        assert cut.loss_mask == whole.loss_mask[:limit]
        assert len(cut.ids) + cut.cut == len(whole.ids)


@given(conversations())
@settings(max_examples=100, deadline=None)
def test_a_prompt_and_an_answer_make_the_rendering(conversation):
    *before, last = conversation.messages
    if last.role != "assistant":
        return
    prompt = Conversation(tuple(before)).prompt(TOKENIZER)
    whole = conversation.render(TOKENIZER).ids
    assert whole[: len(prompt)] == prompt
    assert answer_parts(whole[len(prompt) :], TOKENIZER) == last.parts


def test_answer_parts_forgives_what_a_model_may_write():
    special = TOKENIZER.special
    a, b = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    python, end = special("<|python_start|>"), special("<|python_end|>")
    cases = {
        (): (),
        (*a, special("<|assistant_end|>"), *b): (Part("text", "a"),),
        (*a, python, *b): (Part("text", "a"), Part("python", "b")),
        (*a, end, *b): (Part("text", "ab"),),
        (python, *a, python, *b, end): (Part("python", "a"), Part("python", "b")),
        (*a, special("<|user_start|>"), *b): (Part("text", "a"),),
        (*a, TOKENIZER.bos, *b): (Part("text", "a"),),
    }
    for ids, expected in cases.items():
        assert answer_parts(ids, TOKENIZER) == expected


def naive_parts(ids):
    """The plainest reading: cut the ids at the markers, decode what stands between them."""
    names = {TOKENIZER.special(name): name for name in SPECIAL_TOKENS}
    parts, kind, between = [], "text", []
    for id in [*ids, TOKENIZER.bos]:
        if id not in names:
            between.append(id)
            continue
        if between or kind != "text":
            parts.append(Part(kind, TOKENIZER.decode(between)))
        opened = names[id].removeprefix("<|").removesuffix("_start|>")
        kind, between = opened if opened in ("python", "output") else "text", []
        if names[id] in END_NAMES:
            break
    return Message("assistant", tuple(parts)).parts


def joined(pieces):
    """Pieces put together by their rule: an empty one, or one of another kind, opens a part."""
    parts = []
    for piece in pieces:
        if piece.text and parts and parts[-1].kind == piece.kind:
            parts[-1] = Part(piece.kind, parts[-1].text + piece.text)
        else:
            parts.append(piece)
    return parts


# Bytes of characters cut anywhere, bytes that are no text, words, and every marker.
answer_ids = st.lists(
    st.one_of(
        st.sampled_from([*"é猫🐈‍".encode(), 0xFF, 0xC0, *b"ab"]),
        st.sampled_from(TOKENIZER.encode("the cat")),
        st.sampled_from([TOKENIZER.special(n) for n in SPECIAL_TOKENS if n not in END_NAMES]),
        st.sampled_from([TOKENIZER.special(name) for name in SPECIAL_TOKENS]),
    ),
    max_size=30,
)


@given(answer_ids)
@settings(max_examples=500, deadline=None)
def test_one_token_at_a_time_gives_what_parsing_everything_anew_gives(ids):
    parser, pieces = AnswerParser(TOKENIZER), []
    for count, id in enumerate(ids, 1):
        pieces += parser.feed(id)
        assert joined(pieces) == parser.parts
        whole = naive_parts(ids[:count])
        if parser.parts != list(whole):  # an incomplete character is still to come
            *before, last = whole
            held = last.text.removesuffix("\ufffd")
            assert held != last.text
            missing = [] if (last.kind, held) == ("text", "") else [Part(last.kind, held)]
            assert parser.parts == [*before, *missing]
    pieces += parser.finish()
    assert joined(pieces) == parser.parts == list(naive_parts(ids))
    assert answer_parts(ids, TOKENIZER) == naive_parts(ids)
    assert all(piece.text or piece.kind != "text" for piece in pieces)


@given(st.lists(parts, max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_piece_of_a_text_has_half_a_character(parts):
    answer = Message("assistant", tuple(parts))
    ids = Conversation((say("hi").messages[0], answer)).render(TOKENIZER).ids
    parser = AnswerParser(TOKENIZER)
    pieces = [piece for id in ids[ids.index(TOKENIZER.special("<|assistant_start|>")) + 1 :]
              for piece in parser.feed(id)]  # fmt: skip
    assert joined(pieces) == list(answer.parts)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([("system", "x")], "at least one message"),
        ([("assistant", "x")], "message 1 .* must come from the user, got 'assistant'"),
        ([("user", "x"), ("user", "y")], "message 2 .* must come from the assistant, got 'user'"),
        ([("user", "x"), ("system", "y")], "message 2 .* got 'system'"),
        ([("tool", "x")], "role must be one of system, user, assistant, got 'tool'"),
        ([("user", [{"type": "python", "text": "1"}])], "only the assistant has python parts"),
        ([("user", [{"type": "image", "text": ""}])], "a part must be one of .*got 'image'"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(messages, message):
    with pytest.raises(ValueError, match=message):
        Conversation.from_messages([{"role": r, "content": c} for r, c in messages])


def test_a_prompt_after_the_assistant_is_refused():
    with pytest.raises(ValueError, match="assistant spoke last"):
        say("hi", "ho").prompt(TOKENIZER)


def test_letters_are_the_same_token_in_question_and_answer():
    choices = ["the cat", "sat", "mat", "A"]
    text = choice_question("Who sat?", choices)
    assert [text.index(f"{c} (") for c in choices] == sorted(text.index(f"{c} (") for c in choices)
    ids = TOKENIZER.encode(text)
    for letter in "ABCD":
        assert TOKENIZER.encode(letter)[0] in ids
    with pytest.raises(ValueError, match="2 to 8 choices, got 1"):
        choice_question("Who?", ["only"])
