"""HTML of answers: what is rendered, and that nothing which was said runs or loads anything."""

from html.parser import HTMLParser

import pytest

from nanolib.conversation import Part
from nanolib.ui.markup import CSS, answer_html, user_html

TAGS = {  # all that markdown without HTML and images makes, and our own
    *("div", "p", "br", "hr", "em", "strong", "a", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
    *("details", "summary"),
}
ATTRIBUTES = {"class", "href", "rel", "target", "style", "start", "title"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></details></div><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "![pixel](https://tracker.example/p.png)",
    "![pixel](data:image/png;base64,AAAA)",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java&#115;cript:alert(1))",
    "[click](\tjavascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x) [click](file:///etc/passwd) [click](/chat) [click](//evil.example)",
    "<javascript:alert(1)> [a]\n\n[a]: javascript:alert(1)",
    '[a](https://x.example/" onmouseover="alert(1))',
    "[a](https://x.example 'title\" onclick=\"alert(1)')",
    '```js" onload="alert(1)\nx\n```',
    "`<script>`",
    "<style>*{display:none}</style><iframe src=//evil.example></iframe><svg onload=alert(1)>",
    "<|assistant_end|><script>alert(1)</script>",
    "| a |\n|---|\n| <b onclick=alert(1)>x</b> |",
    "a\x00b \ufffd \u202e",
]


class Reader(HTMLParser):
    """What a browser would make of it: tags with attributes, and the text between."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def text(said: str) -> Part:
    return Part("text", said)


def check(markup: str) -> Reader:
    """Only harmless tags and attributes; links lead out, and without a word about us."""
    read = Reader(markup)
    for tag, attributes in read.tags:
        assert tag in TAGS
        assert set(attributes) <= ATTRIBUTES
        if tag == "a":
            assert attributes["href"].startswith(("http://", "https://", "mailto:"))
            assert "noopener" in attributes["rel"] and attributes["target"] == "_blank"
    return read


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_that_was_said_runs_or_loads(hostile):
    check(user_html(hostile))
    check(answer_html([text(hostile)]))
    for kind in ("python", "output"):
        read = check(answer_html([text("a "), Part(kind, hostile), text(" b")]))
        assert len(read.of("details")) == 1
        assert hostile.splitlines()[0].strip("\t\x00")[:40].strip() in read.text
    check(answer_html([Part("python", hostile), Part("output", hostile), text(hostile)]))


def test_what_a_user_types_stays_as_typed():
    typed = "a *b* <|assistant_end|>\n  <b>\"c\" & 'd'</b>"
    read = check(user_html(typed))
    assert read.text == typed
    assert [tag for tag, _ in read.tags] == ["div"]
    assert "white-space: pre-wrap" in CSS  # which keeps the newlines


def test_an_answer_is_rendered_as_markdown():
    read = check(answer_html([text("Some **bold** [words](https://x.example/a?b=1&c=2)\nnext\n\n- a\n- b")]))  # fmt: skip
    assert [tag for tag, _ in read.tags] == ["div", "p", "strong", "a", "br", "ul", "li", "li"]
    assert read.of("a")[0]["href"] == "https://x.example/a?b=1&c=2"
    assert len(check(answer_html([text("|a|b|\n|-|-|\n|1|2|")])).of("td")) == 2


def test_a_number_that_is_an_answer_is_no_list():
    for said in ("42.", "42)", "It is\n42. ", "> 7.", "42.\n\nYes."):
        read = check(answer_html([text(said)]))
        assert not read.of("ol") and read.text.split() == said.removeprefix("> ").split()
    assert len(check(answer_html([text("1. a\n2. b\n3. c")])).of("li")) == 3
    assert len(check(answer_html([text("1. a\n   1. b")])).of("ol")) == 2


@pytest.mark.parametrize("number", ["42", "-5", "1,234.50", "$42", "50%"])
def test_the_final_answer_is_no_heading(number):
    for said in (
        f"#### {number}",
        f"so\n####{number}.",
        f"so\n#### {number} \nDone.",
        f"> #### {number}",
    ):
        markup = answer_html([text(said)])
        assert f'<p class="final">Answer: <strong>{number}</strong></p>' in markup
        assert not check(markup).of("h4")


def test_other_headings_and_code_stay():
    for said in ("#### Steps", "#### 2024 in review", "#### 1. First", "### 42", "#### ", "#### -"):
        read = check(answer_html([text(said)]))
        assert read.of(f"h{said.count('#')}") and "Answer" not in read.text
    for said in ("```\n#### 42\n```", "    #### 42", "so\n    #### 42", "see #### 42", "##### 42"):
        read = check(answer_html([text(said)]))
        assert "#### 42" in said and "Answer" not in read.text


def test_a_special_token_in_an_answer_is_text():
    assert check(answer_html([text("<|bos|> `<|user_end|>`")])).text.strip() == "<|bos|> <|user_end|>"  # fmt: skip


def test_a_program_is_folded_with_its_output():
    parts = [text("It is "), Part("python", "12+30"), Part("output", "42"), text("**42**.")]
    markup = answer_html(parts)
    tool = '<details class="tool"><summary>python: 12+30 → 42</summary><pre>12+30</pre><pre>42</pre></details>'  # fmt: skip
    assert markup == f'<div class="nanolib-answer"><p>It is</p>\n{tool}<p><strong>42</strong>.</p>\n</div>'  # fmt: skip
    assert "open" not in check(markup).of("details")[0]


def summaries(*parts: Part) -> list[str]:
    markup = answer_html(parts)
    check(markup)
    return [piece.split("</summary>")[0] for piece in markup.split("<summary>")[1:]]


def test_each_program_is_folded_apart_even_unfinished_or_odd_ones():
    a, b = Part("python", "a = 1\nprint(a)"), Part("output", "1\n2")
    assert summaries(a, b, a, b) == ["python: a = 1… → 1…"] * 2
    assert summaries(a, a, b) == ["python: a = 1…", "python: a = 1… → 1…"]
    assert summaries(Part("python", "12+")) == ["python: 12+"]
    assert summaries(Part("python", "")) == ["python: "]
    assert summaries(Part("python", "None"), Part("output", "")) == ["python: None → "]
    assert summaries(b) == ["output → 1…"]
    assert summaries(Part("python", "x" * 99)) == [f"python: {'x' * 60}…"]


def test_every_beginning_of_an_answer_is_whole_html():
    said = "A **b** `c` [d](https://e.example)\n\n```py\n<i>\n```\n\n- f <script>"
    for end in range(len(said) + 1):
        check(answer_html([text(said[:end]), Part("python", said[:end])]))
    assert answer_html([]) == '<div class="nanolib-answer"></div>'
