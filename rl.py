"""GRPO by hand: reinforcement learning on any checkpoint with a reward that is checked by a program.

    python rl.py --init runs/base/8M.pt --out runs/rl

Every step: sample G answers to each of P problems, reward 1 for a right final answer and 0 otherwise, call an
answer good or bad relative to its group (Shao et al. 2024), raise or lower the log-probability of its tokens.
No reference solution is ever seen. Left out: a value network (GRPO's point), a reward model (the reward is
exact), length penalties, top-k and top-p sampling (sampled and scored distribution must be the same).
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    Run, batch_indices, file_sha256, generator, main, one_run, require, require_positive, save_checkpoint,
    setup)
from data.tokenizer import Tokenizer
from evaluate import open_training, pass_at_k, prompt_ids, read_answer, validate
from model import GPT, SharedPrompts, completion_logprobs, micro_batches, pack, sample, shared_logprobs
from ranks import add_up, share
from scale import Memory, keep_start, make_optimizer


@dataclass
class Config(Memory):                          # and the options of scale.Memory
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    problems: str = ""              # problem file to train on instead of DATA/train.jsonl
    out: str = "runs/rl"            # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # which problems to train and validate on: easy, hard, all
    questions: int = 2000           # how many to train on, 0 = all; the run sees them repeatedly
    n_problems: int = 64            # P, problems per step
    rollouts: int = 16              # G, sampled answers per problem
    steps: int = 50                 # batches of rollouts
    updates: int = 1                # optimizer steps per batch of rollouts (the batch is split by problems)
    lr: float = 3e-4                # AdamW, constant after the warm-up
    warmup: int = 0                 # steps until lr is reached
    weight_decay: float = 0.0       # of AdamW
    grad_clip: float = 1.0          # largest gradient norm
    std: bool = True                # divide the advantage by the group's standard deviation
    clip_low: float = 0.2           # the ratio counts down to 1 - clip_low ...
    clip_high: float = 0.2          # ... and up to 1 + clip_high (0.28: "clip higher"); idle with --updates 1
    kl: float = 0.0                 # coefficient of the KL penalty towards the start
    temperature: float = 1.0        # of the rollouts
    max_new: int = 80               # longest answer, tokens
    micro_batch: int = 2_048        # tokens per forward pass of the update
    eval_every: int = 10            # steps between validations (and transcripts)
    eval_problems: int = 100        # validation problems
    eval_samples: int = 16          # samples of each, at T=0.6
    save_every: int = 5             # steps between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # steps after which to keep a checkpoint, besides the last
    seed: int = 0                   # of the order of problems and of the rollouts
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def check(c: Config) -> None:
    require(c.rollouts >= 2, f"--rollouts {c.rollouts}: a group needs at least 2 for a relative advantage")
    require_positive(c, "n_problems steps updates lr grad_clip temperature max_new micro_batch eval_every "
                        "eval_problems eval_samples save_every")
    require_positive(c, "questions warmup weight_decay clip_low clip_high kl", zero=True)
    require(c.n_problems % c.updates == 0, f"--updates {c.updates}: must divide --n-problems {c.n_problems}")
    late = [s for s in c.checkpoints_at if not 0 < s <= c.steps]
    require(not late, f"--checkpoints-at {','.join(map(str, late))}: not within the run's {c.steps} steps")


# ---- the algorithm ---------------------------------------------------------------------------------------

def advantages(rewards: Tensor, std: bool = True) -> Tensor:
    """Rewards (P, G) minus their group's mean, over its unbiased deviation + 1e-6 (Shao et al. 2024, section
    4.1.2; without: Liu et al. 2025). 0 where all are equal: their deviation in floats may be just above 0."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    signal = rewards.amax(dim=1, keepdim=True) != rewards.amin(dim=1, keepdim=True)
    return torch.where(signal, centred, 0.0)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Clipped loss of each token (N,), not yet averaged: minus the smaller of ratio · advantage and the same
    with the ratio clipped to 1 − low ... 1 + high (Schulman et al. 2017, equation 7)."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl_k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """KL(policy || reference) estimated at each sampled token, never negative: exp(d) − 1 − d, d being the
    reference's log-probability minus the policy's, exact for small d too (Schulman 2020, 'k3')."""
    d = reference_logp - logp
    return torch.expm1(d) - d


@dataclass
class Batch:
    """B = P·G graded rollouts, row p·G + g being rollout g of problem p."""
    prompts: list[list[int]]        # P
    completions: list[list[int]]    # B, EOS included where generated
    logprobs: list[Tensor]          # B of (length,): under the distribution they were sampled from
    grades: list[str]               # B: right, wrong, unparsed
    texts: list[str]                # B
    rewards: Tensor                 # (P, G) of 0. and 1.
    entropy: float                  # nats per sampled token
    truncated: float                # share of rollouts without EOS


def collect(model: GPT, tokenizer: Tokenizer, problems: list[dict], group: int, c: Config,
            gen: torch.Generator) -> Batch:
    """Sample `group` answers to every problem at the training temperature and grade them."""
    prompts = [prompt_ids(tokenizer, p) for p in problems]
    out = sample(model, prompts, group, c.max_new, tokenizer.eos, tokenizer.pad, gen, c.temperature)
    completions, finished = out.completions(), out.finished.tolist()
    answers = [p["answer"] for p in problems for _ in range(group)]
    read = [read_answer(tokenizer, *row) for row in zip(completions, finished, answers)]
    texts, grades = [text for text, _ in read], [grade for _, grade in read]
    rewards = torch.tensor([float(g == "right") for g in grades]).view(len(problems), group)
    return Batch(prompts, completions, [row[:n] for row, n in zip(out.logprobs, out.lengths.tolist())],
                 grades, texts, rewards, float(out.entropy.sum() / out.lengths.sum()),
                 1 - sum(finished) / len(finished))


def policy_gradient(model: GPT, reference: GPT | None, batch: Batch, advantage: Tensor, rows: range,
                    c: Config, pad: int) -> dict[str, float] | None:
    """Add the GRPO gradient of these rows to .grad; returns figures per token, None if no row has a signal.
    The loss is the mean over *all* completion tokens of the rows, truncated and signal-free ones included,
    whatever the micro-batches (Yu et al. 2025). Rows without advantage add 0 to it: they are not computed.
    A prompt is computed once for all its completions, which attend to it."""
    device, completions, G = model.head.weight.device, batch.completions, batch.rewards.shape[1]
    total = sum(len(completions[r]) for r in rows)
    useful = [r for r in rows if advantage[r] != 0 or c.kl > 0]
    if not useful:
        return None
    sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "kl_penalty"), 0.0)
    groups = sorted({r // G for r in useful})
    own = share(groups)                          # the others are other processes' work
    for block in micro_batches([len(batch.prompts[g]) for g in own], c.micro_batch):
        place = {own[i]: at for at, i in enumerate(block)}               # group -> its number in the block
        shared = SharedPrompts(model, [batch.prompts[g] for g in place], pad)
        mine = [r for r in useful if r // G in place]
        for part in micro_batches([len(completions[r]) for r in mine], c.micro_batch):
            part = [mine[i] for i in part]
            texts = [completions[r] for r in part]
            logp = shared_logprobs(model, shared, [place[r // G] for r in part], texts, pad, c.temperature)
            # one update per batch is exactly on-policy: the ratio is 1, its gradient that of REINFORCE
            old = (logp.detach() if c.updates == 1                                                # (N,)
                   else torch.cat([batch.logprobs[r] for r in part]).to(device))
            sizes = torch.tensor([len(text) for text in texts])
            token_advantage = advantage[part].repeat_interleave(sizes).to(device)                 # (N,)
            loss = policy_loss(logp, old, token_advantage, c.clip_low, c.clip_high)
            if c.kl > 0:
                ids, target = pack([batch.prompts[r // G] for r in part], texts, pad, device)
                reference_logp = completion_logprobs(reference, ids, target, c.temperature).detach()
                penalty = kl_k3(logp, reference_logp)
                loss = loss + c.kl * penalty
                sums["kl_penalty"] += float(penalty.detach().sum())
            (loss.sum() / total).backward()
            ratio = (logp.detach() - old).exp()
            outside = ((token_advantage > 0) & (ratio > 1 + c.clip_high)
                       | (token_advantage < 0) & (ratio < 1 - c.clip_low))
            for name, value in (("loss", loss.detach()), ("ratio", ratio - 1), ("clip_fraction", outside)):
                sums[name] += float(value.sum())
        shared.backward()
    positions = sum(len(completions[r]) for r in useful) + sum(len(batch.prompts[g]) for g in groups)
    # a skipped token's ratio counts as 1
    means = {name: value / total for name, value in zip(sums, add_up(*sums.values()))}
    return means | {"ratio": 1 + means["ratio"], "positions": positions}


# ---- measurements ----------------------------------------------------------------------------------------

def grpo_flops(model: GPT, batch: Batch, trained: int, c: Config) -> int:
    """FLOPs of sampling a batch and of updating on `trained` positions; measurements are not counted."""
    prompted, sampled = (sum(map(len, x)) for x in (batch.prompts, batch.completions))
    length = int(prompted / len(batch.prompts) + sampled / len(batch.completions))
    return model.flops_per_token(length) * (prompted + sampled + (3 + (c.kl > 0)) * trained)


def signal_probability(n: int, right: int, group: int) -> float:
    """Probability that `group` of n answers, `right` of them right, drawn without replacement, are mixed."""
    return pass_at_k(n, right, group) + pass_at_k(n, n - right, group) - 1


@torch.inference_mode()
def kl_to_start(reference: GPT | None, batch: Batch, c: Config, pad: int, rows: int = 64) -> float:
    """KL(policy || start), nats per token, from `rows` rollouts of the batch and their recorded logprobs; NaN
    without a reference (--reference none)."""
    if reference is None:
        return float("nan")
    B, G, device = batch.rewards.numel(), batch.rewards.shape[1], reference.head.weight.device
    chosen = range(0, B, -(-B // rows))
    texts, logp = [(batch.prompts[r // G], batch.completions[r]) for r in chosen], []
    at_once = max(1, 2 ** 27 // (c.max_new * reference.config.n_vocab))          # logits of half a GiB
    for i in range(0, len(texts), at_once):
        ids, target = pack(*zip(*texts[i:i + at_once]), pad, device)
        logp.append(completion_logprobs(reference, ids, target, c.temperature).cpu())
    return float(kl_k3(torch.cat([batch.logprobs[r] for r in chosen]), torch.cat(logp)).mean())


def probe(model: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config) -> None:
    """Measure the success rate before the first step; print the expected share of groups with a signal."""
    n = 2 * c.rollouts
    batch = collect(model, tokenizer, problems, n, c, generator(c.seed, "probe"))
    right = batch.rewards.sum(1).int().tolist()
    signal = float(np.mean([signal_probability(n, r, c.rollouts) for r in right]))
    unparsed = batch.grades.count("unparsed") / len(batch.grades)
    print(f"before training: {batch.rewards.mean():.1%} of {n * len(right)} answers right, {unparsed:.1%} not"
          f" readable; about {signal:.0%} of groups of {c.rollouts} will have a signal")
    if signal < .3:
        print("WARNING: few groups have a signal, and a rare success gets a large advantage: updates will be "
              "noisy. More --n-problems or --rollouts, or a smaller --lr, are safer." if signal else
              "WARNING: no group has a signal, so RL cannot learn anything here. Start from a later "
              "checkpoint, or use easier problems or more --rollouts.")


def transcript(batch: Batch, problems: list[dict], step: int, group: int) -> str:
    """Two answers to each of three problems, with their grades."""
    parts = [f"======== step {step}"]
    for i, p in enumerate(problems[:3]):
        parts.append(f"{p['question']}   (answer {p['answer']})")
        parts += [f"  [{batch.grades[r]}] {batch.texts[r]!r}" for r in (i * group, i * group + 1)]
    return "\n".join(parts)


# ---- training --------------------------------------------------------------------------------------------

@one_run
def train(c: Config) -> Path:
    """Run (or resume) RL; returns the path of the last checkpoint."""
    check(c)
    model, tokenizer, earlier, problems, validation = open_training(c, setup(c.device, c.threads))
    reference = keep_start(model, c)
    run = Run(c, {c.init: file_sha256(c.init)})
    final = run.out / "final.pt"
    if run.finished(final, c.steps):
        return final
    optimizer = make_optimizer(model, c, c.lr)
    step, counts = 0, {"tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}
    if run.last:
        run.restore(model, optimizer)
        step, counts = run.last["step"], run.last["counts"]
    else:
        probe(model, tokenizer, problems[:c.n_problems], c)

    def lineage() -> list[dict]:
        return run.lineage(earlier, **counts)
    bar = tqdm(total=c.steps, initial=step, unit="step", desc="rl")
    scores: dict[str, float] = {}
    while True:
        # ---- learning rate
        for group in optimizer.param_groups:
            group["lr"] = c.lr * min(1.0, (step + 1) / max(1, c.warmup))
        # ---- evaluate and checkpoint
        if step % c.eval_every == 0 or step == c.steps:
            scores = {"val_pass@1": validate(model, tokenizer, validation, c).score}
            run.log(step=step, **scores)
        if step in c.checkpoints_at:
            save_checkpoint(run.out / f"step{step}.pt", model, tokenizer, lineage())
        if step == c.steps:
            break
        # ---- collect
        started = time.perf_counter()
        chosen = [problems[i] for i in batch_indices(len(problems), c.n_problems, step, c.seed, "rl")]
        batch = collect(model, tokenizer, chosen, c.rollouts, c, generator(c.seed, "rollouts", step))
        advantage = advantages(batch.rewards, c.std).flatten()                                    # (B,)
        kl = kl_to_start(reference, batch, c, tokenizer.pad)
        # ---- update
        rows, figures, skipped = len(advantage) // c.updates, [], run.skipped
        for i in range(c.updates):
            span = range(i * rows, (i + 1) * rows)
            part = policy_gradient(model, reference, batch, advantage, span, c, tokenizer.pad)
            if part:                             # no signal, no step: momentum must not move the model
                figures.append(part | {"grad_norm": run.step(model, optimizer, c.grad_clip)})
        # ---- log: line s of log.jsonl is the s-th batch, sampled before its update
        step += 1
        B, sampled = len(advantage), sum(map(len, batch.completions))
        counts["tokens"] += sampled
        counts["updates"] += len(figures) - (run.skipped - skipped)
        counts["flops"] += grpo_flops(model, batch, sum(f.pop("positions") for f in figures), c)
        counts["seconds"] += time.perf_counter() - started
        means = {k: float(np.mean([f[k] for f in figures])) for k in figures[0]} if figures else {}
        reward, signal = float(batch.rewards.mean()), float((advantage != 0).float().mean())
        run.log(step=step, reward=reward, signal=signal, unparsed=batch.grades.count("unparsed") / B,
                truncated=batch.truncated, length=sampled / B, entropy=batch.entropy, kl=kl, **means,
                lr=optimizer.param_groups[0]["lr"], skipped=run.skipped,
                **{k: round(v, 3) for k, v in counts.items()})
        if (step - 1) % c.eval_every == 0:
            run.write(transcript(batch, chosen, step, c.rollouts))
        bar.update(1)
        shown = {"reward": reward, "signal": signal, "entropy": batch.entropy, "kl": kl, **scores}
        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in shown.items()), refresh=False)
        # ---- stop
        if step % c.save_every == 0 or step == c.steps or run.interrupted:
            run.save_last(model, tokenizer, lineage(), [optimizer], step, counts=counts)
        if run.interrupted and step < c.steps:
            run.stop()
    bar.close()
    save_checkpoint(final, model, tokenizer, lineage())
    run.save_last(model, tokenizer, lineage(), [optimizer], step, done=True, counts=counts)
    print(f"{final}: {counts['updates']} updates, {c.steps * c.n_problems * c.rollouts:,} rollouts, "
          f"{counts['seconds'] / 60:.1f} min, validation pass@1 {scores['val_pass@1']:.1%}\n"
          f"next: python evaluate.py {final} {c.init} --data {c.data}")
    return final


if __name__ == "__main__":
    main(train, Config)
