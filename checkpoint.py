"""Model files, seeds, run folders with exact resume, options: needed by every run, not needed to read one.

A run is resumed bitwise because everything random is a function of (seed, stream, step), and because a
checkpoint remembers how long each log file was: lines logged after it are cut off before the run resumes.
"""
import argparse
import ctypes
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import ranks  # comes before torch: it sets how idle threads wait

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model import GPT, ModelConfig

try:
    import fcntl
except ImportError:      # Windows: runs work, but are not locked
    fcntl = None


class UserError(ValueError):
    """An error that the user can fix: shown as one line, without a traceback."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def printable(text: str) -> str:
    """A text from a file or a model with its control characters, which a terminal would obey, spelled out."""
    return "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)


# ---- randomness ------------------------------------------------------------------------------------------
def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A CPU generator for one stream ('text', 'rollouts', ...) at one step: none disturbs another. PyTorch
    seeds it with 32 bits, so two of n streams coincide with probability n² / 2³³: 0.05 % of 2,000."""
    digest = hashlib.blake2b(f"{seed} {stream} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[-4:], "big"))


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, stream: str, epoch: int) -> list[int]:
    return torch.randperm(n, generator=generator(seed, stream, epoch)).tolist()


def batch_indices(n: int, batch: int, step: int, seed: int, stream: str) -> list[int]:
    """Which of n examples make up batch `step`, without any state; every epoch is a new order of them all."""
    return [permutation(n, seed, stream, i // n)[i % n] for i in range(step * batch, (step + 1) * batch)]


# ---- checkpoints -----------------------------------------------------------------------------------------
FORMAT = "earlybird checkpoint 1"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error names the file, so that the line on the screen does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"not written ({error.strerror})", str(path)) from None


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at every moment the old or the new content is there, whole. Rank 0 writes."""
    if ranks.rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            if os.name == "posix":               # the new name is on disk too
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, model: GPT, tokenizer: Tokenizer, lineage: list[dict], **more: Any) -> None:
    """Everything that is needed to use the model elsewhere. `more` must be plain types and tensors."""
    weights = {name.removeprefix("_orig_mod."): w.detach().cpu().clone()
               for name, w in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "model": weights, "config": asdict(model.config),
                "tokenizer": tokenizer.spec, "lineage": lineage, **more}, buffer)
    atomic_write(Path(path), buffer.getbuffer())         # a view: no second copy in memory


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint on the CPU; never runs code from it. UserError names the file and the fault."""
    require(Path(path).is_file(), f"{path}: no such checkpoint file")
    try:
        with zipfile.ZipFile(path) as z:
            require(z.testzip() is None, "a checksum differs")           # every record's CRC-32
        content = torch.load(path, map_location="cpu", weights_only=True)
        require(content["format"] == FORMAT, f"its format is not {FORMAT!r}")
        require(isinstance(content["lineage"], list), "its lineage is no list")
        for stage in content["lineage"]:         # can be written as JSON, compared and shown
            json.dumps(stage, sort_keys=True)
            "".join([stage["script"], stage.get("parent") or "", *stage.get("merged", ())])     # are texts
            finite = all(math.isfinite(stage[name]) for name in ("tokens", "updates", "flops", "seconds"))
            require(finite and isinstance(stage["config"], dict), "its lineage is not whole")
    except Exception as error:                   # zipfile and torch raise a dozen types for foreign files
        fault = error if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path}: damaged or not a checkpoint of this project ({fault})") from None
    return content


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, list[dict]]:
    """(model, tokenizer, lineage). UserError if they do not fit together or a weight is not finite."""
    require(path != "", "--init is missing: give the checkpoint to start from")
    content = load_checkpoint(path)
    try:
        config = ModelConfig(**content["config"])
        require(config.d_model % (2 * config.n_heads) == 0, "n_heads does not divide d_model")
        require(config.n_heads % config.n_kv_heads == 0, "n_kv_heads does not divide n_heads")
        model = GPT(config)
        model.load_state_dict(content["model"])
        for name, weight in model.state_dict().items():
            require(bool(weight.isfinite().all()), f"{name} has values that are not finite")
        tokenizer = Tokenizer(content["tokenizer"])
        require(tokenizer.n_vocab == config.n_vocab, "the tokenizer has another vocabulary than the model")
    except Exception as error:                   # anything a foreign checkpoint may raise above
        raise UserError(f"{path}: {str(error)[:200]} (its parts must fit together)") from None
    return model.to(device), tokenizer, content["lineage"]


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):          # shards and raw text may be larger than the memory
            digest.update(block)
    return digest.hexdigest()


# ---- a run folder ----------------------------------------------------------------------------------------
SHOWN = ("loss", "sft_loss", "reward", "signal", "entropy", "kl",        # the numbers that the bar shows
         "val_general", "val_arithmetic", "val_pass@1")
HERE = ("device", "threads", "out")              # options that do not change the result


class Run(ExitStack):
    """A run folder and its books: config.json, log.jsonl (a line per step), samples.txt, last.pt to resume
    from, `final` at the end. Use: `with Run(c, steps, lineage of --init, data) as run:`, run.restore, for
    every update run.usable, count, log_step and end_step, and run.finish.

    `data` is all that the run learns from, --init aside: file or folder -> sha256. After Ctrl-C or SIGTERM
    end_step saves and stops; a second Ctrl-C stops at once. Of several ranks, the first one writes. The end
    of `with` unlocks the folder and gives the signal handlers back. UserError if another process works in the
    folder, if it holds a run of another configuration, or if --init or the data have changed."""

    def __init__(self, config: Any, steps: int, parents: list[dict], data: dict[str, Any],
                 final: str = "final.pt"):
        super().__init__()
        self.out = Path(config.out)
        self.final = self.out / final
        self.steps = steps
        self.parents = parents
        self.script = Path(inspect.getfile(type(config))).name
        self.config = json.loads(json.dumps(asdict(config)))             # tuples become lists, as in the file
        self.start = self.data = data
        if config.init:
            self.start = {config.init: file_sha256(config.init)} | data
        if self.script != "pretrain.py":         # which counts in tokens
            late = [step for step in config.checkpoints_at if step > steps]
            require(not late, f"--checkpoints-at {late}: not within the run's {steps} steps")
        self.shown = {}                          # name -> the last such number, as text
        self.signals = set()                     # received so far
        self.bad_in_a_row = Counter()            # optimizer -> gradients that are not finite
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:               # unlocks the folder if anything fails before pop_all
            self._open(stack)
            self.enter_context(stack.pop_all())

    def _open(self, stack: ExitStack) -> None:
        """Lock the folder, compare it with this run, listen to signals."""
        if fcntl and ranks.rank() == 0:
            lock = stack.enter_context(open(self.out / ".lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.out}: another process works in it; choose another --out") from None
        self._load()
        self.counts = self.last["counts"]
        self.sizes = self.last["bytes"]
        self.skipped = self.last["skipped"][0]   # updates left out because of a gradient that is not finite
        for litter in (*self.out.glob(".*.pt.*"), *self.out.glob(".config.json.*")):
            with suppress(FileNotFoundError):    # a kill during a write left it behind, if it is old
                if ranks.rank() == 0 and litter.stat().st_mtime < time.time() - 3600:
                    litter.unlink()
        atomic_write(self.out / "config.json", json.dumps(self.config, indent=1).encode())
        for sign in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):           # not in the main thread: the caller listens
                stack.callback(signal.signal, sign, signal.signal(sign, self._interrupt))

    def _load(self) -> None:
        """Read last.pt, if there is one. UserError unless the folder is empty or holds this very run."""
        counts = {"tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}
        new = {"step": 0, "done": False, "start": self.start, "counts": counts, "optimizers": [],
               "skipped": [0], "bytes": {"log.jsonl": 0, "samples.txt": 0}}
        last = self.out / "last.pt"
        self.last = load_checkpoint(last) if last.exists() else new
        path = self.out / "config.json"
        try:
            there = dict(json.loads(path.read_bytes())) if path.exists() else self.config
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: damaged; choose another --out") from None
        changed = [f"{k}: {there.get(k)!r} there, {v!r} asked" for k, v in self.config.items()
                   if k not in HERE and there.get(k) != v]
        require(not changed, f"{path}: another configuration ({'; '.join(changed)}); choose another --out")
        require(new.keys() <= self.last.keys(), f"{last}: not the state of a run; choose another --out")
        steps = ranks.gather([self.last["step"]])
        require(len(set(steps)) == 1, f"{self.out}: not one folder for all processes (steps {steps})")
        for name, digest in self.start.items():  # of what the state knows: an older one knows --init only
            require(self.last["start"].get(name, digest) == digest,
                    f"{name}: changed since the run in {self.out} started from it; choose another --out")

    def _interrupt(self, sign: int, frame: Any) -> None:
        if sign in self.signals:                 # torchrun forwards Ctrl-C as SIGTERM: not a second request
            raise KeyboardInterrupt
        self.signals.add(sign)
        print("\nstopping after this step (once more: stop at once)", file=sys.stderr)

    def finished(self) -> bool:
        """True if an earlier call completed this run; prints whether it is finished or resumed."""
        if self.last["done"] and self.final.exists():
            print(f"{self.out}: finished already; the result is {self.final}")
            return True
        if self.last["step"]:
            print(f"{self.out}: resuming after step {self.last['step']} of {self.steps}")
        return False

    def restore(self, model: GPT, *optimizers: Optimizer) -> int:
        """Put the last saved state into model and optimizers; returns its step, 0 in a new run."""
        for name, size in self.sizes.items():
            if ranks.rank() == 0:
                with writing(self.out / name), open(self.out / name, "ab") as f:
                    f.truncate(size)             # cut off the lines logged after it
        last, self.last = self.last, {}          # which holds weights and moments: free them
        step = self.step = last["step"]
        if step:
            model.load_state_dict(last["model"])
            for optimizer, state, n in zip(optimizers, last["optimizers"], last["skipped"][1:], strict=True):
                optimizer.load_state_dict(state)
                self.bad_in_a_row[optimizer] = n
        bar = tqdm(total=self.steps, initial=step, unit="step", desc=Path(self.script).stem)
        self.bar = self.enter_context(bar)
        return step

    def usable(self, norm: float, optimizer: Optimizer) -> bool:
        """Whether a norm is finite; counts updates. UserError at an optimizer's third bad norm in a row."""
        if math.isfinite(norm):
            self.counts["updates"] += 1
            self.bad_in_a_row[optimizer] = 0
            return True
        self.skipped += 1
        self.bad_in_a_row[optimizer] += 1
        print(f"\n{self.out}: gradient not finite, update skipped ({self.skipped} so far)", file=sys.stderr)
        require(self.bad_in_a_row[optimizer] < 3, f"{self.out}: three gradients in a row were not finite; "
                "last.pt has the last good state. Lower --lr, or look into the data")
        return False

    def count(self, **amounts: float) -> None:
        """Add to the run's totals: tokens, flops, seconds (updates are counted by `usable`)."""
        for name, amount in amounts.items():
            self.counts[name] += amount

    def log(self, step: int, **metrics: float) -> None:
        """Append a line to log.jsonl and show it in the bar; JSON has no NaN and no infinity, but null."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        self.write(json.dumps({"step": step} | metrics | dict.fromkeys(bad)), "log.jsonl")
        self.shown |= {name: f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics}
        self.bar.set_postfix_str(" ".join(self.shown.values()), refresh=False)

    def log_step(self, step: int, **metrics: float) -> None:
        """`log` for a training step: with the number of skipped updates and the totals so far."""
        totals = {name: round(total, 3) for name, total in self.counts.items()}
        self.log(step, **metrics, skipped=self.skipped, **totals)

    def write(self, text: str, name: str = "samples.txt") -> None:
        """Append to a file of the run; samples.txt is for people to read."""
        if ranks.rank() == 0:
            with writing(self.out / name), open(self.out / name, "ab") as f:
                f.write((printable(text) + "\n").encode())

    def lineage(self) -> list[dict]:
        """The parents and this stage: script, options, totals, sha256 of --init and of the data."""
        return [*self.parents, {"script": self.script, "config": self.config, **self.counts,
                                "parent": self.start.get(self.config.get("init")), "data": self.data}]

    def keep(self, name: str, model: GPT, tokenizer: Tokenizer) -> None:
        """Write a checkpoint of this moment into the folder."""
        save_checkpoint(self.out / name, model, tokenizer, self.lineage())

    def _save_last(self, step: int, model: GPT, tokenizer: Tokenizer, *optimizers: Optimizer,
                   done: bool = False) -> None:
        """The one file to resume from; log files (if `done`: the final checkpoint too) are on disk before."""
        for name in self.sizes:
            with writing(self.out / name), open(self.out / name, "ab") as f:
                os.fsync(f.fileno())
                if not done:
                    self.sizes[name] = f.tell()
        skipped = [self.skipped, *(self.bad_in_a_row[optimizer] for optimizer in optimizers)]
        save_checkpoint(self.out / "last.pt", model, tokenizer, self.lineage(), step=step,
                        optimizers=[optimizer.state_dict() for optimizer in optimizers], done=done,
                        bytes=self.sizes, skipped=skipped, start=self.start, counts=self.counts)

    def end_step(self, step: int, model: GPT, tokenizer: Tokenizer, *optimizers: Optimizer) -> None:
        """Move the bar; save last.pt if it is due; after a signal to any rank, save and stop."""
        interrupted = any(ranks.gather([bool(self.signals)]))
        before, self.step = self.step, step
        self.bar.update(step - before)
        every = self.config["save_every"]
        due = step // every > before // every
        if due or step == self.steps or interrupted:
            self._save_last(step, model, tokenizer, *optimizers)
        if interrupted and step < self.steps:
            print(f"saved; run the same command again to resume (--out {self.out})")
            raise KeyboardInterrupt

    def finish(self, model: GPT, tokenizer: Tokenizer, *optimizers: Optimizer, then: str = "") -> Path:
        """Write the final checkpoint, close the books, print a summary and the command to continue with."""
        self.bar.close()
        self.keep(self.final.name, model, tokenizer)
        self._save_last(self.steps, model, tokenizer, *optimizers, done=True)
        shown = "".join(f", {text}" for text in self.shown.values())
        print(f"{self.final}: {self.counts['updates']} updates, {self.counts['tokens']:,} tokens, "
              f"{self.counts['seconds'] / 60:.1f} min{shown}\nnext: {then}")
        return self.final


# ---- options ---------------------------------------------------------------------------------------------
def number(text: str) -> int:
    """An integer as people write it: 8000000, 8_000_000, 8e6, 8M, 500k."""
    match = re.fullmatch(r"(-?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kKMG]?)", text, re.ASCII)
    zeros = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9}
    value = Fraction(match[1].replace("_", "")) * 10 ** zeros[match[2]] if match else Fraction(1, 2)
    if value.denominator != 1 or abs(value) >= 2 ** 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (such as 8000000, 8e6 or 8M)")
    return int(value)


COMPARE = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}
# field -> its option's former name, in commands that were published, and how that is read
FORMER = {"n_train": ("--questions", {"type": number}), "problem_file": ("--problems", {}),
          "decay": ("--no-decay", {"action": "store_const", "const": 0.0})}


@functools.cache
def help_texts(cls: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    return dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(cls), re.MULTILINE))


def within(domain: str, value: Any) -> bool:
    """Whether a value lies in a domain such as '> 0', '>= 0, <= 1' or 'one of easy, hard, all'."""
    if domain.startswith("one of "):
        return value in domain.removeprefix("one of ").split(", ")
    bounds = re.findall("([<>]=?) ([-0-9.]+)", domain)
    return all(math.isfinite(value) and COMPARE[sign](float(value), float(bound)) for sign, bound in bounds)


def check_fields(config: Any) -> None:
    """UserError unless every field of a Config has its type and lies in the domain with which its comment
    begins, before a colon: `lr: float = 3e-4  # > 0: of AdamW`. Of a tuple, every element."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        option = f"--{name.replace('_', '-')}"
        kind = (*get_args(hint), hint)[0]        # of a tuple: that of its elements
        values = [value] if kind is hint else value
        require(isinstance(values, (tuple, list)), f"{option} {value}: must be a tuple")
        text = help_texts(type(config)).get(name, "")
        domain = re.match("((?:one of|[<>]).*?):|", text)[1] or ""
        for x in values:
            fits = isinstance(x, (int, float) if kind is float else kind)
            right = fits and isinstance(x, bool) == (kind is bool)
            require(right, f"{option} {x}: must be of type {kind.__name__}")
            require(within(domain, x), f"{option} {x}: must be {domain}")


def reader(hint: Any) -> Callable:
    """From the text of an option to its value. A tuple is written with commas."""
    kind = (*get_args(hint), hint)[0]
    one = number if kind is int else kind
    return one if kind is hint else lambda text: tuple(one(x) for x in text.split(",") if x)


def parse(cls: type, argv: list[str] | None = None) -> Any:
    """The command line of a Config: field `lr` is option `--lr`, the comment on its line is the help text,
    and fields without a default are positional (one or more values)."""
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, f"{message} (--help explains the options)")
    hints = get_type_hints(cls)
    for f in fields(cls):
        names = ["-o"] * (f.name == "out") + ["--" + f.name.replace("_", "-")]
        text = help_texts(cls).get(f.name, "").replace("%", "%%")
        if f.default is MISSING:
            parser.add_argument(f.name, nargs="+", help=text)
        elif hints[f.name] is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
            parser.add_argument(*names, type=reader(hints[f.name]), default=f.default, metavar="X",
                                help=f"{text} (default: {shown or 'none'})")
    for name in FORMER.keys() & hints.keys():
        option, how = FORMER[name]
        parser.add_argument(option, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def main(function: Callable, cls: type) -> None:
    """Run function(config) from the command line. An error that the user can fix is one line, status 2."""
    try:
        return function(parse(cls))
    except (UserError, OSError) as error:
        named = getattr(error, "filename", None)
        text = f"{named}: {error.strerror}" if named else str(error)
        line = printable(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}")
        status = 2
    except KeyboardInterrupt:
        line = "interrupted"
        status = 130
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()                              # so that the line is one of its own
    print(line, file=sys.stderr)
    sys.exit(status)


def setup(device: str, threads: int, compile: str = "auto") -> torch.device:
    """Choose the device and the number of threads (0: all cores); keep big memory blocks in the process.
    UserError if there is no such device, or torch.compile is asked for (on) and fails on it."""
    if threads:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        # it hands every big temporary back to the system, and fresh pages are ten times slower to write:
        # keep the memory (mallopt), in pages of 2 MB (read by PyTorch before its first tensor, never later)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        for option, value in ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 30)):   # M_TRIM_THRESHOLD, TOP_PAD, ...
            ctypes.CDLL(None).mallopt(option, value)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":                         # of several, each rank takes its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.empty(1, device=device)
        found.item()                             # the meta device, for one, has no values
        if found.is_cuda:
            torch.cuda.set_device(found.device)
            if share := os.environ.get("EARLYBIRD_GPU_SHARE"):           # study.py has others on this GPU
                torch.cuda.set_per_process_memory_fraction(float(share))
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise UserError(f"--device {device}: not available ({str(error).splitlines()[0]})") from None
    if compile == "on":
        fault = compiler_fault(found.device)
        require(not fault, f"--compile on: torch.compile fails here ({fault}); leave the option out")
    ranks.join()
    return found.device


# ---- torch.compile ---------------------------------------------------------------------------------------
COMPILING = 40                      # seconds that a code takes before the first step (0.5M, two cores)


def compile_if_it_pays(model: GPT, choice: str, flops: float, gain: float, codes: int = 1) -> None:
    """Set model.compiled: always if `choice` is on, never if it is off; if it is auto, on a CPU where the
    share `gain` (measured: results/benchmark) of the time of so many FLOPs is twice what the codes cost. One
    line says so; where no compiler works, auto stays silent. By the whole run: when resumed, as at first."""
    seconds = flops / 50e9                       # at the speed of two common cores
    cost = codes * COMPILING
    on_cpu = model.device.type == "cpu"
    if choice == "off" or choice == "auto" and not on_cpu:
        return
    if choice == "on":
        model.compiled = True
        tqdm.write(f"torch.compile: takes about {cost} s before the first step")
    elif gain * seconds < 2 * cost:
        tqdm.write(f"about {seconds:.0f} s of training: too few for torch.compile (--compile on)")
    elif not compiler_fault(model.device):
        model.compiled = True
        tqdm.write(f"about {seconds:.0f} s of training, {gain:.0%} less with torch.compile, which takes "
                   f"about {cost} s first (--compile off)")


def compiler_fault(device: torch.device) -> str:
    """Why torch.compile fails on this device, in a line; empty where it works."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:                   # of a dozen types, as compilers fail
        first_line = f"{error}".strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line[:120]}"
    return ""
