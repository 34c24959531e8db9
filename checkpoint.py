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
import re
import signal
import sys
import typing
import zipfile
from dataclasses import MISSING, asdict, fields
from fractions import Fraction
from pathlib import Path

import ranks  # before torch, whose idle threads wait as it says

import torch
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model import GPT, ModelConfig

try:
    import fcntl
except ImportError:      # Windows: runs work, but are not locked
    fcntl = None

FORMAT = "earlybird checkpoint 1"


class UserError(ValueError):
    """An error that the user can fix: shown as one line, without a traceback."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# ---- randomness ------------------------------------------------------------------------------------------

def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A CPU generator for one stream ('data', 'rollouts', ...) at one step: none disturbs another."""
    digest = hashlib.blake2b(f"{seed} {stream} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, stream: str, epoch: int) -> list[int]:
    return torch.randperm(n, generator=generator(seed, stream, epoch)).tolist()


def batch_indices(n: int, batch: int, step: int, seed: int, stream: str) -> list[int]:
    """Which of n examples make up batch `step`, without any state; every epoch is a new order of them all."""
    return [permutation(n, seed, stream, i // n)[i % n] for i in range(step * batch, (step + 1) * batch)]


# ---- checkpoints -----------------------------------------------------------------------------------------

def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at every moment either the old or the new content is there, whole. Of several
    ranks, the first one writes."""
    if ranks.rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":                   # the new name is on disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)           # so that the line on the screen names it
        raise


def save_checkpoint(path: Path, model: GPT, tokenizer: Tokenizer, lineage: list[dict],
                    **more: typing.Any) -> None:
    """Everything that is needed to use the model elsewhere. `more` must be plain types and tensors."""
    weights = {name.removeprefix("_orig_mod."): w.detach().cpu().clone()
               for name, w in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "model": weights, "config": asdict(model.config),
                "tokenizer": tokenizer.spec, "lineage": lineage, **more}, buffer)
    atomic_write(Path(path), buffer.getbuffer())         # a view: no second copy in memory


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint on the CPU; never runs code from it. UserError names the file and what is wrong."""
    require(Path(path).is_file(), f"{path}: no such checkpoint file")
    try:
        with zipfile.ZipFile(path) as z:
            damaged = z.testzip()                # compares every record with its CRC-32
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                   # zipfile and torch raise a dozen types for foreign files
        raise UserError(f"{path}: not a checkpoint, or a truncated one ({type(error).__name__})") from None
    require(not damaged, f"{path}: damaged (checksum of {damaged} does not match); restore it from a copy")
    require(isinstance(content, dict) and content.get("format") == FORMAT,
            f"{path}: a PyTorch file, but not a checkpoint of this project (no format {FORMAT!r})")
    stages = content.get("lineage")
    known = {"script", "config", "tokens", "updates", "flops", "seconds"}
    require(isinstance(stages, list) and all(isinstance(s, dict) and known <= s.keys() for s in stages),
            f"{path}: its lineage is missing or damaged")
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
        tokenizer = Tokenizer(content["tokenizer"])
        require(tokenizer.n_vocab == model.config.n_vocab,
                "the tokenizer has another vocabulary than the model")
    except Exception as error:                   # anything a foreign checkpoint may raise above
        raise UserError(f"{path}: weights, model config and tokenizer do not fit together "
                        f"({str(error)[:200]})") from None
    for name, weight in content["model"].items():
        require(bool(weight.isfinite().all()), f"{path}: {name} has values that are not finite")
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


class Run:
    """A run folder and its books: config.json, log.jsonl (a line per step), samples.txt, last.pt to resume
    from, `final` at the end.

        with Run(c, steps, parents) as run:      parents: lineage of the checkpoint that the run starts from
            if run.finished(): ...
            step = run.restore(model, optimizer)
            while True:
                ...                              one update, and step += 1
                run.count(tokens=..., seconds=...)
                run.log(step=step, loss=...)
                run.end_step(step, model, tokenizer, optimizer)
            return run.finish(model, tokenizer, optimizer)

    `start` is what the run begins from (file or folder -> sha256; without it, --init). After Ctrl-C or
    SIGTERM end_step saves and stops; a second Ctrl-C stops at once. Of several ranks, the first one writes.
    UserError if another process works in the folder, if it holds a run of another configuration, or if what
    it began from has changed."""

    def __init__(self, config: typing.Any, steps: int, parents: list[dict], final: str = "final.pt",
                 start: dict[str, typing.Any] | None = None):
        self.out = Path(config.out)
        self.final = self.out / final
        self.steps = steps
        self.parents = parents
        self.save_every = config.save_every
        self.script = Path(inspect.getfile(type(config))).name
        self.config = json.loads(json.dumps(asdict(config)))             # tuples become lists, as in the file
        if start is None:
            start = {config.init: file_sha256(config.init)}
            late = [step for step in config.checkpoints_at if step > steps]
            require(not late, f"--checkpoints-at {late}: not within the run's {steps} steps")
        self.start = start
        self.counts = {"tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}
        self.skipped = 0                         # updates left out because of a gradient that is not finite
        self.bad_in_a_row: dict[int, int] = {}   # id of an optimizer -> how many
        self.shown: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.files: dict[str, typing.BinaryIO] = {}
        self.sizes = {"log.jsonl": 0, "samples.txt": 0}
        self.signals: set[int] = set()
        self.handlers: dict[int, typing.Any] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(os.devnull if ranks.rank() else self.out / ".lock", "w")
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise

    def _open(self) -> None:
        """Lock the folder, compare it with this run, open its files, listen to signals."""
        try:
            if fcntl and ranks.rank() == 0:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.out}: another process is working in this run folder; wait for it, "
                            "or choose another --out") from None
        last = self.out / "last.pt"
        self.last = load_checkpoint(last) if last.exists() else None     # None: a new run
        self._compare()
        if self.last:
            self.counts = self.last["counts"]
            self.skipped = self.last["skipped"][0]
            self.sizes = self.last["bytes"]
        if ranks.rank() == 0:
            for litter in (*self.out.glob(".*.pt.*"), *self.out.glob(".config.json.*")):
                litter.unlink()                  # temporary files that a kill during a write left behind
            self.files = {name: open(self.out / name, "ab", buffering=0) for name in self.sizes}
        atomic_write(self.out / "config.json", json.dumps(self.config, indent=1).encode())
        for sign in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[sign] = signal.signal(sign, self._interrupt)
            except ValueError:                   # not the main thread: the caller handles signals
                break

    def _compare(self) -> None:
        """UserError unless the folder is empty or holds this very run."""
        path = self.out / "config.json"
        try:
            there = dict(json.loads(path.read_text())) if path.exists() else self.config
        except (ValueError, TypeError):
            raise UserError(f"{path}: damaged; choose another --out") from None
        different = [f"{k}={there.get(k)} there, {v} asked" for k, v in self.config.items()
                     if k not in HERE and there.get(k) != v]
        require(not different, f"{path}: this folder holds a run with another configuration "
                               f"({'; '.join(different)}); choose another --out")
        state = {"step", "done", "bytes", "skipped", "start", "optimizers", "counts"}
        require(not self.last or state <= self.last.keys(),
                f"{self.out / 'last.pt'}: a checkpoint, but not the state of a run; choose another --out")
        steps = ranks.gather([self.last["step"] if self.last else 0])
        require(len(set(steps)) == 1, f"{self.out}: the processes see different states (steps {steps}); they "
                                      "need one folder on a disk that they share")
        if self.last:
            for name, digest in self.start.items():
                require(self.last["start"].get(name) == digest,
                        f"{name}: changed since the run in {self.out} started from it; choose another --out")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        """Unlock the folder and give the signal handlers back, however the run ends."""
        if self.bar is not None:
            self.bar.close()
        for f in (*self.files.values(), self.lock):
            f.close()
        for sign, handler in self.handlers.items():
            signal.signal(sign, handler)

    def _interrupt(self, sign: int, frame: typing.Any) -> None:
        if sign in self.signals:                 # torchrun forwards Ctrl-C as SIGTERM: not a second request
            raise KeyboardInterrupt
        self.signals.add(sign)
        print("\nstopping after this step (once more: stop at once)", file=sys.stderr)

    def finished(self) -> bool:
        """True if an earlier call completed this run; prints whether it is finished or resumed."""
        if self.last is not None and self.last["done"] and self.final.exists():
            print(f"{self.out}: finished already; the result is {self.final}")
            return True
        if self.last:
            print(f"{self.out}: resuming after step {self.last['step']} of {self.steps}")
        return False

    def restore(self, model: GPT, *optimizers: torch.optim.Optimizer) -> int:
        """Put the last saved state into model and optimizers; returns its step, 0 in a new run."""
        for name, f in self.files.items():       # cut off what was logged after it
            f.truncate(self.sizes[name])
            f.seek(0, os.SEEK_END)
        if self.last:
            model.load_state_dict(self.last["model"])
            bad = self.last["skipped"][1:]
            for optimizer, state, n in zip(optimizers, self.last["optimizers"], bad, strict=True):
                optimizer.load_state_dict(state)
                self.bad_in_a_row[id(optimizer)] = n
        step = self.last["step"] if self.last else 0
        self.bar = tqdm(total=self.steps, initial=step, unit="step", desc=Path(self.script).stem)
        return step

    def usable(self, norm: float, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a gradient of this norm may be used: not if it is not finite. Three such gradients of an
        optimizer in a row raise UserError, the last saved state being whole. Counts updates."""
        if math.isfinite(norm):
            self.counts["updates"] += 1
            self.bad_in_a_row[id(optimizer)] = 0
            return True
        self.skipped += 1
        bad = self.bad_in_a_row.get(id(optimizer), 0) + 1
        self.bad_in_a_row[id(optimizer)] = bad
        print(f"\n{self.out}: gradient is not finite, update skipped ({self.skipped} so far)",
              file=sys.stderr)
        require(bad < 3, f"{self.out}: three gradients in a row were not finite; last.pt has "
                         "the last good state. Lower --lr, or look into the data")
        return False

    def count(self, **amounts: float) -> None:
        """Add to the run's totals: tokens, flops, seconds (updates are counted by `usable`)."""
        for name, amount in amounts.items():
            self.counts[name] += amount

    def log(self, step: int, **metrics: float) -> None:
        """Append a line to log.jsonl and show it in the bar; a number that is not finite becomes null, as
        JSON has no NaN."""
        bad = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        self._append("log.jsonl", json.dumps({"step": step} | metrics | dict.fromkeys(bad)))
        self.shown |= {name: metrics[name] for name in SHOWN if name in metrics}
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in self.shown.items()), refresh=False)

    def log_step(self, step: int, **metrics: float) -> None:
        """`log` for a training step: with the number of skipped updates and the totals so far."""
        totals = {name: round(total, 3) for name, total in self.counts.items()}
        self.log(step, **metrics, skipped=self.skipped, **totals)

    def write(self, text: str) -> None:
        """Append to samples.txt, for people to read."""
        self._append("samples.txt", text)

    def _append(self, name: str, text: str) -> None:
        if ranks.rank():
            return
        try:
            self.files[name].write((text + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.out / name}: not written ({error.strerror}); last.pt is whole") from None

    def lineage(self) -> list[dict]:
        """The parents and this stage: script, options, the sha256 of what it started from (--init or --data)
        and the totals so far (tokens, updates, FLOPs, seconds)."""
        stage = {"script": self.script, "config": self.config, **self.counts}
        stage["parent"] = self.start.get(self.config.get("init"))
        if "init" not in self.config:
            stage["data"] = self.start[self.config["data"]]
        return [*self.parents, stage]

    def keep(self, name: str, model: GPT, tokenizer: Tokenizer) -> None:
        """Write a checkpoint of this moment into the folder."""
        save_checkpoint(self.out / name, model, tokenizer, self.lineage())

    def _save_last(self, step: int, model: GPT, tokenizer: Tokenizer, optimizers: tuple,
                   done: bool = False) -> None:
        """The one file to resume from; log files (if `done`: the final checkpoint too) are on disk before."""
        for name, f in self.files.items():
            try:
                os.fsync(f.fileno())
            except OSError as error:
                raise UserError(f"{self.out / name}: not written ({error.strerror})") from None
        if not done:
            self.sizes = {name: f.tell() for name, f in self.files.items()}
        skipped = [self.skipped, *(self.bad_in_a_row.get(id(o), 0) for o in optimizers)]
        save_checkpoint(self.out / "last.pt", model, tokenizer, self.lineage(), step=step,
                        optimizers=[optimizer.state_dict() for optimizer in optimizers], done=done,
                        bytes=self.sizes, skipped=skipped, start=self.start, counts=self.counts)

    def end_step(self, step: int, model: GPT, tokenizer: Tokenizer,
                 *optimizers: torch.optim.Optimizer) -> None:
        """Move the bar; save last.pt if it is due; after a signal to any rank, save and stop."""
        interrupted = any(ranks.gather([bool(self.signals)]))
        before = self.bar.n
        self.bar.update(step - before)
        due = step // self.save_every > before // self.save_every
        if due or step == self.steps or interrupted:
            self._save_last(step, model, tokenizer, optimizers)
        if interrupted and step < self.steps:
            print(f"saved; run the same command again to resume (--out {self.out})")
            raise KeyboardInterrupt

    def finish(self, model: GPT, tokenizer: Tokenizer, *optimizers: torch.optim.Optimizer,
               then: str = "") -> Path:
        """Write the final checkpoint, close the books, print a summary and the command to continue with."""
        self.bar.close()
        self.keep(self.final.name, model, tokenizer)
        self._save_last(self.steps, model, tokenizer, optimizers, done=True)
        shown = "".join(f", {name} {value:.3f}" for name, value in self.shown.items())
        print(f"{self.final}: {self.counts['updates']} updates, {self.counts['tokens']:,} tokens, "
              f"{self.counts['seconds'] / 60:.1f} min{shown}\nnext: {then}")
        return self.final


# ---- options ---------------------------------------------------------------------------------------------

# former names of options, in commands that were published
FORMER = {"n_train": "--questions", "problem_file": "--problems"}


def number(text: str) -> int:
    """An integer as people write it: 8000000, 8_000_000, 8e6, 8M, 500k."""
    match = re.fullmatch(r"(-?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kKMG]?)", text, re.ASCII)
    scale = {"": 1, "k": 10 ** 3, "K": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9}
    value = Fraction(match[1].replace("_", "")) * scale[match[2]] if match else Fraction(1, 2)
    if value.denominator != 1 or abs(value) >= 2 ** 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (such as 8000000, 8e6 or 8M)")
    return int(value)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help explains the options)")


@functools.cache
def help_texts(cls: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    return dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(cls), re.MULTILINE))


COMPARE = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}


def within(domain: str, value: typing.Any) -> bool:
    """Whether a value lies in a domain such as '> 0', '>= 0, <= 1' or 'one of easy, hard, all'."""
    if domain.startswith("one of "):
        return value in domain.removeprefix("one of ").split(", ")
    bounds = re.findall(r"([<>]=?) (-?[0-9.]+)", domain)
    return math.isfinite(value) and all(COMPARE[sign](float(value), float(bound)) for sign, bound in bounds)


def check_fields(config: typing.Any) -> None:
    """UserError unless every field of a Config has its type and lies in the domain with which its comment
    begins, before a colon: `lr: float = 3e-4  # > 0: of AdamW`. Of a tuple, every element."""
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        many = typing.get_origin(hints[f.name]) is tuple
        kind = typing.get_args(hints[f.name])[0] if many else hints[f.name]
        allowed = (int, float) if kind is float else kind
        domain = re.match(r"((?:[<>]=? -?[0-9.]+(?:, )?)+|one of [^:]+):", help_texts(type(config))[f.name])
        option = f"--{f.name.replace('_', '-')}"
        require(not many or isinstance(value, (tuple, list)), f"{option} {value}: must be a tuple")
        for x in value if many else [value]:
            right = isinstance(x, allowed) and isinstance(x, bool) == (kind is bool)
            require(right, f"{option} {x}: must be of type {kind.__name__}")
            require(domain is None or within(domain[1], x), f"{option} {x}: must be {domain and domain[1]}")


def parse(cls: type, argv: list[str] | None = None) -> typing.Any:
    """The command line of a Config: field `lr` is option `--lr`, the comment on its line is the help text,
    and fields without a default are positional (one or more values). A tuple is written with commas."""
    automatic = cls.__doc__.startswith(f"{cls.__name__}(")               # the docstring that @dataclass makes
    description = sys.modules[cls.__module__].__doc__ if automatic else cls.__doc__
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        name = "--" + f.name.replace("_", "-")
        text = help_texts(cls).get(f.name, "").replace("%", "%%")
        kind = hints[f.name]
        if f.default is MISSING:
            parser.add_argument(f.name, nargs="+", help=text)
        elif kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            many = typing.get_origin(kind) is tuple
            one = typing.get_args(kind)[0] if many else kind
            one = number if one is int else one
            read = (lambda s, one=one: tuple(one(x) for x in s.split(",") if x)) if many else one
            shown = ",".join(map(str, f.default)) if many else str(f.default)
            parser.add_argument(*["-o"] * (f.name == "out"), name, type=read, default=f.default, metavar="X",
                                help=f"{text} (default: {shown or 'none'})")
            if f.name in FORMER:
                parser.add_argument(FORMER[f.name], dest=f.name, type=read, default=argparse.SUPPRESS,
                                    help=argparse.SUPPRESS)
    if "decay" in hints:
        parser.add_argument("--no-decay", dest="decay", action="store_const", const=0.0,
                            default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def main(function: typing.Callable, cls: type) -> None:
    """Run function(config) from the command line. Errors that the user can fix end in one line and exit
    status 2."""
    try:
        function(parse(cls))
    except (UserError, OSError) as error:
        close_bars()
        named = isinstance(error, OSError) and error.filename
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        close_bars()
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def close_bars() -> None:
    """End the line of every progress bar, so that the next text has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def setup(device: str, threads: int) -> torch.device:
    """Choose the device and the number of threads (0: all cores); keep big memory blocks in the process."""
    require(0 <= threads <= 4096, f"--threads {threads}: must be 0 (all cores) or more, at most 4096")
    if threads:
        torch.set_num_threads(threads)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # glibc hands every big temporary back to the system, and fresh pages are ten times slower to write:
        # keep the memory (mallopt), in pages of 2 MB (read by PyTorch before its first tensor, never later)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        for option, value in ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 30)):   # M_TRIM_THRESHOLD, TOP_PAD, ...
            libc.mallopt(option, value)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":                         # of several, each rank takes its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.empty(1, device=device)
        found.item()                             # the meta device, for one, has no values
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"--device {device}: not available here ({str(error).splitlines()[0]}); "
                        "use cpu, cuda or auto") from None
    if found.is_cuda:
        torch.cuda.set_device(found.device)
    ranks.join()
    return found.device
