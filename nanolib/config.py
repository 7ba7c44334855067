"""Every setting of a run, with its default and its bounds.

A setting is named by its dotted path: TOML ``[base] steps = 100``, CLI ``--base.steps 100``, notebook
``overrides = {"base.steps": 100}``. The recipe is what is computed, a run's identity; the machine is
what computes it, and may differ each time a run is opened.
"""

import dataclasses
import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = REPOSITORY / "runs"
MODELS = ("base", "mid", "sft", "grpo")  # the stages that leave a model, in order
STAGES = ("data", "tokenizer", "shards", *MODELS, "eval", "report")
# What newer settings must be for a recipe that the first edition saved: it lacks them.
FIRST_EDITION = {"optim.every_stage": True}
# What model and optimizer may have on top of the October 2025 architecture, by `model.ingredients`.
INGREDIENTS = {
    "value_embeddings": "every other layer adds a learned vector of each token to its values",
    "x0": "each layer begins with a learned mix of the residual stream and the embedding",
    "smear": "a gated share of the previous token's embedding is added to each token's",
    "backout": "a learned share of the middle layer's residual is taken off before the head",
    "windows": "three layers of four see half of the context",
    "document_mask": "attention does not cross from one document to another",
    "polar_express": "Muon's polynomial changes from iteration to iteration",
    "normuon": "Muon's update has rows of about equal size",
    "cautious_decay": "weight decay of matrices where the update too makes the weight smaller",
    "multi_token": "pretraining's loss has a share, falling to 0, of the token after the next",
}
# Those that leave the model alone.
TRAINING = {"polar_express", "normuon", "cautious_decay", "multi_token"}
NOT_MODERN = {"windows", "document_mask", "multi_token"}
PRESETS = {"classic": (), "modern": tuple(name for name in INGREDIENTS if name not in NOT_MODERN)}
GATE_WIDTH = 16  # numbers of a token's vector that an ingredient's gate looks at


# A type, and its bound as a function and in the words of an error: "base.steps must be ...".
Count = Annotated[int, "at least 1", lambda value: value >= 1]
Limit = Annotated[int, "0 or more, or none for all", lambda value: value >= 0]
Positive = Annotated[float, "more than 0", lambda value: value > 0]
NotNegative = Annotated[float, "0 or more", lambda value: value >= 0]
Fraction = Annotated[float, "a fraction from 0 to 1", lambda value: 0 <= value <= 1]
Terms = Annotated[int, "at least 2", lambda value: value >= 2]
Largest = Annotated[int, "at least 9", lambda value: value >= 9]
HeadDim = Annotated[int, "even (RoPE turns pairs) and not 0", lambda n: n > 0 and n % 2 == 0]
VocabSize = Annotated[int, "at least 265 (256 bytes and 9 special tokens)", lambda n: n >= 265]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Settings:
    """A frozen dataclass whose fields are given by name."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


class DataConfig(Settings):
    source: Literal["toyworld", "hub"] = "hub"  # "hub": the mirror if one is given, else the hub
    repository: str = "karpathy/fineweb-edu-100b-shuffle"  # pretraining text on the hub
    text_shards: Count | None = None  # training shards to use; None: all the mirror has, or enough
    text: str | None = (
        None  # pretraining text of your own: a folder or file of txt, jsonl or parquet
    )
    conversations: str | None = None  # of your own, jsonl: {"messages": [{"role", "content"}, …]}


class TokenizerConfig(Settings):
    vocab_size: VocabSize = 65_536  # rows of the embedding: 256 bytes, merges and special tokens
    max_chars: Count = 2_000_000_000  # text to train on
    max_document_chars: Count = 10_000  # of each document, so that no single one dominates


class ModelConfig(Settings):
    preset: Literal["classic", "modern"] = "classic"  # "classic": the October 2025 architecture
    ingredients: tuple[str, ...] | None = None  # of `INGREDIENTS`; None: the preset's own
    depth: Count = 20
    aspect: Count = 64  # width = aspect * depth, rounded up to a multiple of head_dim
    head_dim: HeadDim = 128
    kv_heads: Count | None = None  # key/value heads (GQA); None: as many as query heads
    sequence_len: Count = 2048  # T: tokens a row, and the longest context

    def __post_init__(self) -> None:
        if unknown := sorted(self.uses - INGREDIENTS.keys()):
            known = f"there are {', '.join(INGREDIENTS)}"
            raise ValueError(f"model.ingredients has {', '.join(unknown)}, but {known}")

    @property
    def uses(self) -> frozenset[str]:
        """The ingredients in use."""
        own = PRESETS[self.preset]
        return frozenset(own if self.ingredients is None else self.ingredients)

    @property
    def architecture(self) -> frozenset[str]:
        """Those of `uses` that change what the model computes from its weights."""
        return self.uses - TRAINING

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings: every other one, among them the last."""
        wanted = "value_embeddings" in self.uses
        return tuple(range((self.depth - 1) % 2, self.depth, 2)) if wanted else ()

    @property
    def short_layers(self) -> tuple[int, ...]:
        """Those with a window: all but every fourth and the last."""
        short = [layer for layer in range(self.depth - 1) if layer % 4 != 3]
        return tuple(short) if "windows" in self.uses else ()

    def extras(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the ingredients' parameters: tables, and scalars for gates and shares."""
        gate, layers, kv_heads = min(GATE_WIDTH, self.width), self.value_layers, self.num_kv_heads
        table = (vocab_size, kv_heads * self.head_dim)
        shapes = {"x0": (self.depth, 2), "smear": (1 + gate,), "backout": (1,)}
        shapes = {name: shape for name, shape in shapes.items() if name in self.uses}
        shapes |= {"value_gates": (len(layers), kv_heads, gate)} if layers else {}
        return shapes | {f"value_embeddings_{layer}": table for layer in layers}

    @property
    def width(self) -> int:
        return math.ceil(self.aspect * self.depth / self.head_dim) * self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def parts(self, vocab_size: int) -> dict[str, int]:
        width, kv_width = self.width, self.num_kv_heads * self.head_dim
        extras = {name: math.prod(shape) for name, shape in self.extras(vocab_size).items()}
        tables = sum(size for name, size in extras.items() if name.startswith("value_emb"))
        more = {"value_embeddings": tables, "scalars": sum(extras.values()) - tables}
        return {
            "embedding": vocab_size * width,
            "attention": self.depth * (2 * width * width + 2 * width * kv_width),
            "mlp": self.depth * 8 * width * width,
            "head": vocab_size * width,
        } | {part: count for part, count in more.items() if count}

    def parameters(self, vocab_size: int) -> int:
        return sum(self.parts(vocab_size).values())


class OptimConfig(Settings):
    """Learning rates at width 768 and stage multiplier 1; see `nanolib.optim`."""

    matrix_lr: float = 0.02  # Muon
    embedding_lr: float = 0.2  # AdamW; scaled by (width / 768) ** -0.5
    head_lr: float = 0.004  # AdamW; scaled likewise
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    weight_decay: float = 0.0  # AdamW, decoupled
    momentum: float = 0.95  # Muon, Nesterov, after its warmup
    momentum_start: float = 0.85
    momentum_warmup: Count = 300  # steps
    newton_schulz_steps: Count = 5
    matrix_decay: float | None = None  # Muon, decoupled; None: 0.1 with cautious_decay, else 0
    clip: Positive | None = 1.0  # global gradient norm
    # True: every stage clips gradients and warms momentum up. False, as in the original: only base
    # clips, only base and mid warm up.
    every_stage: bool = False


class Schedule(Settings):
    """What all training stages share; `nanolib.train.lr_scale` shows the learning rate."""

    enabled: bool = True
    seed: int | None = None  # of this stage's draws; None: the run's
    steps: Count | None = None
    eval_every: Count | None = None  # steps between scores; None: about ten times a stage
    save_every: Count | None = None  # steps between checkpoints; None: about ten times a stage
    lr: Positive = 1.0  # multiplies every learning rate of [optim]
    warmup: Fraction = 0.0  # fraction of the steps
    warmdown: Fraction = 0.2  # fraction of the steps
    final: Fraction = 0.0  # fraction of lr at the end of the last step


class BaseConfig(Schedule):
    tokens_per_parameter: Positive = 20.0  # the horizon, when steps is not given
    batch_tokens: Count = 524_288  # over all ranks and micro-batches
    eval_documents: Count | None = None  # of the validation shard; None: all


class SumsConfig(Settings):
    """How hard the problems of `nanolib.tasks.Sums` are."""

    fewest: Terms = 2  # terms
    most: Terms = 4
    largest: Largest = 9  # term


class Mixture(Settings):
    """Training rows taken from each source: None means all of them, 0 none."""

    smoltalk: Limit | None = None
    mmlu: Limit | None = 0
    arc_easy: Limit | None = None
    arc_challenge: Limit | None = None
    gsm8k: Limit | None = None
    sums: Limit | None = 0  # problems of `nanolib.tasks.Sums`, worked in steps
    mine: Limit | None = None  # of data.conversations; where N is more than there are, they repeat


class ConversationConfig(Schedule):
    """A stage that trains on what the assistant says in a mixture of conversations."""

    epochs: Positive = 1.0  # passes over the mixture, when steps is not given
    batch_tokens: Count = 524_288  # over all ranks and micro-batches, padding included
    rows: Mixture = Mixture()
    sums: SumsConfig = SumsConfig()


class MidConfig(ConversationConfig):
    """Midtraining: conversations, four choices and the tool, at pretraining's rates."""

    rows: Mixture = Mixture(mmlu=100_000, arc_easy=0, arc_challenge=0)


class SFTConfig(ConversationConfig):
    """Supervised finetuning on a small, clean mixture, at low rates."""

    lr: Positive = 0.02
    warmdown: Fraction = 1.0
    batch_tokens: Count = 65_536
    rows: Mixture = Mixture(smoltalk=10_000)


class GRPOConfig(Schedule):
    """Reinforcement learning from graded answers; see `nanolib.grpo`."""

    lr: Positive = 0.05
    warmdown: Fraction = 1.0
    task: str = "gsm8k"  # a task of `nanolib.tasks` that can be graded
    sums: SumsConfig = SumsConfig()  # where that is sums
    epochs: Positive = 1.0  # passes over the task's questions, when steps is not given
    questions: Count = 16  # a step, over all ranks
    samples: Count = 16  # answers to each
    max_new_tokens: Count = 256
    temperature: Positive = 1.0
    top_k: Count | None = 50
    updates_each: Count = 1  # optimizer updates on the same answers; clipped from the second on
    clip: Positive = 0.2  # of the probability ratio, in further updates
    clip_high: Positive | None = None  # of ratios above 1; None: as `clip` (DAPO: 0.28)
    objective: Literal["ppo", "cispo"] = "ppo"  # with clipped ratios, in further updates
    kl: NotNegative = 0.0  # weight of the penalty for leaving the start (0.04 in arXiv:2402.03300)
    deviation: bool = False  # divide a question's advantages by their deviation, as there
    sequence_mean: bool = False  # each answer counts alike, as there; False: each token
    skip_equal: bool = False  # leave out questions whose answers all earn the same (DAPO)
    shuffled: bool = False  # a control: each question's rewards are shuffled among its answers
    eval_questions: Count = 400  # held-out questions in each evaluation
    eval_samples: Count = 8  # of each, for pass@1 to pass@8; with `top_k`, at temperature 1


class EvalConfig(Settings):
    """Scores of every model: bits per byte, CORE, and (from mid on) the tasks."""

    tasks: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    max_problems: Count | None = None  # of each task; None: all
    max_new_tokens: Count = 512  # for answers by generation
    core_problems: Limit | None = None  # of each CORE task; None: all, 0: no CORE


class Recipe(Settings):
    """What is computed; saved in the manifest and in every checkpoint."""

    seed: int = 1
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    base: BaseConfig = BaseConfig()
    mid: MidConfig = MidConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def models(self) -> tuple[str, ...]:
        """The enabled stages that leave a model, in order."""
        return tuple(name for name in MODELS if getattr(self, name).enabled)

    @property
    def road(self) -> tuple[str, ...]:
        """The stages from text to the last model, in order."""
        return ("data", "tokenizer", "shards", *self.models)


class MachineConfig(Settings):
    """What computes it: may differ each time a run is opened."""

    ranks: Count | None = None  # processes; None: one a GPU, or one
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    device_batch: Count | None = None  # rows a micro-batch on one rank; None: the stage's share
    threads: Count | None = None  # CPU threads a rank; None: the cores divided by the ranks
    mirror: str | None = None  # a folder in the mirror's layout instead of the hub
    save_minutes: Positive | None = None  # between checkpoints at most; None: 10 on CUDA, else any
    dollars_per_hour: float | None = None  # of the whole machine, for the report's cost


class Config(Settings):
    profile: str
    recipe: Recipe
    machine: MachineConfig


# Short forms for the command line.
ALIASES = {name: f"machine.{name}" for name in ("mirror", "dollars_per_hour")}
ALIASES |= {"nproc": "machine.ranks", "depth": "model.depth"}
Overrides = Mapping[str, Any] | None  # dotted path or short form -> value


# ---------------------------------------------------------------------------- flat dictionaries


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, a config dataclass or the types of one, as a flat dictionary of paths."""
    hints = typing.get_type_hints(tree, include_extras=True) if isinstance(tree, type) else {}
    flat: dict[str, Any] = {}
    for name, value in (hints or (tree if isinstance(tree, Mapping) else vars(tree))).items():
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


@functools.cache
def settings() -> Mapping[str, Any]:
    """Dotted path -> type of every setting that a profile or an override may name."""
    return flatten(Recipe) | flatten(MachineConfig, "machine.")


def replace_settings(tree: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A config dataclass with the settings that `flat` names; other names are ignored."""
    values: dict[str, Any] = {}
    for name, value in vars(tree).items():
        value = flat.get(prefix + name, value)
        if dataclasses.is_dataclass(value):
            value = replace_settings(value, flat, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(tree, **values)


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "a comma-separated list",
}


def as_text(value: Any) -> str:
    """A setting's value as it is written on the command line: `mmlu,facts`, `none`, `0.5`."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """`value`, given as text or as a Python value, as the type of setting `path`."""
    optional, text = type(None) in typing.get_args(hint), as_text(value)
    if optional and text.lower() in ("none", "null"):
        return None
    kind = typing.get_args(hint)[0] if optional else hint
    is_bounded = typing.get_origin(kind) is Annotated
    kind, bound, holds = typing.get_args(kind) if is_bounded else (kind, "", lambda _: True)
    try:
        converted = _convert(kind, text)
    except (ValueError, KeyError, OverflowError):
        words = KINDS.get(kind) or f"one of {', '.join(typing.get_args(kind))}"
        got = "none" if value is None else repr(value)
        raise ValueError(f"{path} must be {words}{' or none' * optional}, got {got}") from None
    if not holds(converted):
        raise ValueError(f"{path} must be {bound}, got {value}")
    return converted


def _convert(kind: Any, text: str) -> Any:
    """`text` as one of KINDS or a Literal; any error means that it is none of that kind."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (int, float):
        number = kind(float(text))  # "1e3" is whole; int refuses infinity and nan
        if number != float(text) or not math.isfinite(number):
            raise ValueError
        return number
    if kind == tuple[str, ...]:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    if text not in (typing.get_args(kind) or [text]):
        raise ValueError
    return text


def check_overrides(overrides: Overrides) -> dict[str, Any]:
    """Overrides with aliases resolved and values coerced; ValueError for an unknown path or value."""
    known, checked = settings(), {}
    for path, value in (overrides or {}).items():
        path = ALIASES.get(path, path)
        if path not in known:
            close = " or ".join(difflib.get_close_matches(path, known, n=3))
            hint = f"; did you mean {close}?" if close else ""
            raise ValueError(f"there is no setting {path!r}{hint} (`nanolib settings` lists all)")
        checked[path] = _coerce(path, known[path], value)
    return checked


def split_settings(arguments: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Settings (``--base.steps 9``, ``--nproc=2``) apart from a command's own words."""
    words, given, rest = [], {}, iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        path = name.replace("-", "_")
        if not word.startswith("--") or not ("." in path or path in {*settings(), *ALIASES}):
            words.append(word)
            continue
        given[path] = value if equals else next(rest, "--")
        if given[path].startswith("--"):
            raise ValueError(f"--{name} needs a value")
    overrides = check_overrides(given)
    for path in ("machine.mirror", "data.text", "data.conversations"):
        if place := overrides.get(path):
            overrides[path] = str(Path(place).expanduser().absolute())
    return words, overrides


# ---------------------------------------------------------------------------- profiles


def profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(profile: str) -> dict[str, Any]:
    """The flat settings of ``runs/<profile>.toml``, checked."""
    path = PROFILES / f"{profile}.toml"
    if profile not in profiles():
        raise ValueError(f"there is no profile {profile!r}; there are {', '.join(profiles())}")
    try:
        return check_overrides(flatten(tomllib.loads(path.read_text())))
    except (ValueError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def resolve(profile: str, overrides: Overrides = None) -> Config:
    """A profile with overrides; ValueError for what is unknown or contradicts something else."""
    return from_flat(profile, load_profile(profile) | check_overrides(overrides))


def from_flat(profile: str, flat: Mapping[str, Any]) -> Config:
    """A complete configuration from checked flat settings (a profile's or a manifest's)."""
    recipe = replace_settings(Recipe(), flat)
    machine = replace_settings(MachineConfig(), flat, "machine.")
    check_together(recipe, machine)
    base = recipe.base
    # Value embeddings do not lengthen the horizon: presets see the same number of tokens.
    parts = recipe.model.parts(recipe.tokenizer.vocab_size)
    tokens = base.tokens_per_parameter * (sum(parts.values()) - parts.get("value_embeddings", 0))
    steps = base.steps or math.ceil(tokens / base.batch_tokens)
    every = max(1, steps // 10)
    derived = {"eval_every": base.eval_every or every, "save_every": base.save_every or every}
    base = dataclasses.replace(base, steps=steps, **derived)
    return Config(profile=profile, recipe=dataclasses.replace(recipe, base=base), machine=machine)


def check_together(recipe: Recipe, machine: MachineConfig) -> None:
    """Raise ValueError for settings that contradict, with their values and what would do."""
    model, ranks, row = recipe.model, machine.ranks or 1, recipe.model.sequence_len
    heads, kv_heads, questions = model.heads, model.kv_heads, recipe.grpo.questions
    if heads % model.num_kv_heads:
        raise ValueError(f"model.kv_heads must divide the {heads} query heads, got {kv_heads}")
    if machine.mirror is not None and recipe.data.source == "toyworld":
        own = f"machine.mirror is {machine.mirror}, but data.source = toyworld makes its own text"
        raise ValueError(f"{own}; leave the mirror out, or choose data.source = hub")
    for name in MODELS:
        stage = getattr(recipe, name)
        if (both := stage.warmup + stage.warmdown) > 1:
            raise ValueError(f"{name}.warmup + {name}.warmdown must be at most 1, got {both}")
        if name != "base" and stage.sums.most < stage.sums.fewest:
            least = f"{name}.sums.fewest ({stage.sums.fewest})"
            raise ValueError(f"{name}.sums.most must be at least {least}, got {stage.sums.most}")
        if name in ("mid", "sft") and stage.rows.mine and recipe.data.conversations is None:
            mine = f"{name}.rows.mine is {stage.rows.mine}, and data.conversations names no file"
            raise ValueError(f"{mine}; give one")
        setting, tokens = f"{name}.batch_tokens", getattr(stage, "batch_tokens", row * ranks)
        if tokens % row:
            raise ValueError(
                f"{setting} must be a multiple of model.sequence_len ({row}), got {tokens}"
            )
        if tokens // row % ranks:
            rows = f"{setting} = {tokens} makes {tokens // row} rows, which {ranks} ranks cannot"
            raise ValueError(f"{rows} share equally; choose machine.ranks or {setting} to fit")
    if recipe.grpo.enabled and questions < ranks:
        raise ValueError(
            f"grpo.questions must be at least 1 for each of {ranks} ranks, got {questions}"
        )
    if recipe.grpo.enabled and not (recipe.mid.enabled or recipe.sft.enabled):
        raise ValueError(
            "grpo.enabled needs a model that answers: enable mid or sft, or turn it off"
        )


# ---------------------------------------------------------------------------- identity


def up_to(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The flat settings that a stage's (not eval's) result depends on: its own and earlier ones."""
    order = ("seed", "data", "tokenizer", "model", "optim", *MODELS)
    last = "tokenizer" if stage == "shards" else stage
    sections = order[: order.index(last) + 1]
    flat = flatten(recipe)
    if stage not in MODELS[1:]:
        del flat["data.conversations"]
    return {path: value for path, value in flat.items() if path.split(".")[0] in sections}


def recipe_difference(mine: Recipe, theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path, mine, theirs) for every setting in which a recipe and a saved flat one differ."""
    flat = flatten(mine)
    paths = sorted(flat.keys() | theirs.keys())
    return [(p, flat.get(p), theirs.get(p)) for p in paths if flat.get(p) != theirs.get(p)]
