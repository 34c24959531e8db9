"""Pretrain a small GPT on the token shards of data/prepare.py, keeping checkpoints at listed token counts.

    python pretrain.py --data data/tiny --out runs/base

The checkpoints along the way (runs/base/1M.pt, 2M.pt, ...) are what the whole study starts from. The learning
rate is constant after the warm-up, as a decayed checkpoint would need a run of its own; --decay adds a linear
decay over the last part of the run. Left out: document masking (a sequence may see the end of the document
before), and a schedule of batch sizes.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ranks  # comes before torch: it sets how idle threads wait

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import (
    Run, batch_indices, check_fields, compile_if_it_pays, generator, load_model, main, require, setup)
from data.problems import open_data
from data.tokenizer import Tokenizer
from model import GPT, SIZES, ModelConfig, compilable, moved, tokens_at_once


@dataclass
class Config:
    data: str = "data/tiny"         # folder made by data/prepare.py
    init: str = ""                  # checkpoint to continue from, on the texts that follow, with new moments
    out: str = "runs/base"          # run folder; the same call again resumes an unfinished run
    size: str = "0.5M"              # one of 0.3M, 0.5M, 1M, 3M, 10M, 30M, 124M: parameters, at 512 token ids
    context: int = 256              # > 0: tokens per sequence
    batch: int = 16                 # > 0: sequences per update: 16 x 256 = 4,096 tokens
    micro_batch: int = 0            # >= 0: sequences per forward pass, 0 = 2,048 tokens' (GPU: 16,384)
    tokens: int = 8_000_000         # > 0: length of the run
    checkpoints_at: tuple[int, ...] = ()    # > 0: tokens (none: 1/8 1/4 3/8 1/2 3/4 of all)
    lr: float = 3e-3                # > 0: peak learning rate of AdamW; small models take large ones
    warmup: int = 50                # >= 0: updates until the peak
    decay: float = 0.0              # >= 0, <= 1: share of the run, at its end, over which lr falls to 0
    weight_decay: float = 0.1       # >= 0: on matrices only, not on embeddings and norms (OLMo-2)
    grad_clip: float = 1.0          # > 0: largest gradient norm
    eval_every: int = 100           # > 0: updates between validation losses
    save_every: int = 100           # > 0: updates between states to resume from
    seed: int = 0                   # >= 0: of the initial weights and of the order of the data
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores
    compile: str = "auto"           # one of auto, on, off: torch.compile; auto: in long runs on a CPU


def check(c: Config) -> None:
    check_fields(c)
    require(c.micro_batch == 0 or c.batch % c.micro_batch == 0,
            f"--micro-batch {c.micro_batch}: does not divide --batch {c.batch}")
    late = [t for t in c.checkpoints_at if t > c.tokens]
    require(not late,
            f"--checkpoints-at {','.join(map(str, late))}: not within the --tokens {c.tokens} of the run")


def blocks(shard: np.ndarray, numbers: list[int], context: int) -> Tensor:
    """Blocks of a shard by number: (B, T+1), each block sharing its last token with the first of the next."""
    rows = [shard[i * context:(i + 1) * context + 1] for i in numbers]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@compilable(shapes_vary=False)
def next_token_loss(model: GPT, sequences: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of sequences (B, T+1)."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


@torch.inference_mode()
def validation_loss(model: GPT, shard: np.ndarray, c: Config, device: torch.device) -> float:
    """Nats per token over the first 128 blocks (or all, if there are fewer)."""
    n = min(128, (len(shard) - 1) // c.context)
    total = 0.0
    for part in blocks(shard, range(n), c.context).split(at_once(c, device)):
        part = moved(part, device)
        total += next_token_loss(model, part) * len(part)
    return float(total / n)


def at_once(c: Config, device: torch.device) -> int:
    """Sequences per forward pass."""
    return c.micro_batch or max(1, tokens_at_once(0, device) // c.context)


def learning_rate(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, constant, optional linear decay to 0 over the last `decay` of the run."""
    decay_steps = c.decay * steps
    rising = min(1.0, (step + 1) / max(1, c.warmup))
    falling = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return c.lr * rising * falling


def new_model(c: Config, tokenizer: Tokenizer) -> GPT:
    d_model, n_layers, n_heads, d_ff = SIZES[c.size]
    rows = 64 * math.ceil(tokenizer.n_vocab / 64)                        # aligned for fast matrix products
    config = ModelConfig(rows, tokenizer.n_vocab, c.context, d_model, n_layers, n_heads, d_ff)
    return GPT(config, generator(c.seed, "weights"))


def first_model(c: Config, tokenizer: Tokenizer, device: torch.device) -> tuple[GPT, list[dict]]:
    """A new model, or that of --init, and its lineage. UserError if --init has another tokenizer or shape."""
    if not c.init:
        return new_model(c, tokenizer).to(device), []
    model, own, parents = load_model(c.init, device)
    require(own.sha256 == tokenizer.sha256, f"{c.init}: made with another tokenizer than {c.data} holds")
    there = model.config
    require(there.context == c.context, f"--context {c.context}: {c.init} has {there.context}")
    shape = (there.d_model, there.n_layers, there.n_heads, there.d_ff)
    require(shape == SIZES[c.size], f"--size {c.size}: {c.init} has another")
    return model, parents


def new_optimizer(model: GPT, c: Config) -> torch.optim.Optimizer:
    """AdamW that decays the matrices, but neither the embedding nor the gains of the norms."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and name != "embed.weight"
        (decayed if matrix else others).append(p)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(.9, .95), weight_decay=c.weight_decay, fused=True)


# ---- training --------------------------------------------------------------------------------------------
def train(c: Config) -> Path:
    """Run (or resume) the pretraining; returns the path of the last checkpoint."""
    check(c)
    device = setup(c.device, c.threads, c.compile)
    require(c.batch >= ranks.world_size(),
            f"--batch {c.batch}: fewer sequences than the {ranks.world_size()} processes")
    manifest, tokenizer, shards = open_data(c.data)
    for name, shard in shards.items():
        require(len(shard) > c.context,
                f"{c.data}/{name}.bin: has {len(shard)} tokens, --context {c.context} needs more")
    model, parents = first_model(c, tokenizer, device)
    optimizer = new_optimizer(model, c)
    tokens_per_step = c.batch * c.context
    flops_per_step = 3 * model.flops_per_token(c.context) * tokens_per_step
    steps = math.ceil(c.tokens / tokens_per_step)
    kept = c.checkpoints_at or [c.tokens * eighths // 8 for eighths in (1, 2, 3, 4, 6)]

    earlier = [stage for stage in parents if stage["script"] == "pretrain.py"]
    before = sum(stage["tokens"] for stage in earlier) // tokens_per_step
    if any(stage["config"].get("seed") != c.seed for stage in earlier):
        print(f"WARNING: {c.init} was pretrained with another --seed: some of its texts come again",
              file=sys.stderr)
    with Run(c, steps, parents, {c.data: manifest["sha256"]}, f"{c.tokens / 1e6:g}M.pt") as run:
        if run.finished():
            return run.final
        step = run.restore(model, optimizer)
        compile_if_it_pays(model, c.compile, steps * flops_per_step, gain=.2)
        while True:
            # ---- learning rate
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(c, step, steps)

            # ---- evaluate and checkpoint
            if step % c.eval_every == 0 or step == steps:
                losses = {f"val_{kind}": validation_loss(model, shards[f"val_{kind}"], c, device)
                          for kind in ("general", "arithmetic")}
                run.log(step, **losses)
            for tokens in kept:
                if step == math.ceil(tokens / tokens_per_step):          # whole steps only
                    run.keep(f"{tokens / 1e6:g}M.pt", model, tokenizer)
            if step == steps:
                break

            # ---- collect
            started = time.perf_counter()
            n_blocks = (len(shards["train"]) - 1) // c.context
            numbers = batch_indices(n_blocks, c.batch, before + step, c.seed, "text")   # none twice an epoch
            sequences = blocks(shards["train"], ranks.my_part(numbers), c.context)   # (B, T+1)

            # ---- update
            total = torch.zeros((), device=device)
            for part in sequences.split(at_once(c, device)):
                part = moved(part, device)
                loss = next_token_loss(model, part) * (len(part) / c.batch)
                loss.backward()
                total += loss.detach()
            ranks.sum_gradients(model)           # over the processes, if there are several
            norm = float(clip_grad_norm_(model.parameters(), c.grad_clip))
            if run.usable(norm, optimizer):      # finite; three bad ones in a row end the run
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # ---- log
            step += 1
            loss, = ranks.add_up(float(total))
            run.count(tokens=tokens_per_step, flops=flops_per_step, seconds=time.perf_counter() - started)
            run.log_step(step, loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)

            # ---- stop
            run.end_step(step, model, tokenizer, optimizer)
        then = f"python rl.py --data {c.data} --init {run.final} --out runs/rl"
        if not (c.init or c.decay):                      # a base for RL has its learning rate lowered first
            then = (f"python pretrain.py --data {c.data} --init {run.final} --tokens {c.tokens // 10} "
                    "--decay 1 --warmup 10 --out runs/annealed")
        return run.finish(model, tokenizer, optimizer, then=then)


if __name__ == "__main__":
    main(train, Config)
