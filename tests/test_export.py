"""The exported model and tokenizer, loaded by transformers, against ours."""

from __future__ import annotations

import json

import pytest
import torch
from test_model import CPU, tiny
from test_session import run_with_models  # noqa: F401  (a fixture)
from torch.testing import assert_close

from nanolib import export
from nanolib.conversation import Conversation
from nanolib.engine import Engine
from nanolib.model import GPT
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer

TEXTS = [
    "The cat sat on the mat; the rat, on 12345 hats.",
    "We'll see IT'S done\r\n\r\n   x\t\ty  \n\n z   ",
    "naïve 猫 🐈‍⬛ ½ ²³ ١٢٣ Ünïcödé\u00a0space\u2003em\u0085nel\x1c",
    "def f(x):\n    return x ** 2  # it's $4.50!!!\n",
    "",
]


@pytest.fixture(scope="module")
def transformers():
    import transformers  # 5 to 10 s, once

    return transformers


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text.lower() + text for text in TEXTS] * 3, 320)


@pytest.fixture(scope="module", params=[None, 2], ids=["all-heads", "grouped"])
def exported(request, tokenizer, tmp_path_factory):
    """A model with every weight drawn at random, and the folder it was written to."""
    model = GPT.build(tiny(kv_heads=request.param, sequence_len=64), tokenizer.vocab_size, CPU, 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 2 * weight.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("export") / "model"
    export.write(model, tokenizer, folder)
    return model, folder


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [Conversation.ask(text).prompt(tokenizer) for text in TEXTS[:2]]


def test_transformers_computes_the_same_logits(transformers, exported, tokenizer):
    model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    ids = torch.randint(tokenizer.vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)
        assert ours.abs().max() > 2, "the comparison must have something to compare"
        assert_close(theirs(ids).logits, ours, rtol=0, atol=1e-4)


def test_transformers_writes_the_same_greedy_text(transformers, exported, tokenizer):
    model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(model, tokenizer, Runtime(device=CPU, dtype=torch.float32))
    for prompt in prompts(tokenizer):
        room = min(24, engine.context - len(prompt))
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=room, do_sample=False)
        said = [token for token in out[0, len(prompt) :].tolist() if token not in engine.ends]
        assert [said] == engine.complete([prompt], max_new_tokens=room)
        assert len(said) > 1


def test_tokenizer_gives_the_same_ids_and_text(transformers, exported, tokenizer):
    _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    for name in ("<|bos|>", "<|assistant_end|>", "<|output_end|>"):
        assert theirs.convert_tokens_to_ids(name) == tokenizer.special(name)


def test_chat_template_is_the_grammar(transformers, exported, tokenizer):
    _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the cat?"},
        {"role": "assistant", "content": "on the mat"},
        {"role": "user", "content": "  the rat? "},
    ]
    for start in (0, 1):
        asked = messages[start:]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids == Conversation.from_messages(asked).prompt(tokenizer)
        whole = theirs.apply_chat_template(asked[:-1], return_dict=False)
        assert whole == Conversation.from_messages(asked[:-1]).render(tokenizer).ids


def test_a_folder_with_something_else_is_not_overwritten(exported, tokenizer, tmp_path):
    model, folder = exported
    export.write(model, tokenizer, folder)  # an earlier export is replaced
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no earlier export; give another --out"):
        export.write(model, tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["thesis.txt"]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == tokenizer.vocab_size


def test_a_model_with_ingredients_is_refused_by_their_names(tokenizer, tmp_path):
    def model(*ingredients: str) -> GPT:
        return GPT.build(tiny(ingredients=ingredients), tokenizer.vocab_size, CPU, 0)

    with pytest.raises(ValueError, match="cannot be exported: it has smear, x0, and transformers"):
        export.write(model("x0", "smear", "polar_express"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.write(
        model("polar_express"), tokenizer, tmp_path / "out"
    )  # a classic model, trained otherwise


def test_a_runs_newest_model_is_exported(run_with_models, transformers):  # noqa: F811
    run, models = run_with_models("base", "sft")
    assert export.export(run) == run.path / "export"
    for of, folder in (("sft", run.path / "export"), ("base", run.path / "elsewhere")):
        if of == "base":
            export.export(run, of, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert_close(theirs.lm_head.weight.detach(), models[of].head.weight.detach())
    run, _ = run_with_models("base")
    assert export.export(run).is_dir()
    with pytest.raises(ValueError, match=r"has no sft model to export yet; .* \(it has base\)"):
        export.export(run, "sft")
    run, _ = run_with_models()
    with pytest.raises(ValueError, match=r"no trained model to export yet; .* \(it has none\)"):
        export.export(run)
