"""Supervised fine-tuning on reference solutions: one per question, or all of them (--gold).

    python sft.py --init runs/base/8M.pt --out runs/sft

Next-token loss on the solution and its EOS only; the question is context. Its questions are the first of
rl.py's, and the loop is the same with the same headings: a diff of the two files shows what differs between
the methods. Left out: sequence packing (padding is cheap at these lengths) and loss on the prompt.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import ranks  # comes before torch: it sets how idle threads wait

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpoint import (
    Run, batch_indices, check_fields, compile_if_it_pays, generator, load_model, main, require, setup)
from data.problems import prompt_ids, training_problems
from data.tokenizer import Tokenizer
from evaluate import attempt, validate
from model import GPT, completion_logprobs, packed


@dataclass
class Config:
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    teacher: str = "wrapped"        # one of native, wrapped, spoken, prose: language of the solutions
    own: int = 0                    # >= 0: if not 0, sample this many answers, learn from the right ones
    problem_file: str = ""          # problem file to train on instead of one in DATA
    out: str = "runs/sft"           # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # one of easy, hard, all: which problems to train and validate on
    n_train: int = 2000             # >= 0: number of problems to train on, 0 = all
    gold: bool = False              # all solutions of every question instead of one chosen at random
    epochs: int = 3                 # > 0: passes over the examples
    batch: int = 32                 # > 0: examples per update
    lr: float = 1e-3                # > 0: of AdamW, peak
    warmup: int = 10                # >= 0: updates until the peak
    decay: float = 1.0              # >= 0, <= 1: share of the run, at its end, over which lr falls to 0
    weight_decay: float = 0.0       # >= 0: of AdamW
    grad_clip: float = 1.0          # > 0: largest gradient norm
    max_new: int = 80               # > 0: longest answer in the validation, tokens
    micro_tokens: int = 0           # >= 0: tokens per forward pass, 0 = 2,048 on a CPU, 16,384 on a GPU
    eval_every: int = 100           # > 0: updates between validations (and transcripts)
    eval_problems: int = 100        # > 0: validation problems
    eval_samples: int = 16          # > 0: samples of each, at T=0.6
    save_every: int = 50            # > 0: updates between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # > 0: updates after which to keep a checkpoint, besides the last
    recompute: bool = False         # activations again in the backward pass: less memory, a third slower
    decode_rows: int = 1024         # > 0: rows sampled at once (one problem's at least): bounds the cache
    freeze_embeddings: bool = False     # no gradient and no moments for embedding and head
    seed: int = 0                   # >= 0: of the choice of solutions and of the order
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores
    compile: str = "auto"           # one of auto, on, off: torch.compile; auto: in long runs on a CPU


Example = tuple[list[int], list[int]]           # ids of the prompt, ids of the solution and EOS


def make_examples(tokenizer: Tokenizer, problems: list[dict], gold: bool, seed: int) -> list[Example]:
    """One example per question with one solution, chosen at random once, or one per solution."""
    choice = np.random.default_rng([seed, 0])
    examples = []
    for p in problems:
        solutions = p["solutions"]
        if not gold:
            solutions = [solutions[choice.integers(len(solutions))]]
        for solution in solutions:
            examples.append((prompt_ids(tokenizer, p), tokenizer.encode(solution) + [tokenizer.eos]))
    return examples


def own_solutions(model: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config) -> tuple[list, dict]:
    """(the problems that the model solves, with its own right answers as their solutions; tokens, FLOPs and
    seconds): rejection sampling, `own` answers of each problem (Yuan et al. 2023). UserError if it solves
    none."""
    started = time.perf_counter()
    attempts = attempt(model, tokenizer, problems, c.own, 1.0, c.max_new, generator(c.seed, "own"))
    solved = []
    for i, problem in enumerate(problems):
        rows = range(i * c.own, (i + 1) * c.own)
        right = {attempts.texts[row] for row in rows if attempts.grades[row] == "right"}
        if right:
            solved.append(problem | {"solutions": sorted(right)})
    require(bool(solved), f"--own {c.own}: {c.init} solves none of the problems; take a later checkpoint")
    prompted = sum(len(prompt_ids(tokenizer, p)) for p in problems)
    sampled = sum(len(tokenizer.encode(text)) + 1 for text in attempts.texts)
    length = int(prompted / len(problems) + sampled / len(attempts.texts))
    flops = model.flops_per_token(length) * (prompted + sampled)
    return solved, {"tokens": sampled, "flops": flops, "seconds": time.perf_counter() - started}


@torch.no_grad()
def surprise(model: GPT, examples: list[Example], c: Config, pad: int) -> float:
    """Mean negative log-likelihood of the solutions under the model, nats per token: how foreign they are."""
    prompts = [prompt for prompt, _ in examples]
    solutions = [solution for _, solution in examples]
    parts = packed(prompts, solutions, pad, c.micro_tokens, model.device)
    sums = [completion_logprobs(model, *inputs).sum() for _, *inputs in parts]
    return -float(torch.stack(sums).sum()) / sum(map(len, solutions))


def require_fit(examples: list[Example], context: int) -> None:
    """UserError if an example is longer than the model's context, tokens."""
    longest = max(len(prompt) + len(solution) for prompt, solution in examples)
    require(longest <= context,
            f"the longest example has {longest} tokens: beyond the model's context of {context}")


def learning_rate(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last `decay` of the run."""
    rising = min(1.0, (step + 1) / max(1, c.warmup))
    falling = min(1.0, (1 - step / steps) / c.decay) if c.decay else 1.0
    return c.lr * rising * falling


def sft_gradient(model: GPT, examples: list[Example], c: Config, pad: int) -> dict[str, float]:
    """Add the gradient of the mean loss per solution token (EOS included) to the model's .grad, whatever the
    micro-batches; returns the loss in nats per token and the FLOPs."""
    total = sum(len(solution) for _, solution in examples)
    losses = []
    mine = ranks.my_part(examples)
    prompts = [prompt for prompt, _ in mine]
    solutions = [solution for _, solution in mine]
    for _, *inputs in packed(prompts, solutions, pad, c.micro_tokens, model.device):
        loss = -completion_logprobs(model, *inputs).sum() / total
        loss.backward()
        losses.append(loss.detach())             # a number only at the end: reading one waits for the GPU

    positions = total + sum(len(prompt) for prompt, _ in examples)
    loss_sum, = ranks.add_up(sum(torch.stack(losses).tolist()) if losses else 0.0)
    return {"loss": loss_sum, "flops": 3 * model.flops_per_token(positions // len(examples)) * positions}


# ---- training --------------------------------------------------------------------------------------------
def train(c: Config) -> Path:
    """Run (or resume) SFT; returns the path of the last checkpoint."""
    check_fields(c)
    device = setup(c.device, c.threads, c.compile)
    model, tokenizer, parents = load_model(c.init, device)
    model.set_memory(c)
    problems, validation, files = training_problems(c, model, tokenizer, solutions=True)
    cost = {}
    if c.own:
        problems, cost = own_solutions(model, tokenizer, problems, c)
    examples = make_examples(tokenizer, problems, c.gold, c.seed)
    require_fit(examples, model.config.context)
    steps = math.ceil(c.epochs * len(examples) / c.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True)
    tokens = sum(len(prompt) + len(solution) for prompt, solution in examples)
    flops = 3 * model.flops_per_token(tokens // len(examples)) * tokens * c.epochs

    with Run(c, steps, parents, files) as run:
        if run.finished():
            return run.final
        step = run.restore(model, optimizer)
        compile_if_it_pays(model, c.compile, flops, gain=.15)
        if step == 0:
            nll = surprise(model, examples[:512], c, tokenizer.pad)
            run.count(**cost)
            run.log(0, demonstration_nll=nll)
            tqdm.write(f"{len(examples)} demonstrations, {nll:.3f} nats per token under {c.init}")
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
            batch = [examples[i] for i in batch_indices(len(examples), c.batch, step, c.seed, "sft")]

            # ---- update
            metrics = sft_gradient(model, batch, c, tokenizer.pad)
            ranks.sum_gradients(model)           # over the processes, if there are several
            norm = float(clip_grad_norm_(model.parameters(), c.grad_clip))
            if run.usable(norm, optimizer):      # finite; three bad ones in a row end the run
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # ---- log
            step += 1
            run.count(tokens=sum(len(solution) for _, solution in batch), flops=metrics["flops"],
                      seconds=time.perf_counter() - started)
            run.log_step(step, loss=metrics["loss"], grad_norm=norm, lr=optimizer.param_groups[0]["lr"])

            # ---- stop
            run.end_step(step, model, tokenizer, optimizer)
        return run.finish(model, tokenizer, optimizer,
                          then=f"python evaluate.py {run.final} {c.init} --data {c.data}")


if __name__ == "__main__":
    main(train, Config)
