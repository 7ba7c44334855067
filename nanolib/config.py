"""Every setting of a run, with its default and its bounds.

A setting is named by its dotted path: TOML ``[base] steps = 100``, CLI ``--base.steps 100``, notebook
``overrides = {"base.steps": 100}``. Recipe settings define the result and identify the run; machine
settings say where and how it is computed, and may change each time a run is opened.
"""

import dataclasses
import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = REPOSITORY / "runs"
MODELS = ("base", "mid", "sft", "grpo")  # stages that train a model, in order
STAGES = ("data", "tokenizer", "shards", *MODELS, "eval", "report")
# Values for settings that are missing from recipes saved by the first edition.
FIRST_EDITION = {"optim.every_stage": True}
# Optional additions to the October 2025 model and optimizer, chosen by `model.ingredients`.
INGREDIENTS = {
    "value_embeddings": "every other layer adds a learned token embedding to its attention values",
    "x0": "each layer's input is a learned mix of the residual stream and the token embedding",
    "smear": "adds a gated fraction of the previous token's embedding to each token's embedding",
    "windows": "three of every four layers attend to only half the context",
    "document_mask": "attention does not cross document boundaries",
    "polar_express": "Muon uses a different polynomial in each orthogonalisation step",
    "cautious_decay": "matrix weights decay only where the update also shrinks them",
}
# Ingredients that change training but not the forward pass.
TRAINING = {"polar_express", "cautious_decay"}
NOT_MODERN = {"windows", "document_mask"}
# Ingredients that gained too little for their lines (runs/bench/ablations.md), with the last commit that has them.
REMOVED = {"backout": "e5da0fd", "normuon": "e5da0fd", "multi_token": "5511be9"}
PRESETS = {"classic": (), "modern": tuple(name for name in INGREDIENTS if name not in NOT_MODERN)}
GATE_WIDTH = 16  # leading channels of a token's vector that feed a gate
ENCLOSED = ("user", "assistant", "python", "output")  # each has a start and an end token
SPECIAL_TOKENS = ("<|bos|>", *(f"<|{it}_{end}|>" for it in ENCLOSED for end in ("start", "end")))
FEWEST_TOKENS = 256 + len(SPECIAL_TOKENS)

# A type, its bound in the words of an error ("base.steps must be ..."), and a check of it.
Count = Annotated[int, "at least 1", lambda value: value >= 1]
Limit = Annotated[int, "0 or more, or none for all", lambda value: value >= 0]
Positive = Annotated[float, "more than 0", lambda value: value > 0]
NotNegative = Annotated[float, "0 or more", lambda value: value >= 0]
Fraction = Annotated[float, "a fraction from 0 to 1", lambda value: 0 <= value <= 1]
Terms = Annotated[int, "at least 2", lambda value: value >= 2]
Largest = Annotated[int, "at least 9", lambda value: value >= 9]
HeadDim = Annotated[int, "even (RoPE rotates pairs) and not 0", lambda n: n > 0 and n % 2 == 0]
VOCAB_BOUND = f"at least {FEWEST_TOKENS} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
VocabSize = Annotated[int, VOCAB_BOUND, lambda value: value >= FEWEST_TOKENS]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Settings:
    """Base class: makes each subclass a frozen, keyword-only dataclass."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


class DataConfig(Settings):
    source: Literal["toyworld", "hub"] = "hub"  # "hub": machine.mirror if set, else the hub
    repository: str = "karpathy/fineweb-edu-100b-shuffle"  # pretraining text on the hub
    text_shards: Count | None = None  # training shards; None: all of a mirror, else enough
    text: str | None = None  # your own pretraining text: a folder or file of txt, jsonl or parquet
    drop_contaminated: bool = False  # leave out texts that share 13 words with a test problem
    conversations: str | None = None  # your own, jsonl: {"messages": [{"role", "content"}, …]}


class TokenizerConfig(Settings):
    vocab_size: VocabSize = 65_536  # bytes, merges and special tokens
    max_chars: Count = 2_000_000_000  # total text to train on
    max_document_chars: Count = 10_000  # per document, so that no single one dominates


class ModelConfig(Settings):
    preset: Literal["classic", "modern"] = "classic"  # "classic": the October 2025 architecture
    ingredients: tuple[str, ...] | None = None  # from `INGREDIENTS`; None: the preset's
    depth: Count = 20
    aspect: Count = 64  # width = aspect * depth, rounded up to a multiple of head_dim
    head_dim: HeadDim = 128
    kv_heads: Count | None = None  # key/value heads (GQA); None: as many as query heads
    sequence_len: Count = 2048  # T: tokens per row, and the maximum context

    def __post_init__(self) -> None:
        if unknown := sorted(self.uses - INGREDIENTS.keys()):
            known = f"there are {', '.join(INGREDIENTS)}"
            for name in sorted(REMOVED.keys() & set(unknown)):
                known += f"; commit {REMOVED[name]} is the last with {name}"
            raise ValueError(f"model.ingredients has {', '.join(unknown)}, but {known}")

    @property
    def uses(self) -> frozenset[str]:
        """The ingredients in use."""
        own = PRESETS[self.preset]
        return frozenset(own if self.ingredients is None else self.ingredients)

    @property
    def architecture(self) -> frozenset[str]:
        """The ingredients in use that change the forward pass."""
        return self.uses - TRAINING

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings: every other one, ending with the last."""
        wanted = "value_embeddings" in self.uses
        return tuple(range((self.depth - 1) % 2, self.depth, 2)) if wanted else ()

    @property
    def short_layers(self) -> tuple[int, ...]:
        """The layers with a short attention window: all but every fourth and the last."""
        short = [layer for layer in range(self.depth - 1) if layer % 4 != 3]
        return tuple(short) if "windows" in self.uses else ()

    def extras(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that ingredients add: tables, gates and scalars."""
        gate, layers, kv_heads = min(GATE_WIDTH, self.width), self.value_layers, self.num_kv_heads
        table = (vocab_size, kv_heads * self.head_dim)
        shapes = {"x0": (self.depth, 2), "smear": (1 + gate,)}
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
        tables = len(self.value_layers) * vocab_size * kv_width
        scalars = sum(map(math.prod, self.extras(vocab_size).values())) - tables
        more = {"value_embeddings": tables, "scalars": scalars}
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
    momentum: float = 0.95  # Muon, Nesterov; the value after warmup
    momentum_start: float = 0.85
    momentum_warmup: Count = 300  # steps
    newton_schulz_steps: Count = 5
    matrix_decay: float | None = None  # Muon, decoupled; None: 0.1 with cautious_decay, else 0
    clip: Positive | None = 1.0  # global gradient norm
    # True: every stage clips gradients and warms up momentum. False, as in nanochat: only base
    # clips, and only base and mid warm up.
    every_stage: bool = False


class Schedule(Settings):
    """Settings of every training stage; see `nanolib.train.lr_scale` for the learning rate."""

    enabled: bool = True
    seed: int | None = None  # for this stage; None: the run's seed
    steps: Count | None = None
    eval_every: Count | None = None  # steps between evaluations; None: about ten per stage
    save_every: Count | None = None  # steps between saves; None: ten, on CUDA at least 30 s apart
    lr: Positive = 1.0  # multiplies every learning rate of [optim]
    warmup: Fraction = 0.0  # fraction of the steps
    warmdown: Fraction = 0.2  # fraction of the steps
    final: Fraction = 0.0  # fraction of lr left after the last step


class BaseConfig(Schedule):
    tokens_per_parameter: Positive = 20.0  # sets the steps if they are not given
    batch_tokens: Count = 524_288  # over all ranks and micro-batches
    eval_documents: Count | None = None  # from the validation shard; None: all


class SumsConfig(Settings):
    """Difficulty of the problems in `nanolib.tasks.Sums`."""

    fewest: Terms = 2  # number of terms
    most: Terms = 4
    largest: Largest = 9  # value of a term


class Mixture(Settings):
    """Number of training rows from each source: None means all, 0 none."""

    smoltalk: Limit | None = None
    mmlu: Limit | None = 0
    arc_easy: Limit | None = None
    arc_challenge: Limit | None = None
    gsm8k: Limit | None = None
    sums: Limit | None = 0  # problems from `nanolib.tasks.Sums`, solved step by step
    mine: Limit | None = None  # from data.conversations; repeated if there are fewer


class ConversationConfig(Schedule):
    """A stage that trains on the assistant's tokens in a mixture of conversations."""

    epochs: Positive = 1.0  # passes over the mixture, when steps is not given
    batch_tokens: Count = 524_288  # over all ranks and micro-batches, padding included
    rows: Mixture = Mixture()
    sums: SumsConfig = SumsConfig()


class MidConfig(ConversationConfig):
    """Midtraining: chat, multiple choice and tool use, at the learning rates of pretraining."""

    rows: Mixture = Mixture(mmlu=100_000, arc_easy=0, arc_challenge=0)


class SFTConfig(ConversationConfig):
    """Supervised fine-tuning on a small, clean mixture, at low learning rates."""

    lr: Positive = 0.02
    warmdown: Fraction = 1.0
    batch_tokens: Count = 65_536
    rows: Mixture = Mixture(smoltalk=10_000)


class GRPOConfig(Schedule):
    """Reinforcement learning from graded answers; see `nanolib.grpo`."""

    lr: Positive = 0.05
    warmdown: Fraction = 1.0
    task: str = "gsm8k"  # a graded task of `nanolib.tasks`
    sums: SumsConfig = SumsConfig()  # used if task is sums
    epochs: Positive = 1.0  # passes over the task's questions, when steps is not given
    questions: Count = 16  # per step, over all ranks
    samples: Count = 16  # answers per question
    max_new_tokens: Count = 256
    temperature: Positive = 1.0
    top_k: Count | None = 50
    updates_each: Count = 1  # updates per rollout; the ratio is clipped from the second on
    clip: Positive = 0.2  # bound on the probability ratio, from the second update on
    clip_high: Positive | None = None  # upper bound; None: same as `clip` (DAPO: 0.28)
    objective: Literal["ppo", "cispo"] = "ppo"  # from the second update on
    kl: NotNegative = 0.0  # weight of the KL to the initial policy (0.04 in arXiv:2402.03300)
    deviation: bool = False  # divide advantages by each question's std, as in that paper
    sequence_mean: bool = False  # average per answer, as in that paper; False: over tokens
    skip_equal: bool = False  # skip questions whose answers all get the same reward (DAPO)
    shuffled: bool = False  # control experiment: shuffle rewards among a question's answers
    eval_questions: Count = 400  # held-out questions per evaluation
    eval_samples: Count = 8  # per question, for pass@1 to pass@8; temperature 1, with `top_k`


class EvalConfig(Settings):
    """What each model is scored on: bits per byte, CORE, and (from mid on) tasks."""

    tasks: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    max_problems: Count | None = None  # per task; None: all
    max_new_tokens: Count = 512  # for generated answers
    core_problems: Limit | None = None  # per CORE task; None: all, 0: skip CORE


class Recipe(Settings):
    """Settings that define the result; saved in the manifest and in every checkpoint."""

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
        """The enabled stages that produce a model, in order."""
        return tuple(name for name in MODELS if getattr(self, name).enabled)

    @property
    def road(self) -> tuple[str, ...]:
        """The stages from text to the last model, in order."""
        return ("data", "tokenizer", "shards", *self.models)


class MachineConfig(Settings):
    """Where and how a run is computed; may change each time it is opened."""

    ranks: Count | None = None  # processes on a node; None: one per GPU, or one on CPU
    nodes: Count = 1  # machines with a shared disk, each running the command; see runs/launch/
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    device_batch: Count | None = None  # rows per micro-batch on a rank; None: all of its rows
    threads: Count | None = None  # CPU threads per rank; None: cores / ranks
    mirror: str | None = None  # a local mirror folder to use instead of the hub
    save_minutes: Positive | None = None  # longest time between saves; None: 10 on CUDA only
    dollars_per_hour: float | None = None  # for the whole machine; used in the report


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
    """A flat {dotted path: value} from nested dicts or a config (from its class: types)."""
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
    """{dotted path: type} of every setting that a profile or an override can set."""
    return flatten(Recipe) | flatten(MachineConfig, "machine.")


def replace_settings(tree: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of a config dataclass with the values in `flat`; unknown paths are ignored."""
    values: dict[str, Any] = {}
    for name, value in vars(tree).items():
        value = flat.get(prefix + name, value)
        if dataclasses.is_dataclass(value):
            value = replace_settings(value, flat, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(tree, **values)


def _number(kind: type, text: str) -> float:
    number = kind(float(text))  # accepts "1e3" as an int; int() rejects inf and nan
    if number != float(text) or not math.isfinite(number):
        raise ValueError
    return number


# A type, in words and as a conversion from text that raises if it does not parse.
KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", functools.partial(_number, int)),
    float: ("a number", functools.partial(_number, float)),
    str: ("text", str),
    tuple[str, ...]: (
        "a comma-separated list",
        lambda text: tuple(filter(None, map(str.strip, text.split(",")))),
    ),
}


def as_text(value: Any) -> str:
    """A value in command-line syntax, such as `mmlu,facts`, `none` or `0.5`."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """Convert `value`, text or a Python value, to the type of setting `path`, and check it."""
    optional, text = type(None) in typing.get_args(hint), as_text(value)
    if optional and text.lower() in ("none", "null"):
        return None
    kind = typing.get_args(hint)[0] if optional else hint
    is_bounded = typing.get_origin(kind) is Annotated
    kind, bound, holds = typing.get_args(kind) if is_bounded else (kind, "", lambda _: True)
    choices = {choice: choice for choice in typing.get_args(kind)}  # of a Literal
    words, convert = KINDS.get(kind) or (f"one of {', '.join(choices)}", choices.__getitem__)
    try:
        converted = convert(text)
    except (ValueError, KeyError, OverflowError):
        got = "none" if value is None else repr(value)
        raise ValueError(f"{path} must be {words}{' or none' * optional}, got {got}") from None
    if not holds(converted):
        raise ValueError(f"{path} must be {bound}, got {value}")
    return converted


def check_overrides(overrides: Overrides) -> dict[str, Any]:
    """Resolve aliases and convert values; ValueError for an unknown path or a bad value."""
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
    """Split a command line into other words and settings (``--base.steps 9``, ``--nproc=2``)."""
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
        if folder := overrides.get(path):
            overrides[path] = str(Path(folder).expanduser().absolute())
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
    """A profile with overrides applied; ValueError for unknown or conflicting settings."""
    return from_flat(profile, load_profile(profile) | check_overrides(overrides))


def from_flat(profile: str, flat: Mapping[str, Any]) -> Config:
    """A complete configuration from checked flat settings (a profile's or a manifest's)."""
    recipe = replace_settings(Recipe(), flat)
    machine = replace_settings(MachineConfig(), flat, "machine.")
    check_together(recipe, machine)
    base = recipe.base
    # Value embeddings are not counted, so that all presets train on the same number of tokens.
    parts = recipe.model.parts(recipe.tokenizer.vocab_size)
    tokens = base.tokens_per_parameter * (sum(parts.values()) - parts.get("value_embeddings", 0))
    steps = base.steps or math.ceil(tokens / base.batch_tokens)
    every = max(1, steps // 10)
    derived = {"eval_every": base.eval_every or every, "save_every": base.save_every or every}
    base = dataclasses.replace(base, steps=steps, **derived)
    return Config(profile=profile, recipe=dataclasses.replace(recipe, base=base), machine=machine)


def check_together(recipe: Recipe, machine: MachineConfig) -> None:
    """Raise ValueError if settings conflict, naming their values and a fix."""
    for conflict in _conflicts(recipe, machine):
        raise ValueError(conflict)


def _conflicts(recipe: Recipe, machine: MachineConfig) -> Iterator[str]:
    model, row = recipe.model, recipe.model.sequence_len
    ranks = machine.nodes * (machine.ranks or 1)
    if model.heads % model.num_kv_heads:
        yield f"model.kv_heads must divide the {model.heads} query heads, got {model.kv_heads}"
    if machine.mirror is not None and recipe.data.source == "toyworld":
        own = f"machine.mirror is {machine.mirror}, but data.source = toyworld makes its own text"
        yield f"{own}; leave the mirror out, or choose data.source = hub"
    for name in MODELS:
        stage = getattr(recipe, name)
        if (both := stage.warmup + stage.warmdown) > 1:
            yield f"{name}.warmup + {name}.warmdown must be at most 1, got {both}"
        if name != "base" and stage.sums.most < (fewest := stage.sums.fewest):
            least = f"at least {name}.sums.fewest ({fewest})"
            yield f"{name}.sums.most must be {least}, got {stage.sums.most}"
        if name in ("mid", "sft") and stage.rows.mine and recipe.data.conversations is None:
            mine = f"{name}.rows.mine is {stage.rows.mine}"
            yield f"{mine}, and data.conversations names no file; give one"
        setting, tokens = f"{name}.batch_tokens", getattr(stage, "batch_tokens", row * ranks)
        if tokens % row:
            yield f"{setting} must be a multiple of model.sequence_len ({row}), got {tokens}"
        if tokens // row % ranks:
            rows = f"{setting} = {tokens} makes {tokens // row} rows, which {ranks} ranks cannot"
            yield f"{rows} share equally; choose machine.ranks or {setting} to fit"
    if recipe.grpo.enabled and (questions := recipe.grpo.questions) < ranks:
        yield f"grpo.questions must be at least 1 for each of {ranks} ranks, got {questions}"
    if recipe.grpo.enabled and not (recipe.mid.enabled or recipe.sft.enabled):
        yield "grpo.enabled needs a model that answers: enable mid or sft, or turn it off"


def steps(recipe: Recipe, stage: str, counted: Mapping[str, float]) -> int | None:
    """A training stage's steps, as set or as follows from `stages.text.counted`; else None."""
    config = getattr(recipe, stage)
    if config.steps is not None or stage not in counted:
        return config.steps
    at_once = config.questions if isinstance(config, GRPOConfig) else config.batch_tokens
    return math.ceil(config.epochs * counted[stage] / at_once)


# ---------------------------------------------------------------------------- identity


def up_to(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Flat settings that a stage's result depends on: its own and earlier ones (not for eval)."""
    order = ("seed", "data", "tokenizer", "model", "optim", *MODELS)
    last = "tokenizer" if stage == "shards" else stage
    sections = order[: order.index(last) + 1]
    flat = flatten(recipe)
    if stage not in MODELS[1:]:
        del flat["data.conversations"]
    return {path: value for path, value in flat.items() if path.split(".")[0] in sections}


def recipe_difference(mine: Recipe, theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path, mine, theirs) for each setting that differs between a recipe and a flat saved one."""
    flat = flatten(mine)
    paths = sorted(flat.keys() | theirs.keys())
    return [(p, flat.get(p), theirs.get(p)) for p in paths if flat.get(p) != theirs.get(p)]
