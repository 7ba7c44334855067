"""Settings: one name everywhere, checked on the way in, complete on the way out."""

import dataclasses
import json

import pytest

from nanolib import config
from nanolib.config import INGREDIENTS, MODELS, PRESETS, ModelConfig, Recipe, flatten, resolve


def test_the_original_at_depth_20():
    model = ModelConfig(depth=20)
    assert (model.width, model.heads, model.num_kv_heads) == (1280, 10, 10)
    assert model.parameters(65_536) == 560_988_160
    base = config.from_flat("d20", {}).recipe.base
    assert base.steps == -(-20 * 560_988_160 // 524_288)  # 11.2 billion tokens


@pytest.mark.parametrize(
    "depth, aspect, head_dim, width, heads",
    [(12, 64, 128, 768, 6), (11, 64, 128, 768, 6), (1, 64, 128, 128, 1), (4, 32, 32, 128, 4)],
)
def test_the_dial_rounds_the_width_up_to_whole_heads(depth, aspect, head_dim, width, heads):
    model = ModelConfig(depth=depth, aspect=aspect, head_dim=head_dim)
    assert (model.width, model.heads) == (width, heads)


def test_learning_rates_of_each_stage_fall_as_in_the_original():
    """Constant for 80 % and then down to 0 in base and mid, down from the first step after them."""
    recipe = config.from_flat("d20", {}).recipe
    shapes = {name: getattr(recipe, name) for name in config.MODELS}
    found = {name: (s.lr, s.warmup, s.warmdown, s.final) for name, s in shapes.items()}
    assert found == {
        "base": (1.0, 0.0, 0.2, 0.0),
        "mid": (1.0, 0.0, 0.2, 0.0),
        "sft": (0.02, 0.0, 1.0, 0.0),
        "grpo": (0.05, 0.0, 1.0, 0.0),
    }
    assert resolve("d32").recipe.tokenizer.max_chars == 4_000_000_000


@pytest.mark.parametrize("profile", config.profiles())
def test_every_profile_resolves_and_survives_the_manifest(profile):
    resolved = resolve(profile)
    saved = json.loads(json.dumps(flatten(resolved.recipe)))
    assert config.from_flat(profile, config.check_overrides(saved)).recipe == resolved.recipe
    assert not config.recipe_difference(resolved.recipe, saved)
    assert resolved.recipe.base.steps and resolved.recipe.base.eval_every


def test_flat_names_cover_everything_and_no_stage_is_optional():
    paths = set(flatten(Recipe())) | {
        f"machine.{f.name}" for f in dataclasses.fields(config.MachineConfig)
    }
    assert paths == set(config.settings())


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "path, given, value",
    [
        ("base.steps", "1_000", 1000),
        ("base.steps", 10.0, 10),
        ("base.steps", "1e3", 1000),
        ("base.steps", "none", None),
        ("base.lr", "0.5", 0.5),
        ("base.lr", 1, 1.0),
        ("base.enabled", "false", False),
        ("base.enabled", "True", True),
        ("data.source", "toyworld", "toyworld"),
        ("machine.mirror", "/a b", "/a b"),
        ("mirror", "x", "x"),
        ("nproc", "2", 2),
        ("depth", "26", 26),
        ("eval.tasks", "mmlu, facts", ("mmlu", "facts")),
        ("eval.tasks", ["mmlu"], ("mmlu",)),
        ("machine.mirror", "none", None),
        ("model.ingredients", "none", None),
        ("model.ingredients", "x0, smear", ("x0", "smear")),
    ],
)
def test_values_are_coerced(path, given, value):
    (coerced,) = config.check_overrides({path: given}).values()
    assert coerced == value and type(coerced) is type(value)


@pytest.mark.parametrize(
    "path, given, message",
    [
        ("base.steps", "many", r"base\.steps must be a whole number or none, got 'many'"),
        ("base.steps", 1.5, r"base\.steps must be a whole number or none, got 1\.5"),
        ("base.steps", True, r"base\.steps must be a whole number or none, got True"),
        ("base.lr", "nan", r"base\.lr must be a number, got 'nan'"),
        ("seed", None, r"seed must be a whole number, got none"),
        ("base.enabled", "maybe", r"base\.enabled must be true or false, got 'maybe'"),
        ("base.enabled", 1, r"base\.enabled must be true or false, got 1"),
        ("data.source", "web", r"data\.source must be one of toyworld, hub, got 'web'"),
        ("base.step", 1, r"no setting 'base\.step'; did you mean base\.steps"),
        ("xyzzy", 1, r"no setting 'xyzzy' \(`nanolib settings`"),
    ],
)
def test_other_values_and_names_are_refused(path, given, message):
    with pytest.raises(ValueError, match=message):
        config.check_overrides({path: given})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.depth": 0}, r"model\.depth must be at least 1, got 0"),
        ({"base.steps": 0}, r"base\.steps must be at least 1, got 0"),
        ({"base.batch_tokens": -256}, r"base\.batch_tokens must be at least 1"),
        ({"machine.ranks": 0}, r"machine\.ranks must be at least 1, got 0"),
        ({"tokenizer.vocab_size": 264}, r"vocab_size must be at least 265 .* got 264"),
        ({"model.head_dim": 15}, r"head_dim must be even .* got 15"),
        ({"eval.core_problems": -1}, r"eval\.core_problems must be 0 or more"),
        ({"grpo.temperature": 0}, r"grpo\.temperature must be more than 0"),
        ({"model.kv_heads": 3}, r"kv_heads must divide the 2 query heads, got 3"),
        ({"base.batch_tokens": 1000}, r"multiple of model\.sequence_len \(128\), got 1000"),
        ({"sft.batch_tokens": 64}, r"sft\.batch_tokens must be a multiple"),
        ({"model.ingredients": "x0,y0"}, r"ingredients has y0, but there are value_emb.*, x0, "),
        ({"base.save_every": 0}, r"base\.save_every must be at least 1, got 0"),
        ({"machine.threads": 0}, r"machine\.threads must be at least 1, got 0"),
        ({"sft.epochs": 0}, r"sft\.epochs must be more than 0"),
        ({"sft.rows.mmlu": -1}, r"sft\.rows\.mmlu must be 0 or more"),
        ({"base.warmdown": 1.5}, r"base\.warmdown must be a fraction"),
        ({"base.warmup": 0.7, "base.warmdown": 0.7}, r"warmup \+ base\.warmdown must be at most 1"),
        ({"mirror": "/there"}, r"machine\.mirror is /there, but data\.source = toyworld"),
        ({"grpo.kl": -0.1}, r"grpo\.kl must be 0 or more, got -0.1"),
        ({"sft.sums.fewest": 1}, r"sft\.sums\.fewest must be at least 2, got 1"),
        ({"grpo.sums.largest": 8}, r"grpo\.sums\.largest must be at least 9, got 8"),
        ({"grpo.sums.fewest": 6}, r"sums\.most must be at least grpo.sums.fewest \(6\), got 4"),
        ({"machine.ranks": 3}, r"1024 makes 8 rows, which 3 ranks cannot .* machine\.ranks or"),
    ],
)
def test_settings_that_contradict_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve("smoke", overrides)


# ---------------------------------------------------------------------------- profiles


def test_a_preset_has_ingredients_that_a_list_replaces():
    assert ModelConfig().uses == frozenset() == ModelConfig().architecture
    assert ModelConfig(preset="modern").uses == set(PRESETS["modern"]) <= set(INGREDIENTS)
    assert ModelConfig(preset="modern", ingredients=()).uses == frozenset()
    some = ModelConfig(ingredients=("x0", "polar_express"))
    assert some.uses == {"x0", "polar_express"} and some.architecture == {"x0"}
    with pytest.raises(ValueError, match=r"ingredients has none, words, but there are"):
        ModelConfig(ingredients=("words", "none"))
    with pytest.raises(
        ValueError, match=r"has backout, but .*; commit \w{7} is the last with backout$"
    ):
        ModelConfig(ingredients=("backout", "x0"))
    with pytest.raises(ValueError, match=r"preset must be one of classic, modern, got 'old'"):
        resolve("smoke", {"model.preset": "old"})


def test_value_embeddings_do_not_lengthen_the_horizon():
    steps = [
        resolve("smoke", {"model.preset": preset, "base.steps": None}).recipe.base.steps
        for preset in ("classic", "modern")
    ]
    assert steps[0] <= steps[1] <= steps[0] + 2


def test_unknown_and_broken_profiles(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no profile 'dmeo'; there are .*demo.*smoke"):
        resolve("dmeo")
    with pytest.raises(ValueError, match="no profile"):
        resolve("../runs/demo")
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    (tmp_path / "a.toml").write_text("[base\n")
    (tmp_path / "b.toml").write_text("[base]\nstep = 1\n")
    for name in "ab":
        with pytest.raises(ValueError, match=rf"{name}\.toml"):
            resolve(name)


def test_overrides_win_and_derive():
    assert resolve("smoke", {"base.steps": 300}).recipe.base.eval_every == 30
    derived = resolve("smoke", {"base.steps": None, "base.tokens_per_parameter": 1}).recipe
    parameters = derived.model.parameters(derived.tokenizer.vocab_size)
    assert derived.base.steps == -(-parameters // derived.base.batch_tokens)


def test_differences():
    assert config.recipe_difference(Recipe(), flatten(Recipe())) == []
    theirs = flatten(Recipe(seed=2))
    assert config.recipe_difference(Recipe(seed=3), theirs) == [("seed", 3, 2)]


def test_a_stage_depends_on_its_own_settings_and_on_those_before_it():
    sections = {
        stage: {path.split(".")[0] for path in config.up_to(Recipe(), stage)}
        for stage in ("data", "tokenizer", "shards", *MODELS)
    }
    assert sections["data"] == {"seed", "data"}
    assert sections["shards"] == sections["tokenizer"] == {"seed", "data", "tokenizer"}
    assert sections["base"] == sections["shards"] | {"model", "optim", "base"}
    assert sections["grpo"] == sections["base"] | {"mid", "sft", "grpo"}


def test_values_as_text():
    assert [*map(config.as_text, (["mmlu", "facts"], None, 0.5))] == ["mmlu,facts", "none", "0.5"]


def test_settings_are_told_apart_from_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, overrides = config.split_settings(
        ["stage", "--base.batch-tokens=1024", "sft", "--seed", "-1", "--mirror", "pack"]
    )
    assert words == ["stage", "sft"]
    assert overrides == {
        "base.batch_tokens": 1024,
        "seed": -1,
        "machine.mirror": str(tmp_path / "pack"),
    }
