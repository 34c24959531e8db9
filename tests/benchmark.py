"""Speed and memory of every stage beside the limits of this machine. A script, not a timed test; Linux, CPU.

    python tests/benchmark.py               every number, on a quiet machine: about 15 minutes on two cores
    python tests/benchmark.py --quick       tiny workloads: does it run at all? The numbers mean nothing

Writes results/benchmark/benchmark.json and, beside it, scaling.png: cost against rollouts and answer length.
Limit: a model's FLOPs (GPT.flops_per_token; backward twice forward) at the rate that its own weight matrices
reach when multiplied one after the other, with as many threads. EOS is not in the random models' vocabulary
of 512: every answer is as long as allowed. In the updates every rollout takes part: the dearest case.
"""
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import merge
import pretrain
import ranks
import rl
import sft
from checkpoint import atomic_write, check_fields, generator, main, require, setup
from data.tokenizer import PATTERN, Tokenizer
from model import GPT, SIZES, Cache, ModelConfig


@dataclass
class Config:
    sizes: tuple[str, ...] = ("0.5M", "3M")     # one of 0.3M, 0.5M, 1M, 3M, 10M, 30M, 124M: models
    threads: tuple[int, ...] = (1, 0)           # >= 0: CPU threads of one process, 0 = all cores
    processes: int = 0              # >= 0: then this many of one thread, by torchrun, 0 = all cores
    n_problems: int = 64            # > 0: P, problems per GRPO step, with prompts of 24 tokens on average
    rollouts: int = 16              # >= 2: G, sampled answers per problem
    max_new: int = 48               # > 0: tokens of each answer
    eval_problems: int = 200        # > 0: problems evaluated
    eval_samples: int = 64          # > 0: samples of each
    eval_new: int = 24              # > 0: tokens of each, fixed: about as many as real answers have
    scale: tuple[int, ...] = (16, 64, 256, 1024)        # > 0: problems per step in the figure
    lengths: tuple[int, ...] = (12, 24, 48, 96, 192)    # > 0: answer tokens in the figure
    matrix: int = 3072              # > 0: side of the big matrix product
    repeats: int = 3                # > 0: of each measurement, after a small warm-up; the median counts
    patience: float = 20            # > 0: seconds after which a measurement is not repeated any more
    quick: bool = False             # tiny workloads instead of all these
    out: str = "results/benchmark/benchmark.json"       # file to write


QUICK = dict(sizes=("0.3M",), n_problems=4, rollouts=4, max_new=8, eval_problems=4, eval_samples=4,
             eval_new=8, scale=(1, 4), lengths=(8, 16), matrix=256, repeats=2, patience=.5)
PROMPT = 24
# its EOS and PAD are numbers 512 and 513, beyond the models' n_vocab: they are never sampled
TOKENIZER = Tokenizer({"pattern": PATTERN, "merges": [[97 + i // 16, 97 + i % 16] for i in range(256)]})


def build(size: str) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(ModelConfig(576, TOKENIZER.eos, 256, *SIZES[size]), generator(0, "weights"))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def make_problems(n: int) -> list[dict]:
    """With EOS, digits (a token each) and newline, prompts of 20 to 28 tokens."""
    return [{"question": "7" * (PROMPT - 6 + i % 9), "answer": "7"} for i in range(n)]


def random_ids(n: int, length: int) -> list[list[int]]:
    return torch.randint(TOKENIZER.eos, (n, length), generator=generator(0, "ids")).tolist()


def update(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """As it stands in every loop, but for the books."""
    ranks.sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def grpo_step(model: GPT, reference: GPT, optimizer: torch.optim.Optimizer, n: int, c: rl.Config) -> None:
    batch = rl.collect(model, TOKENIZER, make_problems(n), c.rollouts, c, generator(0, "rollouts"))
    rl.kl_to_reference(reference, batch, c, TOKENIZER.pad)
    half_right = (torch.arange(n * c.rollouts) % 2).float().view(n, c.rollouts)      # no group is silent
    rl.policy_gradient(model, reference, batch, rl.advantages(half_right).flatten(), range(n * c.rollouts), c,
                       TOKENIZER.pad)
    update(model, optimizer)


def sampling_flops(model: GPT, problems: int, group: int, new: int) -> int:
    """Prompts once, then answers, whose tokens see PROMPT + new/2 others: flops_per_token(n) means n/2."""
    return problems * (PROMPT * model.flops_per_token(PROMPT)
                       + group * new * model.flops_per_token(2 * PROMPT + new))


# ---- repeated, in a process of its own -------------------------------------------------------------------

def repeat(work: Callable[[], object], c: Config) -> list[float]:
    """Seconds of each call. All processes make as many calls."""
    seconds: list[float] = []
    while len(seconds) < c.repeats and max(ranks.gather([sum(seconds)])) < c.patience:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def watched(clock: Counter, label: Callable[..., str], function: Callable) -> Callable:
    """The function, which now adds its seconds to clock[label(its arguments)]."""
    def timed(*args):
        started = time.perf_counter()
        result = function(*args)
        clock[label(*args)] += time.perf_counter() - started
        return result
    return timed


def in_child(function: Callable, c: Config, size: str, processes: int, threads: int, folder: str,
             rank: int) -> tuple[object, float, float]:
    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    setup("cpu", threads)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    imports = peak()
    return function(c, size), peak(), peak() - imports


def alone(function: Callable, c: Config, size: str, processes: int, threads: int) -> tuple:
    """(result of the first, peak MB of all, MB beyond the imports) of function(c, size) in forks of this
    process, which itself must not compute anything: OpenMP's threads do not survive a fork."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, fork) as executor:
        child = partial(in_child, function, c, size, processes, threads, folder)
        results, peaks, added = zip(*executor.map(child, range(processes)))
    return results[0], sum(peaks), sum(added)


# ---- workloads -------------------------------------------------------------------------------------------

class Row(NamedTuple):
    what: str
    amount: int
    unit: str                       # of the amount
    flops: float
    seconds: list[float]            # of each repetition
    parts: list[dict] = []          # of each repetition: seconds by what they were spent on


@torch.no_grad()
def machine(c: Config, size: str) -> dict:
    """GFLOP/s of a big matrix product; of the model's weights one after the other, times 2,048 tokens (a
    micro-batch); GB/s of copying between blocks of 256 MB, bytes read and bytes written both counted."""
    x, y = torch.randn(2, c.matrix, c.matrix)
    out, source, target = torch.empty_like(x), torch.ones(1 << 26), torch.zeros(1 << 26)
    weights = [p for name, p in build(size)[0].named_parameters() if p.dim() == 2 and name != "embed.weight"]
    inputs = {w.shape[1]: torch.randn(2048, w.shape[1]) for w in weights}

    def own() -> None:
        for w in 5 * weights:
            F.linear(inputs[w.shape[1]], w)

    def rate(work: Callable[[], object], amount: float) -> float:
        work()
        return amount / 1e9 / median(repeat(work, c))
    return {"matmul_gflops": rate(lambda: torch.mm(x, y, out=out), 2 * c.matrix ** 3),
            "own_gflops": rate(own, 2 * 2048 * 5 * sum(w.numel() for w in weights)),
            "copy_gb_per_s": rate(lambda: target.copy_(source), 8 * len(source))}


def pretraining(c: Config, size: str, compiled: bool = False) -> list[Row]:
    """Forward, backward, AdamW with the batches of pretrain.py; three updates at a time."""
    (model, optimizer), p = build(size), pretrain.Config()
    model.compiled = compiled
    sequences = torch.tensor(random_ids(p.batch, p.context + 1))

    def work(updates: int = 3) -> None:
        for _ in range(updates):
            for part in ranks.my_part(sequences).split(pretrain.at_once(p, model.device)):
                (pretrain.next_token_loss(model, part) * (len(part) / p.batch)).backward()
            update(model, optimizer)
    work(1)
    tokens = 3 * p.batch * p.context
    return [Row("pretraining, compiled" if compiled else "pretraining", tokens, "tokens",
                tokens * 3 * model.flops_per_token(p.context), repeat(work, c))]


def learning(c: Config, size: str, compiled: bool = False) -> list[Row]:
    """Rounds of parallel averaging, of which one arm is a GRPO step, of which sampling is a part."""
    (model, optimizer), (reference, _) = build(size), build(size)
    model.compiled = compiled
    sft_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    config, n_examples = rl.Config(max_new=c.max_new, rollouts=c.rollouts), merge.Config.batch
    examples = list(zip(random_ids(n_examples, PROMPT), random_ids(n_examples, c.max_new)))
    clock, steps = Counter(), []                 # seconds of the parts of a GRPO step; those of every step
    if not compiled:                             # a clock would interrupt the code
        model.hidden = watched(clock, lambda ids, cache=None: "prefill" if isinstance(cache, Cache)
                               and ids.shape[1] > 1 else "other", model.hidden)
    for owner, name in ((ranks, "sample_together"), (rl, "collect"), (rl, "kl_to_reference"),
                        (rl, "policy_gradient"), (torch.Tensor, "backward")):
        setattr(owner, name, watched(clock, lambda *_, name=name: name, getattr(owner, name)))
    step = watched(clock, lambda *_: "step", grpo_step)

    def sft_arm(h: int) -> None:
        sft.sft_gradient(model, examples, sft.Config(), TOKENIZER.pad)
        update(model, sft_optimizer)

    def work(n: int = c.n_problems) -> None:
        def rl_arm(h: int) -> None:
            clock.clear()
            step(model, reference, optimizer, n, config)
            steps.append(clock.copy())
        merge.parallel_round(model, [rl_arm, sft_arm], [.5, .5])
    work(c.n_problems if compiled else 4)        # code is made for new shapes
    steps.clear()
    seconds = repeat(work, c)
    parts = [{"prefill": t["prefill"], "decode": t["sample_together"] - t["prefill"],
              "grading": t["collect"] - t["sample_together"], "scoring": t["kl_to_reference"],
              "forward": t["policy_gradient"] - t["backward"], "backward": t["backward"],
              "optimizer": t["step"] - t["collect"] - t["kl_to_reference"] - t["policy_gradient"]}
             for t in steps]
    B, length = c.n_problems * c.rollouts, PROMPT + c.max_new
    row, sampled = (length * model.flops_per_token(length),
                    sampling_flops(model, c.n_problems, c.rollouts, c.max_new))
    whole = 4 * sampled + min(64, B) * row       # sampling, an update of three times that, scoring of 64 rows
    if compiled:
        return [Row("update, compiled", B, "rollouts", 3 * sampled, [t["policy_gradient"] for t in steps]),
                Row("GRPO step, compiled", B, "rollouts", whole, [t["step"] for t in steps])]
    return [
        Row("sampling", B * c.max_new, "tokens", sampled, [t["sample_together"] for t in steps]),
        Row("update, prompts shared", B, "rollouts", 3 * sampled, [t["policy_gradient"] for t in steps]),
        Row("GRPO step", B, "rollouts", whole, [t["step"] for t in steps], parts),
        Row("parallel averaging", B, "rollouts", whole + 3 * n_examples * row, seconds)]


def evaluation(c: Config, size: str) -> list[Row]:
    """Sampling at the temperature of evaluate.py, texts, grades; measured on 64 problems, given for 200."""
    model, n, measured = build(size)[0], c.eval_problems, min(64, c.eval_problems)

    def work(problems: int = measured) -> None:
        evaluate.attempt(model, TOKENIZER, make_problems(problems), c.eval_samples,
                         evaluate.Config.temperature, c.eval_new, generator(0, "evaluation"))
    work(2)
    return [Row(f"evaluation, {n} x {c.eval_samples}", n * c.eval_samples, "samples",
                sampling_flops(model, n, c.eval_samples, c.eval_new),
                [n / measured * seconds for seconds in repeat(work, c)])]


# ---- all of it -------------------------------------------------------------------------------------------

def stages(c: Config, where: dict, result: dict) -> None:
    """Measure every stage with a size, processes and threads: a table on the screen, rows in the result."""
    limit, *_ = alone(machine, c, **where)
    limit = {name: where["processes"] * rate for name, rate in limit.items()}
    result["limits"].append(where | limit)
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()) + ". Limits: "
          + ", ".join(f"{name} {rate:.1f}" for name, rate in limit.items())
          + f"\n{'':44s} seconds  GFLOP/s  of limit  peak MB  repeats")
    compiled = [partial(work, compiled=True) for work in (pretraining, learning)]
    compiled *= bool(shutil.which(os.environ.get("CXX", "g++")) and not c.quick)
    for workload in (pretraining, learning, evaluation, *compiled):
        rows, peak_mb, _ = alone(workload, c, **where)
        for what, amount, unit, flops, each, parts in rows:
            seconds = median(each)
            gflops = flops / seconds / 1e9
            share = gflops / limit["own_gflops"]
            print(f"  {what:23s}{amount / seconds:8,.0f} {unit + '/s':11s}{seconds:8.2f}{gflops:9.1f}"
                  f"{share:10.0%}{peak_mb:9.0f}{len(each):9d}", flush=True)
            result["figures"].append(where | {
                "what": what, "amount": amount, "unit": unit, "seconds": seconds, "repeats": len(each),
                "per_second": amount / seconds, "gflops": gflops, "of_limit": share,
                "of_big_matmul": gflops / limit["matmul_gflops"], "peak_mb": peak_mb})
            if parts:
                breakdown = {name: median(part[name] for part in parts) for name in parts[0]}
                result["breakdown"].append(where | breakdown)
                print("    " + ", ".join(f"{name} {value:.3f}" for name, value in breakdown.items()))


def scaling(c: Config, threads: int) -> dict[str, list[dict]]:
    """The cost of a GRPO step of the first size against its rollouts and against the length of answers."""
    print(f"\na GRPO step of {c.sizes[0]}, threads: {threads}")
    series = {"rollouts": [replace(c, n_problems=n, max_new=c.max_new // 2) for n in c.scale],
              "answer tokens": [replace(c, n_problems=c.scale[0], max_new=new) for new in c.lengths]}
    result = {x: [] for x in series}
    for x, changed in ((x, changed) for x, configs in series.items() for changed in configs):
        (_, _, step, _), peak_mb, added_mb = alone(learning, changed, c.sizes[0], 1, threads)
        B, new, seconds = step.amount, changed.max_new, median(step.seconds)
        result[x].append({"rollouts": B, "answer tokens": new, "seconds": seconds, "peak_mb": peak_mb,
                          "added_mb": added_mb})
        print(f"{B:7d} rollouts of {new:3d} tokens{seconds:9.2f} s{1e3 * seconds / B:8.2f} ms per rollout, "
              f"memory +{added_mb:.0f} MB", flush=True)
    return result


def draw(series: dict[str, list[dict]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex="col", layout="tight")
    for (x, points), (above, below) in zip(series.items(), axes.T):
        xs, seconds, memory = ([p[key] for p in points] for key in (x, "seconds", "added_mb"))
        above.loglog(xs, seconds, "o-", label="seconds per GRPO step")
        above.loglog(xs, [seconds[-1] / xs[-1] * at for at in xs], ":", color="0.5", label="proportional")
        below.semilogx(xs, memory, "o-", label="peak memory beyond imports, MB")
        below.set(xlabel=x, ylim=(0, None), xticks=xs, xticklabels=xs)
        below.minorticks_off()
        for axis in (above, below):
            axis.grid(alpha=.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run(c: Config) -> None:
    c = replace(c, **QUICK) if c.quick else c
    check_fields(c)
    require(all((c.sizes, c.threads, c.scale)), "--sizes, --threads and --scale must not be empty")
    started, out, cores = time.perf_counter(), Path(c.out), torch.get_num_threads()
    out.parent.mkdir(parents=True, exist_ok=True)
    cpu = [x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    about = {"cpu": cpu[0], "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2),
             "torch": torch.__version__, "date": datetime.now().isoformat(timespec="minutes")}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    if about["load"] > .5:
        print("WARNING: the machine is busy; the numbers say little about it")
    result = {"machine": about, "config": asdict(c), "limits": [], "figures": [], "breakdown": []}
    ways = dict.fromkeys([*((1, n or cores) for n in c.threads), (c.processes or cores, 1)])
    for (processes, threads), size in product(ways, c.sizes):
        stages(c, {"size": size, "processes": processes, "threads": threads}, result)
    result["scaling"] = scaling(c, max(n or cores for n in c.threads))
    draw(result["scaling"], out.with_name("scaling.png"))
    atomic_write(out, json.dumps(result, indent=1).encode())
    print(f"\nwritten: {out} and scaling.png beside it, {(time.perf_counter() - started) / 60:.1f} min")


if __name__ == "__main__":
    main(run, Config)
