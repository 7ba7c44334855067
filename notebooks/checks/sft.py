"""The checks of chapter 07's exercises. Spoilers ahead."""

from statistics import fmean

import torch
from torch import Tensor

from checks import Build, Exercise, Value

# ---------------------------------------------------------------------------- 7.1 loss mask

START, END, OUTPUT, OUTPUT_END = 100, 101, 102, 103
USER, USER_END, PYTHON, PYTHON_END = 104, 105, 106, 107


def talks(generator: torch.Generator) -> list[tuple]:
    a, b, c = torch.randint(1, 90, (3,), generator=generator).tolist()
    ask = [99, USER, a, b, USER_END]
    call = [PYTHON, a, b, PYTHON_END, OUTPUT, c, OUTPUT_END]
    plain, tooled = [START, b, c, END], [START, a, *call, c, END]
    rows = [ask + tooled, ask + plain, ask + plain + ask[1:] + tooled, ask, ask + tooled[:-2]]
    rows.append([*ask, START, *call, *call, b, END, *ask[1:], *plain])
    return [(row, START, END, OUTPUT, OUTPUT_END) for row in rows]


def loss_mask(ids, start, end, output, output_end):
    mask, speaking, tool = [], False, False
    for id in ids:
        tool = tool or id == output
        mask.append(speaking and not tool)
        tool = tool and id != output_end
        speaking = (speaking or id == start) and id != end
    return mask


def result_graded(ids, start, end, output, output_end):
    return loss_mask(ids, start, end, None, None)


def end_forgotten(ids, start, end, output, output_end):
    right = loss_mask(ids, start, end, output, output_end)
    return [graded and id != end for id, graded in zip(ids, right, strict=True)]


def start_graded(ids, start, end, output, output_end):
    right = loss_mask(ids, start, end, output, output_end)
    return [graded or id == start for id, graded in zip(ids, right, strict=True)]


def output_markers_graded(ids, start, end, output, output_end):
    right = loss_mask(ids, start, end, output, output_end)
    return [graded or id in (output, output_end) for id, graded in zip(ids, right, strict=True)]


def output_end_graded(ids, start, end, output, output_end):
    right = loss_mask(ids, start, end, output, output_end)
    return [graded or id == output_end for id, graded in zip(ids, right, strict=True)]


def silent_after_tool(ids, start, end, output, output_end):
    mask, speaking = [], False
    for id in ids:
        speaking = speaking and id != output
        mask.append(speaking)
        speaking = (speaking or id == start) and id != end
    return mask


def everything(ids, start, end, output, output_end):
    return [True] * len(ids)


def which_token(got, expected, ids, *markers) -> str | None:
    if len(got) != len(expected):
        return f"there are {len(ids)} ids and {len(got)} answers: one for each"
    place = next(p for p, (g, e) in enumerate(zip(got, expected, strict=True)) if bool(g) != e)
    verb = "grades" if got[place] else "leaves out"
    return f"your mask {verb} position {place} of {ids}, and should not (start is {START})"


# ---------------------------------------------------------------------------- 7.2 targets


def masked_rows(generator: torch.Generator) -> list[tuple]:
    cases = []
    for size in (6, 9, 2):
        ids = torch.randint(1, 90, (size,), generator=generator).tolist()
        mask = (torch.rand(size, generator=generator) < 0.6).tolist()
        mask[0], mask[-1] = False, True
        cases.append((ids, mask))
    return cases


def targets(ids, mask):
    return [id if graded else -1 for id, graded in zip(ids[1:], mask[1:], strict=True)]


def mask_not_moved(ids, mask):
    return [id if graded else -1 for id, graded in zip(ids[1:], mask[:-1], strict=True)]


def not_shifted(ids, mask):
    return [id if graded else -1 for id, graded in zip(ids, mask, strict=True)]


def last_cut_off(ids, mask):
    return not_shifted(ids[:-1], mask[:-1])


def same_length(ids, mask):
    return [*targets(ids, mask), -1]


def ignored_left_out(ids, mask):
    return [id for id in targets(ids, mask) if id != -1]


# ---------------------------------------------------------------------------- 7.3 masked mean


def losses(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    cases = []
    for shape in ((3, 7), (1, 4), (5, 11)):
        mask_BT = torch.rand(shape, generator=generator) < 0.4
        mask_BT[:, 0] = True
        cases.append((4 * torch.rand(shape, generator=generator), mask_BT))
    return cases


def masked_mean(nll_BT, mask_BT):
    return (nll_BT * mask_BT).sum() / mask_BT.sum()


def over_all(nll_BT, mask_BT):
    return (nll_BT * mask_BT).mean()


def unmasked(nll_BT, mask_BT):
    return nll_BT.mean()


def mean_of_means(nll_BT, mask_BT):
    return ((nll_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)).mean()


def not_divided(nll_BT, mask_BT):
    return (nll_BT * mask_BT).sum()


def upside_down(nll_BT, mask_BT):
    return masked_mean(nll_BT, ~mask_BT)


# ---------------------------------------------------------------------------- 7.4 first fit


def conversations(generator: torch.Generator) -> list[tuple[list[int], int]]:
    cases = [([5, 6, 4, 3, 2], 10), ([10, 10], 10), ([], 8), ([3, 7, 2, 5, 1, 1], 8)]
    for count in (12, 30):
        cases.append((torch.randint(1, 20, (count,), generator=generator).tolist(), 24))
    return cases


def first_fit(lengths, room, choose=min, equal=True):
    rows, left = [], []
    for item, need in enumerate(lengths):
        fits = [row for row, space in enumerate(left) if space > need - equal]
        if not fits:
            rows.append([])
            left.append(room)
            fits = [len(rows) - 1]
        row = choose(fits) if choose is min else choose(fits, left)
        rows[row].append(item)
        left[row] -= need
    return rows


def best_fit(lengths, room):
    return first_fit(lengths, room, choose=lambda fits, left: min(fits, key=left.__getitem__))


def worst_fit(lengths, room):
    return first_fit(lengths, room, choose=lambda fits, left: max(fits, key=left.__getitem__))


def last_row_only(lengths, room):
    rows, left = [], 0
    for item, need in enumerate(lengths):
        if not rows or left < need:
            rows.append([])
            left = room
        rows[-1].append(item)
        left -= need
    return rows


def never_full(lengths, room):
    return first_fit(lengths, room, equal=False)


def sizes_not_items(lengths, room):
    return [[lengths[item] for item in row] for row in first_fit(lengths, room)]


def one_each(lengths, room):
    return [[item] for item in range(len(lengths))]


def too_full_or_lost(got, expected, lengths, room) -> str | None:
    for row, items in enumerate(got):
        if sum(lengths[item] for item in items) > room:
            return f"row {row} holds more than {room} tokens"
    if sorted(item for row in got for item in row) != list(range(len(lengths))):
        return "each conversation must be in exactly one row"
    if lengths and fmean(map(len, got)) < fmean(map(len, expected)):
        return f"you open {len(got)} rows where fewer would do: look at all earlier rows first"
    return None


# ---------------------------------------------------------------------------- all

EXERCISES: dict[str, Exercise] = {
    "7.1": Build(
        loss_mask,
        talks,
        {
            "You grade the tool's result: the model would learn to make results up.": result_graded,
            "The marker that ends the assistant's turn must be graded, or the model never learns to "
            "stop.": end_forgotten,
            "You grade the marker that opens the assistant's turn; the engine puts it there.": (
                start_graded
            ),
            "You grade the markers around a result; they are the engine's, like the result.": (
                output_markers_graded
            ),
            "The closing marker of a result is still the tool's: leave the tool's turn after it, not "
            "at it.": output_end_graded,
            "After a result nothing is graded any more: the assistant goes on speaking.": (
                silent_after_tool
            ),
            "You grade everything, also what the user says.": everything,
        },
        explain=which_token,
    ),
    "7.2": Build(
        targets,
        masked_rows,
        {
            "The mask has to move with the ids: what counts is whether the *predicted* token is "
            "graded.": mask_not_moved,
            "Nothing is shifted: the target at position t is token t + 1.": not_shifted,
            "You cut off the last id instead of the first: position t would predict "
            "itself.": last_cut_off,
            "There is one target too many: after the last id nothing follows.": same_length,
            "Keep a −1 where nothing is graded, so that each position has its place.": (
                ignored_left_out
            ),
        },
    ),
    "7.3": Build(
        masked_mean,
        losses,
        {
            "You divide by all B × T places; divide by the number of graded ones.": over_all,
            "You average all tokens, the user's too: where is the mask?": unmasked,
            "That is the mean of each row's mean: a short answer's tokens weigh more than a long "
            "one's.": mean_of_means,
            "You sum and do not divide: a longer batch would have a larger loss.": not_divided,
            "Your mask is upside down: you average what is not graded.": upside_down,
        },
    ),
    "7.4": Build(
        first_fit,
        conversations,
        {
            "That is best fit (the fullest row that has room), as nanolib does it; asked is the "
            "first row.": best_fit,
            "That is worst fit: you take the emptiest row, not the first with room.": worst_fit,
            "You look only at the newest row; an earlier one may still have room.": last_row_only,
            "A conversation that fills a row exactly fits: compare with >=.": never_full,
            "Return the conversations' indices, not their lengths.": sizes_not_items,
            "One conversation in each row: that is the waste you are to avoid.": one_each,
        },
        explain=too_full_or_lost,
    ),
    "7.5": Value(
        "dc755437a3df",
        {
            0.06: "That is the distance itself; divide it by the standard error.",
            0.0433: "That is one standard error; how many of them is the distance?",
            1.297: "Your error is that of 31 %; if it guesses, p is 25 %.",
        },
    ),
}
