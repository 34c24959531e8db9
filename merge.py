"""RL and SFT together: parallel averaging of their updates, two controls, merging of finished weights.

    python merge.py --init runs/base/8M.pt --out runs/merge
    python merge.py weights runs/rl/final.pt runs/sft/final.pt --base runs/base/8M.pt --method ties -o out.pt

Parallel averaging, every step: from one snapshot of the weights an RL update and an SFT update, each by an
AdamW of its own, each gradient clipped alone; the new weights are the average of the two results. The
gradients are those of rl.py and sft.py. Controls (--mode): one AdamW on the summed loss, or RL and SFT steps
in turn, both moving about as far per step as the average does. Left out: several RL updates per batch.
"""
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import ranks
import rl
import sft
from checkpoint import (
    Run, batch_indices, file_sha256, generator, load_model, main, one_run, require,
    require_positive, save_checkpoint, setup)
from evaluate import load_problems, open_training, validate
from scale import Memory, keep_start, make_optimizer


@dataclass
class Config(Memory):                          # and the options of scale.Memory
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    problems: str = ""              # problem file to train on instead of DATA/train.jsonl
    out: str = "runs/merge"         # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # which problems to train and validate on: easy, hard, all
    questions: int = 2000           # how many to train on, 0 = all
    mode: str = "parallel"          # parallel averaging; controls: fused (one AdamW), alternating
    gold: bool = False              # SFT on all solutions of every question instead of one chosen at random
    n_problems: int = 64            # P, problems per RL update
    rollouts: int = 16              # G, sampled answers per problem
    batch: int = 32                 # examples per SFT update
    steps: int = 50                 # updates of each of the two
    inner: int = 1                  # H, updates of each before averaging; 1: the paper's, --steps: one merge
    lr_rl: float = 3e-4             # AdamW, constant
    lr_sft: float = 1e-3            # AdamW, constant
    weight_rl: float = 0.5          # share of RL in the average; SFT has the rest
    weight_decay: float = 0.0       # of both AdamW
    grad_clip: float = 1.0          # largest norm of each gradient
    std: bool = True                # divide the advantage by the group's standard deviation
    temperature: float = 1.0        # of the rollouts
    max_new: int = 80               # longest answer, tokens
    micro_batch: int = 2_048        # tokens per forward pass of an update
    eval_every: int = 10            # steps between validations (and transcripts), a multiple of H
    eval_problems: int = 100        # validation problems
    eval_samples: int = 16          # samples of each, at T=0.6
    save_every: int = 5             # steps between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # steps after which to keep a checkpoint, besides the last
    seed: int = 0                   # of the order of problems, the choice of solutions and the rollouts
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def check(c: Config) -> None:
    require(c.mode in ("parallel", "fused", "alternating"),
            f"--mode {c.mode}: must be parallel, fused or alternating")
    require(0 <= c.weight_rl <= 1, f"--weight-rl {c.weight_rl}: must be between 0 and 1")
    require_positive(c, "inner batch")
    require_positive(c, "lr_rl lr_sft", zero=True)
    require(c.inner == 1 or c.mode == "parallel", f"--inner {c.inner}: belongs to --mode parallel only")
    uneven = [s for s in (c.steps, *c.checkpoints_at) if s % c.inner]
    require(not uneven, f"--inner {c.inner}: does not divide {uneven} of --steps, --checkpoints-at")


def arm_configs(c: Config) -> tuple[rl.Config, sft.Config]:
    """What rl.py's and sft.py's functions want to know, checked by their own rules."""
    def common(cls: type) -> dict:
        return {k: v for k, v in asdict(c).items() if k in cls.__dataclass_fields__}
    rl_config = rl.Config(**common(rl.Config))
    sft_config = sft.Config(**common(sft.Config))
    rl.check(rl_config)
    sft.check(sft_config)
    return rl_config, sft_config


# ---- averaging of updates --------------------------------------------------------------------------------

Arm = Callable[[int], None]         # arm(h) does the h-th update of a round: gradient, clip, its own AdamW


def parallel_round(model: torch.nn.Module, arms: list[Arm], weights: list[float], inner: int = 1) -> None:
    """Start every arm from the same snapshot, let it do `inner` updates, average the results (paper,
    "parallel averaging"). Moments stay with their arm; an arm that does no update contributes the snapshot.
    Whatever an arm raises passes on, with the snapshot back in the model and no gradient left."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    snapshot, ends = [p.detach().clone() for p in parameters], []

    def put(values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(parameters, values):
                p.copy_(value)
        model.zero_grad(set_to_none=True)        # no gradient leaks from one arm into the next
    try:
        for arm in arms:
            for h in range(inner):
                arm(h)
            ends.append([p.detach().clone() for p in parameters])
            put(snapshot)
    except BaseException:
        put(snapshot)
        raise
    put(sum(w * x for w, x in zip(weights, group)) for group in zip(*ends))


@one_run
def train(c: Config) -> Path:
    """Run (or resume) the training; returns the path of the last checkpoint."""
    check(c)
    rl_config, sft_config = arm_configs(c)
    device = setup(c.device, c.threads)
    model, tokenizer, earlier, problems, validation = open_training(c, device, solutions=True)
    examples = sft.make_examples(tokenizer, problems, c.gold, c.seed)
    sft.require_fit(examples, model.config.context)
    reference = keep_start(model, c)
    run = Run(c, {c.init: file_sha256(c.init)})
    final = run.out / "final.pt"
    if run.finished(final, c.steps):
        return final
    share = {"rl": c.weight_rl, "sft": 1 - c.weight_rl}
    lr = {"rl": c.lr_rl, "sft": c.lr_sft}
    if c.mode == "fused":                        # the length of two AdamW steps at right angles, as they are
        lr = {"fused": math.hypot(share["rl"] * c.lr_rl, share["sft"] * c.lr_sft)}
    elif c.mode == "alternating":
        lr = {name: share[name] * lr[name] for name in lr}
    optimizers = {name: make_optimizer(model, c, lr[name]) for name in lr}
    step, counts = 0, {"tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}
    if run.last:
        run.restore(model, *optimizers.values())
        step, counts = run.last["step"], run.last["counts"]
    else:
        rl.probe(model, tokenizer, problems[:c.n_problems], rl_config)

    def lineage() -> list[dict]:
        return run.lineage(earlier, **counts)

    def update(name: str) -> None:
        skipped = run.skipped
        figures["grad_norm_" + name] = run.step(model, optimizers[name], c.grad_clip)
        counts["updates"] += 1 - (run.skipped - skipped)

    def rl_gradient(at: int) -> bool:
        """Collect rollouts from the model as it is and add GRPO's gradient; False if there is no signal."""
        chosen = [problems[i] for i in batch_indices(len(problems), c.n_problems, at, c.seed, "rl")]
        batch = rl.collect(model, tokenizer, chosen, c.rollouts, rl_config, generator(c.seed, "rollouts", at))
        advantage = rl.advantages(batch.rewards, c.std).flatten()                                 # (B,)
        result = rl.policy_gradient(model, reference, batch, advantage, range(len(advantage)), rl_config,
                                    tokenizer.pad)
        figures.update(reward=float(batch.rewards.mean()), entropy=batch.entropy, truncated=batch.truncated,
                       signal=float((advantage != 0).float().mean()),
                       kl=rl.kl_to_start(reference, batch, rl_config, tokenizer.pad))
        counts["tokens"] += sum(map(len, batch.completions))
        counts["flops"] += rl.grpo_flops(model, batch, result["positions"] if result else 0, rl_config)
        if at % c.eval_every == 0:
            run.write(rl.transcript(batch, chosen, at + 1, c.rollouts))
        return result is not None

    def sft_gradient(at: int) -> None:
        batch = [examples[i] for i in batch_indices(len(examples), c.batch, at, c.seed, "sft")]
        result = sft.sft_gradient(model, batch, sft_config, tokenizer.pad)
        figures.update(sft_loss=result["loss"])
        counts["tokens"] += sum(len(solution) for _, solution in batch)
        counts["flops"] += result["flops"]

    def rl_arm(h: int) -> None:
        if rl_gradient(step + h):                # no signal, no step: momentum must not move the model
            update("rl")

    def sft_arm(h: int) -> None:
        sft_gradient(step + h)
        update("sft")
    bar = tqdm(total=c.steps, initial=step, unit="step", desc=c.mode)
    scores: dict[str, float] = {}
    while True:
        # ---- learning rate: constant
        # ---- evaluate and checkpoint
        if step % c.eval_every == 0 or step == c.steps:
            scores = {"val_pass@1": validate(model, tokenizer, validation, c).score}
            run.log(step=step, **scores)
        if step in c.checkpoints_at:
            save_checkpoint(run.out / f"step{step}.pt", model, tokenizer, lineage())
        if step == c.steps:
            break
        # ---- collect and update
        started, figures = time.perf_counter(), {}
        if c.mode == "parallel":
            parallel_round(model, [rl_arm, sft_arm], [share["rl"], share["sft"]], c.inner)
        elif c.mode == "alternating":
            rl_arm(0)
            sft_arm(0)
        else:
            rl_gradient(step)
            sft_gradient(step)                   # adds to the gradient that is there
            update("fused")
        # ---- log
        step += c.inner
        counts["seconds"] += time.perf_counter() - started
        run.log(step=step, **figures, skipped=run.skipped, **{k: round(v, 3) for k, v in counts.items()})
        bar.update(c.inner)
        shown = {"reward": figures["reward"], "sft_loss": figures["sft_loss"], "kl": figures["kl"], **scores}
        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in shown.items()), refresh=False)
        # ---- stop
        if step % c.save_every < c.inner or step == c.steps or run.interrupted:
            run.save_last(model, tokenizer, lineage(), list(optimizers.values()), step, counts=counts)
        if run.interrupted and step < c.steps:
            run.stop()
    bar.close()
    save_checkpoint(final, model, tokenizer, lineage())
    run.save_last(model, tokenizer, lineage(), list(optimizers.values()), step, done=True, counts=counts)
    print(f"{final}: {counts['updates']} updates, {counts['seconds'] / 60:.1f} min, validation pass@1 "
          f"{scores['val_pass@1']:.1%}\nnext: python evaluate.py {final} {c.init} --data {c.data}")
    return final


# ---- merging of finished weights -------------------------------------------------------------------------

@dataclass
class WeightsConfig:
    checkpoints: tuple[str, ...]    # two or more checkpoints with a common ancestor
    base: str = ""                  # the ancestor; task and ties need it
    method: str = "linear"          # linear, task (task arithmetic) or ties
    weights: tuple[float, ...] = ()  # of each checkpoint (empty: equal ones that add up to 1)
    scale: float = 1.0              # lambda, the factor of the merged difference to the base (task, ties)
    density: float = 0.5            # ties: share of each tensor's differences that is kept
    sweep: tuple[float, ...] = ()   # weights of the second of two checkpoints to try, measured on validation
    data: str = "data/tiny"         # for --sweep: folder made by data/prepare.py
    n_problems: int = 100           # for --sweep: validation problems of each difficulty
    out: str = "merged.pt"          # file to write; --sweep: one per weight, as merged-0.25.pt
    seed: int = 0                   # of the sampling in --sweep
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def merge_tensors(method: str, tensors: list[Tensor], weights: list[float], base: Tensor | None = None,
                  scale: float = 1.0, density: float = 1.0) -> Tensor:
    """Merge tensors of one shape. linear: sum of w·t, over the sum of w. task: base + scale · sum of w·(t −
    base) (Ilharco et al. 2023). ties: of each t − base keep the `density` largest values, per element elect
    the sign of the weighted sum, and average the differences that have it (Yadav et al. 2023)."""
    w = torch.tensor(weights, dtype=tensors[0].dtype).view(-1, *[1] * tensors[0].dim())     # (n, 1, ...)
    if method == "linear":
        return (w * torch.stack(tensors)).sum(0) / w.sum()
    deltas = torch.stack([t - base for t in tensors])                                             # (n, ...)
    if method == "task":
        return base + scale * (w * deltas).sum(0)
    keep = max(1, round(density * base.numel()))
    for d in deltas:
        d[d.abs() < d.abs().flatten().topk(keep).values[-1]] = 0.0
    agree = deltas.sign() == (w * deltas).sum(0).sign()
    total = (w * agree).sum(0)
    return base + scale * (w * agree * deltas).sum(0) / torch.where(total == 0, 1.0, total)


def ancestors(digest: str, content: dict) -> set[str]:
    """sha256 of a checkpoint's file (`digest`) and of all that it was trained or merged from; and the options
    of its pretraining: whatever comes from two moments of one run has the same initial weights behind it."""
    first = {k: v for k, v in content["lineage"][0].items() if k in ("script", "config")}
    return {digest, json.dumps(first, sort_keys=True)}.union(
        *([stage.get("parent"), *stage.get("merged", ())] for stage in content["lineage"])) - {None}


def merge_weights(c: WeightsConfig) -> list[Path]:
    """Merge and write checkpoints (one, or one per --sweep weight); returns their paths. Raises UserError for
    checkpoints of different shape or tokenizer; warns if their lineage shows no common ancestor."""
    n = len(c.checkpoints)
    require(n >= 2, "one checkpoint given: merging needs two or more")
    require(c.method in ("linear", "task", "ties"), f"--method {c.method}: must be linear, task or ties")
    require(c.method == "linear" or c.base != "", f"--base is missing: --method {c.method} needs it")
    require(len(c.weights) in (0, n), f"--weights: {len(c.weights)} given for {n} checkpoints")
    require(all(abs(w) < 1e6 for w in (*c.weights, *c.sweep)) and abs(c.scale) < 1e6,
            "--weights, --sweep and --scale must be finite")
    require(not c.weights or c.method != "linear" or abs(sum(c.weights)) > 1e-6, "--weights: add up to 0")
    require(0 < c.density <= 1, f"--density {c.density}: must be more than 0, at most 1")
    require(not c.sweep or n == 2 and not c.weights, "--sweep: needs two checkpoints and no --weights")
    require(Path(c.out).suffix == ".pt", f"--out {c.out}: must be the name of a file, ending in .pt")
    inputs = {Path(path).resolve() for path in (*c.checkpoints, c.base)}
    require(Path(c.out).resolve() not in inputs, f"--out {c.out}: is one of the checkpoints to merge")
    setup(c.device, c.threads)
    require(ranks.world_size() == 1, "merge.py weights runs in one process, without torchrun")
    paths = [*c.checkpoints, c.base] if c.base else list(c.checkpoints)
    loaded = [load_model(path) for path in paths]
    first, tokenizer, _ = loaded[0]
    for path, (model, other, _) in zip(paths, loaded):
        require(model.config == first.config, f"{path}: another shape than {paths[0]} "
                f"({model.config} against {first.config}); only equal models can be merged")
        require(other.sha256 == tokenizer.sha256, f"{path}: another tokenizer than {paths[0]}")
    digests = [file_sha256(path) for path in paths]
    if not set.intersection(*(ancestors(d, content) for d, (_, _, content) in zip(digests, loaded))):
        print(f"WARNING: the lineage of {', '.join(paths)} shows no common ancestor; weights of unrelated "
              "models cannot be averaged in any meaningful way", file=sys.stderr)
    measure = evaluate.Config(c.checkpoints, c.data, n_problems=c.n_problems, seed=c.seed, device=c.device,
                              threads=c.threads)
    if c.sweep:                                  # what would stop the measurement stops the merge
        evaluate.check(measure)
        require(evaluate.open_data(c.data)[1].sha256 == tokenizer.sha256,
                f"{paths[0]}: made with another tokenizer than {c.data} holds")
        load_problems(f"{c.data}/val.jsonl")
    lineages = [content["lineage"] for _, _, content in loaded[:n]]
    shared = [stages[0] for stages in zip(*lineages) if all(s == stages[0] for s in stages)]
    cost = {k: sum(stage[k] for lineage in lineages for stage in lineage[len(shared):])
            for k in ("tokens", "updates", "flops", "seconds")}
    states = [model.state_dict() for model, _, _ in loaded]
    base = states[-1] if c.base else dict.fromkeys(states[0])
    result, out, written = copy.deepcopy(first), Path(c.out), []
    out.parent.mkdir(parents=True, exist_ok=True)
    for mix in c.sweep or [None]:
        weights = list(c.weights) or ([1 / n] * n if mix is None else [1 - mix, mix])
        merged = {name: merge_tensors(c.method, [s[name] for s in states[:n]], weights, base[name], c.scale,
                                      c.density) for name in states[0]}
        result.load_state_dict(merged)
        path = out if mix is None else out.with_stem(f"{out.stem}-{mix:.12g}")
        config = json.loads(json.dumps(asdict(c))) | {"weights": weights}
        stage = {"script": "merge.py weights", "config": config,
                 "parent": digests[-1] if c.base else None, "merged": digests[:n], **cost}
        save_checkpoint(path, result, tokenizer, [*shared, stage])
        print(f"written: {path}")
        written.append(path)
    results = [evaluate.evaluate(str(p), measure) for p in written] if c.sweep else []
    for mix, measured in zip(c.sweep, results):
        for name, d in measured["problems"].items():
            print(f"weight {mix:4g} of {c.checkpoints[1]}: {name} " + ", ".join(
                f"{k} {v['mean']:.1%}" for k, v in d.items() if k.startswith("pass@"))
                + (f", general mean {measured['general_mean']:.1%}" if "general_mean" in measured else ""))
    return written


if __name__ == "__main__":
    if sys.argv[1:2] == ["weights"]:
        del sys.argv[1]
        main(merge_weights, WeightsConfig)
    else:
        main(train, Config)
