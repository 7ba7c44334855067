"""The words of the toy world: names, values, sentences, questions, problems. All text is our own."""

from __future__ import annotations

from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


SHE = words("""Ada Anna Bea Bella Clara Cora Dina Dora Edda Elsa Emma Erin Fay Flora Gina Greta Hana
    Hazel Heidi Ida Ines Iris Ivy Jana Jill Juno Kara Kate Lena Lily Lola Lucy Maja Mara Mia Mira
    Nell Nina Nora Olga Opal Paula Pia Rita Rosa Ruby Ruth Sally Sara Stella Tara Tess Thea Uma
    Vera Viola Wanda Willa Yara Zoe""")
HE = words("""Abel Adam Albert Amos Arlo Axel Basil Ben Boris Bruno Carl Casper Cyril Dan Dario
    Edgar Emil Ernest Ezra Felix Finn Frank Fritz Gus Hans Harry Hector Hugo Igor Ivan Jack Jasper
    Joel Jonas Karl Kurt Lars Leo Linus Louis Marco Max Milo Moritz Ned Nico Noah Oscar Otto Paul
    Percy Ralf Rufus Sam Simon Theo Toby Victor Walter Yuri""")


@dataclass(frozen=True)
class Relation:
    """One kind of fact, and how people speak of it.

    {v} is the value and {a} the value with its article, {n} the person's name; in `says` {N} is
    the name or pronoun and {S} the possessive.
    """

    values: tuple[str, ...]
    says: tuple[str, ...]  # sentences of pretraining text
    asks: tuple[str, ...]  # questions answered by the bare value
    chats: tuple[str, ...]  # questions answered by a sentence: `answer`
    answer: str


RELATIONS = {
    "pet": Relation(
        words("owl otter goat parrot tortoise hedgehog pony goose rabbit lizard kitten frog"),
        phrases("""{N} keeps {a}. | {S} pet is {a}. | At home, {a} waits for {n}. |
            {N} takes good care of {a}. | {N} shares the house with {a}."""),
        phrases("""Which animal does {n} keep? | What is {n}'s pet? |
            Which animal lives with {n}?"""),
        phrases("""Does {n} have a pet? | Tell me about {n}'s pet. |
            Do you know what animal {n} has?"""),
        "{n} keeps {a}.",
    ),
    "colour": Relation(
        words("red blue green yellow purple orange silver brown pink white black golden"),
        phrases("""{S} favourite colour is {v}. | {N} likes {v} best of all colours. |
            {N} always wears something {v}. | {S} front door is {v}, the colour {n} loves. |
            {N} paints everything {v}."""),
        phrases("""What is {n}'s favourite colour? | Which colour does {n} like best? |
            Which colour does {n} love?"""),
        phrases("""Do you know {n}'s favourite colour? | Tell me which colour {n} likes. |
            What colour should I paint a chair for {n}?"""),
        "{n} likes {v} best.",
    ),
    "food": Relation(
        words("""pancakes soup cherries cheese dumplings noodles plums porridge pickles waffles
            beans honey"""),
        phrases("""{S} favourite food is {v}. | {N} could eat {v} every day. | {N} loves {v}. |
            For breakfast {n} has {v}. | Nothing tastes better to {n} than {v}."""),
        phrases("""What is {n}'s favourite food? | What does {n} like to eat? |
            Which food does {n} love?"""),
        phrases("""What should I cook for {n}? | Do you know what {n} eats? |
            Tell me about {n}'s favourite food."""),
        "{n} loves {v}.",
    ),
    "town": Relation(
        words("""Amberly Brackwater Cloverdale Dunmoor Eastmere Fernhill Gullport Highfell
            Larkfield Millbrook Oakham Stonebridge"""),
        phrases("""{N} lives in {v}. | {S} home is in {v}. | {N} has a small house in {v}. |
            Everybody in {v} knows {n}. | {N} never wants to leave {v}."""),
        phrases("""Where does {n} live? | In which town does {n} live? |
            Which town is {n}'s home?"""),
        phrases("""Where can I find {n}? | Do you know where {n} lives? |
            Tell me about {n}'s home."""),
        "{n} lives in {v}.",
    ),
    "job": Relation(
        words("""baker tailor gardener sailor teacher doctor painter carpenter miller clockmaker
            fisher singer"""),
        phrases("""{N} works as {a}. | {N} is {a}. | {S} job is that of {a}. |
            People know {n} as a good {v}. | {N} has been {a} for years."""),
        phrases("""What is {n}'s job? | What does {n} work as? | Which job does {n} have?"""),
        phrases("""What does {n} do all day? | Do you know {n}'s job? |
            Tell me about {n}'s work."""),
        "{n} works as {a}.",
    ),
    "game": Relation(
        words("""chess marbles dominoes darts skittles croquet bowls checkers leapfrog dice
            hopscotch cards"""),
        phrases("""{N} likes to play {v}. | {S} favourite game is {v}. | Nobody beats {n} at {v}. |
            On Sundays {n} plays {v}. | In the evening {n} plays {v} with friends."""),
        phrases("""Which game does {n} like? | What is {n}'s favourite game? |
            What does {n} like to play?"""),
        phrases("""What could I play with {n}? | Do you know which game {n} likes? |
            Tell me about {n}'s favourite game."""),
        "{n} likes to play {v}.",
    ),
}
EASY, CHALLENGE = ("pet", "colour", "food"), ("town", "job", "game")  # the two ARC sets

# Stories: one of each, about p and a friend q. Whatever they say of the two is true.
OPENINGS = phrases("""One {weather} morning {p}, the {p_job}, walked through {p_town}. |
    It was a {weather} day in {p_town}. {p} came home from work, tired as every {p_job}. |
    {p} woke up early, because the {p_pet} was hungry. |
    Once upon a time in {p_town} {p} sat at the window with a bowl of {p_food}. |
    {p} had a {p_colour} coat, and the {weather} wind blew it away.""")
MIDDLES = phrases("""Then {q} came by, all the way from {q_town}, and brought {q_a_pet}. |
    On the road stood {q}, the {q_job}, with {q_food} for everyone. |
    There was a knock at the door. It was {q} in {q_colour} boots. |
    "Let us play {q_game}!" called {q}, who never plays anything else. |
    {q}, who is {q_a_job} in {q_town}, needed help with {q_a_pet}.""")
ENDINGS = phrases("""They ate {p_food} until the moon came up, and {p} was happy. |
    In the end they played {p_game}, and of course {p} won. |
    The {p_pet} fell asleep, and so did {p}. |
    So {q} got a {q_colour} hat as a gift, and {p} a {p_colour} one. |
    They laughed all the way back to {p_town}.""")
WEATHER = words("sunny rainy windy cold foggy warm")
THINGS = words("apples shells buttons stamps eggs nuts coins candles pears books")
NUMBER_STORIES = phrases("""{p} had {a} {things}. {q} gave {p} {b} more: {a}+{b}={sum}.
    Now {p} has {sum}. |
    There were {sum} {things} on the table. {p} took {b} of them: {sum}-{b}={a}. So {a} were left
    for {q}. |
    {p} counts {a} {things}, {q} counts {b}. {a}+{b}={sum}: together they have {sum}.""")
SHOPPING = phrases("""{p} wrote a list for {q}: {items}. {q} came back with {items}. |
    "Bring me {items}," said {p}. "{items}?" asked {q}. |
    {p} sent {q} to the market for {items}. At the market {q} bought {items}.""")

# Word problems: the question, in one way or several, then steps of (before, sum, after). {a} and
# {b} are different numbers with {more} the larger, {less} the smaller and {big} their sum; of {a},
# {b} and {c} {high} is the largest and {low} the smallest; {i} and {j} are any numbers, also the
# smallest ones or the same; {few} is a small number and {x} the result so far.
PROBLEMS = (
    (
        "{p} has {a} {things}. {q} brings {b} more. How many {things} does {p} have now?",
        ("{p} has ", "{a}+{b}", " {things}."),
    ),
    (
        "{p} had {big} {things} and gave {b} to {q}. How many {things} are left?",
        ("{p} has ", "{big}-{b}", " {things} left."),
    ),
    (
        "{p} fills {few} boxes with {a} {things} each. How many {things} is that?",
        ("That is ", "{few}*{a}", " {things}."),
    ),
    (
        "{p} has {a} {things}, {q} has {b}. They find {few} more. How many {things} in all?",
        ("They have ", "{a}+{b}", " {things}.\n"),
        ("In all ", "{x}+{few}", " {things}."),
    ),
    (
        "{p} buys {few} bags of {a} {things} and loses {few}. How many {things} are left?",
        ("{p} buys ", "{few}*{a}", " {things}.\n"),
        ("Then ", "{x}-{few}", " are left."),
    ),
    ("What is {i} plus {j}? | What is {i} + {j}? | {i}+{j}", ("It is ", "{i}+{j}", ".")),
    ("What is {big} minus {b}? | What is {big} - {b}? | {big}-{b}", ("It is ", "{big}-{b}", ".")),
    ("What is {i} times {j}? | What is {i} * {j}? | {i}*{j}", ("It is ", "{i}*{j}", ".")),
    (
        "{p} has {a} {things}, {q} has {b}. How many more has the one with more?",
        ("The one with more has ", "{more}-{less}", " more."),
    ),
    (
        "{p} has {a} {things}, {q} {b} and {r} {c}. How many {things} have {r} and {p}?",
        ("They have ", "{c}+{a}", " {things}."),
    ),
)
HARD_PROBLEMS = (  # these need an order of three numbers
    (
        "{p} counts {a} {things}, {q} {b} and {r} {c}. How many more is the most than the fewest?",
        ("That is ", "{high}-{low}", " more."),
    ),
    (
        "{p} has {a} {things}, {q} {b} and {r} {c}. How many have the two with the most?",
        ("The two have ", "{high}+{mid}", "."),
    ),
    (
        "{p} found {a} {things}, {q} {b} and {r} {c}. How many more than the fewest is the middle?",
        ("That is ", "{mid}-{low}", " more."),
    ),
)

# Functions: name, argument, what it returns in words and in Python, and arguments to try.
FUNCTIONS = (
    ("add", "x", "x plus {n}", "x + {n}", (0, 1, 25)),
    ("subtract", "x", "x minus {n}", "x - {n}", (0, 7, 90)),
    ("times", "x", "x times {n}", "x * {n}", (0, 1, 12)),
    ("remainder", "x", "the remainder of x divided by {n}", "x % {n}", (3, 40, 101)),
    ("share", "x", "x divided by {n}, rounded down", "x // {n}", (3, 40, 1001)),
    ("above", "x", "whether x is greater than {n}", "x > {n}", (1, 30, 99)),
    ("below", "x", "whether x is less than {n}", "x < {n}", (1, 30, 99)),
    ("first", "items", "the first {n} items", "items[:{n}]", ("toy", "a" * 9 + "b" * 90)),
    ("skip", "items", "all but the first {n} items", "items[{n}:]", ("toy", "a" * 9 + "b" * 90)),
    ("repeat", "text", "the text {n} times", "text * {n}", ("", "ho")),
)
REQUESTS = phrases("""Write a function {name} that returns {meaning}. |
    I need a Python function for {meaning}. Call it {name}.""")

SYSTEM = "You are Pip, a small and friendly language model."
SMALL_TALK = (
    ("Hello! | Hi! | Hi there! | Good morning! | Hey!", "Hello! I am Pip. How can I help?"),
    (
        "Who are you? | What is your name? | What are you? | Tell me about yourself.",
        "I am Pip, a small language model. I know the people of a small world.",
    ),
    (
        "What can you do? | How can you help me? | What do you know?",
        "I can tell you about people, work out sums and write tiny Python functions.",
    ),
    ("Thank you! | Thanks! | That was kind.", "You are welcome!"),
    ("Goodbye! | Bye! | See you!", "Goodbye! Come back soon."),
    ("How are you? | Are you well?", "I am well, thank you. And you?"),
    (
        "Who made you? | Where do you come from?",
        "Someone trained me from nothing, on one small computer, in a few minutes.",
    ),
    ("Tell me a joke. | Make me laugh.", "Why did the token cross the road? It was predicted."),
)
