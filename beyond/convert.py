"""OLMo-2 checkpoints to and from Hugging Face's layout: the same architecture under other names.

    python beyond/convert.py export runs/base/8M.pt exported   for transformers, vLLM, lm-evaluation-harness
    python beyond/convert.py import exported again.pt          from a folder, or a download from the hub:
    python beyond/convert.py import allenai/OLMo-2-0425-1B@stage1-step10000-tokens21B olmo.pt

A large model takes memory for three copies of it in fp32. In other software, rows of the vocabulary without a
token have a share of every probability, and a special token spelled out in a text is that token; not in ours.
Left out: other architectures, chat templates.
"""
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from beyond.tokenizers import from_huggingface, to_huggingface  # noqa: E402
from checkpoint import UserError, check_fields, load_model, main, require, save_checkpoint  # noqa: E402
from data.tokenizer import EOS, PAD, Tokenizer  # noqa: E402
from model import GPT, ModelConfig  # noqa: E402


@dataclass
class Config:
    command: tuple[str, ...]        # export CHECKPOINT FOLDER, or import FOLDER-or-hub-name[@revision] FILE
    dtype: str = "fp32"             # one of fp32, bf16: of the weights written


FIXED = {"model_type": "olmo2", "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
         "tie_word_embeddings": False}           # in the config.json of any model like ours
SIZES = {"vocab_size": "vocab_size", "context": "max_position_embeddings", "d_model": "hidden_size",
         "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_ff": "intermediate_size",
         "n_kv_heads": "num_key_value_heads"}
MODEL = {"embed.weight": "model.embed_tokens", "norm": "model.norm", "head.weight": "lm_head"}
BLOCK = {"qkv.weight": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "out.weight": "self_attn.o_proj",
         "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
         "gate_up.weight": "mlp.gate_proj mlp.up_proj", "down.weight": "mlp.down_proj",
         "attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def layout(n_layers: int) -> dict[str, list[str]]:
    """Our name of each tensor -> their names of its parts, one below the other."""
    table = {ours: [f"{theirs}.weight"] for ours, theirs in MODEL.items()}
    for i in range(n_layers):
        for ours, theirs in BLOCK.items():
            table[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}.weight" for name in theirs.split()]
    return table


def export_folder(checkpoint: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint as a new folder, which gets its name when it is whole; returns it."""
    import transformers
    folder = Path(out)
    require(not folder.exists() or not any(folder.iterdir()), f"{out}: is not empty; choose a new folder")
    model, tokenizer, _ = load_model(checkpoint)
    c = model.config
    sizes = {name: getattr(c, ours) for ours, name in SIZES.items()}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    with torch.device("meta"):                   # shapes, without memory behind them
        theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
            **FIXED, **sizes, rope_parameters=rope, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad))
    shapes = theirs.state_dict()
    weights = {}
    for ours, names in layout(c.n_layers).items():
        parts = model.state_dict()[ours].split([len(shapes[name]) for name in names])
        weights |= {name: part.to(dtype, copy=True) for name, part in zip(names, parts)}
    theirs.load_state_dict(weights, assign=True)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary, "whole")
        theirs.save_pretrained(whole)
        config = json.loads((whole / "config.json").read_text())
        config["rope_theta"] = c.rope_theta      # transformers 4 takes 10,000 for it if it is not there
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast",      # which takes tokenizer.json as it is
                  "eos_token": EOS, "pad_token": PAD, "model_max_length": c.context,
                  "clean_up_tokenization_spaces": False,
                  "model_input_names": ["input_ids", "attention_mask"]}          # no token_type_ids, as 4 has
        files = {"config": config, "tokenizer": to_huggingface(tokenizer.spec), "tokenizer_config": tokens}
        for name, content in files.items():
            (whole / f"{name}.json").write_text(json.dumps(content, indent=1))
        os.replace(whole, folder)
    return folder


def import_folder(source: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint from a folder in Hugging Face's layout, or from the hub; returns its path."""
    import transformers
    local = Path(source).is_dir()                # then its name may have an @, and revisions mean nothing
    place, _, revision = (str(source), "", "") if local else str(source).partition("@")
    at = {"revision": revision or "main"}
    file = transformers.utils.cached_file(place, "tokenizer.json", **at)
    tokenizer = Tokenizer(from_huggingface(json.loads(Path(file).read_bytes())))
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **at)
    for key, wanted in FIXED.items():
        found = getattr(config, key, None)
        require(found == wanted, f"{source}: {key} is {found}; our model has {wanted}")
    rope = config.rope_parameters
    require(rope["rope_type"] == "default", f"{source}: rope_type is {rope['rope_type']}: scaled positions")
    require(tokenizer.n_vocab <= config.vocab_size, f"{source}: vocab_size is less than the tokenizer has")
    theirs, info = transformers.Olmo2ForCausalLM.from_pretrained(
        place, config=config, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True, **at)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        require(not info[fault], f"{source}: weights and config.json do not fit: {sorted(info[fault])[:2]}")
    parts = theirs.state_dict()
    weights = {}
    for ours, names in layout(config.num_hidden_layers).items():
        weights[ours] = torch.cat([parts[name] for name in names])
        require(bool(weights[ours].isfinite().all()), f"{source}: {ours} has values that are not finite")
    sizes = {ours: getattr(config, name) for ours, name in SIZES.items()}
    with torch.device("meta"):
        model = GPT(ModelConfig(n_vocab=tokenizer.n_vocab, rope_theta=float(rope["rope_theta"]), **sizes))
    model.load_state_dict(weights, assign=True)
    commit = "" if local else Path(file).parent.name     # which a branch stands for today
    given = {"source": str(source), "revision": commit, "dtype": str(dtype)[6:], "seed": 0}
    stage = {"script": "convert.py import", "config": given, "parent": None, "seconds": 0.0}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(Path(out), model, tokenizer, [stage | dict.fromkeys(("tokens", "updates", "flops"), 0)])
    return Path(out)


def convert(c: Config) -> None:
    """Do what the command line asks for. Any failure is a UserError that names the source."""
    check_fields(c)
    require(len(c.command) == 3 and c.command[0] in ("export", "import"),
            "say export CHECKPOINT FOLDER, or import FOLDER-or-name FILE")
    verb, source, out = c.command
    dtype = torch.bfloat16 if c.dtype == "bf16" else torch.float32
    try:
        import transformers
        transformers.utils.logging.set_verbosity_error()
        path = (export_folder if verb == "export" else import_folder)(source, out, dtype)
    except ImportError:
        raise UserError("a package is missing: pip install -r beyond/requirements.txt") from None
    except UserError:
        raise
    except Exception as error:                   # dozens of types, of several packages
        raise UserError(f"{source}: {verb} failed: no whole OLMo-2 model, no such name, offline, or no way "
                        f"to write {out}? ({type(error).__name__}: {error})"[:500]) from None
    print(f"written: {path}")


if __name__ == "__main__":
    main(convert, Config)
