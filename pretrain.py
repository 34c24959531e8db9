"""Pretrain a small GPT on the token shards of data/prepare.py, keeping checkpoints at listed token counts.

    python pretrain.py --data data/tiny --out runs/base

The checkpoints along the way (runs/base/1M.pt, 2M.pt, ...) are what the whole study starts from. The learning
rate is constant after the warm-up, as decaying it for each checkpoint would need a run for each; --decay adds
a linear decay over the last part of the run. Left out: document masking (a sequence may see the end
of the document before), and a schedule of batch sizes.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    Run, batch_indices, generator, main, one_run, require, require_positive, save_checkpoint, setup)
from evaluate import open_data
from model import GPT, SIZES, ModelConfig
from ranks import add_up, share, world_size


@dataclass
class Config:
    data: str = "data/tiny"         # folder made by data/prepare.py
    out: str = "runs/base"          # run folder; the same call again resumes an unfinished run
    size: str = "0.5M"              # parameters: 0.3M 0.5M 1M 3M 10M 30M 124M (at a vocabulary of 512)
    context: int = 256              # tokens per sequence
    batch: int = 16                 # sequences per update: 16 x 256 = 4,096 tokens
    micro_batch: int = 8            # sequences per forward pass; 8 keeps activations in the cache of a CPU
    tokens: int = 8_000_000         # length of the run
    checkpoints_at: tuple[int, ...] = ()    # tokens, besides the end; if none: 1/8 1/4 3/8 1/2 3/4 of the run
    lr: float = 3e-3                # peak learning rate of AdamW; small models take large ones
    warmup: int = 50                # updates until the peak
    decay: float = 0.0              # share of the run, at its end, over which lr falls linearly to 0
    weight_decay: float = 0.1       # on matrices only, not on embeddings and norms (OLMo-2)
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 100           # updates between validation losses
    save_every: int = 100           # updates between states to resume from
    seed: int = 0                   # of the initial weights and of the order of the data
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores
    compile: bool = False           # torch.compile the model (CUDA does so by itself)


def check(c: Config) -> None:
    require(c.size in SIZES, f"--size {c.size}: must be one of {' '.join(SIZES)}")
    require_positive(c, "context batch micro_batch tokens lr grad_clip eval_every save_every")
    require_positive(c, "warmup weight_decay", zero=True)
    require(c.batch % c.micro_batch == 0, f"--micro-batch {c.micro_batch}: does not divide --batch {c.batch}")
    require(0 <= c.decay <= 1, f"--decay {c.decay}: must be between 0 and 1")
    late = [t for t in c.checkpoints_at if not 0 < t <= c.tokens]
    require(not late,
            f"--checkpoints-at {','.join(map(str, late))}: not within the --tokens {c.tokens} of the run")


def blocks(shard: np.ndarray, numbers: list[int], context: int) -> Tensor:
    """Blocks of a shard by number: (B, T+1), each block sharing its last token with the first of the next."""
    return torch.from_numpy(np.stack([shard[i * context:(i + 1) * context + 1]
                                      for i in numbers]).astype(np.int64))


def next_token_loss(model: GPT, sequences: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of sequences (B, T+1)."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.inference_mode()
def validation_loss(model: GPT, shard: np.ndarray, c: Config, device: torch.device) -> float:
    """Nats per token over the first 128 blocks (or all, if there are fewer)."""
    n = min(128, (len(shard) - 1) // c.context)
    parts = blocks(shard, range(n), c.context).split(c.micro_batch)
    return float(sum(next_token_loss(model, part.to(device)) * len(part) for part in parts) / n)


def learning_rate(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, constant, optional linear decay to 0 over the last `decay` of the run."""
    decay_steps = c.decay * steps
    falling = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * falling


@one_run
def train(c: Config) -> Path:
    """Run (or resume) the pretraining; returns the path of the last checkpoint."""
    check(c)
    device = setup(c.device, c.threads)
    require(c.batch >= world_size(), f"--batch {c.batch}: fewer sequences than the {world_size()} processes")
    cuda = device.type == "cuda"
    manifest, tokenizer, shards = open_data(c.data)
    for name, shard in shards.items():
        require(len(shard) > c.context,
                f"{c.data}/{name}.bin: has {len(shard)} tokens, --context {c.context} needs more")
    run = Run(c, {c.data: manifest["sha256"]})
    tokens_per_step = c.batch * c.context
    steps = -(-c.tokens // tokens_per_step)
    kept = c.checkpoints_at or [c.tokens * eighths // 8 for eighths in (1, 2, 3, 4, 6)]
    due = {t: -(-t // tokens_per_step) for t in kept}                    # tokens -> step: whole steps only
    final = run.out / f"{c.tokens / 1e6:g}M.pt"
    if run.finished(final, steps):
        return final
    d_model, n_layers, n_heads, d_ff = SIZES[c.size]
    rows = -(-tokenizer.n_vocab // 64) * 64                              # aligned for fast matrix products
    model = GPT(ModelConfig(rows, tokenizer.n_vocab, c.context, d_model, n_layers, n_heads, d_ff),
                generator(c.seed, "weights"))
    model.to(device)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name == "embed.weight"]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=c.lr,
                                  betas=(.9, .95), weight_decay=c.weight_decay, fused=True)
    step, seconds = 0, 0.0
    if run.last:
        run.restore(model, optimizer)
        step, seconds = run.last["step"], run.last["seconds"]
    compiled = torch.compile(model) if c.compile or cuda else model
    forward = torch.autocast("cuda", torch.bfloat16, enabled=cuda)

    flops_per_step = 3 * model.flops_per_token(c.context) * tokens_per_step

    def lineage() -> list[dict]:
        return run.lineage([], tokens=step * tokens_per_step, updates=step - run.skipped,
                           flops=step * flops_per_step, seconds=seconds, data=manifest["sha256"])
    bar = tqdm(total=steps * tokens_per_step, initial=step * tokens_per_step, unit="tok", unit_scale=True,
               desc="pretrain")
    scores: dict[str, float] = {}
    while True:
        # ---- learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, step, steps)
        # ---- evaluate and checkpoint
        if step % c.eval_every == 0 or step == steps:
            with forward:
                scores = {f"val_{kind}": validation_loss(compiled, shards[f"val_{kind}"], c, device)
                          for kind in ("general", "arithmetic")}
            run.log(step=step, **scores)
        for tokens, at in due.items():
            if at == step:
                save_checkpoint(run.out / f"{tokens / 1e6:g}M.pt", model, tokenizer, lineage())
        if step == steps:
            break
        # ---- collect
        started = time.perf_counter()
        numbers = batch_indices((len(shards["train"]) - 1) // c.context, c.batch, step, c.seed, "text")
        sequences = blocks(shards["train"], share(numbers), c.context)   # (B, T+1), none twice in an epoch
        # ---- update
        total = torch.zeros((), device=device)
        for part in sequences.split(c.micro_batch):
            with forward:
                loss = next_token_loss(compiled, part.to(device, non_blocking=True)) * (len(part) / c.batch)
            loss.backward()
            total += loss.detach()
        norm = run.step(model, optimizer, c.grad_clip)
        # ---- log
        step += 1
        loss, = add_up(float(total))
        seconds += time.perf_counter() - started
        run.log(step=step, tokens=step * tokens_per_step, loss=loss, lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm, skipped=run.skipped, flops=step * flops_per_step,
                seconds=round(seconds, 3))
        bar.update(tokens_per_step)
        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in {"loss": loss, **scores}.items()),
                            refresh=False)
        # ---- stop
        if step % c.save_every == 0 or step == steps or run.interrupted:
            run.save_last(model, tokenizer, lineage(), [optimizer], step, seconds=seconds)
        if run.interrupted and step < steps:
            run.stop()
    bar.close()
    save_checkpoint(final, model, tokenizer, lineage())
    run.save_last(model, tokenizer, lineage(), [optimizer], step, done=True, seconds=seconds)
    print(f"{final}: {step * tokens_per_step:,} tokens, {seconds / 60:.1f} min, {step * flops_per_step:.2e} "
          f"FLOPs, validation loss general {scores['val_general']:.3f}, "
          f"arithmetic {scores['val_arithmetic']:.3f}\n"
          f"next: python rl.py --data {c.data} --init {final} --out runs/rl")
    return final


if __name__ == "__main__":
    main(train, Config)
