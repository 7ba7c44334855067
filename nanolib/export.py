"""Export to Hugging Face's format: a folder that transformers loads as `NanoChatForCausalLM`.

Our preset ``classic`` computes the same function, so the logits are the same. The tokenizers differ
in one thing: theirs turns a special token typed as plain text into the special token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanolib import checkpoint, model
from nanolib.config import ModelConfig
from nanolib.engine import end_tokens
from nanolib.model import GPT
from nanolib.rundir import Run, saving, write_json
from nanolib.session import stage_with_model
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer

# Our parameter names -> those of transformers.
NAMES = {
    "embedding.": "model.embed_tokens.",
    "head.": "lm_head.",
    "blocks.": "model.layers.",
    ".attention.query.": ".self_attn.q_proj.",
    ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.",
    ".attention.out.": ".self_attn.o_proj.",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
}

CHAT_TEMPLATE = Path(__file__).parent / "templates" / "chat.j2"


def export(run: Run, of: str | None = None, folder: Path | None = None) -> Path:
    """Export the model of stage `of` (None: the last stage that has one); returns the folder.

    folder: None means ``export/`` in the run. Raises ValueError where there is no such model, and
    for a folder that holds something else.
    """
    stage = run.stage(stage_with_model(run, of, "to export"))
    trained = checkpoint.load_model(stage.checkpoints, torch.device("cpu"))
    tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
    folder = folder or run.path / "export"
    write(trained, tokenizer, folder)
    return folder


def write(trained: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (float32), configuration, tokenizer and chat template into `folder`."""
    if folder.exists() and (not folder.is_dir() or _is_foreign(folder)):
        raise ValueError(f"{folder} exists and is no earlier export; give another --out")
    ends = end_tokens(tokenizer)
    files = {
        "config.json": model_config(trained.config, tokenizer),
        "generation_config.json": {
            "bos_token_id": tokenizer.bos,
            "eos_token_id": list(ends),
            "pad_token_id": ends[0],
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": "<|assistant_end|>",
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "model_max_length": trained.config.sequence_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
        },
    }
    weights = {_their_name(name): w.detach().cpu() for name, w in trained.named_parameters()}
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors"
        save_file(weights, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # the library makes it private
        partial.replace(folder / "model.safetensors")
    for name, content in files.items():
        write_json(folder / name, content)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds files, but no NanoChat model."""
    config = folder / "config.json"
    if config.is_file():
        return '"NanoChatForCausalLM"' not in config.read_text(encoding="utf-8", errors="replace")
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _their_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def model_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Our settings as ``config.json`` of `NanoChatConfig`."""
    end = end_tokens(tokenizer)[0]
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.ROTARY_BASE)},
        "final_logit_softcapping": model.SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "float32",
    }


# ---------------------------------------------------------------------------- the tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The same tokenizer in the format of the `tokenizers` library."""
    letters = _byte_letters()
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.bos)]
    names = ["".join(letters[byte] for byte in token) for token in tokens]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.special(name), "content": name, **special, "special": True}
            for name in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", **split}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": [[names[left], names[right]] for left, right in tokenizer.merges],
        },
    }


def _byte_letters() -> str:
    """A printable letter for each byte, as GPT-2 chose them: Latin-1 where that prints, the rest
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))
