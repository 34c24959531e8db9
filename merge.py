"""RL and SFT together: parallel averaging of their updates, two controls, merging of finished weights.

    python merge.py --init runs/base/8M.pt --out runs/merge
    python merge.py weights runs/rl/final.pt runs/sft/final.pt --base runs/base/8M.pt --method ties -o out.pt

Parallel averaging, every step: from one snapshot of the weights an RL update and an SFT update (the two
"arms"), each by an AdamW of its own, each gradient clipped alone; the new weights are the average of the two
results. The gradients are those of rl.py and sft.py. Controls (--mode): one AdamW on the summed loss, or RL
and SFT steps in turn, both moving about as far per step as the average does. Left out: several RL updates per
batch.
"""
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import ranks  # comes before torch: it sets how idle threads wait

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import evaluate
import rl
import sft
from checkpoint import (
    Run, batch_indices, check_fields, compile_if_it_pays, file_sha256, generator, load_model, main, require,
    save_checkpoint, setup)
from data.problems import training_problems
from data.tokenizer import Tokenizer
from model import GPT


@dataclass
class Config:
    init: str = ""                  # checkpoint to start from
    data: str = "data/tiny"         # folder made by data/prepare.py
    teacher: str = "wrapped"        # one of native, wrapped, spoken, prose: language of the solutions
    problem_file: str = ""          # problem file to train on instead of one in DATA
    out: str = "runs/merge"         # run folder; the same call again resumes an unfinished run
    difficulty: str = "easy"        # one of easy, hard, all: which problems to train and validate on
    n_train: int = 0                # >= 0: number of problems to train on, 0 = all
    demonstrated: int = 2000        # >= 0: of them with solutions for SFT, 0 = all
    mode: str = "parallel"          # one of parallel, fused, alternating: parallel averaging, or a control
    gold: bool = False              # SFT on all solutions of every question instead of one chosen at random
    n_problems: int = 64            # > 0: P, problems per RL update
    rollouts: int = 16              # >= 2: G, sampled answers per problem
    batch: int = 32                 # > 0: examples per SFT update
    steps: int = 150                # > 0: updates per arm
    inner: int = 1                  # > 0: H, updates per arm between averages: 1 as in the paper, STEPS: once
    lr_rl: float = 1e-4             # >= 0: of AdamW, constant
    lr_sft: float = 1e-3            # >= 0: of AdamW, constant
    weight_rl: float = 0.5          # >= 0, <= 1: weight of RL in the average; SFT has the rest
    weight_decay: float = 0.0       # >= 0: of both AdamW
    grad_clip: float = 1.0          # > 0: largest norm of each gradient
    std: bool = True                # divide the advantage by the group's standard deviation
    reference: bool = True          # keep the initial policy, to log the KL to it; off: less memory
    temperature: float = 1.0        # > 0: of the rollouts
    max_new: int = 80               # > 0: longest answer, tokens
    micro_tokens: int = 0           # >= 0: tokens per forward pass, 0 = 2,048 on a CPU, 16,384 on a GPU
    eval_every: int = 10            # > 0: steps between validations (and transcripts), a multiple of H
    eval_problems: int = 100        # > 0: validation problems
    eval_samples: int = 16          # > 0: samples of each, at T=0.6
    save_every: int = 5             # > 0: steps between states to resume from
    checkpoints_at: tuple[int, ...] = ()    # > 0: steps after which to keep a checkpoint, besides the last
    recompute: bool = False         # activations again in the backward pass: less memory, a third slower
    decode_rows: int = 1024         # > 0: rows sampled at once (one problem's at least): bounds the cache
    freeze_embeddings: bool = False     # no gradient and no moments for embedding and head
    seed: int = 0                   # >= 0: of the order of problems, the choice of solutions, the rollouts
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores
    compile: str = "auto"           # one of auto, on, off: torch.compile; auto: in long runs on a CPU


def check(c: Config) -> None:
    check_fields(c)
    require(c.inner == 1 or c.mode == "parallel", f"--inner {c.inner}: belongs to --mode parallel only")
    uneven = [s for s in (c.steps, *c.checkpoints_at) if s % c.inner]
    require(not uneven, f"--inner {c.inner}: does not divide {uneven} of --steps, --checkpoints-at")


def arm_config(cls: type, c: Config) -> rl.Config | sft.Config:
    """The options that rl.py's or sft.py's functions read."""
    return cls(**{name: value for name, value in asdict(c).items() if name in cls.__dataclass_fields__})


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


def learning_rates(c: Config) -> dict[str, float]:
    """Optimizer -> learning rate. Those of the controls make their steps about as long as the average's."""
    if c.mode == "parallel":
        return {"rl": c.lr_rl, "sft": c.lr_sft}
    half_rl = c.weight_rl * c.lr_rl
    half_sft = (1 - c.weight_rl) * c.lr_sft
    if c.mode == "alternating":
        return {"rl": half_rl, "sft": half_sft}
    return {"fused": math.hypot(half_rl, half_sft)}      # norm of two orthogonal AdamW steps added


def rl_gradient(model: GPT, reference: GPT | None, tokenizer: Tokenizer, problems: list[dict], step: int,
                c: rl.Config, run: Run) -> dict[str, float]:
    """Collect rollouts from the model as it is and add GRPO's gradient (none if the metric `signal` is 0)."""
    chosen = [problems[i] for i in batch_indices(len(problems), c.n_problems, step, c.seed, "rl")]
    batch = rl.collect(model, tokenizer, chosen, c.rollouts, c, generator(c.seed, "rollouts", step))
    advantage = rl.advantages(batch.rewards, c.std).flatten()            # (B,)
    kl = rl.kl_to_reference(reference, batch, c, tokenizer.pad)
    rows = range(len(advantage))
    metrics = rl.policy_gradient(model, reference, batch, advantage, rows, c, tokenizer.pad)

    trained = metrics["positions"] if metrics else 0
    run.count(tokens=sum(map(len, batch.completions)), flops=rl.grpo_flops(model, batch, trained, c))
    return rl.rollout_metrics(batch, advantage) | {"kl": kl}


def sft_gradient(model: GPT, tokenizer: Tokenizer, examples: list[sft.Example], step: int, c: sft.Config,
                 run: Run) -> dict[str, float]:
    """Add SFT's gradient at the model as it is."""
    batch = [examples[i] for i in batch_indices(len(examples), c.batch, step, c.seed, "sft")]
    metrics = sft.sft_gradient(model, batch, c, tokenizer.pad)
    run.count(tokens=sum(len(solution) for _, solution in batch), flops=metrics["flops"])
    return {"sft_loss": metrics["loss"]}


# ---- training --------------------------------------------------------------------------------------------
def train(c: Config) -> Path:
    """Run (or resume) the training; returns the path of the last checkpoint."""
    check(c)
    device = setup(c.device, c.threads, c.compile)
    model, tokenizer, parents = load_model(c.init, device)
    model.set_memory(c)
    problems, validation, files = training_problems(c, model, tokenizer, solutions=True)
    examples = sft.make_examples(tokenizer, problems[:c.demonstrated or None], c.gold, c.seed)
    sft.require_fit(examples, model.config.context)
    reference = copy.deepcopy(model).requires_grad_(False) if c.reference else None
    rl_config = arm_config(rl.Config, c)
    sft_config = arm_config(sft.Config, c)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr, weight_decay=c.weight_decay, fused=True)
                  for name, lr in learning_rates(c).items()}
    metrics: dict[str, float] = {}

    def update(name: str) -> None:               # `run` and `step`, here and below, are those of the loop
        ranks.sum_gradients(model)               # over the processes, if there are several
        norm = float(clip_grad_norm_(model.parameters(), c.grad_clip))
        if run.usable(norm, optimizers[name]):   # finite; three bad ones in a row end the run
            optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        metrics["grad_norm_" + name] = norm

    def add_rl(h: int = 0) -> None:
        metrics.update(rl_gradient(model, reference, tokenizer, problems, step + h, rl_config, run))

    def add_sft(h: int = 0) -> None:
        metrics.update(sft_gradient(model, tokenizer, examples, step + h, sft_config, run))

    def rl_arm(h: int = 0) -> None:
        add_rl(h)
        if metrics["signal"] > 0:                # no signal, no step: momentum must not move the model
            update("rl")

    def sft_arm(h: int = 0) -> None:
        add_sft(h)
        update("sft")

    with Run(c, c.steps, parents, files) as run:
        if run.finished():
            return run.final
        step = run.restore(model, *optimizers.values())
        compile_if_it_pays(model, c.compile, rl.expected_flops(model, rl_config), gain=.1, codes=2)
        if step == 0:
            rl.probe(model, tokenizer, problems[:c.n_problems], rl_config)
        while True:
            # ---- learning rate: constant
            # ---- evaluate and checkpoint
            if step % c.eval_every == 0 or step == c.steps:
                attempts = evaluate.validate(model, tokenizer, validation, c)
                run.log(step, **{"val_pass@1": attempts.score})
                run.write(f"======== step {step}\n{attempts.transcript(validation)}")
            if step in c.checkpoints_at:
                run.keep(f"step{step}.pt", model, tokenizer)
            if step == c.steps:
                break

            # ---- collect and update
            started = time.perf_counter()
            metrics.clear()
            if c.mode == "parallel":
                parallel_round(model, [rl_arm, sft_arm], [c.weight_rl, 1 - c.weight_rl], c.inner)
            elif c.mode == "alternating":
                rl_arm()
                sft_arm()
            else:
                add_rl()
                add_sft()                        # adds to the gradient that is there
                update("fused")

            # ---- log
            step += c.inner
            run.count(seconds=time.perf_counter() - started)
            run.log_step(step, **metrics)

            # ---- stop
            run.end_step(step, model, tokenizer, *optimizers.values())
        return run.finish(model, tokenizer, *optimizers.values(),
                          then=f"python evaluate.py {run.final} {c.init} --data {c.data}")


# ---- merging of finished weights -------------------------------------------------------------------------
@dataclass
class WeightsConfig:
    checkpoints: tuple[str, ...]    # two or more checkpoints with a common ancestor
    base: str = ""                  # the ancestor; task and ties need it
    method: str = "linear"          # one of linear, task, ties: task = task arithmetic
    weights: tuple[float, ...] = ()  # > -1000000, < 1000000: of each checkpoint; none: equal ones, sum 1
    factor: float = 1.0             # > -1000000, < 1000000: lambda, of the merged difference (task, ties)
    density: float = 0.2            # > 0, <= 1: ties: share of the differences that is kept, the largest
    out: str = "merged.pt"          # file to write
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores


def check_weights(c: WeightsConfig) -> None:
    n = len(c.checkpoints)
    check_fields(c)
    require(n >= 2, "one checkpoint given: merging needs two or more")
    require(c.method == "linear" or c.base != "", f"--base is missing: --method {c.method} needs it")
    require(len(c.weights) in (0, n), f"--weights: {len(c.weights)} given for {n} checkpoints")
    require(c.method != "ties" or min(c.weights, default=1) > 0, "--weights: ties takes positive ones only")
    require(not c.weights or c.method != "linear" or abs(sum(c.weights)) > 1e-6, "--weights: add up to 0")
    require(Path(c.out).suffix == ".pt", f"--out {c.out}: must be the name of a file, ending in .pt")
    inputs = {Path(path).resolve() for path in (*c.checkpoints, c.base)}
    require(Path(c.out).resolve() not in inputs, f"--out {c.out}: is one of the checkpoints to merge")


def merge_tensors(method: str, tensors: list[Tensor], weights: list[float], base: Tensor | None = None,
                  factor: float = 1.0, density: float = 1.0) -> Tensor:
    """Merge tensors of one shape. linear: sum of w·t, over the sum of w. task: base + factor · sum of w·(t −
    base) (Ilharco et al. 2023). ties: of each t − base keep the `density` largest values, per element elect
    the sign of the weighted sum, and average the differences that have it (Yadav et al. 2023; given all
    weights of a model as one vector, it trims as they do)."""
    w = torch.tensor(weights, dtype=tensors[0].dtype).view(-1, *[1] * tensors[0].dim())     # (n, 1, ...)
    if method == "linear":
        return (w * torch.stack(tensors)).sum(0) / w.sum()
    deltas = torch.stack([t - base for t in tensors])                                       # (n, ...)
    if method == "task":
        return base + factor * (w * deltas).sum(0)
    keep = max(1, round(density * base.numel()))
    for d in deltas:
        smallest_kept = d.abs().flatten().topk(keep).values[-1]
        d[d.abs() < smallest_kept] = 0.0
    agree = deltas.sign() == (w * deltas).sum(0).sign()
    total = (w * agree).sum(0)
    return base + factor * (w * agree * deltas).sum(0) / torch.where(total == 0, 1.0, total)


def ancestors(digest: str, lineage: list[dict]) -> set[str]:
    """sha256 of a checkpoint's file (`digest`) and of all that it was trained or merged from; and the options
    of its pretraining: two checkpoints of one pretraining run share its initial weights."""
    first = [json.dumps([stage["script"], stage["config"]], sort_keys=True) for stage in lineage[:1]]
    found = {digest, *first}
    for stage in lineage:
        found.update([stage.get("parent"), *stage.get("merged", ())])
    return found - {None}


def load_relatives(paths: list[str]) -> tuple[list[GPT], Tokenizer, list[list[dict]], list[str]]:
    """(models, their tokenizer, lineage and sha256 of each file). UserError for different shapes or
    tokenizers; a warning if the lineages show no common ancestor."""
    loaded = [load_model(path) for path in paths]
    first, tokenizer, _ = loaded[0]
    for path, (model, other, _) in zip(paths, loaded):
        require(model.config == first.config, f"{path}: another shape than {paths[0]} "
                f"({model.config} against {first.config}); only equal models can be merged")
        require(other.sha256 == tokenizer.sha256, f"{path}: another tokenizer than {paths[0]}")
    lineages = [lineage for _, _, lineage in loaded]
    digests = [file_sha256(path) for path in paths]
    if not set.intersection(*map(ancestors, digests, lineages)):
        print(f"WARNING: the lineage of {', '.join(paths)} shows no common ancestor; weights of unrelated "
              "models cannot be averaged in any meaningful way", file=sys.stderr)
    return [model for model, _, _ in loaded], tokenizer, lineages, digests


def merged_lineage(c: WeightsConfig, weights: list[float], lineages: list[list[dict]],
                   digests: list[str]) -> list[dict]:
    """The stages that all have in common and this one, whose costs are those of all the others; `digests`:
    sha256 of the checkpoints and, if there is one, of the base."""
    n = len(c.checkpoints)
    common = [stages[0] for stages in zip(*lineages) if all(s == stages[0] for s in stages)]
    own = [stage for lineage in lineages for stage in lineage[len(common):]]
    cost = {name: sum(stage[name] for stage in own) for name in ("tokens", "updates", "flops", "seconds")}
    config = json.loads(json.dumps(asdict(c))) | {"weights": weights}
    return [*common, {"script": "merge.py weights", "config": config,
                      "parent": digests[n] if c.base else None, "merged": digests[:n], **cost}]


def merge_weights(c: WeightsConfig) -> Path:
    """Merge and write a checkpoint; returns its path. Raises UserError for checkpoints of different shape or
    tokenizer; warns if their lineage shows no common ancestor."""
    check_weights(c)
    setup("cpu", c.threads)
    require(ranks.world_size() == 1, "merge.py weights runs in one process, without torchrun")
    n = len(c.checkpoints)
    weights = list(c.weights) or [1 / n] * n
    models, tokenizer, lineages, digests = load_relatives([*c.checkpoints, *[c.base] * bool(c.base)])

    states = [model.state_dict() for model in models]
    vectors = [torch.cat([w.flatten() for w in state.values()]) for state in states]
    base = vectors[n] if c.base else None
    merged = merge_tensors(c.method, vectors[:n], weights, base, c.factor, c.density)
    parts = merged.split([w.numel() for w in states[0].values()])
    result = copy.deepcopy(models[0])
    result.load_state_dict({name: part.view_as(w) for (name, w), part in zip(states[0].items(), parts)})
    out = Path(c.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, result, tokenizer, merged_lineage(c, weights, lineages[:n], digests))
    print(f"written: {out}")
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["weights"]:
        del sys.argv[1]
        main(merge_weights, WeightsConfig)
    else:
        main(train, Config)
