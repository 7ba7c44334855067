"""Tasks: data sets as conversations, graders, and bad files refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolib import tasks
from nanolib.config import SumsConfig
from nanolib.conversation import Conversation, Part, choice_question
from nanolib.tasks import calculator_parts, final_number
from nanolib.tools import Sandbox

MMLU_ROW = {"question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1}
ARC_ROW = {
    "id": "x",
    "question": "Who barks?",
    "choices": {"text": ["cat", "dog", "owl"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}


@pytest.fixture
def mirror(tmp_path):
    """Writes rows as a split of a data set; returns the mirror."""

    def write(path, *rows):
        file = tmp_path / "hub" / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
        return tmp_path

    return write


def test_mmlu_trains_on_the_auxiliary_split_and_answers_with_the_letter(mirror):
    task = tasks.load("mmlu", "train", mirror("cais/mmlu/all/auxiliary_train", MMLU_ROW))
    question = choice_question("2 + 2?", ["3", "4", "5", "6"])
    assert task.conversation(0) == Conversation.ask(question, "B")
    assert (task.question(0), task.choices(0), task.answer(0)) == ("2 + 2?", list("3456"), 1)


@pytest.mark.parametrize(("name", "half"), [("arc_easy", "Easy"), ("arc_challenge", "Challenge")])
def test_arc_labels_may_be_digits_and_choices_fewer_than_four(mirror, name, half):
    task = tasks.load(name, "test", mirror(f"allenai/ai2_arc/ARC-{half}/test", ARC_ROW))
    assert (task.choices(0), task.answer(0)) == (["cat", "dog", "owl"], 1)
    assert task.conversation(0).messages[1].text == "B"
    assert task.conversation(0).messages[0].text.count("\n") == 4


def test_smoltalk_keeps_the_system_message(mirror):
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    path = "HuggingFaceTB/smol-smoltalk/train"
    task = tasks.load("smoltalk", "train", mirror(path, {"messages": messages}))
    assert [message.role for message in task.conversation(0).messages] == roles


def test_gsm8k_marks_become_a_tool_call_and_its_output(mirror):
    answer = "She sold 12*2 = <<12*2=24>>24 in May.\nThat is $<<48+24=72>>72.\n#### 72"
    row = {"question": "How many?", "answer": answer}
    task = tasks.load("gsm8k", "test", mirror("openai/gsm8k/main/test", row))
    assert task.conversation(0).messages[1].parts == (
        Part("text", "She sold 12*2 = "),
        Part("python", "12*2"),
        Part("output", "24"),
        Part("text", "24 in May.\nThat is $"),
        Part("python", "48+24"),
        Part("output", "72"),
        Part("text", "72.\n#### 72"),
    )
    shown = "".join(part.text for part in task.conversation(0).messages[1].parts)
    assert shown == answer.replace("<<", "").replace("=24>>", "24").replace("=72>>", "72")


def test_gsm8k_outputs_are_what_the_tool_says(mirror):
    """The last two are nothing that Python computes: what was written stays."""
    sums = ["48/2=24", "2.5*12=30", "-(3-10)//2=3", " 7%4=3", "0.1+0.2=.3", "1,000*3=3,000"]
    sums += ["(1,200 - 1,000)/ 4=50", "1/0=0", "2x=4"]
    row = {"question": "?", "answer": "".join(f"<<{sum}>>, " for sum in sums) + "#### 1"}
    task = tasks.load("gsm8k", "test", mirror("openai/gsm8k/main/test", row))
    parts = task.conversation(0).messages[1].parts
    calls, outputs = ([p.text for p in parts if p.kind == kind] for kind in ("python", "output"))
    with Sandbox(workers=1) as sandbox:
        assert outputs[:7] == [sandbox.run(call).text for call in calls[:7]]
    assert outputs[0] == "24.0" and outputs[5] == "3000" and outputs[7:] == ["0", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "'a'*9",
        "max(1,2)",
        "1.real",
        "1(2)",
        "2**9**9**9",
        "2* *9",
        "1/0",
        "9" * 5000,
        "*".join(["9" * 4000] * 2),
        "(" * 9000,
        "-" * 99_999 + "1",
        "",
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_not_arithmetic_is_not_computed(text):
    assert tasks.evaluated(text) is None


def test_an_answer_without_marks_is_one_text():
    assert calculator_parts("No sums. #### 3") == (Part("text", "No sums. #### 3"),)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -5 apples", "-5"),
        ("#### 2.50.", "2.50"),
        ("first #### 1 then #### 2", "2"),
        ("72", None),
        ("#### none", None),
    ],
)
def test_the_number_after_the_hashes(text, number):
    assert final_number(text) == number


def test_gsm8k_grades_by_that_number(mirror):
    path = "openai/gsm8k/main/test"
    good = {"question": "q", "answer": "long story\n#### 1,200"}
    task = tasks.load("gsm8k", "test", mirror(path, good))
    assert task.grade(0, "It is 1200. #### 1200")
    assert not task.grade(0, "It is 1200.")
    assert not task.grade(0, "#### 120")
    assert task.formatted("#### 120") and not task.formatted("It is 1200.")


def test_a_problem_without_its_number_is_named_when_the_task_is_opened(mirror):
    rows = [{"question": "q", "answer": answer} for answer in ("#### 12", "so 12")]
    folder = mirror("openai/gsm8k/main/train", *rows)
    with pytest.raises(ValueError, match=r"gsm8k \(train\) row 1 has no '#### n.*'so 12'.*remove"):
        tasks.load("gsm8k", "train", folder)


def test_a_conversation_that_the_assistant_begins_is_named_with_its_row(mirror):
    rows = [
        {"messages": [{"role": role, "content": "hi"} for role in roles]}
        for roles in (("user", "assistant"), ("assistant", "user"))
    ]
    task = tasks.load("smoltalk", "test", mirror("HuggingFaceTB/smol-smoltalk/test", *rows))
    assert len(task.conversation(0).messages) == 2
    with pytest.raises(ValueError, match=r"smol-smoltalk \(test\) row 1: message 1 .*'assistant'"):
        task.conversation(1)


def test_facts_are_right_when_the_value_is_named_and_no_other(mirror):
    row = {"question": "Pet?", "answer": "owl", "others": ["goat", "frog"]}
    task = tasks.load("facts", "test", mirror("nanolib/toy-facts/test", row))
    assert task.grade(0, "Mira keeps an owl.")
    assert not task.grade(0, "Mira keeps a goat.")
    assert not task.grade(0, "an owl, a goat or a frog")
    assert not task.grade(0, "owls")
    assert not task.grade(0, "")


def test_humaneval_asks_for_the_prompt_and_grades_the_function(mirror):
    row = {"task_id": "a/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    row |= {"entry_point": "f", "test": "def check(f): assert f() == 1"}
    task = tasks.load("humaneval", "test", mirror("openai/openai_humaneval/test", row))
    assert "def f():\n    return 1\n" in task.conversation(0).messages[1].text
    assert task.unanswered(0) == Conversation.ask("def f():\n")
    answers = ("    return 1", "    return 2", "    import numpy")
    assert [task.grade(0, answer) for answer in answers] == [True, False, None]


def test_sums_are_worked_in_steps_that_python_agrees_with():
    for i in range(200):
        task = tasks.load("sums", "test", None, SumsConfig(fewest=2, most=5, largest=30))
        text, steps, total = task.problem(i)
        terms = [int(n) for n in text.replace("+", " ").replace("-", " ").split()]
        assert 2 <= len(terms) == len(steps) + 1 <= 5 and max(terms) <= 30 and total >= 0
        assert eval(text) == total
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right) >= 0
        worked = task.conversation(i).turns[-1].text
        assert worked == "\n".join([*steps, f"#### {total}"])
        assert task.grade(i, worked) and task.formatted(worked)
        wrong = worked.replace(f"#### {total}", f"#### {total + 1}")
        assert not task.grade(i, wrong) and task.formatted(wrong)
        assert not task.grade(i, str(total)) and not task.formatted(str(total))
    assert {len(task.problem(i)[1]) for i in range(200)} == {1, 2, 3, 4}


def test_no_sum_is_in_two_splits():
    dial = SumsConfig(fewest=2, most=3)  # few enough to meet each other

    def drawn(split):
        return {tasks.load("sums", split, None, dial).problem(i)[0] for i in range(1500)}

    train, test, one, two = map(drawn, ("train", "test", "final 1", "final 2"))
    assert not train & test and not train & (one | two) and not test & (one | two)
    assert one != two
    assert drawn("final 1") == one
    assert len(train) > 500 and min(map(len, (test, one))) > 100


def test_what_is_asked_leaves_out_the_answer(mirror):
    task = tasks.load("mmlu", "test", mirror("cais/mmlu/all/test", MMLU_ROW))
    assert task.unanswered(0).messages == task.conversation(0).messages[:1]


BAD_ROW = {"title": "x"}


@pytest.mark.parametrize(
    ("name", "path", "missing"),
    [
        ("mmlu", "cais/mmlu/all/test", "question, choices, answer"),
        ("arc_easy", "allenai/ai2_arc/ARC-Easy/test", "question, choices, answerKey"),
        ("gsm8k", "openai/gsm8k/main/test", "question, answer"),
        ("smoltalk", "HuggingFaceTB/smol-smoltalk/test", "messages"),
        ("facts", "nanolib/toy-facts/test", "question, answer, others"),
    ],
)
def test_missing_columns_are_named_with_their_file(mirror, name, path, missing):
    repository = "/".join(path.split("/")[:2])
    with pytest.raises(
        ValueError, match=rf"{repository}.*test.*no column {missing}; it has title; take"
    ):
        tasks.load(name, "test", mirror(path, BAD_ROW))


def test_an_unknown_task_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="no task 'hellaswag'; there are arc_easy, "):
        tasks.load("hellaswag", "test", tmp_path)
