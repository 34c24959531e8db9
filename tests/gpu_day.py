"""What a borrowed GPU has to answer, in one call of at most eight minutes.

    python tests/gpu_day.py                          on a machine with a CUDA GPU
    python tests/gpu_day.py --device cpu             a rehearsal: does every step run? No number counts

Every step is a process with a time limit of its own; one that fails or is too slow says so, and the next one
starts. Each leaves a line in results/gpu/gpu_day.jsonl, from which results/gpu/README.md is made and, of a
GPU, the table in README.md. Random models, whose answers never end, stand for those of larger sizes.
"""
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import model as model_module
import rl
from beyond import memory as planning
from checkpoint import atomic_write, batch_indices, check_fields, generator, load_model, main, require
from data.problems import load_problems
from model import GPT, SIZES, ModelConfig, completion_logprobs, packed, sample
from pretrain import next_token_loss

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"about": 30, "base": 60, "study": 190, "parity": 50, "waits": 30, "bench": 60, "memory": 30,
          "compiling": 30}                       # seconds; 480 in all
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


@dataclass
class Config:
    steps: tuple[str, ...] = tuple(LIMITS)      # which, of all
    device: str = "cuda"            # one of cuda, cpu: the latter is a rehearsal
    runs: str = "runs/gpu"          # where data sets and runs go
    out: str = "results/gpu"        # where gpu_day.jsonl and README.md go
    child: bool = False             # this process is one step


# ---- tools -----------------------------------------------------------------------------------------------
def seconds(work: Callable, *arguments) -> float:
    """Of a call: the best of three after one that warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken = []
    for _ in range(4):
        wait()
        started = time.perf_counter()
        work(*arguments)
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def products(dtype: str) -> None:
    """From now on matrix products in this dtype, whatever the width."""
    model_module.precision = lambda model: torch.autocast(model.device.type, torch.bfloat16,
                                                          enabled=dtype == "bf16")


def run(*argv: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, **more)


def random_model(c: Config, size: str) -> GPT:
    d_model, n_layers, n_heads, d_ff = SIZES[size]
    return GPT(ModelConfig(512, 512, 256, d_model, n_layers, n_heads, d_ff)).to(c.device)


def of_length(answers: int, P: int, G: int = 16) -> tuple[rl.Batch, torch.Tensor]:
    """A batch of P·G answers of this length, each with an advantage."""
    completions = [[2] * answers] * (G * P)
    batch = rl.Batch([[1] * 28] * P, completions, [torch.zeros(answers)] * (G * P), [], [],
                     torch.zeros(P, G), 0., 0.)
    return batch, torch.linspace(-1, 1, G * P)


def trained(c: Config, n_problems: int):
    """(the base model on the CPU, its tokenizer, problems)."""
    model, tokenizer, _ = load_model(f"{c.runs}/base/final.pt")
    known = load_problems(f"{c.runs}/data/train.jsonl", "easy")
    return model, tokenizer, [known[i] for i in batch_indices(len(known), n_problems, 0, 0, "rl")]


def gradient(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


# ---- the steps -------------------------------------------------------------------------------------------
def about(c: Config) -> dict:
    """The card, and what a launch, a wait and a product cost."""
    x = torch.ones(1000, device=c.device)
    small = torch.ones(64)
    gpu = c.device == "cuda"
    figures = {
        "torch": torch.__version__,
        "card": torch.cuda.get_device_name() if gpu else "none: a rehearsal on a CPU",
        "card GiB": torch.cuda.get_device_properties(0).total_memory / 2 ** 30 if gpu else 0.0,
        "launch µs": seconds(lambda: [x.add_(1) for _ in range(2000)]) / 2000 * 1e6,
        "wait µs": seconds(lambda: [x[0].item() for _ in range(500)]) / 500 * 1e6,
        "copy µs": seconds(lambda: [small.to(c.device) for _ in range(500)]) / 500 * 1e6}
    side = 8192 if gpu else 256
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=c.device, dtype=dtype)
        figures[f"{name} TFLOP/s"] = 2 * side ** 3 / seconds(torch.mm, a, a) / 1e12
    return figures


def base(c: Config) -> dict:
    """The data set and a small base model for the steps that follow."""
    tokens = "2M" if c.device == "cuda" else "60k"
    made = run("data/prepare.py", "--out", f"{c.runs}/data", "--math-fraction", "0.6", "--tokens", tokens)
    require(made.returncode == 0, made.stderr[-300:])
    started = time.perf_counter()
    made = run("pretrain.py", "--data", f"{c.runs}/data", "--out", f"{c.runs}/base", "--tokens", tokens,
               "--device", c.device)
    require(made.returncode == 0, made.stderr[-300:])
    last = Path(c.runs, "base", f"{tokens if tokens == '2M' else '0.06M'}.pt")
    last.replace(last.with_name("final.pt"))
    lines = [json.loads(line) for line in Path(c.runs, "base", "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    took = [b["seconds"] - a["seconds"] for a, b in zip(steps, steps[1:])]
    return {"pretraining s": time.perf_counter() - started, "update ms": statistics.median(took) * 1e3,
            "loss": steps[-1]["loss"]}


def study(c: Config) -> dict:
    """The quick study, whole (of a rehearsal: its list of commands)."""
    more = [] if c.device == "cuda" else ["--list"]
    made = run("study.py", "--runs", f"{c.runs}/study", "--out", f"{c.runs}/results", *more)
    took = []
    for log in Path(c.runs, "study").glob("rl-*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines() if "reward" in line]
        took += [b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])]
    return {"status": made.returncode, "GRPO step s": statistics.median(took) if took else None,
            "end": (made.stdout + made.stderr)[-300:]}


def parity(c: Config) -> dict:
    """CPU against the device: the same rollouts, log-probabilities of the sampler and the scorer, gradients,
    three steps of AdamW. The share of equal answers is below 1 where rounding moves a token."""
    cpu, tokenizer, problems = trained(c, 16 if c.device == "cuda" else 2)
    options = rl.Config()
    truth = rl.collect(cpu, tokenizer, problems, 16, options, generator(0, "rollouts"))
    advantage = torch.linspace(-1, 1, len(truth.completions))
    rows = range(len(advantage))

    def found(model: GPT, micro_tokens: int = 0) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        rl.policy_gradient(model, None, truth, advantage, rows, rl.Config(micro_tokens=micro_tokens),
                           tokenizer.pad)
        return gradient(model)

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / a.norm())

    products("fp32")
    expected = found(cpu)
    result = {}
    for dtype in ("fp32", "bf16"):
        products(dtype)
        there = copy.deepcopy(cpu).to(c.device)
        batch = rl.collect(there, tokenizer, problems, 16, options, generator(0, "rollouts"))
        equal = [a == b for a, b in zip(truth.completions, batch.completions)]
        prompts = [batch.prompts[row // 16] for row in rows]
        gaps = torch.zeros(0)
        for numbers, ids, at in packed(prompts, batch.completions, tokenizer.pad, 8192, there.device):
            with torch.no_grad():
                scored = completion_logprobs(there, ids, at).cpu()
            gaps = torch.cat((gaps, scored - rl.recorded(batch, numbers)))
        here = found(there)
        result |= {f"{dtype}: equal answers": sum(equal) / len(equal),
                   f"{dtype}: sampler against scorer, nats": float(gaps.abs().max()),
                   f"{dtype}: gradient's relative error": off(expected, here),
                   f"{dtype}: gradient, run to run": off(here, found(there)),
                   f"{dtype}: gradient, micro-batches of 1,000": off(here, found(there, 1_000))}
    ends = []
    for device in ("cpu", c.device):
        model = copy.deepcopy(cpu).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        parts = expected.split([p.numel() for p in model.parameters()])
        for p, part in zip(model.parameters(), parts):
            p.grad = part.view_as(p).to(device)
        for _ in range(3):
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    result["AdamW, largest difference"] = float((ends[0] - ends[1]).abs().max())
    return result


def waits(c: Config) -> dict:
    """Waits, kernels and busy time of the halves of a GRPO step."""
    model, tokenizer, problems = trained(c, 64 if c.device == "cuda" else 4)
    model.to(c.device)
    options = rl.Config()
    batch = rl.collect(model, tokenizer, problems, 16, options, generator(0, "rollouts"))
    advantage = torch.linspace(-1, 1, len(batch.completions))
    halves = {
        "sampling": lambda: rl.collect(model, tokenizer, problems, 16, options, generator(0, "rollouts")),
        "update": lambda: rl.policy_gradient(model, None, batch, advantage, range(len(advantage)), options,
                                             tokenizer.pad)}
    result = {"longest answer": max(map(len, batch.completions))}
    for name, work in halves.items():
        result[f"{name} s"] = took = seconds(work)
        if c.device == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                work()
                torch.cuda.set_sync_debug_mode("default")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                work()
                torch.cuda.synchronize()
            kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
            result |= {f"{name}: waits": len(caught), f"{name}: kernels": len(kernels),
                       f"{name}: busy": busy / took}
    return result


def bench(c: Config) -> dict:
    """Seconds of sampling 1,024 answers and of an update on them, by size and dtype."""
    gpu = c.device == "cuda"
    P = 64 if gpu else 2
    result = {}
    for size, answers in (("0.5M", 16), ("10M", 32), ("30M", 32), ("124M", 32)) if gpu else (("0.3M", 4),):
        model = random_model(c, size)
        batch, advantage = of_length(answers, P)
        for dtype in ("fp32", "bf16"):
            products(dtype)
            rows = f"{size} {dtype}"
            result[f"{rows}: sampling s"] = seconds(sample, model, batch.prompts, 16, answers, 511, 510,
                                                    generator(0, "rollouts"))
            for micro in (2_048, 16_384):
                options = rl.Config(micro_tokens=micro)
                result[f"{rows}: update s, micro-batches of {micro:,}"] = seconds(
                    rl.policy_gradient, model, None, batch, advantage, range(len(advantage)), options, 510)
        print(json.dumps(result), flush=True)    # what there is, should the time run out
    return result


def memory(c: Config) -> dict:
    """The plan of beyond/memory.py against the memory that PyTorch allocated, GiB; growth step by step."""
    gpu = c.device == "cuda"
    result = {}
    for size in ("10M", "30M", "124M") if gpu else ("0.3M",):
        options = rl.Config(n_problems=64 if gpu else 4)
        model = random_model(c, size)
        reference = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        batch, advantage = of_length(options.max_new if gpu else 4, options.n_problems)
        after = []
        for _ in range(2):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            sample(model, batch.prompts, 16, len(batch.completions[0]), 511, 510, generator(0, "rollouts"))
            rl.policy_gradient(model, reference, batch, advantage, range(len(advantage)), options, 510)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after.append(torch.cuda.memory_allocated() if gpu else 0)
        planned, _ = planning.total(planning.plan(model.config, options, 28))
        peak = torch.cuda.max_memory_allocated() if gpu else 0
        result |= {f"{size}: planned": planned - planning.CUDA_CONTEXT, f"{size}: allocated": peak / 2 ** 30,
                   f"{size}: bytes more after the second step": after[1] - after[0]}
        del model, reference, optimizer
    return result


def compiling(c: Config) -> dict:
    """pretrain.py's forward and backward pass: cost of torch.compile before the first, gain in each."""
    gpu = c.device == "cuda"
    ids = torch.randint(0, 500, (64, 257) if gpu else (1, 17), device=c.device)
    result = {}

    def both(forward: torch.nn.Module) -> None:
        next_token_loss(forward, ids).backward()
    for name in ("eager", "compiled"):
        model = random_model(c, "0.5M" if gpu else "0.3M")
        forward = torch.compile(model) if name == "compiled" else model
        started = time.perf_counter()
        both(forward)
        result[f"{name}: first s"] = time.perf_counter() - started
        result[f"{name}: ms"] = 1e3 * seconds(both, forward)
    return result


# ---- the day ---------------------------------------------------------------------------------------------
def limited(step: str, c: Config) -> dict:
    """Run a step as a process that is killed, with all that it started, when its time is over."""
    argv = [sys.executable, __file__, "--child", "--steps", step, "--device", c.device, "--runs", c.runs,
            "--out", c.out]
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, encoding="utf-8")

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)
    late = threading.Timer(LIMITS[step], kill)
    late.start()
    output, errors = process.communicate()
    late.cancel()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    figures = json.loads(lines[-1]) if lines else {}
    if process.returncode:
        killed = process.returncode == -signal.SIGKILL
        figures["failed"] = f"more than {LIMITS[step]} s" if killed else errors.strip()[-300:]
    return {"step": step, "s": round(time.perf_counter() - started, 1)} | figures


def table(lines: list[dict]) -> str:
    """The figures of all steps as a Markdown table."""
    rows = ["| step | figure | value |", "|---|---|---|"]
    for line in lines:
        for name, value in line.items():
            if name != "step":
                text = f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")
                rows.append(f"| {line['step']} | {name} | {text.replace('|', '/')} |")
    return "\n".join(rows)


def publish(c: Config, lines: list[dict]) -> None:
    """results/gpu/README.md; of a GPU, its name and three figures in README.md too."""
    figures = {line["step"]: line for line in lines}
    card = figures.get("about", {}).get("card", "an unknown card")
    head = f"# A day with a GPU: {card}\n\nMade by `python tests/gpu_day.py --device {c.device}`.\n\n"
    atomic_write(Path(c.out, "README.md"), (head + table(lines) + "\n").encode())
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if c.device == "cuda" and BEGIN in text:
        study, halves = figures.get("study", {}), figures.get("waits", {})
        row = (f"| {card} | {study.get('s', '?')} | {halves.get('sampling s', '?')} "
               f"| {halves.get('update s', '?')} |")
        short = f"| card | quick study, s | sampling 1,024 answers, s | update, s |\n|---|---|---|---|\n{row}"
        before, rest = text.split(BEGIN)
        atomic_write(readme, f"{before}{BEGIN}\n{short}\n{END}{rest.split(END)[1]}".encode())


def day(c: Config) -> None:
    check_fields(c)
    unknown = [step for step in c.steps if step not in LIMITS]
    require(not unknown, f"--steps {','.join(unknown)}: must be of {','.join(LIMITS)}")
    if c.child:
        return print(json.dumps(globals()[c.steps[0]](c)))
    there = c.device == "cpu" or torch.cuda.is_available()
    require(there, "--device cuda: not available; --device cpu is a rehearsal")
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in c.steps:
        lines.append(limited(step, c))
        print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        atomic_write(out / "gpu_day.jsonl", text.encode())
    publish(c, lines)


if __name__ == "__main__":
    main(day, Config)
