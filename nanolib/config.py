"""Everything a run can be told, in one place.

A setting's name is its dotted path, everywhere: TOML ``[base] steps = 100``, CLI ``--base.steps
100``, notebook ``overrides = {"base.steps": 100}``. Profiles (``runs/*.toml``) and overrides stay
flat dictionaries until `resolve`, which checks every path and value, derives what is missing and
returns a complete, frozen `Config`.

``Config.recipe`` is what is computed: the identity of a run. ``Config.machine`` is what it is
computed on: it may differ every time a run is opened.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = REPOSITORY / "runs"
MODELS = ("base", "mid", "sft", "grpo")  # the stages that leave a model, in order
STAGES = ("data", "tokenizer", "shards", *MODELS, "eval", "report")
NUM_SPECIAL_TOKENS = 9


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text, conversations and questions come from."""

    source: Literal["toyworld", "hub"] = "hub"  # "hub": the mirror if one is given, else the hub
    repository: str = "karpathy/fineweb-edu-100b-shuffle"  # pretraining text on the hub
    text_shards: int | None = None  # training shards to use; None: all the mirror has, or enough


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    vocab_size: int = 65_536  # rows of the embedding: 256 bytes, merges and special tokens
    max_chars: int = 2_000_000_000  # text to train on
    max_document_chars: int = 10_000  # of each document, so that no single one dominates


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The depth dial and what hangs on it."""

    preset: Literal["classic"] = "classic"  # the October 2025 architecture
    depth: int = 20
    aspect: int = 64  # width = aspect * depth, rounded up to a multiple of head_dim
    head_dim: int = 128
    kv_heads: int | None = None  # key/value heads (GQA); None: as many as query heads
    sequence_len: int = 2048  # T: tokens a row, and the longest context

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
        """Weights by what they are for."""
        width, kv_width = self.width, self.num_kv_heads * self.head_dim
        return {
            "embedding": vocab_size * width,
            "attention": self.depth * (2 * width * width + 2 * width * kv_width),
            "mlp": self.depth * 8 * width * width,
            "head": vocab_size * width,
        }

    def parameters(self, vocab_size: int) -> int:
        """All weights."""
        return sum(self.parts(vocab_size).values())


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
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
    momentum_warmup: int = 300  # steps
    newton_schulz_steps: int = 5
    clip: float | None = 1.0  # global gradient norm


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all training stages have; the learning rate goes up, stays, goes down (see `train`)."""

    enabled: bool = True
    steps: int | None = None
    eval_every: int | None = None  # steps between scores; None: about ten times a stage
    save_every: int | None = None  # steps between checkpoints; None: about ten times a stage
    lr: float = 1.0  # multiplies every learning rate of [optim]
    warmup: float = 0.0  # fraction of the steps
    warmdown: float = 0.2  # fraction of the steps
    final: float = 0.0  # fraction of lr at the last step's end


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Schedule):
    """Pretraining."""

    tokens_per_parameter: float = 20.0  # the horizon, when steps is not given
    batch_tokens: int = 524_288  # over all ranks and micro-batches
    eval_documents: int | None = None  # of the validation shard; None: all


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Training rows taken from each source: None means all of them, 0 none."""

    smoltalk: int | None = None
    mmlu: int | None = 0
    arc_easy: int | None = None
    arc_challenge: int | None = None
    gsm8k: int | None = None


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(Schedule):
    """A stage that learns what the assistant says in a mixture of conversations."""

    warmdown: float = 1.0
    epochs: float = 1.0  # passes over the mixture, when steps is not given
    batch_tokens: int = 524_288  # over all ranks and micro-batches, padding included
    rows: Mixture = field(default_factory=Mixture)


@dataclass(frozen=True, kw_only=True)
class MidConfig(ConversationConfig):
    """Midtraining: conversations, four choices and the tool, at pretraining's rates."""

    rows: Mixture = field(
        default_factory=lambda: Mixture(mmlu=100_000, arc_easy=0, arc_challenge=0)
    )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ConversationConfig):
    """Supervised finetuning on a small, clean mixture, at low rates."""

    lr: float = 0.02
    batch_tokens: int = 65_536
    rows: Mixture = field(default_factory=lambda: Mixture(smoltalk=10_000))


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Schedule):
    """Reinforcement learning from graded answers; see `nanolib.grpo`."""

    lr: float = 0.05
    warmdown: float = 1.0
    task: str = "gsm8k"  # a task of `nanolib.tasks` that can be graded
    epochs: float = 1.0  # passes over the task's questions, when steps is not given
    questions: int = 16  # a step, over all ranks
    samples: int = 16  # answers to each
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    updates_each: int = 1  # on the same answers; more than 1: clipped
    clip: float = 0.2  # of the probability ratio, in further updates
    shuffled: bool = False  # a control: each question's rewards are dealt to its answers at random
    eval_questions: int = 400  # held-out ones, scored on the way
    eval_samples: int = 4


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores of every model: bits per byte, CORE, and (from mid on) the tasks."""

    tasks: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    max_problems: int | None = None  # of each task; None: all
    max_new_tokens: int = 512  # for answers by generation
    core_problems: int | None = None  # of each CORE task; None: all, 0: no CORE


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is computed: saved in the manifest and in every checkpoint."""

    seed: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    mid: MidConfig = field(default_factory=MidConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def models(self) -> tuple[str, ...]:
        """The stages that leave a model and are not left out, in order."""
        return tuple(name for name in MODELS if getattr(self, name).enabled)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What it is computed on: free to differ at every opening of a run."""

    ranks: int | None = None  # processes; None: one a GPU, or one
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    device_batch: int | None = None  # rows a micro-batch on one rank; None: the stage's share
    threads: int | None = None  # CPU threads a rank; None: the cores divided by the ranks
    mirror: str | None = None  # a folder in the mirror's layout instead of the hub
    dollars_per_hour: float | None = None  # of the whole machine, for the report's cost


@dataclass(frozen=True, kw_only=True)
class Config:
    profile: str
    recipe: Recipe
    machine: MachineConfig


ALIASES = {"mirror": "machine.mirror", "nproc": "machine.ranks"}


# ---------------------------------------------------------------------------- flat dictionaries


def fields_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> type of every leaf setting below a config class."""
    paths: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            paths |= fields_of(hint, f"{prefix}{name}.")
        else:
            paths[f"{prefix}{name}"] = hint
    return paths


def settings() -> dict[str, Any]:
    """Dotted path -> type of every setting a profile or an override may name."""
    return fields_of(Recipe) | fields_of(MachineConfig, "machine.")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries or dataclasses as one flat dictionary of dotted paths."""
    if dataclasses.is_dataclass(tree):
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _overlay(tree: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A config dataclass with those of its settings replaced that a flat dictionary names."""
    values: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(tree)):
        path, value = prefix + name, getattr(tree, name)
        if dataclasses.is_dataclass(value):
            values[name] = _overlay(value, flat, f"{path}.")
        elif path in flat:
            value = flat[path]
            values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(tree, **values)


def coerce(path: str, hint: Any, value: Any) -> Any:
    """`value`, given as text or as a Python value, as the type of setting `path`.

    Raises ValueError that names the path, the value and what would be accepted.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in options:
            return None
        raise ValueError(f"{path} must be {_describe(hint)}, got none")
    for option in options:
        try:
            return _coerce_one(option, value)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}")


def as_text(value: Any) -> str:
    """A setting's value as it is written on the command line; `coerce` reads it back.

    >>> as_text(["mmlu", "facts"]), as_text(None), as_text(0.5)
    ('mmlu,facts', 'none', '0.5')
    """
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _coerce_one(option: Any, value: Any) -> Any:
    if typing.get_origin(option) is Literal:
        if value in typing.get_args(option):
            return value
    elif typing.get_origin(option) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(str(item).strip() for item in items if str(item).strip())
    elif option is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif option in (int, float) and not isinstance(value, bool):
        number = float(value.replace("_", "")) if isinstance(value, str) else float(value)
        if math.isfinite(number) and (option is float or number == int(number)):
            return option(number)
    elif option is str and isinstance(value, str | Path):
        return str(value)
    raise ValueError


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "none" if hint is type(None) else "a comma-separated list")


def check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with aliases resolved and values coerced; ValueError for an unknown path."""
    known = settings()
    checked = {}
    for path, value in overrides.items():
        path = ALIASES.get(path, path)
        if path not in known:
            close = difflib.get_close_matches(path, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no setting {path!r}{hint} (`nanolib settings` lists all)")
        checked[path] = coerce(path, known[path], value)
    return checked


# ---------------------------------------------------------------------------- profiles


def split_settings(arguments: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate ``--dotted.path VALUE`` (or an alias) from a command's own words.

    Paths on the command line are relative to the shell, so a mirror is made absolute here.

    >>> split_settings(["run", "demo", "--base.steps", "9", "--nproc=2", "--run", "x"])
    (['run', 'demo', '--run', 'x'], {'base.steps': 9, 'machine.ranks': 2})
    """
    words, overrides, known = [], {}, settings()
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        path = name.replace("-", "_")
        is_setting = "." in path or path in known or path in ALIASES
        if not word.startswith("--") or not is_setting:
            words.append(word)
            continue
        value = value if equals else next(rest, "--")
        if value.startswith("--"):
            raise ValueError(f"--{name} needs a value")
        overrides |= check_overrides({path: value})
    if mirror := overrides.get("machine.mirror"):
        overrides["machine.mirror"] = str(Path(mirror).expanduser().absolute())
    return words, overrides


def profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(profile: str) -> dict[str, Any]:
    """The flat settings of ``runs/<profile>.toml``."""
    path = PROFILES / f"{profile}.toml"
    if profile not in profiles():
        raise ValueError(f"there is no profile {profile!r}; there are {', '.join(profiles())}")
    try:
        return check_overrides(flatten(tomllib.loads(path.read_text())))
    except (ValueError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def resolve(profile: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The complete configuration of a profile with overrides on top.

    Raises ValueError for an unknown profile, path or value and for settings that contradict.
    """
    return from_flat(profile, load_profile(profile) | check_overrides(overrides or {}))


def from_flat(profile: str, flat: Mapping[str, Any]) -> Config:
    """A complete configuration from checked flat settings (a profile's or a manifest's)."""
    recipe = _overlay(Recipe(), flat)
    machine = _overlay(MachineConfig(), flat, "machine.")
    _validate(recipe, machine)
    return Config(profile=profile, recipe=_derive(recipe), machine=machine)


def _derive(recipe: Recipe) -> Recipe:
    """Fill what the dial decides: the pretraining horizon and the intervals."""
    base = recipe.base
    parameters = recipe.model.parameters(recipe.tokenizer.vocab_size)
    horizon = math.ceil(base.tokens_per_parameter * parameters / base.batch_tokens)
    steps = base.steps or horizon
    every = max(1, steps // 10)
    base = dataclasses.replace(
        base,
        steps=steps,
        eval_every=base.eval_every or every,
        save_every=base.save_every or every,
    )
    return dataclasses.replace(recipe, base=base)


# Last parts of the paths of settings that count something.
AT_LEAST_ONE = frozenset([
    "depth", "aspect", "head_dim", "kv_heads", "sequence_len", "batch_tokens", "steps",
    "eval_every", "save_every", "eval_documents", "text_shards", "max_chars",
    "max_document_chars", "max_problems", "max_new_tokens", "momentum_warmup",
    "newton_schulz_steps", "ranks", "device_batch", "threads", "questions", "samples", "top_k",
    "updates_each", "eval_questions", "eval_samples",
])  # fmt: skip
ABOVE_ZERO = frozenset(["tokens_per_parameter", "epochs", "lr", "clip", "temperature"])


def _check_ranges(flat: Mapping[str, Any]) -> None:
    """Each setting by itself."""
    for path, value in flat.items():
        name = path.split(".")[-1]
        if value is None:
            continue
        if name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{path} must be at least 1, got {value}")
        if name in ABOVE_ZERO and value <= 0:
            raise ValueError(f"{path} must be more than 0, got {value}")
        if (".rows." in path or name == "core_problems") and value < 0:
            raise ValueError(f"{path} must be 0 or more, or none for all, got {value}")
        if name in ("warmup", "warmdown", "final") and not 0 <= value <= 1:
            raise ValueError(f"{path} is a fraction from 0 to 1, got {value}")


def _validate(recipe: Recipe, machine: MachineConfig) -> None:
    """Settings by themselves and together; ValueError names the value and what would do."""
    model, ranks = recipe.model, machine.ranks or 1
    _check_ranges(flatten(recipe) | flatten(machine, "machine."))
    if recipe.tokenizer.vocab_size < 256 + NUM_SPECIAL_TOKENS:
        raise ValueError(
            f"tokenizer.vocab_size must be at least {256 + NUM_SPECIAL_TOKENS} (256 bytes and "
            f"{NUM_SPECIAL_TOKENS} special tokens), got {recipe.tokenizer.vocab_size}"
        )
    if model.head_dim % 2:
        raise ValueError(f"model.head_dim must be even (RoPE turns pairs), got {model.head_dim}")
    if model.heads % model.num_kv_heads:
        raise ValueError(
            f"model.kv_heads must divide the {model.heads} query heads, got {model.kv_heads}"
        )
    if machine.mirror is not None and recipe.data.source == "toyworld":
        raise ValueError(
            f"machine.mirror is {machine.mirror}, but data.source = toyworld makes its own text; "
            "leave the mirror out, or choose data.source = hub"
        )
    for name in MODELS:
        _check_stage(name, getattr(recipe, name), model.sequence_len, ranks)
    if recipe.grpo.enabled and not (recipe.mid.enabled or recipe.sft.enabled):
        raise ValueError(
            "grpo.enabled needs a model that answers questions: set mid.enabled or sft.enabled, "
            "or grpo.enabled false"
        )


def _check_stage(name: str, stage: Any, sequence_len: int, ranks: int) -> None:
    """The schedule of one training stage, and how its ranks share a step."""
    if stage.warmup + stage.warmdown > 1:
        raise ValueError(
            f"{name}.warmup + {name}.warmdown must be at most 1, got "
            f"{stage.warmup} + {stage.warmdown}"
        )
    if isinstance(stage, GRPOConfig):
        if stage.enabled and stage.questions < ranks:
            raise ValueError(
                f"grpo.questions = {stage.questions} leaves some of {ranks} ranks without one; "
                "choose at least one a rank"
            )
        return
    rows, rest = divmod(stage.batch_tokens, sequence_len)
    if rest:
        raise ValueError(
            f"{name}.batch_tokens must be a multiple of model.sequence_len "
            f"({sequence_len}), got {stage.batch_tokens}"
        )
    if rows % ranks:
        raise ValueError(
            f"{name}.batch_tokens = {stage.batch_tokens} makes {rows} rows, which {ranks} ranks "
            f"cannot share equally; choose machine.ranks or {name}.batch_tokens so that they can"
        )


# ---------------------------------------------------------------------------- identity


def recipe_difference(mine: Recipe, theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path, mine, theirs) for every setting in which a recipe and a saved flat one differ."""
    flat = flatten(mine)
    paths = sorted(flat.keys() | theirs.keys())
    return [(p, flat.get(p), theirs.get(p)) for p in paths if flat.get(p) != theirs.get(p)]


def short_hash(overrides: Mapping[str, Any]) -> str:
    """Six hex digits that name a set of recipe overrides."""
    return hashlib.sha256(json.dumps(dict(overrides), sort_keys=True).encode()).hexdigest()[:6]
