"""The checks of chapter 09's exercises. Spoilers ahead."""

import torch

from checks import Build, Exercise

KINDS = {
    "<|python_start|>": "python",
    "<|output_start|>": "output",
    "<|python_end|>": "text",
    "<|output_end|>": "text",
}


def parse(tokens):
    parts, kind = [], "text"
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in KINDS:
            kind = KINDS[token]
            if kind != "text":
                parts.append((kind, ""))
        elif parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + token)
        else:
            parts.append((kind, token))
    return parts


def one_of_each_kind(tokens):
    whole = {}
    for kind, text in parse(tokens):
        whole[kind] = whole.get(kind, "") + text
    return list(whole.items())


def closed_ones_alone(tokens):
    tokens = list(tokens)
    starts = [i for i, t in enumerate(tokens) if t in ("<|python_start|>", "<|output_start|>")]
    ends = [i for i, t in enumerate(tokens) if t in ("<|python_end|>", "<|output_end|>")]
    is_open = bool(starts) and (not ends or starts[-1] > ends[-1])
    return parse(tokens[: starts[-1]] if is_open else tokens)


def past_the_end(tokens):
    return parse([token for token in tokens if token != "<|assistant_end|>"])


def with_empty_texts(tokens):
    parts, kind, text = [], "text", ""
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in KINDS:
            parts.append((kind, text))
            kind, text = KINDS[token], ""
        else:
            text += token
    return [*parts, (kind, text)]


def some_answers(generator):
    call = ["<|python_start|>", "12", "+", "30", "<|python_end|>"]
    result = ["<|output_start|>", "42", "<|output_end|>"]
    answers = [
        ["Hello", "!", "<|assistant_end|>", "I", " go on"],
        ["That is ", *call, *result, " 4", "2", ".", "<|assistant_end|>"],
        [*call, *result, *call, *result, "done"],
        ["so ", "<|python_start|>", "1", "+"],
        ["a", "<|python_end|>", "b"],
        [],
    ]
    return [(answer,) for answer in answers]


def fit(sizes, room):
    for left_out in range(0, len(sizes), 2):
        if sum(sizes[left_out:]) <= room:
            return left_out
    raise ValueError("the message is too long; shorten it")


def one_at_a_time(sizes, room):
    for left_out in range(len(sizes)):
        if sum(sizes[left_out:]) <= room:
            return left_out
    raise ValueError


def never_quite_full(sizes, room):
    return fit(sizes, room - 1)


def newest_left_out(sizes, room):
    for left_out in range(0, len(sizes), 2):
        if sum(sizes[: len(sizes) - left_out]) <= room:
            return left_out
    raise ValueError


def never_refused(sizes, room):
    found = (n for n in range(0, len(sizes), 2) if sum(sizes[n:]) <= room)
    return next(found, len(sizes) - 1)


def some_histories(generator):
    histories = [([5], 5), ([5], 4), ([9, 2, 4, 3, 6], 24), ([9, 2, 4, 3, 6], 15)]
    histories += [([9, 2, 4, 3, 6], 13), ([9, 2, 4, 3, 6], 12), ([1, 1, 9], 9), ([2, 2, 50], 49)]
    for length in (3, 7, 11):
        sizes = torch.randint(1, 40, (length,), generator=generator).tolist()
        histories.append((sizes, sum(sizes) * 2 // 3 + sizes[-1]))
    return histories


def next_token(logits_V, temperature, top_k, dart):
    if temperature == 0:
        return int(logits_V.argmax())
    least = logits_V.topk(top_k).values[-1]
    kept_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    p_V = (kept_V / temperature).softmax(dim=0)
    return int((p_V.cumsum(dim=0) > dart).nonzero()[0])


def all_kept(logits_V, temperature, top_k, dart):
    return next_token(logits_V, temperature, len(logits_V), dart)


def multiplied(logits_V, temperature, top_k, dart):
    return next_token(logits_V, 1 / temperature if temperature else 0, top_k, dart)


def cut_after_softmax(logits_V, temperature, top_k, dart):
    if temperature == 0:
        return int(logits_V.argmax())
    p_V = (logits_V / temperature).softmax(dim=0)
    p_V = torch.where(p_V < p_V.topk(top_k).values[-1], 0, p_V)
    hit = (p_V.cumsum(dim=0) > dart).nonzero()
    return int(hit[0]) if len(hit) else int(p_V.nonzero()[-1])


def always_the_likeliest(logits_V, temperature, top_k, dart):
    return int(logits_V.argmax())


def in_order_of_rank(logits_V, temperature, top_k, dart):
    order = logits_V.sort(descending=True).indices
    return next_token(logits_V[order], temperature, top_k, dart)


def some_darts(generator):
    cases = []
    for size, top_k in ((7, 3), (5, 5), (12, 4), (4, 1)):
        logits = 2 * torch.randn(size, generator=generator)
        for temperature in (0.0, 0.5, 1.0, 2.0):
            for dart in (0.03, 0.41, 0.77, 0.98):
                cases.append((logits, temperature, top_k, dart))
    return cases


def bill(parameters, tokens, peak, used, devices, price):
    hours = 6 * parameters * tokens / (peak * used * devices) / 3600
    return hours, hours * devices * price


def one_price(parameters, tokens, peak, used, devices, price):
    hours, dollars = bill(parameters, tokens, peak, used, devices, price)
    return hours, dollars / devices


def scaled(factor):
    return lambda *given: tuple(factor(*given) * part for part in bill(*given))


EXERCISES: dict[str, Exercise] = {
    "9.1": Build(
        parse,
        some_answers,
        wrong={
            "You collect all text into one part: the order of the parts is lost.": one_of_each_kind,
            "A part that was never closed is missing: a model may stop anywhere.": (
                closed_ones_alone
            ),
            "You read on after <|assistant_end|>.": past_the_end,
            "You keep text parts that are empty: a program at the very start has no text before it.": (
                with_empty_texts
            ),
        },
    ),
    "9.2": Build(
        fit,
        some_histories,
        wrong={
            "You leave out one message at a time: an answer stays without its question.": (
                one_at_a_time
            ),
            "A conversation that fills the room exactly still fits.": never_quite_full,
            "You leave out the newest messages; the oldest must go.": newest_left_out,
            "Where not even the new question fits, raise ValueError.": never_refused,
        },
    ),
    "9.3": Build(
        next_token,
        some_darts,
        wrong={
            "You keep all tokens: top_k changes nothing.": all_kept,
            "You multiply by the temperature: it should make a hot model bolder, not surer.": (
                multiplied
            ),
            "You cut after softmax: what is left does not add up to 1, and high darts miss.": (
                cut_after_softmax
            ),
            "You always take the likeliest: the dart changes nothing.": always_the_likeliest,
            "You return a rank, not an id: keep the order of the vocabulary.": in_order_of_rank,
        },
    ),
    "9.5": Build(
        bill,
        lambda generator: [
            (561e6, 11.2e9, 989e12, 0.47, 8, 3.0),
            (1.05e6, 2.1e6, 74e9, 0.4, 1, 0.1),
            (1.88e9, 37.6e9, 312e12, 0.5, 16, 1.5),
        ],
        wrong={
            "The price is for one device: you pay for all of them.": one_price,
            "That is the forward pass alone (2); the backward pass takes twice as much again.": (
                scaled(lambda *given: 1 / 3)
            ),
            "You count on the whole peak; only a share of it is really used.": (
                scaled(lambda parameters, tokens, peak, used, *_: used)
            ),
            "You let one device do all the work.": scaled(lambda *given: given[4]),
            "The time is in seconds: an hour has 3,600.": scaled(lambda *given: 3600),
        },
    ),
}
