"""Supervised fine-tuning on reference solutions: one per question, or all of them (--gold).

    python sft.py --init runs/base/8M.pt --out runs/sft

Next-token loss on the solution and its EOS only; the question is context. The same questions as in rl.py, and
the same loop with the same headings: a diff of the two files shows what differs between the methods. Left
out: sequence packing (padding is cheap at these lengths) and loss on the prompt.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import (
    Run, batch_indices, file_sha256, main, one_run, require, require_positive, save_checkpoint, setup)
from data.tokenizer import Tokenizer
from evaluate import open_training, prompt_ids, validate
from model import GPT, completion_logprobs, micro_batches, pack
from ranks import add_up, share
from scale import Memory, make_optimizer


@dataclass
class Config(Memory):                          # and the options of scale.Memory
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    problems: str = ""              # problem file to train on instead of DATA/train.jsonl
    out: str = "runs/sft"           # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # which problems to train and validate on: easy, hard, all
    questions: int = 2000           # how many to train on, 0 = all
    gold: bool = False              # all solutions of every question instead of one chosen at random
    epochs: int = 3                 # passes over the examples
    batch: int = 32                 # examples per update
    lr: float = 1e-3                # AdamW, peak
    warmup: int = 10                # updates until the peak
    decay: bool = True              # fall linearly to 0 at the end
    weight_decay: float = 0.0       # of AdamW
    grad_clip: float = 1.0          # largest gradient norm
    max_new: int = 80               # longest answer in the validation, tokens
    micro_batch: int = 2_048        # tokens per forward pass
    eval_every: int = 100           # updates between validations
    eval_problems: int = 100        # validation problems
    eval_samples: int = 16          # samples of each, at T=0.6
    save_every: int = 50            # updates between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # updates after which to keep a checkpoint, besides the last
    seed: int = 0                   # of the choice of solutions and of the order
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def check(c: Config) -> None:
    require_positive(c, "epochs batch lr grad_clip max_new micro_batch eval_every eval_problems eval_samples "
                        "save_every")
    require_positive(c, "questions warmup weight_decay seed", zero=True)


Example = tuple[list[int], list[int]]           # ids of the prompt, ids of the solution and EOS


def make_examples(tokenizer: Tokenizer, problems: list[dict], gold: bool, seed: int) -> list[Example]:
    """One example per question with a solution chosen at random once and for all, or one per solution."""
    choice = np.random.default_rng([seed, 0])
    examples = []
    for p in problems:
        solutions = p["solutions"] if gold else [p["solutions"][choice.integers(len(p["solutions"]))]]
        examples += [(prompt_ids(tokenizer, p), tokenizer.encode(s) + [tokenizer.eos]) for s in solutions]
    return examples


def require_fit(examples: list[Example], context: int) -> None:
    """UserError if an example is longer than the model's context, tokens."""
    longest = max(len(prompt) + len(solution) for prompt, solution in examples)
    require(longest <= context,
            f"the longest example has {longest} tokens: beyond the model's context of {context}")


def sft_gradient(model: GPT, examples: list[Example], c: Config, pad: int) -> dict[str, float]:
    """Add the gradient of the mean loss per solution token (EOS included) to the model's .grad, whatever the
    micro-batches; returns the loss in nats per token and the FLOPs."""
    device = model.head.weight.device
    total, loss_sum = sum(len(solution) for _, solution in examples), 0.0
    mine = share(examples)                       # the others are other processes' work
    for rows in micro_batches([len(prompt) + len(solution) for prompt, solution in mine], c.micro_batch):
        ids, target = pack([mine[r][0] for r in rows], [mine[r][1] for r in rows], pad, device)
        loss = -completion_logprobs(model, ids, target).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
    positions = sum(len(prompt) + len(solution) for prompt, solution in examples)
    loss_sum, = add_up(loss_sum)
    return {"loss": loss_sum, "flops": 3 * model.flops_per_token(positions // len(examples)) * positions}


@one_run
def train(c: Config) -> Path:
    """Run (or resume) SFT; returns the path of the last checkpoint."""
    check(c)
    device = setup(c.device, c.threads)
    model, tokenizer, earlier, problems, validation = open_training(c, device, solutions=True)
    examples = make_examples(tokenizer, problems, c.gold, c.seed)
    steps = -(-c.epochs * len(examples) // c.batch)
    late = [s for s in c.checkpoints_at if not 0 < s <= steps]
    require(not late, f"--checkpoints-at {','.join(map(str, late))}: not within the run's {steps} updates")
    require_fit(examples, model.config.context)
    run = Run(c, {c.init: file_sha256(c.init)})
    final = run.out / "final.pt"
    if run.finished(final, steps):
        return final
    optimizer = make_optimizer(model, c, c.lr)
    step, counts = 0, {"tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}
    if run.last:
        run.restore(model, optimizer)
        step, counts = run.last["step"], run.last["counts"]

    def lineage() -> list[dict]:
        return run.lineage(earlier, **counts)
    bar = tqdm(total=steps, initial=step, unit="step", desc="sft")
    scores: dict[str, float] = {}
    while True:
        # ---- learning rate
        for group in optimizer.param_groups:
            group["lr"] = (c.lr * min(1.0, (step + 1) / max(1, c.warmup))
                           * (1 - step / steps if c.decay else 1))
        # ---- evaluate and checkpoint
        if step % c.eval_every == 0 or step == steps:
            tried = validate(model, tokenizer, validation, c)
            scores = {"val_pass@1": tried.score}
            run.log(step=step, **scores)
            run.write(f"======== step {step}")
            for i, problem in enumerate(validation[:3]):
                run.write(f"{problem['question']}   (answer {problem['answer']})\n"
                          f"  [{tried.grades[i * c.eval_samples]}] {tried.texts[i * c.eval_samples]!r}")
        if step in c.checkpoints_at:
            save_checkpoint(run.out / f"step{step}.pt", model, tokenizer, lineage())
        if step == steps:
            break
        # ---- collect
        started = time.perf_counter()
        batch = [examples[i] for i in batch_indices(len(examples), c.batch, step, c.seed, "sft")]
        # ---- update
        figures = sft_gradient(model, batch, c, tokenizer.pad)
        skipped = run.skipped
        norm = run.step(model, optimizer, c.grad_clip)
        # ---- log
        step += 1
        counts["tokens"] += sum(len(solution) for _, solution in batch)
        counts["updates"] += 1 - (run.skipped - skipped)
        counts["flops"] += figures["flops"]
        counts["seconds"] += time.perf_counter() - started
        run.log(step=step, loss=figures["loss"], grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                skipped=run.skipped, **{k: round(v, 3) for k, v in counts.items()})
        bar.update(1)
        shown = {"loss": figures["loss"], **scores}
        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in shown.items()), refresh=False)
        # ---- stop
        if step % c.save_every == 0 or step == steps or run.interrupted:
            run.save_last(model, tokenizer, lineage(), [optimizer], step, counts=counts)
        if run.interrupted and step < steps:
            run.stop()
    bar.close()
    save_checkpoint(final, model, tokenizer, lineage())
    run.save_last(model, tokenizer, lineage(), [optimizer], step, done=True, counts=counts)
    print(f"{final}: {counts['updates']} updates, {len(examples):,} examples, {counts['seconds'] / 60:.1f} "
          f"min, validation pass@1 {scores['val_pass@1']:.1%}\n"
          f"next: python evaluate.py {final} {c.init} --data {c.data}")
    return final


if __name__ == "__main__":
    main(train, Config)
