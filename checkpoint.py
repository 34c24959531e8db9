"""What every run needs and no reader must study: options, run folders, seeds, checkpoints, exact resume.

A run is resumed bitwise because everything random is a function of (seed, stream, step), and because a
checkpoint remembers how long each log file was: what was logged after it is cut off before the run goes on.
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
import tempfile
import typing
import zipfile
from dataclasses import MISSING, asdict, fields, is_dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import ranks
from data.tokenizer import Tokenizer
from model import GPT, ModelConfig

try:
    import fcntl
except ImportError:      # Windows: runs work, but are not locked
    fcntl = None

FORMAT = "earlybird checkpoint 1"


class UserError(ValueError):
    """Something a person can mend: shown as one line, without a traceback."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_positive(config: typing.Any, names: str, zero: bool = False) -> None:
    """Raise UserError unless these options are finite numbers above 0 (or 0, where `zero` allows it)."""
    for name in names.split():
        value = getattr(config, name)
        require(math.isfinite(value) and (value > 0 or zero and value == 0),
                f"--{name.replace('_', '-')} {value}: must be {'0 or more' if zero else 'more than 0'}")


# ---- options ---------------------------------------------------------------------------------------------

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
    """Field -> the comment on its line, inherited fields too."""
    source = "".join(inspect.getsource(x) for x in reversed(cls.__mro__) if is_dataclass(x))
    return dict(re.findall(r"^ +(\w+):.*?# *(.*)$", source, re.MULTILINE))


def parse(cls: type, argv: list[str] | None = None) -> typing.Any:
    """The command line of a Config: field `lr` is option `--lr`, the comment on its line is the help text,
    and fields without a default are positional (one or more values). A tuple is written with commas."""
    automatic = cls.__doc__.startswith(f"{cls.__name__}(")               # what dataclass writes if we do not
    description = sys.modules[cls.__module__].__doc__ if automatic else cls.__doc__
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for f in sorted(fields(cls), key=lambda f: f.kw_only):               # inherited ones last
        name, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        text = help_texts(cls).get(f.name, "").replace("%", "%%")
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
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def close_bars() -> None:
    """End the line of every progress bar, so that what is printed next has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def main(function: typing.Callable, cls: type) -> None:
    """Run function(config) from the command line. What a person can mend ends in one line and status 2."""
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)       # mkstemp alone would leave 0600
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
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


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, checkpoint). UserError if they do not fit together or a weight is not finite."""
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
    except Exception as error:                   # whatever a foreign dict may cause in the four lines above
        raise UserError(f"{path}: weights, model config and tokenizer do not fit together "
                        f"({str(error)[:200]})") from None
    for name, weight in content["model"].items():
        require(bool(weight.isfinite().all()), f"{path}: {name} has values that are not finite")
    return model.to(device), tokenizer, content


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):          # shards and raw text may be larger than the memory
            digest.update(block)
    return digest.hexdigest()


# ---- a run folder ----------------------------------------------------------------------------------------

OPEN: list["Run"] = []


def one_run(train: typing.Callable) -> typing.Callable:
    """Decorator: however train() ends, its run folder is unlocked and the signal handlers are given back."""
    @functools.wraps(train)
    def wrapped(config: typing.Any) -> Path:
        try:
            return train(config)
        finally:
            while OPEN:
                OPEN.pop().close()
    return wrapped


class Run:
    """A run folder: config.json, log.jsonl (a line per step), samples.txt, last.pt for resuming.

    `last` is the content of last.pt, None in a new run. `interrupted` is True after Ctrl-C or SIGTERM, as of
    the next line in the log: the loop then saves and stops; a second Ctrl-C stops at once. `start` says what
    the run begins from (file or folder -> sha256). Of several ranks, the first one writes. Raises UserError
    if another process works in the folder, if it holds a run of another configuration, or if what it began
    from has changed."""

    def __init__(self, config: typing.Any, start: dict[str, typing.Any] | None = None):
        self.out, self.interrupted, self.signals = Path(config.out), False, set()
        self.files, self.handlers, first = {}, {}, ranks.rank() == 0
        self.script, self.start = Path(inspect.getfile(type(config))).name, start or {}
        self.config = json.loads(json.dumps(asdict(config)))             # tuples become lists, as in the file
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w") if first else open(os.devnull)
        OPEN.append(self)
        try:
            fcntl and first and fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.out}: another process is working in this run folder; wait for it, "
                            "or choose another --out") from None
        self.last = load_checkpoint(self.out / "last.pt") if (self.out / "last.pt").exists() else None
        path = self.out / "config.json"
        try:
            there = dict(json.loads(path.read_text())) if path.exists() else self.config
        except (ValueError, TypeError):
            raise UserError(f"{path}: damaged; choose another --out") from None
        # a run from before an option existed had its default
        there = {f.name: f.default for f in fields(config) if f.kw_only} | there
        different = [f"{k}={there.get(k)} there, {v} asked" for k, v in self.config.items()
                     if k not in ("device", "threads", "out", "memory") and there.get(k) != v]
        require(not different, f"{path}: this folder holds a run with another configuration "
                               f"({'; '.join(different)}); choose another --out")
        if self.last:
            require({"step", "done", "bytes", "skipped", "start", "optimizers"} <= self.last.keys(),
                    f"{self.out / 'last.pt'}: a checkpoint, but not the state of a run; choose another --out")
        steps = ranks.gather([self.last["step"] if self.last else 0])
        require(len(set(steps)) == 1, f"{self.out}: the processes see different states (steps {steps}); they "
                                      "need one folder on a disk that they share")
        self.skipped = self.last["skipped"][0] if self.last else 0       # updates left out because of a NaN
        self.bad_in_a_row: dict[int, int] = {}                           # id of an optimizer -> how many
        self.sizes = self.last["bytes"] if self.last else {"log.jsonl": 0, "samples.txt": 0}
        for name, digest in self.start.items() if self.last else ():
            require(self.last["start"].get(name) == digest,
                    f"{name}: changed since the run in {self.out} started from it; choose another --out")
        if first:
            for litter in (*self.out.glob(".*.pt.*"), *self.out.glob(".config.json.*")):
                litter.unlink()                  # what a kill in the middle of a write left
            self.files = {name: open(self.out / name, "ab", buffering=0) for name in self.sizes}
        atomic_write(path, json.dumps(self.config, indent=1).encode())
        for sign in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[sign] = signal.signal(sign, self._interrupt)
            except ValueError:                   # not the main thread: the caller handles signals
                break

    def _cut(self) -> None:
        """Cut the log files to where they were when last.pt was saved."""
        for name, f in self.files.items():
            f.truncate(self.sizes[name])
            f.seek(0, os.SEEK_END)

    def close(self) -> None:
        for f in (*self.files.values(), self.lock):
            f.close()
        for sign, handler in self.handlers.items():
            signal.signal(sign, handler)

    def _interrupt(self, sign: int, frame: typing.Any) -> None:
        if sign in self.signals:                 # torchrun passes a Ctrl-C on as a SIGTERM: that is no second
            raise KeyboardInterrupt
        self.signals.add(sign)
        print("\nstopping after this step (once more: stop at once)", file=sys.stderr)

    def finished(self, final: Path, steps: int) -> bool:
        """True, and says so, if this run was completed by an earlier call; says so too if it only goes on."""
        done = self.last is not None and self.last["done"] and final.exists()
        if done:
            print(f"{self.out}: finished already; the result is {final}")
            return True
        self._cut()
        if self.last:
            print(f"{self.out}: resuming after step {self.last['step']} of {steps}")
        return False

    def restore(self, model: GPT, *optimizers: torch.optim.Optimizer) -> None:
        model.load_state_dict(self.last["model"])
        bad = self.last["skipped"][1:]
        for optimizer, state, n in zip(optimizers, self.last["optimizers"], bad, strict=True):
            optimizer.load_state_dict(state)
            self.bad_in_a_row[id(optimizer)] = n

    def _append(self, name: str, text: str) -> None:
        if ranks.rank():
            return
        try:
            self.files[name].write((text + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.out / name}: not written ({error.strerror}); last.pt is whole") from None

    def log(self, **numbers: typing.Any) -> None:
        """Append a line to log.jsonl; what is not finite becomes null, as JSON has no NaN. Here the ranks
        agree whether they were interrupted."""
        self.interrupted = any(ranks.gather([bool(self.signals)]))
        bad = [k for k, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)]
        self._append("log.jsonl", json.dumps(numbers | dict.fromkeys(bad)))

    def write(self, text: str) -> None:
        """Append to samples.txt, for people to read."""
        self._append("samples.txt", text)

    def lineage(self, earlier: list[dict], **counts: typing.Any) -> list[dict]:
        """The earlier stages and this one: script, options, the sha256 of what it started from (--init or
        --data) and counts (tokens, updates, FLOPs, seconds)."""
        return earlier + [{"script": self.script, "config": self.config, **counts,
                           "parent": self.start.get(self.config.get("init"))}]

    def save_last(self, model: GPT, tokenizer: Tokenizer, lineage: list[dict],
                  optimizers: list[torch.optim.Optimizer], step: int, done: bool = False,
                  **state: typing.Any) -> None:
        """The one file to resume from; log files (if `done`: the final checkpoint too) are on disk before."""
        for name, f in self.files.items():
            try:
                os.fsync(f.fileno())
            except OSError as error:
                raise UserError(f"{self.out / name}: not written ({error.strerror})") from None
        if not done:
            self.sizes = {name: f.tell() for name, f in self.files.items()}
        save_checkpoint(self.out / "last.pt", model, tokenizer, lineage, step=step,
                        optimizers=[optimizer.state_dict() for optimizer in optimizers],
                        done=done, bytes=self.sizes,
                        skipped=[self.skipped, *(self.bad_in_a_row.get(id(o), 0) for o in optimizers)],
                        start=self.start, **state)

    def step(self, model: GPT, optimizer: torch.optim.Optimizer, grad_clip: float) -> float:
        """Sum the gradients of all ranks, clip to norm `grad_clip`, update, clear; returns the norm before
        clipping. A gradient that is not finite is not used; three in a row raise UserError, the last saved
        state being whole."""
        ranks.sum_gradients([p for p in model.parameters() if p.requires_grad])
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
        if math.isfinite(norm):
            optimizer.step()
        else:
            self.skipped += 1
            print(f"\n{self.out}: gradient is not finite, update skipped ({self.skipped} so far)",
                  file=sys.stderr)
        bad = 0 if math.isfinite(norm) else self.bad_in_a_row.get(id(optimizer), 0) + 1
        self.bad_in_a_row[id(optimizer)] = bad
        optimizer.zero_grad(set_to_none=True)
        require(bad < 3, f"{self.out}: three gradients in a row were not finite; last.pt has "
                                       "the last good state. Lower --lr, or look into the data")
        return norm

    def stop(self) -> None:
        """End an interrupted run, after it was saved."""
        print(f"saved; to go on, run the same command again (--out {self.out})")
        raise KeyboardInterrupt
