"""OLMo-2 checkpoints to and from Hugging Face's layout: the same architecture under other names.

    python beyond/convert.py export runs/base/8M.pt exported   for transformers, vLLM, lm-evaluation-harness
    python beyond/convert.py import exported again.pt          from a folder, or a download from the hub:
    python beyond/convert.py import allenai/OLMo-2-0425-1B@stage1-step10000-tokens21B olmo.pt
    python beyond/convert.py import allenai/OLMo-2-0425-1B --list-revisions

A large model takes memory for three copies of it in fp32. A special token that is spelled out in a text is
that token for the exported tokenizer, plain text for ours. Left out: other architectures, chat templates.
"""
import importlib
import json
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from beyond.tokenizers import read_tokenizer, to_huggingface  # noqa: E402
from checkpoint import (  # noqa: E402
    UserError, atomic_write, check_fields, load_model, main, require, save_checkpoint)
from data.tokenizer import EOS, PAD, Tokenizer  # noqa: E402
from model import GPT, ModelConfig  # noqa: E402


@dataclass
class Config:
    command: tuple[str, ...]        # export CHECKPOINT FOLDER, or import FOLDER-or-hub-name[@revision] FILE
    dtype: str = "fp32"             # one of fp32, bf16: of the weights written
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


def layout(c: ModelConfig) -> dict[str, tuple[list[str], tuple[int, ...] | None]]:
    """Our name of each tensor -> (their names, the rows of each where one of ours holds several)."""
    several = {"qkv.weight": (c.d_model, c.kv_width, c.kv_width), "gate_up.weight": (c.d_ff, c.d_ff)}
    table = {ours: ([f"{theirs}.weight"], None) for ours, theirs in MODEL.items()}
    for i in range(c.n_layers):
        for ours, theirs in BLOCK.items():
            names = [f"model.layers.{i}.{name}.weight" for name in theirs.split()]
            table[f"blocks.{i}.{ours}"] = names, several.get(ours)
    return table


def need(package: str) -> typing.Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"a package is missing: pip install {package.split('.')[0]}") from None


# ---- export ----------------------------------------------------------------------------------------------

def their_config(c: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """config.json. transformers 4 reads rope_theta only, 5 reads rope_parameters."""
    sizes = {theirs: getattr(c, ours) for ours, theirs in SIZES.items()}
    return ARCHITECTURE | sizes | {
        "architectures": ["Olmo2ForCausalLM"], "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "bos_token_id": None,
        "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad, "torch_dtype": str(dtype)[6:]}


def export_folder(checkpoint: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint as a folder; returns it. config.json comes last (an old one goes first), without
    which nothing opens a folder: a kill leaves no mixture. UserError if the folder holds other files."""
    safetensors = need("safetensors.torch")
    folder = Path(out)
    model, tokenizer, _ = load_model(checkpoint)
    config = model.config
    weights = model.state_dict()
    del model                                    # each of ours goes when theirs is there
    theirs = {}
    for ours, (names, rows) in layout(config).items():
        whole = weights.pop(ours)
        for name, part in zip(names, whole.split(rows or len(whole))):
            theirs[name] = part.to(dtype, copy=True)

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
        text = data if isinstance(data, bytes) else json.dumps(data, indent=1, ensure_ascii=False).encode()
        atomic_write(folder / name, text)

    if spare := config.vocab_size - config.n_vocab:
        print(f"WARNING: {spare} rows of the vocabulary belong to no token. Our software never scores them, "
              "other software gives them a share of every probability")
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
    heads = sizes["n_heads"]
    require(heads % sizes["n_kv_heads"] == 0, f"{path}: num_key_value_heads ({sizes['n_kv_heads']}) must "
            f"divide num_attention_heads ({heads})")
    require(sizes["d_model"] % (2 * heads) == 0, f"{path}: {heads} heads in a width of {sizes['d_model']}")
    require(n_vocab <= sizes["vocab_size"], f"{path}: fewer rows (vocab_size) than the tokenizer has tokens")

    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta")}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    require(type(theta) in (int, float) and theta > 0 and c.get("rope_theta") in (None, theta)
            and rope.get("rope_type") in (None, "default"),
            f"{path}: rope_theta must be given, the same in both places, without scaling")
    return ModelConfig(n_vocab=n_vocab, rope_theta=float(theta), **sizes)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    safetensors = need("safetensors.torch")
    files = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        require(index.is_file(), f"{folder}: has neither model.safetensors nor {index.name}")
        places = read_json(index).get("weight_map")
        require(isinstance(places, dict), f"{index}: has no weight_map")
        files = {Path(str(file)).name for file in places.values()}

    weights = {}
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
    name, _, revision = source.partition("@")
    require(name.count("/") == 1, f"{source}: no such folder, and no name of the hub (owner/name[@revision])")
    hub = need("huggingface_hub")
    try:
        if not list_revisions:
            return Path(hub.snapshot_download(name, revision=revision or None,
                                              allow_patterns=["*.json", "model*.safetensors"]))
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
    config = read_config(folder / "config.json", tokenizer.n_vocab)
    theirs = read_weights(folder)
    with torch.device("meta"):                   # shapes, without memory behind them
        model = GPT(config)

    weights = {}
    try:
        for ours, (names, rows) in layout(config).items():
            parts = [theirs.pop(name).to(dtype) for name in names]
            require(rows in (None, tuple(map(len, parts))), f"rows of {', '.join(names)}: "
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
    print(f"written: {out}\nnext: python sample.py {out}")
    return Path(out)


def convert(c: Config) -> Path | None:
    """Do what the command line asks for; returns the path written."""
    check_fields(c)
    verb, *paths = c.command
    require(verb in ("export", "import")[c.list_revisions:] and len(paths) == 2 - c.list_revisions,
            "say export CHECKPOINT FOLDER, import FOLDER-or-name FILE or import NAME --list-revisions")
    if c.list_revisions:
        return from_hub(*paths, list_revisions=True)
    return (export_folder if verb == "export" else import_folder)(*paths, DTYPES[c.dtype])


if __name__ == "__main__":
    main(convert, Config)
