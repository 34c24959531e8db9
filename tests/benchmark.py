"""Speed and memory of every stage beside the limits of this machine. A script, not a timed test; Linux, CPU.

    python tests/benchmark.py               every number, on a quiet machine: about 12 minutes on two cores
    python tests/benchmark.py --quick       tiny workloads: does it run at all? The numbers mean nothing

Writes results/benchmark/benchmark.json and, beside it, scaling.png: cost against rollouts and answer length.
Limit: a model's FLOPs (GPT.flops_per_token; backward twice forward) at the rate that its own weight matrices
reach when multiplied one after the other, with as many threads. The models are random; EOS is not in their
vocabulary of 512, so every answer is as long as allowed. In the updates every group has a signal and every
rollout takes part: the dearest case. Every workload is a process of its own: its peak memory is its own too.
"""
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from statistics import median

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
from data.problems import prompt_ids
from data.tokenizer import PATTERN, Tokenizer
from model import GPT, SIZES, Cache, ModelConfig, completion_logprobs, micro_batches, pack


@dataclass
class Config:
    sizes: tuple[str, ...] = ("0.5M", "3M")     # one of 0.3M, 0.5M, 1M, 3M, 10M, 30M, 124M: models
    threads: tuple[int, ...] = (1, 0)           # >= 0: CPU threads of one process, 0 = all cores
    processes: int = 0              # >= 0: then so many of one thread, as torchrun starts them, 0 = all cores
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


def make_advantages(n: int, group: int) -> torch.Tensor:
    """(n · group,), none of them 0: every other rollout is right."""
    return rl.advantages((torch.arange(n * group) % 2).float().view(n, group)).flatten()


def update(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """As it stands in every loop, but for the books."""
    ranks.sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def grpo_step(model: GPT, reference: GPT, optimizer: torch.optim.Optimizer, n: int, c: rl.Config) -> None:
    batch = rl.collect(model, TOKENIZER, make_problems(n), c.rollouts, c, generator(0, "rollouts"))
    rl.kl_to_reference(reference, batch, c, TOKENIZER.pad)
    rl.policy_gradient(model, reference, batch, make_advantages(n, c.rollouts), range(n * c.rollouts), c,
                       TOKENIZER.pad)
    update(model, optimizer)


def sampling_flops(model: GPT, problems: int, group: int, new: int) -> int:
    """Prompts computed once, and `group` answers to each, whose tokens see the prompt and half of the answer
    on average; flops_per_token(length) means length/2 keys, hence twice the prompt."""
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


def in_child(function: Callable, rank: int, processes: int, threads: int, folder: str,
             *args: object) -> tuple[object, float, float]:
    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    setup("cpu", threads)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    imports = peak()
    return function(*args), peak(), peak() - imports


def alone(function: Callable, processes: int, threads: int, *args: object) -> tuple[object, float, float]:
    """(result of the first, peak MB of all, MB beyond the imports) of function(*args) in forks of this
    process, which itself must not compute anything: OpenMP's threads do not survive a fork."""
    with (tempfile.TemporaryDirectory() as folder,
          ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as executor):
        futures = [executor.submit(in_child, function, rank, processes, threads, folder, *args)
                   for rank in range(processes)]
        results, peaks, added = zip(*(f.result() for f in futures))
    return results[0], sum(peaks), sum(added)


# ---- workloads: rows are (what, amount, unit of the amount, seconds, FLOPs) ------------------------------

@torch.no_grad()
def machine(c: Config, size: str) -> dict:
    """GFLOP/s of a big matrix product; of the model's weights one after the other, times 2,048 tokens (a
    micro-batch); GB/s of copying between blocks of 256 MB, bytes read and bytes written both counted."""
    x, y = torch.randn(2, c.matrix, c.matrix)
    out, source, target = torch.empty_like(x), torch.ones(1 << 26), torch.zeros(1 << 26)
    weights = [p for name, p in build(size)[0].named_parameters() if p.dim() == 2 and name != "embed.weight"]
    inputs = {w.shape[1]: torch.randn(2048, w.shape[1]) for w in weights}

    def big() -> None:
        torch.mm(x, y, out=out)

    def own() -> None:
        for w in 5 * weights:
            F.linear(inputs[w.shape[1]], w)
    big(), own()
    return {"matmul_gflops": 2e-9 * c.matrix ** 3 / median(repeat(big, c)),
            "own_gflops": 2e-9 * 2048 * 5 * sum(w.numel() for w in weights) / median(repeat(own, c)),
            "copy_gb_per_s": 8e-9 * len(source) / median(repeat(lambda: target.copy_(source), c))}


def pretraining(c: Config, size: str, compiled: bool = False) -> dict:
    """Forward, backward, AdamW with the batches of pretrain.py; three updates at a time."""
    (model, optimizer), p = build(size), pretrain.Config()
    sequences = torch.tensor(random_ids(p.batch, p.context + 1))
    forward = torch.compile(model) if compiled else model

    def work(updates: int = 3) -> None:
        for _ in range(updates):
            for part in ranks.my_part(sequences).split(p.micro_batch):
                (pretrain.next_token_loss(forward, part) * (len(part) / p.batch)).backward()
            update(model, optimizer)
    work(1)
    seconds, tokens = repeat(work, c), 3 * p.batch * p.context
    flops = tokens * 3 * model.flops_per_token(p.context)
    name = "the same, --compile" if compiled else "pretraining"
    return {"repeats": len(seconds), "rows": [(name, tokens, "tokens", median(seconds), flops)]}


def pretraining_compiled(c: Config, size: str) -> dict:
    """pretrain.py --compile, which needs a C++ compiler; no row where there is none."""
    try:
        return pretraining(c, size, compiled=True)
    except torch._dynamo.exc.BackendCompilerFailed:
        return {"repeats": 0, "rows": []}


def learning(c: Config, size: str) -> dict:
    """Rounds of parallel averaging, of which one arm is a GRPO step, of which sampling is a part."""
    (model, optimizer), (reference, _) = build(size), build(size)
    sft_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    config, n_examples = rl.Config(max_new=c.max_new, rollouts=c.rollouts), merge.Config.batch
    examples = list(zip(random_ids(n_examples, PROMPT), random_ids(n_examples, c.max_new)))
    clock, parts = Counter(), []                 # seconds of the parts of a GRPO step; those of every step
    model.hidden = watched(clock, lambda ids, cache=None: "prefill" if isinstance(cache, Cache)
                           and ids.shape[1] > 1 else "other", model.hidden)
    ranks.sample_together = watched(clock, lambda *_: "sample", ranks.sample_together)
    for name in ("collect", "kl_to_reference", "policy_gradient"):
        setattr(rl, name, watched(clock, lambda *_, name=name: name, getattr(rl, name)))
    torch.Tensor.backward = watched(clock, lambda *_: "backward", torch.Tensor.backward)
    step = watched(clock, lambda *_: "step", grpo_step)

    def sft_arm(h: int) -> None:
        sft.sft_gradient(model, examples, sft.Config(), TOKENIZER.pad)
        update(model, sft_optimizer)

    def work(n: int = c.n_problems) -> None:
        def rl_arm(h: int) -> None:
            clock.clear()
            step(model, reference, optimizer, n, config)
            parts.append(dict(clock))
        merge.parallel_round(model, [rl_arm, sft_arm], [.5, .5])
    work(4)
    parts.clear()
    seconds = repeat(work, c)
    breakdowns = [
        {"prefill": t["prefill"], "decode": t["sample"] - t["prefill"], "grading": t["collect"] - t["sample"],
         "scoring": t["kl_to_reference"], "forward": t["policy_gradient"] - t["backward"],
         "backward": t["backward"],
         "optimizer": t["step"] - t["collect"] - t["kl_to_reference"] - t["policy_gradient"]} for t in parts]
    breakdown, t = ({k: median(part[k] for part in every) for k in every[0]} for every in (breakdowns, parts))
    B, length = c.n_problems * c.rollouts, PROMPT + c.max_new
    row, sampled = (length * model.flops_per_token(length),
                    sampling_flops(model, c.n_problems, c.rollouts, c.max_new))
    whole = 4 * sampled + min(64, B) * row       # sampling, an update of three times that, scoring of 64 rows
    return {"repeats": len(seconds), "breakdown": breakdown, "rows": [
        ("sampling", B * c.max_new, "tokens", t["sample"], sampled),
        ("update, prompts shared", B, "rollouts", t["policy_gradient"], 3 * sampled),
        ("GRPO step", B, "rollouts", t["step"], whole),
        ("parallel averaging", B, "rollouts", median(seconds), whole + 3 * n_examples * row)]}


def plain_update(c: Config, size: str) -> dict:
    """The same gradient, but each row with its prompt; measured on 16 problems, given for them all."""
    (model, _), n = build(size), min(16, c.n_problems)
    prompts = ranks.my_part([prompt_ids(TOKENIZER, p) for p in make_problems(n)
                           for _ in range(c.rollouts)])
    answers, advantage = random_ids(len(prompts), c.max_new), make_advantages(n, c.rollouts)

    def work() -> None:
        for rows in micro_batches([len(p) + c.max_new for p in prompts], rl.Config.micro_tokens):
            ids, target = pack([prompts[r] for r in rows], [answers[r] for r in rows], TOKENIZER.pad)
            logp = completion_logprobs(model, ids, target)
            loss = rl.policy_loss(logp, logp.detach(), advantage[rows].repeat_interleave(c.max_new), .2, .2)
            (loss.sum() / (len(prompts) * c.max_new)).backward()
        model.zero_grad(set_to_none=True)
    work()
    seconds, B, length = repeat(work, c), c.n_problems * c.rollouts, PROMPT + c.max_new
    flops = B * length * 3 * model.flops_per_token(length)
    return {"repeats": len(seconds), "rows": [
        ("update, plain path", B, "rollouts", c.n_problems / n * median(seconds), flops)]}


def evaluation(c: Config, size: str) -> dict:
    """Sampling at the temperature of evaluate.py, texts, grades; measured on 64 problems, given for 200."""
    model, n = build(size)[0], c.eval_problems

    def work(problems: int = min(64, n)) -> None:
        evaluate.attempt(model, TOKENIZER, make_problems(problems), c.eval_samples,
                         evaluate.Config.temperature, c.eval_new, generator(0, "evaluation"))
    work(2)
    seconds, flops = repeat(work, c), sampling_flops(model, n, c.eval_samples, c.eval_new)
    return {"repeats": len(seconds), "rows": [(f"evaluation, {n} x {c.eval_samples}", n * c.eval_samples,
                                               "samples", n / min(64, n) * median(seconds), flops)]}


# ---- all of it -------------------------------------------------------------------------------------------

def draw(series: dict[str, list[dict]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex="col")
    for (x, points), (above, below) in zip(series.items(), axes.T):
        xs, seconds = [p[x] for p in points], [p["seconds"] for p in points]
        above.loglog(xs, seconds, "o-", label="seconds per GRPO step")
        above.loglog(xs, [seconds[-1] / xs[-1] * at for at in xs], ":", color="0.5", label="proportional")
        below.semilogx(xs, [p["added_mb"] for p in points], "o-", label="peak memory beyond imports, MB")
        below.set(xlabel=x, ylim=(0, None), xticks=xs, xticklabels=xs)
        below.minorticks_off()
        for axis in (above, below):
            axis.grid(alpha=.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def run(c: Config) -> None:
    c = dataclasses.replace(c, **QUICK) if c.quick else c
    check_fields(c)
    require(all((c.sizes, c.threads, c.scale)), "--sizes, --threads and --scale must not be empty")
    started, out, cores = time.perf_counter(), Path(c.out), torch.get_num_threads()
    out.parent.mkdir(parents=True, exist_ok=True)
    cpu = [x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    about = {"cpu": cpu[0], "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2),
             "torch": torch.__version__, "date": datetime.now().isoformat(timespec="minutes")}
    print(", ".join(f"{k} {v}" for k, v in about.items())
          + ("\nWARNING: the machine is busy; the numbers say little about it" if about["load"] > .5 else ""))
    result = {"machine": about, "config": dataclasses.asdict(c), "limits": [], "figures": [], "breakdown": []}
    ways = dict.fromkeys([*((1, n or cores) for n in c.threads), (c.processes or cores, 1)])
    for (processes, threads), size in product(ways, c.sizes):
        where = {"size": size, "processes": processes, "threads": threads}
        limit, *_ = alone(machine, processes, threads, c, size)
        limit = {name: processes * rate for name, rate in limit.items()}
        result["limits"].append(where | limit)
        print(f"\n{size}, {processes} process(es) of {threads} thread(s). Matrix products: "
              f"{limit['own_gflops']:.0f} GFLOP/s at its shapes, "
              f"{limit['matmul_gflops']:.0f} at {c.matrix}³; copying: {limit['copy_gb_per_s']:.1f} GB/s\n"
              f"{'':44s} seconds  GFLOP/s  of limit  peak MB  repeats")
        for workload in (pretraining, pretraining_compiled, learning, plain_update, evaluation):
            done, peak_mb, _ = alone(workload, processes, threads, c, size)
            for what, amount, unit, seconds, flops in done["rows"]:
                gflops = flops / seconds / 1e9
                share = gflops / limit["own_gflops"]
                print(f"  {what:23s}{amount / seconds:8,.0f} {unit + '/s':11s}{seconds:8.2f}{gflops:9.1f}"
                      f"{share:10.0%}{peak_mb:9.0f}{done['repeats']:9d}", flush=True)
                result["figures"].append(where | {
                    "what": what, "amount": amount, "unit": unit, "seconds": seconds,
                    "per_second": amount / seconds, "gflops": gflops, "of_limit": share,
                    "of_big_matmul": gflops / limit["matmul_gflops"], "peak_mb": peak_mb,
                    "repeats": done["repeats"]})
            if "breakdown" in done:
                result["breakdown"].append(where | done["breakdown"])
                print("    " + ", ".join(f"{k} {v:.3f}" for k, v in done["breakdown"].items()))
    threads = max(n or cores for n in c.threads)
    print(f"\na GRPO step of {c.sizes[0]}, threads: {threads}")
    series = result["scaling"] = {"rollouts": [], "answer tokens": []}
    for x, n, new in ([("rollouts", n, c.max_new // 2) for n in c.scale]
                      + [("answer tokens", c.scale[0], new) for new in c.lengths]):
        changed = dataclasses.replace(c, n_problems=n, max_new=new)
        done, peak_mb, added_mb = alone(learning, 1, threads, changed, c.sizes[0])
        _, B, _, seconds, _ = done["rows"][2]
        series[x].append({"rollouts": B, "answer tokens": new, "seconds": seconds, "peak_mb": peak_mb,
                          "added_mb": added_mb})
        print(f"{B:7d} rollouts of {new:3d} tokens{seconds:9.2f} s{1e3 * seconds / B:8.2f} ms per rollout, "
              f"memory +{added_mb:.0f} MB", flush=True)
    draw(series, out.with_name("scaling.png"))
    atomic_write(out, json.dumps(result, indent=1).encode())
    print(f"\nwritten: {out} and scaling.png beside it, {(time.perf_counter() - started) / 60:.1f} min")


if __name__ == "__main__":
    main(run, Config)
