"""GRPO by hand: reinforcement learning on any checkpoint with a reward that is checked by a program.

    python rl.py --init runs/base/8M.pt --out runs/rl

Every step: sample G answers to each of P problems, reward 1 for a right final answer and 0 otherwise, call an
answer good or bad relative to its group (Shao et al. 2024), raise or lower the log-probability of its tokens.
No reference solution is ever seen. Left out: a value network (GRPO does without one), a reward model (the
reward is exact), length penalties, top-k and top-p sampling (sampled and scored distribution must be equal).
"""
import copy
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ranks  # comes before torch: it sets how idle threads wait

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpoint import (
    Run, batch_indices, check_fields, compile_if_it_pays, generator, load_model, main, require, setup)
from data import arithmetic
from data.problems import prompt_ids, training_problems
from data.tokenizer import Tokenizer
from evaluate import validate
from model import GPT, SharedPrompts, micro_batches, row_logprobs, shared_logprobs


@dataclass
class Config:
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    problem_file: str = ""          # problem file to train on instead of DATA/train.jsonl
    out: str = "runs/rl"            # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # one of easy, hard, all: which problems to train and validate on
    n_train: int = 0                # >= 0: number of problems to train on, 0 = all
    n_problems: int = 64            # > 0: P, problems per step
    rollouts: int = 16              # >= 2: G, sampled answers per problem
    steps: int = 150                # > 0: batches of rollouts
    updates: int = 1                # > 0: optimizer steps per batch of rollouts (it is split by problems)
    lr: float = 1e-4                # > 0: of AdamW, constant after the warm-up
    warmup: int = 0                 # >= 0: steps until lr is reached
    weight_decay: float = 0.0       # >= 0: of AdamW
    grad_clip: float = 1.0          # > 0: largest gradient norm
    std: bool = True                # divide the advantage by the group's standard deviation
    clip_low: float = 0.2           # >= 0: lower clip of the ratio, 1 - clip_low; no effect with --updates 1
    clip_high: float = 0.2          # >= 0: upper clip, 1 + clip_high (DAPO: 0.28); no effect with --updates 1
    reward: str = "answer"          # one of answer, steps, random: right, sound, or as many drawn at random
    kl: float = 0.0                 # >= 0: weight of the KL penalty to the initial policy; 0 = none
    reference: bool = True          # keep the initial policy, to log the KL to it; off: less memory
    temperature: float = 1.0        # > 0: of the rollouts
    max_new: int = 80               # > 0: longest answer, tokens
    micro_tokens: int = 0           # >= 0: tokens per forward pass, 0 = 2,048 on a CPU, 16,384 on a GPU
    eval_every: int = 10            # > 0: steps between validations (and transcripts)
    eval_problems: int = 100        # > 0: validation problems
    eval_samples: int = 16          # > 0: samples of each, at T=0.6
    save_every: int = 5             # > 0: steps between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # > 0: steps after which to keep a checkpoint, besides the last
    recompute: bool = False         # activations again in the backward pass: less memory, a third slower
    decode_rows: int = 1024         # > 0: rows sampled at once (one problem's at least): bounds the cache
    freeze_embeddings: bool = False     # no gradient and no moments for embedding and head
    seed: int = 0                   # >= 0: of the order of problems and of the rollouts
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores
    compile: str = "auto"           # one of auto, on, off: torch.compile; auto: in long runs on a CPU


def check(c: Config) -> None:
    check_fields(c)
    require(c.n_problems % c.updates == 0, f"--updates {c.updates}: must divide --n-problems {c.n_problems}")
    require(c.reference or c.kl == 0, "--no-reference: --kl needs a reference")


# ---- the algorithm ---------------------------------------------------------------------------------------
def reward(problem: dict, text: str, grade: str) -> float:
    """1 for a right answer, 0 for a wrong or an unparsed one. A shaped reward in [0, 1] goes here."""
    return float(grade == "right")


def advantages(rewards: Tensor, std: bool = True) -> Tensor:
    """Rewards (P, G) minus their group's mean, over its unbiased deviation + 1e-6 (Shao et al. 2024, section
    4.1.2; without: Liu et al. 2025). 0 where all are equal: rounding can make the deviation of equal floats
    slightly positive."""
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
    reference's log-probability minus the policy's, exact for small d too (Schulman 2020, 'k3'). As a loss its
    gradient is that of KL(reference || policy) instead, as in GRPO."""
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
    rewards: Tensor                 # (P, G)
    entropy: float                  # nats per sampled token
    truncated: float                # share of rollouts without EOS
    sound: Sequence[bool] = ()      # B: right, and every step of the derivation too


def collect(model: GPT, tokenizer: Tokenizer, problems: list[dict], group: int, c: Config,
            gen: torch.Generator) -> Batch:
    """Sample `group` answers to every problem at the training temperature, grade and reward them. The control
    --reward random gives as many rewards as answers were right, to anyone."""
    prompts = [prompt_ids(tokenizer, p) for p in problems]
    out = ranks.sample_together(model, prompts, group, c.max_new, tokenizer.eos, tokenizer.pad, gen,
                                c.temperature)

    completions = out.completions()
    finished = out.finished.tolist()
    texts, grades, derived, rewards = [], [], [], []
    for row, ids in enumerate(completions):
        problem = problems[row // group]
        text, grade = arithmetic.read_answer(tokenizer, ids, finished[row], problem["answer"])
        texts.append(text)
        grades.append(grade)
        derived.append(grade == "right" and arithmetic.sound(problem, text))
        rewards.append(float(derived[-1] if c.reward == "steps" else reward(problem, text, grade)))
    rewards = torch.tensor(rewards)
    if c.reward == "random":
        rewards = torch.full_like(rewards, float(rewards.mean())).bernoulli(generator=gen)

    logprobs = [row[:len(ids)] for row, ids in zip(out.logprobs, completions)]
    return Batch(prompts, completions, logprobs, grades, texts,
                 rewards=rewards.view(len(problems), group),
                 entropy=float(out.entropy.sum() / out.lengths.sum()),
                 truncated=1 - sum(finished) / len(finished),
                 sound=derived)


def policy_gradient(model: GPT, reference: GPT | None, batch: Batch, advantage: Tensor, rows: range,
                    c: Config, pad: int) -> dict[str, float] | None:
    """Add the GRPO gradient of these rows to .grad; returns metrics per token, None if no row has a signal.
    The loss is the mean over *all* completion tokens of the rows, truncated and signal-free ones included,
    whatever the micro-batches (Yu et al. 2025). Rows without advantage add 0 to it: they are not computed."""
    total = sum(len(batch.completions[r]) for r in rows)                 # tokens of the whole update
    signal = (advantage != 0).tolist()
    useful = [r for r in rows if signal[r] or c.kl > 0]
    if not useful:
        return None                                                      # no signal, no step
    metrics = Metrics()
    for micro, logp in scored(model, batch, useful, c, pad):             # logp (N,): all tokens of these rows
        A = per_token(advantage, batch, micro).to(logp.device, non_blocking=logp.is_cuda)         # (N,)
        # one update per batch is exactly on-policy: the ratio is 1, its gradient that of REINFORCE
        old = logp.detach()                                              # (N,)
        if c.updates > 1:
            old = sampled_logprobs(batch, micro).to(logp.device, non_blocking=logp.is_cuda)
        loss = policy_loss(logp, old, A, c.clip_low, c.clip_high)
        if c.kl > 0:
            penalty = kl_k3(logp, reference_logprobs(reference, batch, micro, c, pad))
            loss = loss + c.kl * penalty
            metrics.add(kl_penalty=penalty)
        (loss.sum() / total).backward()
        ratio = (logp - old).detach().exp()
        clipped = (A > 0) & (ratio > 1 + c.clip_high) | (A < 0) & (ratio < 1 - c.clip_low)
        metrics.add(loss=loss, ratio=ratio - 1, clip_fraction=clipped)
    return metrics.means(total) | {"positions": positions(batch, useful)}


# ---- its bookkeeping -------------------------------------------------------------------------------------
def scored(model: GPT, batch: Batch, rows: list[int], c: Config, pad: int
           ) -> Iterator[tuple[list[int], Tensor]]:
    """(micro-batch of rows, log-probabilities (N,) of all their tokens), until every row had its turn; of
    several processes, this one's part. A prompt is computed once for all its completions, which attend to
    it: their gradients gather at its keys and values and go back through the prompt at the end. So the caller
    calls backward() before it asks for the next micro-batch."""
    G = batch.rewards.shape[1]
    groups = ranks.my_part(sorted({r // G for r in rows}))
    for chunk in micro_batches([len(batch.prompts[g]) for g in groups], c.micro_tokens, model.device):
        place = {groups[i]: at for at, i in enumerate(chunk)}            # group -> its number in the chunk
        shared = SharedPrompts(model, [batch.prompts[g] for g in place], pad)
        chunk_rows = [r for r in rows if r // G in place]
        lengths = [len(batch.completions[r]) for r in chunk_rows]
        for numbers in micro_batches(lengths, c.micro_tokens, model.device):
            micro = [chunk_rows[i] for i in numbers]
            completions = [batch.completions[r] for r in micro]
            prompt_of_row = [place[r // G] for r in micro]
            yield micro, shared_logprobs(model, shared, prompt_of_row, completions, pad, c.temperature)
        shared.backward()


def per_token(values: Tensor, batch: Batch, rows: list[int]) -> Tensor:
    """A value of each row (B,), repeated for every token of these rows (N,)."""
    lengths = torch.tensor([len(batch.completions[r]) for r in rows])
    return values[rows].repeat_interleave(lengths)


def sampled_logprobs(batch: Batch, rows: list[int]) -> Tensor:
    """Log-probabilities (N,) of these rows' tokens at the time of sampling."""
    return torch.cat([batch.logprobs[r] for r in rows])


@torch.no_grad()
def reference_logprobs(reference: GPT, batch: Batch, rows: list[int], c: Config, pad: int) -> Tensor:
    """Log-probabilities (N,) of these rows' tokens under the reference, at the training temperature."""
    G = batch.rewards.shape[1]
    prompts = [batch.prompts[r // G] for r in rows]
    completions = [batch.completions[r] for r in rows]
    return row_logprobs(reference, prompts, completions, pad, c.temperature)


class Metrics:
    """Sums over tokens of the numbers to log. They stay on the device until the end: reading one waits."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.append((name, value.detach().sum().float()))

    def means(self, total: int) -> dict[str, float]:
        """Per token of the whole update, over all processes; a skipped token's ratio counts as 1."""
        sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "kl_penalty"), 0.0)
        read = torch.stack([part for _, part in self.parts]).tolist() if self.parts else []
        for (name, _), value in zip(self.parts, read):
            sums[name] += value
        summed = ranks.add_up(*sums.values())
        means = {name: value / total for name, value in zip(sums, summed)}
        return means | {"ratio": 1 + means["ratio"]}


def positions(batch: Batch, rows: list[int]) -> int:
    """Number of positions that `scored` computes for these rows: completions, and each prompt once."""
    G = batch.rewards.shape[1]
    groups = {r // G for r in rows}
    return sum(len(batch.completions[r]) for r in rows) + sum(len(batch.prompts[g]) for g in groups)


# ---- measurements ----------------------------------------------------------------------------------------
def grpo_flops(model: GPT, batch: Batch, trained: int, c: Config) -> int:
    """FLOPs of sampling a batch and of updating on `trained` positions; measurements are not counted."""
    prompted = sum(map(len, batch.prompts))
    sampled = sum(map(len, batch.completions))
    length = int(prompted / len(batch.prompts) + sampled / len(batch.completions))
    return model.flops_per_token(length) * (prompted + sampled + (3 + (c.kl > 0)) * trained)


def expected_flops(model: GPT, c: Config) -> int:
    """FLOPs of the whole run, if its answers have a quarter of their largest length."""
    tokens = c.steps * c.n_problems * c.rollouts * c.max_new // 4
    return 4 * model.flops_per_token(c.max_new) * tokens


def signal_probability(rewards: list[float], group: int) -> float:
    """Probability that the rewards of a group drawn from these without replacement are not all equal."""
    equal = sum(math.comb(times, group) for times in Counter(rewards).values())
    return 1 - equal / math.comb(len(rewards), group)


def kl_to_reference(reference: GPT | None, batch: Batch, c: Config, pad: int, n_rows: int = 64) -> float:
    """KL(policy || reference), nats per token, from `n_rows` rollouts of the batch and their recorded
    log-probabilities; NaN without a reference."""
    if reference is None:
        return float("nan")
    B = len(batch.completions)
    rows = list(range(0, B, math.ceil(B / n_rows)))
    at_once = max(1, 2 ** 27 // (c.max_new * reference.config.n_vocab))          # logits of half a GiB
    logp = [reference_logprobs(reference, batch, rows[i:i + at_once], c, pad).cpu()
            for i in range(0, len(rows), at_once)]
    return float(kl_k3(sampled_logprobs(batch, rows), torch.cat(logp)).mean())


def gradient_noise(model: GPT, reference: GPT | None, batch: Batch, advantage: Tensor, c: Config, pad: int
                   ) -> dict[str, float]:
    """|G|² of the true gradient and the trace of one problem's covariance, both unbiased, from the gradients
    of two half batches (McCandlish et al. 2018, appendix A.1). The mean trace of many steps over their mean
    |G|² is the noise scale: a batch of more problems helps little."""
    P, G = batch.rewards.shape
    half = P // 2 * G
    gradients = []
    for rows in (range(half), range(half, 2 * half)):
        policy_gradient(model, reference, batch, advantage, rows, c, pad)
        ranks.sum_gradients(model)
        parts = []
        for p in model.parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            parts.append(gradient.flatten())
        gradients.append(torch.cat(parts))
        model.zero_grad(set_to_none=True)
    a, b = gradients
    return {"gradient_square": float(a @ b), "gradient_trace": P // 2 / 2 * float((a - b).square().sum())}


def probe(model: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config) -> None:
    """Measure the success rate before the first step; print the expected share of groups with a signal."""
    n = 2 * c.rollouts
    batch = collect(model, tokenizer, problems, n, c, generator(c.seed, "probe"))
    signal = np.mean([signal_probability(row, c.rollouts) for row in batch.rewards.tolist()])
    total = len(batch.grades)
    tqdm.write(f"before training: {batch.grades.count('right') / total:.1%} of {total} answers right, "
               f"{batch.grades.count('unparsed') / total:.1%} unparsed; about {signal:.0%} of groups of "
               f"{c.rollouts} will have a signal")
    if signal == 0:
        tqdm.write("WARNING: no group has a signal, so RL cannot learn anything here. Start from a later "
                   "checkpoint, or use easier problems or more --rollouts.")
    elif signal < .3:
        tqdm.write("WARNING: few groups have a signal, and a rare success gets a large advantage: updates "
                   "will be noisy. More --n-problems or --rollouts, or a smaller --lr, are safer.")


def rollout_metrics(batch: Batch, advantage: Tensor) -> dict[str, float]:
    """Metrics of a batch, before its update."""
    B = len(batch.completions)
    return {"reward": float(batch.rewards.mean()), "right": batch.grades.count("right") / B,
            "sound": sum(batch.sound) / B, "signal": float((advantage != 0).float().mean()),
            "unparsed": batch.grades.count("unparsed") / B, "truncated": batch.truncated,
            "length": sum(map(len, batch.completions)) / B, "entropy": batch.entropy,
            **{f"style {name}": share for name, share in arithmetic.style_shares(batch.texts).items()}}


# ---- training --------------------------------------------------------------------------------------------
def learning_rate(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, then constant."""
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup))


def train(c: Config) -> Path:
    """Run (or resume) RL; returns the path of the last checkpoint."""
    check(c)
    device = setup(c.device, c.threads, c.compile)
    model, tokenizer, parents = load_model(c.init, device)
    model.set_memory(c)
    problems, validation, files = training_problems(c, model, tokenizer)
    reference = copy.deepcopy(model).requires_grad_(False) if c.reference else None
    steps = c.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True)

    with Run(c, steps, parents, files) as run:
        if run.finished():
            return run.final
        step = run.restore(model, optimizer)
        flops = expected_flops(model, c)
        compile_if_it_pays(model, c.compile, flops, gain=.1)
        if step == 0:
            probe(model, tokenizer, problems[:c.n_problems], c)
        while True:
            # ---- learning rate
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(c, step, steps)

            # ---- evaluate and checkpoint
            if step % c.eval_every == 0 or step == steps:
                attempts = validate(model, tokenizer, validation, c)
                run.log(step, **{"val_pass@1": attempts.score})
                run.write(f"======== step {step}\n{attempts.transcript(validation)}")
            if step in c.checkpoints_at:
                run.keep(f"step{step}.pt", model, tokenizer)
            if step == steps:
                break

            # ---- collect
            started = time.perf_counter()
            chosen = [problems[i] for i in batch_indices(len(problems), c.n_problems, step, c.seed, "rl")]
            batch = collect(model, tokenizer, chosen, c.rollouts, c, generator(c.seed, "rollouts", step))
            advantage = advantages(batch.rewards, c.std).flatten()                                # (B,)
            kl = kl_to_reference(reference, batch, c, tokenizer.pad)
            noise = {}
            if step % c.eval_every == 0 and c.n_problems > 1:
                noise = gradient_noise(model, reference, batch, advantage, c, tokenizer.pad)

            # ---- update
            per_update = len(advantage) // c.updates
            updates = []
            for i in range(c.updates):
                rows = range(i * per_update, (i + 1) * per_update)
                metrics = policy_gradient(model, reference, batch, advantage, rows, c, tokenizer.pad)
                if metrics is None:              # no signal, no step: momentum must not move the model
                    continue
                ranks.sum_gradients(model)       # over the processes, if there are several
                norm = float(clip_grad_norm_(model.parameters(), c.grad_clip))
                if run.usable(norm, optimizer):  # finite; three bad ones in a row end the run
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                updates.append(metrics | {"grad_norm": norm})

            # ---- log
            step += 1                            # the line with reward of step s: batch s, before its update
            trained = sum(metrics.pop("positions") for metrics in updates)
            means = {name: float(np.mean([u[name] for u in updates])) for name in (updates or [{}])[0]}
            run.count(tokens=sum(map(len, batch.completions)), flops=grpo_flops(model, batch, trained, c),
                      seconds=time.perf_counter() - started)
            run.log_step(step, **rollout_metrics(batch, advantage), kl=kl, **noise, **means,
                         lr=optimizer.param_groups[0]["lr"])

            # ---- stop
            run.end_step(step, model, tokenizer, optimizer)
        return run.finish(model, tokenizer, optimizer,
                          then=f"python evaluate.py {run.final} {c.init} --data {c.data}")


if __name__ == "__main__":
    main(train, Config)
