"""OLMo-2 checkpoints to and from Hugging Face's layout: the same architecture under other names.

    python convert.py export runs/base/8M.pt exported      for transformers, vLLM, lm-evaluation-harness
    python convert.py import exported again.pt             from a folder; from the hub, which is a download:
    python convert.py import allenai/OLMo-2-0425-1B@stage1-step10000-tokens21B olmo.pt
    python convert.py import allenai/OLMo-2-0425-1B --list-revisions

Takes a second for a small model, memory for three copies of a large one in fp32. Needs safetensors; hub names
need huggingface_hub too. Left out: other architectures, chat templates.
A special token spelled out in a text is plain text here, but that token for the exported tokenizer.
"""
import importlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import UserError, atomic_write, load_model, main, require, save_checkpoint
from data.tokenizer import EOS, PAD, Tokenizer, from_huggingface, to_huggingface
from model import GPT, ModelConfig


@dataclass
class Config:
    command: tuple[str, ...]        # export CHECKPOINT FOLDER, or import FOLDER-or-hub-name[@revision] FILE
    dtype: str = "fp32"             # of the weights written: fp32, bf16
    list_revisions: bool = False    # import NAME: print its branches (intermediate checkpoints) and tags


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ARCHITECTURE = {"model_type": "olmo2", "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
                "tie_word_embeddings": False, "rope_scaling": None}     # config.json of any model like ours
SIZES = {"vocab_size": "vocab_size", "context": "max_position_embeddings", "d_model": "hidden_size",
         "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_ff": "intermediate_size",
         "n_kv_heads": "num_key_value_heads"}
MODEL = {"embed.weight": "model.embed_tokens", "norm": "model.norm", "head.weight": "lm_head"}
BLOCK = {"qkv.weight": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "out.weight": "self_attn.o_proj",
         "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
         "gate_up.weight": "mlp.gate_proj mlp.up_proj", "down.weight": "mlp.down_proj",
         "attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def their_names(layers: int) -> dict[str, list[str]]:
    """Our name of each tensor -> theirs; ours has the rows of theirs one below the other."""
    table = MODEL | {f"blocks.{i}.{ours}": " ".join(f"model.layers.{i}.{name}" for name in theirs.split())
                     for i in range(layers) for ours, theirs in BLOCK.items()}
    return {ours: [f"{name}.weight" for name in theirs.split()] for ours, theirs in table.items()}


def part_rows(c: ModelConfig, ours: str) -> tuple[int, ...] | None:
    """Rows of each of their tensors, where one of ours holds several."""
    return next((rows for name, rows in (("qkv", (c.d_model, c.kv_width, c.kv_width)),
                                         ("gate_up", (c.d_ff, c.d_ff))) if name in ours), None)


def need(package: str) -> typing.Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"a package is missing: pip install {package.split('.')[0]}") from None


# ---- export ----------------------------------------------------------------------------------------------

def their_config(c: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """config.json. transformers 4 reads rope_theta only, 5 reads rope_parameters."""
    return ARCHITECTURE | {theirs: getattr(c, ours) for ours, theirs in SIZES.items()} | {
        "architectures": ["Olmo2ForCausalLM"], "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "bos_token_id": None,
        "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad, "torch_dtype": str(dtype)[6:]}


def export_folder(checkpoint: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint as a folder; returns it. config.json comes last (an old one goes first), without
    which nothing opens a folder: a kill leaves no mixture. UserError if the folder holds other files."""
    safetensors, folder = need("safetensors.torch"), Path(out)
    model, tokenizer, content = load_model(checkpoint)
    config, theirs = model.config, {}
    del model                                    # a copy of the weights less
    for ours, names in their_names(config.n_layers).items():
        whole = content["model"].pop(ours)
        parts = whole.split(part_rows(config, ours) or len(whole))
        theirs |= {name: part.to(dtype, copy=True) for name, part in zip(names, parts)}
    files = {"model.safetensors": safetensors.save(theirs, {"format": "pt"}),
             "tokenizer.json": to_huggingface(tokenizer.spec),
             "tokenizer_config.json": {           # of the class that takes tokenizer.json as it is
                 "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD,
                 "model_max_length": config.context, "clean_up_tokenization_spaces": False,
                 "model_input_names": ["input_ids", "attention_mask"]},      # no token_type_ids, as 4 has
             "generation_config.json": {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad},
             "config.json": their_config(config, tokenizer, dtype)}
    folder.mkdir(parents=True, exist_ok=True)
    foreign = sorted({p.name for p in folder.glob("[!.]*")} - files.keys())
    require(not foreign, f"{folder}: holds other files ({', '.join(foreign[:3])}); choose a new folder")
    for old in (folder / "config.json", *folder.glob(".*.safetensors.*"), *folder.glob(".*.json.*")):
        old.unlink(missing_ok=True)              # hidden ones: left by a kill in the middle of a write
    for name, data in files.items():
        atomic_write(folder / name, data if isinstance(data, bytes)
                     else json.dumps(data, indent=1, ensure_ascii=False).encode())
    if config.vocab_size > config.n_vocab:
        print(f"WARNING: {config.vocab_size - config.n_vocab} rows of the vocabulary belong to no token. Our "
              "software never scores them, other software gives them a share of every probability")
    print(f"written: {folder}")
    return folder


# ---- import ----------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict:
    require(path.is_file(), f"{path.parent}: has no {path.name}; is it the folder of an OLMo-2 model, whole?")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: not a JSON object, or a truncated one") from None


def read_config(path: Path, n_vocab: int) -> ModelConfig:
    """The model's shape, for a tokenizer of n_vocab tokens. UserError if the architecture is not ours."""
    c = read_json(path)
    for key, wanted in ARCHITECTURE.items():     # transformers leaves out what has its default value
        found = c.get(key, None if key in ("model_type", "rms_norm_eps") else wanted)
        require(found == wanted, f"{path}: {key} is {json.dumps(found)}; our model has {json.dumps(wanted)}")
    if c.get("num_key_value_heads") is None:     # then as many as of queries
        c["num_key_value_heads"] = c.get("num_attention_heads")
    sizes = {ours: c.get(theirs) for ours, theirs in SIZES.items()}
    bad = [SIZES[ours] for ours, size in sizes.items() if type(size) is not int or size < 1]
    require(not bad, f"{path}: {', '.join(bad)}: must be given, as positive whole numbers")
    heads, rope = sizes["n_heads"], c.get("rope_parameters") or {"rope_theta": c.get("rope_theta")}
    require(heads % sizes["n_kv_heads"] == 0, f"{path}: num_key_value_heads ({sizes['n_kv_heads']}) must "
            f"divide num_attention_heads ({heads})")
    require(sizes["d_model"] % (2 * heads) == 0, f"{path}: {heads} heads in a width of {sizes['d_model']}")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    require(type(theta) in (int, float) and theta > 0 and c.get("rope_theta") in (None, theta)
            and rope.get("rope_type") in (None, "default"),
            f"{path}: rope_theta must be given, the same in both places, without scaling")
    require(n_vocab <= sizes["vocab_size"], f"{path}: fewer rows (vocab_size) than the tokenizer has tokens")
    return ModelConfig(n_vocab=n_vocab, rope_theta=float(theta), **sizes)


def read_tokenizer(path: Path) -> Tokenizer:
    content = read_json(path)
    try:
        return Tokenizer(from_huggingface(content))
    except Exception as error:                   # whatever a foreign dict may cause
        raise UserError(f"{path}: not a tokenizer as OLMo-2 has ({type(error).__name__}: {error})") from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    safetensors, files, weights = need("safetensors.torch"), {"model.safetensors"}, {}
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        require(index.is_file(), f"{folder}: has neither model.safetensors nor {index.name}")
        places = read_json(index).get("weight_map")
        require(isinstance(places, dict), f"{index}: has no weight_map")
        files = {Path(str(file)).name for file in places.values()}
    for path in (folder / file for file in sorted(files)):
        require(path.is_file(), f"{folder}: has no {path.name}; the download is not complete")
        try:
            weights |= safetensors.load_file(path)
        except Exception as error:               # safetensors has types of its own
            raise UserError(f"{path}: no safetensors file, or a truncated one ({error})") from None
    for name, weight in weights.items():
        require(weight.dtype in DTYPES.values() and bool(weight.isfinite().all()),
                f"{folder}: {name} must be bf16 or fp32 ({weight.dtype} found) and finite")
    return weights


def from_hub(source: str, list_revisions: bool = False) -> Path | None:
    """The folder of owner/name[@revision], downloaded unless it is on disk; or print the revisions."""
    (name, _, revision), files = source.partition("@"), ["*.json", "model*.safetensors"]
    require(name.count("/") == 1, f"{source}: no such folder, and no name of the hub (owner/name[@revision])")
    hub = need("huggingface_hub")
    try:
        if not list_revisions:
            return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=files))
        refs = hub.list_repo_refs(name)
        print("\n".join(f"{ref.target_commit[:8]}  {ref.name}" for ref in (*refs.branches, *refs.tags)))
        return None
    except Exception as error:                   # a dozen types, of several packages
        raise UserError(f"{source}: no such folder, and the hub gave nothing; offline, or a wrong name or "
                        f"revision? ({type(error).__name__}: {error})"[:400]) from None


def import_folder(source: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint from a folder in Hugging Face's layout, or from the hub; returns its path."""
    folder = Path(source) if Path(source).is_dir() else from_hub(source)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config, theirs = read_config(folder / "config.json", tokenizer.n_vocab), read_weights(folder)
    with torch.device("meta"):                   # shapes, without memory behind them
        model = GPT(config)
    try:
        weights = {}
        for ours, names in their_names(config.n_layers).items():
            parts = [theirs.pop(name).to(dtype) for name in names]
            require(part_rows(config, ours) in (None, tuple(map(len, parts))), f"rows of {', '.join(names)}: "
                    "other hidden_size, num_attention_heads, num_key_value_heads or intermediate_size?")
            weights[ours] = torch.cat(parts)
        require(not theirs, f"{', '.join(sorted(theirs)[:3])} left over")
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{folder}: weights and config.json do not fit together ({error})"[:400]) from None
    revision = "" if Path(source).is_dir() else folder.name      # the commit that a branch stands for today
    stage = {"script": "convert.py import",
             "config": {"source": str(source), "revision": revision, "dtype": str(dtype)[6:], "seed": 0},
             "tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0, "parent": None}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(Path(out), model, tokenizer, [stage])
    print(f"written: {out}\nnext: python model.py {out}")
    return Path(out)


def convert(c: Config) -> Path | None:
    """What the command line asks for; returns what was written."""
    verb, *paths = c.command
    require(verb in ("export", "import")[c.list_revisions:] and len(paths) == 2 - c.list_revisions,
            "say export CHECKPOINT FOLDER, import FOLDER-or-name FILE or import NAME --list-revisions")
    require(c.dtype in DTYPES, f"--dtype {c.dtype}: must be fp32 or bf16")
    if c.list_revisions:
        return from_hub(*paths, list_revisions=True)
    return (export_folder if verb == "export" else import_folder)(*paths, DTYPES[c.dtype])


if __name__ == "__main__":
    main(convert, Config)
