"""The memory that rl.py, sft.py or merge.py needs on one GPU, computed in a second before the run.

    python beyond/memory.py                               every size, on cards of 8, 12 and 24 GiB
    python beyond/memory.py --init olmo.pt --memory 24    the first options that fit; status 2 if none do

Nobody has compared it with a GPU. Left out: evaluate.py, several GPUs, tensors on the CPU, 8-bit moments.
"""
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import check_fields, load_checkpoint, main, parse, require  # noqa: E402
from model import SIZES, ModelConfig, tokens_at_once  # noqa: E402

MODELS = {name: ModelConfig(512, 512, 256, *shape) for name, shape in SIZES.items()} | {
    "olmo-1b": ModelConfig(100_352, 100_278, 4096, 2048, 16, 16, 8192, 5e5)}
GPU = torch.device("cuda")
SAVINGS = (("micro_tokens", 2048), ("decode_rows", 128), ("decode_rows", 64), ("micro_tokens", 512),
           ("recompute", True), ("reference", False), ("freeze_embeddings", True))       # cheapest first
CUDA_CONTEXT = 1.0      # assumed: GiB for CUDA itself
SPARE = 1.1             # assumed: a tenth is lost between the tensors that come and go
CARD = .97              # assumed: what a card has of the GiB that it is sold with


@dataclass
class Config:
    init: str = ""                  # checkpoint to plan for
    size: str = "all"               # one of all, 0.3M, 0.5M, 1M, 3M, 10M, 30M, 124M, olmo-1b: without --init
    memory: float = 0.0             # >= 0: GiB that the card is sold with; 0 = 8, 12 and 24
    prompt: int = 160               # >= 1: longest prompt, tokens
    run: str = "rl.py --max-new 256"        # command to plan for: rl.py, sft.py or merge.py and its options


def plan(m: ModelConfig, c: Any, prompt: int) -> dict[str, dict[str, int]]:
    """Phase -> name -> bytes, of everything large; c is the Config of rl.py, sft.py or merge.py. Exact:
    parameters, moments, reference, gradients, keys and values. The others count what autograd keeps with
    unfused RMSNorm and fused attention, and large temporaries."""
    size = 2 if m.d_model >= 512 else 4          # of a number in products: bf16, fp32 (model.precision)
    mode = getattr(c, "mode", "")                # of merge.py
    sampled = c.n_problems * c.rollouts if hasattr(c, "rollouts") else 0         # answers per step
    reference = bool(sampled and c.reference)
    embeddings = 2 * m.vocab_size * m.d_model
    matrices = m.n_layers * (2 * m.d_model * (m.d_model + m.kv_width) + 3 * m.d_model * m.d_ff)
    weights = embeddings + matrices + m.n_layers * (3 * m.d_model + m.kv_width) + m.d_model
    trained = weights - c.freeze_embeddings * embeddings

    groups = [(c.eval_samples, c.eval_problems)]         # answers to a problem, problems: of a validation
    if sampled:                                          # of rl.collect, of rl.probe
        groups += [(c.rollouts, c.n_problems), (2 * c.rollouts, c.n_problems)]
    started = [min(problems, max(1, c.decode_rows // group)) for group, problems in groups]      # at once
    rows = max(group * n for (group, _), n in zip(groups, started))
    columns = 16 * -(-(prompt + c.max_new) // 16)        # of the cache, which a GPU allocates once
    keys = rows * columns * m.n_layers * m.kv_width * size
    copied = int(max(.8, 1 / c.eval_samples) * keys / m.n_layers)        # by Cache.select, one by one
    temporaries = max(started) * prompt * (4 * size * m.d_ff + 12 * m.d_model)   # of a layer of prompts, when
    temporaries -= 2 * keys * (rows - max(started)) // rows      # their answers have no keys yet

    # update: if answers are a quarter as long as allowed, four times the rows have a copy of a prompt's keys
    micro_tokens = tokens_at_once(c.micro_tokens, GPU)
    tokens = max(micro_tokens, prompt + c.max_new)
    prompts = repeated = 0
    if sampled:
        tokens = min(max(micro_tokens, c.max_new), sampled * c.max_new)
        prompts = prompt * min(max(1, micro_tokens // prompt), c.n_problems)
        repeated = prompt * min(max(1, 4 * tokens // c.max_new), sampled)        # positions of such copies
    attended = 2 * size * m.d_model * repeated   # with the keys and values repeated for all heads
    kept = (42 + 4 * size) * m.d_model + 4 * size * m.d_ff + 4 * m.n_heads + 16      # by a layer, a token
    activations = m.n_layers * ((tokens + prompts) * kept + attended)
    backward = max(tokens, prompts) * kept       # temporaries of a layer
    if c.recompute:                              # every block's input; one layer computed again
        activations = m.n_layers * 4 * m.d_model * (tokens + prompts)
        backward = 2 * backward + attended
    shared = 2 * size * m.n_layers * m.kv_width * (repeated + 3 * prompts)   # of SharedPrompts; and gradients
    converted = 2 * matrices * (size == 2)
    largest = max(2 * m.d_model * m.d_ff, 0 if c.freeze_embeddings else m.vocab_size * m.d_model)
    return {
        "always": {"parameters": 4 * weights, "reference": 4 * weights * reference,
                   "moments": 8 * trained * (2 if mode in ("parallel", "alternating") else 1),
                   "snapshots": 8 * trained * (mode == "parallel")},
        "sampling": {"weights in bf16": converted, "keys and values": 2 * keys,
                     "copied": max(copied, temporaries),
                     "distributions": 2 * 20 * m.n_vocab * rows},         # one of them in the CUDA graph
        "update": {"gradients": 4 * trained, "newest gradient": 8 * largest,     # as it comes, and converted
                   "weights in bf16": converted,          # and in the graph of the prompts once more
                   "for the prompts": converted * (sampled > 0 and not c.recompute),
                   "activations": activations + shared,
                   "logits": max(12 * m.n_vocab * tokens, backward)}}    # gone before a layer's temporaries


def total(phases: dict[str, dict[str, int]]) -> tuple[float, str]:
    """(GiB on a GPU at the worst moment, the sum as people write it)."""
    worst = max("sampling", "update", key=lambda phase: sum(phases[phase].values()))
    both = []
    for phase in ("always", worst):
        both.append(", ".join(f"{name} {size / 2 ** 30:.2f}" for name, size in phases[phase].items() if size))
    size = sum(phases["always"].values()) + SPARE * sum(phases[worst].values())
    gib = CUDA_CONTEXT + size / 2 ** 30
    return gib, f"{gib:.2f} GiB = {CUDA_CONTEXT:g} for CUDA + ({both[0]}) + {SPARE} x ({both[1]}; in {worst})"


def show(c: Config) -> None:
    """Print the first options that fit. UserError if none do for the model and the card asked for."""
    check_fields(c)
    script, _, options = c.run.partition(".py")
    require(script in ("rl", "sft", "merge"), f"--run {c.run}: must begin with rl.py, sft.py or merge.py")
    given = parse(import_module(script).Config, options.split())
    check_fields(given)
    models = MODELS if c.size == "all" else {c.size: MODELS[c.size]}
    if init := c.init or given.init:
        models = {init: ModelConfig(**load_checkpoint(init)["config"])}
    for name, m in models.items():
        for card in [c.memory] if c.memory else [8, 12, 24]:
            room = CARD * card
            x = replace(given, micro_tokens=tokens_at_once(given.micro_tokens, GPU))
            for option, value in SAVINGS:        # smaller numbers stay; sft.py has no reference
                if hasattr(x, option) and total(plan(m, x, c.prompt))[0] > room:
                    less = value if isinstance(value, bool) else min(value, getattr(x, option))
                    x = replace(x, **{option: less})
            gib, summed = total(plan(m, x, c.prompt))
            verdict = "fits" if gib <= room else "too small even"
            line = f"{name} on {card:g} GB ({room:.2f} GiB): {verdict} with --decode-rows {x.decode_rows}"
            line += f" --micro-tokens {x.micro_tokens}" + " --recompute" * x.recompute
            line += " --no-reference" * (not getattr(x, "reference", True))
            line += f"{' --freeze-embeddings' * x.freeze_embeddings}\n    {summed}"
            require(gib <= room or not c.memory or len(models) > 1, line)
            print(line)


if __name__ == "__main__":
    main(show, Config)
