"""What a borrowed GPU has to answer, in one call of at most eight minutes.

    python tests/gpu_day.py                          on a machine with a CUDA GPU
    python tests/gpu_day.py --device cpu             a rehearsal: does every step run? No number counts

Every step is a process with a time limit; one that fails or is too slow says so beside the figures that it
found before, and the next one starts. They stand in results/gpu/ and, of a GPU, in README.md's table. Random
models, whose answers never end, stand for those of larger sizes.
"""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.benchmark import Timer

import model as model_module
import rl
from beyond import memory as planning
from checkpoint import atomic_write, batch_indices, check_fields, generator, load_model, main, require
from data.problems import load_problems
from data.tokenizer import Tokenizer
from model import GPT, SIZES, ModelConfig, completion_logprobs, pack, sample
from pretrain import next_token_loss

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"about": 30, "base": 60, "study": 190, "parity": 50, "waits": 30, "bench": 60, "memory": 30,
          "compiled": 30}                        # seconds; 480 in all
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
GROUP = 16                                       # answers to a problem


@dataclass
class Config:
    steps: tuple[str, ...] = (*LIMITS,) # one of about, base, study, parity, waits, bench, memory, compiled:
    device: str = "cuda"            # one of cuda, cpu: the latter is a rehearsal
    runs: str = "runs/gpu"          # where data sets and runs go
    out: str = "results/gpu"        # where gpu_day.jsonl and README.md go
    child: bool = False             # this process is one step

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


# ---- tools -----------------------------------------------------------------------------------------------
def seconds(work: Callable, *arguments: object) -> float:
    """Of a call: the mean of two after two that warm up, until the GPU has done its part."""
    return Timer("work(*arguments)", globals=locals()).timeit(2).mean


def products(dtype: str) -> None:
    """From now on matrix products in this dtype, whatever the width."""
    model_module.precision = lambda model: torch.autocast(model.device.type, torch.bfloat16,
                                                          enabled=dtype == "bf16")


def run(*argv: str) -> None:
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, errors="replace")
    require(done.returncode == 0, done.stderr[-300:])


def of_length(answers: int, n_problems: int) -> rl.Batch:
    rows = n_problems * GROUP
    return rl.Batch([[1] * 28] * n_problems, [[2] * answers] * rows, [torch.zeros(answers)] * rows, [], [],
                    torch.zeros(n_problems, GROUP), 0., 0.)


def trained(c: Config, n_problems: int) -> tuple[GPT, Tokenizer, list[dict]]:
    """The base model on the CPU, its tokenizer, problems."""
    [checkpoint] = Path(c.runs, "base").glob("*M.pt")
    model, tokenizer, _ = load_model(checkpoint)
    known = load_problems(f"{c.runs}/data/train.jsonl", "easy")
    return model, tokenizer, [known[i] for i in batch_indices(len(known), n_problems, 0, 0, "rl")]


def rollouts(model: GPT, tokenizer: Tokenizer, problems: list[dict]) -> rl.Batch:
    return rl.collect(model, tokenizer, problems, GROUP, rl.Config(), generator(0, "rollouts"))


def update(model: GPT, batch: rl.Batch, pad: int = 510, micro_tokens: int = 0) -> None:
    """The gradient of a GRPO step in which every answer has an advantage."""
    model.zero_grad(set_to_none=True)
    advantage = torch.linspace(-1, 1, len(batch.completions))
    options = rl.Config(micro_tokens=micro_tokens)
    rl.policy_gradient(model, None, batch, advantage, range(len(advantage)), options, pad)


# ---- the steps: figures, name -> value, as they are found -------------------------------------------------
def about(c: Config) -> Iterator[dict]:
    """The card, and the cost of a launch, of a wait and of a product."""
    yield {"torch": torch.__version__,
           "card": torch.cuda.get_device_name() if c.gpu else "none: a rehearsal on a CPU",
           "card GiB": torch.cuda.get_device_properties(0).total_memory / 2 ** 30 if c.gpu else 0.0}
    x = torch.ones(1000, device=c.device)
    yield {"launch µs": seconds(lambda: [x.add_(1) for _ in range(1000)]) * 1e3,
           "wait µs": seconds(lambda: [x[0].item() for _ in range(1000)]) * 1e3}
    side = 8192 if c.gpu else 256
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=c.device, dtype=dtype)
        yield {f"{name} TFLOP/s": 2 * side ** 3 / seconds(torch.mm, a, a) / 1e12}


def base(c: Config) -> Iterator[dict]:
    """The data set and a small base model for the steps that follow."""
    tokens = "2M" if c.gpu else "20k"
    run("data/prepare.py", "--out", f"{c.runs}/data", "--tokens", tokens, "--math-fraction", "0.6",
        "--val-tokens", "4k", "--train-problems", "500", "--eval-problems", "20", "--benchmark-items", "20")
    started = time.perf_counter()
    run("pretrain.py", "--data", f"{c.runs}/data", "--out", f"{c.runs}/base", "--tokens", tokens,
        "--checkpoints-at", tokens, "--device", c.device)
    yield {"pretraining s": time.perf_counter() - started}


def study(c: Config) -> Iterator[dict]:
    """The quick study, whole (in a rehearsal: its list of commands)."""
    started = time.perf_counter()
    run("study.py", "--runs", f"{c.runs}/study", "--out", f"{c.runs}/results", *["--list"] * (not c.gpu))
    yield {"quick study s": time.perf_counter() - started}


def parity(c: Config) -> Iterator[dict]:
    """CPU against the device: the same rollouts, log-probabilities of the sampler and the scorer, gradients.
    The share of equal answers is below 1 where rounding moves a token."""
    cpu, tokenizer, problems = trained(c, 16 if c.gpu else 2)
    truth = rollouts(cpu, tokenizer, problems)

    def gradient(model: GPT, micro_tokens: int = 0) -> torch.Tensor:
        update(model, truth, tokenizer.pad, micro_tokens)
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / a.norm())

    expected = gradient(cpu)
    for dtype in ("fp32", "bf16"):
        products(dtype)
        there = trained(c, 1)[0].to(c.device)
        batch = rollouts(there, tokenizer, problems)
        equal = [a == b for a, b in zip(truth.completions, batch.completions)]
        rows = range(len(equal))
        prompts = [batch.prompts[row // GROUP] for row in rows]
        inputs = pack(prompts, batch.completions, tokenizer.pad, there.device)
        gaps = completion_logprobs(there, *inputs).detach().cpu() - rl.sampled_logprobs(batch, rows)
        here = gradient(there)
        yield {f"{dtype}: equal answers": sum(equal) / len(equal),
               f"{dtype}: sampler against scorer, nats": float(gaps.abs().max()),
               f"{dtype}: gradient's relative error": off(expected, here),
               f"{dtype}: gradient, run to run": off(here, gradient(there)),
               f"{dtype}: gradient, micro-batches of 1,000": off(here, gradient(there, 1_000))}


def waits(c: Config) -> Iterator[dict]:
    """Waits, kernels and busy time of the halves of a GRPO step."""
    model, tokenizer, problems = trained(c, 64 if c.gpu else 4)
    model.to(c.device)
    batch = rollouts(model, tokenizer, problems)
    yield {"longest answer": max(map(len, batch.completions))}
    halves = {"sampling": lambda: rollouts(model, tokenizer, problems),
              "update": lambda: update(model, batch, tokenizer.pad)}
    for name, work in halves.items():
        took = seconds(work)
        yield {f"{name} s": took}
        if not c.gpu:
            continue
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
        yield {f"{name}: waits": len(caught), f"{name}: kernels": len(kernels), f"{name}: busy": busy / took}


def bench(c: Config) -> Iterator[dict]:
    """Seconds of sampling 1,024 answers and of an update on them, by size and dtype."""
    for size, answers in (("0.5M", 16), ("10M", 32), ("30M", 32), ("124M", 32)) if c.gpu else (("0.3M", 4),):
        model = GPT(ModelConfig(512, 512, 256, *SIZES[size])).to(c.device)
        batch = of_length(answers, 64 if c.gpu else 2)
        for dtype in ("fp32", "bf16"):
            products(dtype)
            took = seconds(sample, model, batch.prompts, GROUP, answers, 511, 510, generator(0, "rollouts"))
            yield {f"{size} {dtype}: sampling s": took}
            for micro in (2_048, 16_384):
                took = seconds(update, model, batch, 510, micro)
                yield {f"{size} {dtype}: update s, micro-batches of {micro:,}": took}


def memory(c: Config) -> Iterator[dict]:
    """The plan of beyond/memory.py against the memory that PyTorch took, GiB."""
    for size in ("10M", "30M", "124M") if c.gpu else ("0.3M",):
        options = rl.Config(n_problems=64 if c.gpu else 2, reference=False)
        model = GPT(ModelConfig(512, 512, 256, *SIZES[size])).to(c.device)
        planned, _ = planning.total(planning.plan(model.config, options, 28))
        yield {f"{size}: planned": planned - planning.CUDA_CONTEXT}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        batch = of_length(options.max_new, options.n_problems)
        for step in (1, 2):
            sample(model, batch.prompts, GROUP, options.max_new, 511, 510, generator(0, "rollouts"))
            update(model, batch)
            optimizer.step()
            yield {f"{size}: bytes after step {step}": torch.cuda.memory_allocated()}
        yield {f"{size}: allocated": torch.cuda.max_memory_allocated() / 2 ** 30,
               f"{size}: reserved": torch.cuda.max_memory_reserved() / 2 ** 30}


def compiled(c: Config) -> Iterator[dict]:
    """pretrain.py's forward and backward pass: cost of torch.compile before the first, gain in each."""
    ids = torch.randint(0, 500, (64, 257) if c.gpu else (1, 17), device=c.device)

    def both(forward: torch.nn.Module) -> None:
        next_token_loss(forward, ids).backward()

    for name in ("eager", "compiled"):
        model = GPT(ModelConfig()).to(c.device)
        backend = "inductor" if c.gpu else "eager"       # a rehearsal compiles nothing
        forward = torch.compile(model, backend=backend) if name == "compiled" else model
        started = time.perf_counter()
        both(forward)
        yield {f"{name}: first s": time.perf_counter() - started}
        yield {f"{name}: ms": 1e3 * seconds(both, forward)}


# ---- the day ---------------------------------------------------------------------------------------------
def limited(step: str, c: Config) -> dict[str, object]:
    """Run a step as a process that is killed, with all that it started, when its time is over."""
    argv = [sys.executable, __file__, "--child", "--steps", step, "--device", c.device, "--runs", c.runs]
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, encoding="utf-8", errors="replace")
    try:
        output, errors = process.communicate(timeout=LIMITS[step])
    except BaseException as stop:                # the time is over, or Ctrl-C
        if hasattr(os, "killpg"):                # not on Windows
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        output, _ = process.communicate()
        errors = f"more than {LIMITS[step]} s"
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
    result: dict[str, object] = {"step": step, "s": time.perf_counter() - started}
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            result |= json.loads(line)
    return result | ({"failed": errors.strip()[-300:]} if process.returncode else {})


def publish(c: Config, lines: list[dict[str, object]]) -> None:
    """Every figure in results/gpu/; of a GPU, its name and three of them in README.md."""
    text = (f"# A day with a GPU\n\nMade by `python tests/gpu_day.py --device {c.device}`.\n\n"
            "| step | figure | value |\n|---|---|---|\n")
    few = dict.fromkeys(("card", "quick study s", "sampling s", "update s"), "?")
    for line in lines:
        for name, value in list(line.items())[1:]:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown = shown.replace("\n", " ").replace("|", "/")
            text += f"| {line['step']} | {name} | {shown} |\n"
            few |= {name: shown} if name in few else {}
    atomic_write(Path(c.out, "README.md"), text.encode())
    log = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_write(Path(c.out, "gpu_day.jsonl"), log.encode())
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    if c.gpu and begin:
        table = ("| card | quick study, s | sampling 1,024 answers, s | update, s |\n|---|---|---|---|\n"
                 f"| {' | '.join(few.values())} |")
        text = f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"
        atomic_write(readme, text.encode())


def day(c: Config) -> None:
    check_fields(c)
    if c.child:
        for figures in globals()[c.steps[0]](c):
            print(json.dumps(figures), flush=True)
        return
    require(not c.gpu or torch.cuda.is_available(), "--device cuda: none here; --device cpu is a rehearsal")
    Path(c.out).mkdir(parents=True, exist_ok=True)
    lines = []
    for step in c.steps:
        lines.append(limited(step, c))
        print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
        publish(c, lines)


if __name__ == "__main__":
    main(day, Config)
