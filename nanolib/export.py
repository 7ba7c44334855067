"""Export to Hugging Face format: a folder that transformers loads as `NanoChatForCausalLM`.

Preset ``classic`` gives the same logits there. The tokenizer differs in one way: special tokens in
plain text are encoded as special tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from nanolib import checkpoint, model
from nanolib.conversation import END_NAMES
from nanolib.model import GPT
from nanolib.rundir import Run, whole_file, write_json
from nanolib.session import stage_with_model
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer

# Our parameter names -> names in transformers.
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

TEMPLATES = Path(__file__).parent / "templates"
CONSTANT = json.loads((TEMPLATES / "export.json").read_text())  # file -> its constant contents


def export(run: Run, of: str | None = None, folder: Path | None = None) -> Path:
    """Export the model of stage `of` (None: the last) to `folder` (None: ``<run>/export``)."""
    stage = run.stage(stage_with_model(run, of, "to export"))
    trained = checkpoint.load_model(stage.checkpoints, torch.device("cpu"))
    tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
    folder = folder or run.path / "export"
    write(trained, tokenizer, folder)
    return folder


def write(trained: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    if more := sorted(trained.config.architecture):
        known = "transformers has a class for the classic model alone"
        raise ValueError(f"this model cannot be exported: it has {', '.join(more)}, and {known}")
    config = folder / "config.json"
    is_ours = config.is_file() and b"NanoChatForCausalLM" in config.read_bytes()
    if folder.is_file() or (any(folder.glob("[!.]*")) and not is_ours):
        raise ValueError(f"{folder} exists and is no earlier export; give another --out")
    weights = {}
    for name, weight in trained.named_parameters():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = weight.detach().cpu()
    with whole_file(folder / "model.safetensors") as file:
        file.write(to_safetensors(weights, metadata={"format": "pt"}))
    ends = [tokenizer.special(name) for name in END_NAMES]
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends[0], "pad_token_id": ends[0]}
    write_json(config, model_config(trained) | ids)
    write_json(folder / "generation_config.json", ids | {"eos_token_id": ends})
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    about = {
        "additional_special_tokens": SPECIAL_TOKENS,
        "model_max_length": trained.config.sequence_len,
        "chat_template": (TEMPLATES / "chat.j2").read_text(encoding="utf-8"),
    }
    write_json(folder / "tokenizer_config.json", CONSTANT["tokenizer_config.json"] | about)


def model_config(trained: GPT) -> dict[str, Any]:
    config = trained.config
    return CONSTANT["config.json"] | {
        "vocab_size": trained.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": model.EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.ROTARY_BASE)},
        "final_logit_softcapping": model.SOFTCAP,
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer in the format of the `tokenizers` library."""
    # GPT-2's printable character for each byte: itself if printable in Latin-1, else U+0100 and up.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.bos)]
    names = ["".join(letters[byte] for byte in token) for token in tokens]
    merges = [[names[left], names[right]] for left, right in tokenizer.merges]
    vocabulary = {name: id for id, name in enumerate(names)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    constant, split = CONSTANT["tokenizer.json"], {"Regex": tokenizer.pattern}
    pieces = {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
    return constant | {
        "added_tokens": [
            {"id": tokenizer.special(name), "content": name, **plain, "special": True}
            for name in SPECIAL_TOKENS
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, constant["decoder"]]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
