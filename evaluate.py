"""Measure a checkpoint: pass@k on arithmetic problems, general benchmarks, bits per byte; or compare two.

    python evaluate.py runs/base/8M.pt               on validation problems; a table, and JSON beside the file
    python evaluate.py runs/rl/final.pt runs/base/8M.pt --split test
    python evaluate.py runs/rl/final.pt runs/base/8M.pt --samples       only show what they answer, in seconds

The scorer `grade` is the reward of rl.py too. Intervals are 95 % bootstrap intervals over problems (samples
of one problem are not independent evidence); two models are compared on the same resampled problems.
Validation is the default, so that nobody tunes on the test problems by accident.
"""
import json
import math
import re
import sys
import textwrap
import typing
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    UserError, atomic_write, file_sha256, generator, load_model, main, require, require_positive,
    setup)
from data.arithmetic import style_of
from data.tokenizer import EOS, Tokenizer
from model import GPT, micro_batches, pack, sample
from scale import fit


@dataclass
class Config:
    checkpoints: tuple[str, ...]    # one checkpoint, or two to compare (first minus second)
    data: str = "data/tiny"         # folder made by data/prepare.py
    split: str = "val"              # val or test; tune on val only
    problems: str = ""              # problem file to use instead of DATA/SPLIT.jsonl
    n_problems: int = 200           # of each difficulty
    n_samples: int = 64             # per problem; at least 2 k makes pass@k more than a coin flip per problem
    k: tuple[int, ...] = (1, 8, 32)  # the k of pass@k
    temperature: float = 0.6        # of the sampling; the paper's value
    max_new: int = 80               # longest answer, tokens
    shots: int = 0                  # solved examples before each question
    decode_rows: int = 1024         # rows sampled at once (one problem's at least): bounds keys and values
    reference: str = ""             # checkpoint to which the KL is measured, such as the one RL started from
    benchmarks: bool = True         # general benchmarks and bits per byte too
    samples: bool = False           # only show graded answers to a few problems (5 of each difficulty)
    seed: int = 0                   # of the sampling, the examples and the bootstrap
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def check(c: Config) -> None:
    require(len(c.checkpoints) in (1, 2), f"{len(c.checkpoints)} checkpoints given: one, or two to compare")
    require(c.split in ("val", "test"), f"--split {c.split}: must be val or test")
    require(bool(c.k) and 0 < min(c.k) and max(c.k) <= c.n_samples, f"--n-samples {c.n_samples}: "
            f"pass@{max(c.k, default=0)} needs at least that many (and k at least 1)")
    require(c.n_problems > 0 and c.max_new > 0, "--n-problems and --max-new must be positive")
    require_positive(c, "temperature decode_rows")
    require_positive(c, "seed", zero=True)
    require(c.shots >= 0, f"--shots {c.shots}: must not be negative")
    require(not (c.samples and c.reference), "--reference: --samples measures nothing; leave one of them out")


# ---- the scorer ------------------------------------------------------------------------------------------

INTEGER = r"-?(?:0|[1-9][0-9]*)"


def grade(completion: str, answer: str, finished: bool = True) -> str:
    """'right', 'wrong' or 'unparsed' for the text before the first EOS.

    Parsed means: it ends in exactly one line '#### N' with N in canonical form and ASCII digits, and '####'
    occurs nowhere else. Numbers are compared as text: no eval, no int() of what a model wrote, no tolerance.
    A completion cut off before its EOS counts only if the line is complete, that is, ended by a newline."""
    if EOS in completion:
        completion, finished = completion.split(EOS)[0], True
    match = re.fullmatch(rf"(?:[\s\S]*\n)?#### ({INTEGER})(\n?)", completion)
    if not match or completion.count("####") != 1 or not (finished or match[2]):
        return "unparsed"
    return "right" if match[1] == answer else "wrong"


def read_answer(tokenizer: Tokenizer, ids: list[int], finished: bool, answer: str) -> tuple[str, str]:
    """(text, grade) of sampled ids. EOS spelled out in ordinary bytes ends nothing: that is no answer."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    return text, "unparsed" if EOS in text else grade(text, answer, finished)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, drawn without replacement, hold a right one
    (Chen et al. 2021, equation 1). Raises ValueError if k > n."""
    if not 0 <= c <= n or not 0 < k <= n:
        raise ValueError(f"pass@{k} of {n} samples with {c} right: needs 0 <= right <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


# ---- intervals -------------------------------------------------------------------------------------------

def bootstrap_means(values: np.ndarray, seed: int, replicates: int = 2_000) -> np.ndarray:
    """Means (replicates, ...) of values (problems, ...) over problems drawn with replacement. The same seed
    and number of problems draw the same problems: subtract two models' means for a paired comparison."""
    index = np.random.default_rng(seed).integers(0, len(values), (replicates, len(values)))
    return np.stack([values[i].mean(0) for i in index])


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return float(low), float(high)


# ---- data ------------------------------------------------------------------------------------------------

def open_data(folder: str) -> tuple[dict, Tokenizer, dict[str, np.ndarray]]:
    """(manifest, tokenizer, shard name -> memory-mapped tokens), every file checked by its sha256."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        sums, names = dict(manifest["sha256"]), [n for n in manifest["shards"] if n.endswith(".bin")]
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        require(manifest["tokenizer_sha256"] == tokenizer.sha256, f"{path / 'tokenizer.json'}: not the "
                f"tokenizer that made the shards in {folder}; make the data again")
        dtype = np.dtype(manifest.get("dtype", "uint16"))
        require("train.bin" in names, f"{path / 'manifest.json'}: lists no train.bin; make the data again")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; make the data with: "
                        f"python data/prepare.py --out {folder}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: manifest.json or tokenizer.json is damaged "
                        f"({type(error).__name__}: {error}); make the data again") from None
    for name, digest in sums.items():
        require((path / name).is_file(), f"{path / name}: not found, although the manifest lists it")
        require(file_sha256(path / name) == digest, f"{path / name}: checksum differs from manifest.json "
                "(truncated or changed); make the data again")
    return manifest, tokenizer, {name.removesuffix(".bin"): np.memmap(path / name, dtype=dtype, mode="r")
                                 for name in names}


def load_problems(path: str | Path, difficulty: str = "all", solutions: bool = False) -> list[dict]:
    """Problems of a JSON-lines file; one without a difficulty, or of "all", belongs to each. UserError names
    file, line and fault."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such problem file")
    manifest = path.parent / "manifest.json"
    if manifest.exists():                        # a file of ours: it must be the one that was made
        known = json.loads(manifest.read_text()).get("sha256", {}).get(path.name)
        require(known in (None, file_sha256(path)), f"{path}: checksum differs from manifest.json")
    problems = []
    for i, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            p = json.loads(line.decode())
            json.dumps(p, ensure_ascii=False).encode()       # a lone surrogate is not text
        except (ValueError, RecursionError) as error:
            p = error
        require(isinstance(p, dict), f"{path}, line {i}: not a JSON object in UTF-8")
        for key in ("question", "answer"):
            require(isinstance(p.get(key), str) and p[key].strip() != "",
                    f"{path}, line {i}: {key!r} must be a text")
        require(re.fullmatch(INTEGER, p["answer"]) is not None,
                f"{path}, line {i}: answer {p['answer'][:40]!r} is not an integer such as 12 or -3")
        if solutions:
            texts = p.get("solutions")
            require(isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts),
                    f"{path}, line {i}: 'solutions' must be a list of at least one text")
            for text in texts:
                require(grade(text, p["answer"]) == "right",
                        f"{path}, line {i}: a solution does not end in the line '#### {p['answer']}'")
        require(isinstance(p.get("difficulty", "all"), str), f"{path}, line {i}: 'difficulty' must be a text")
        if difficulty == "all" or p.get("difficulty", "all") in (difficulty, "all"):
            problems.append(p)
    require(bool(problems), f"{path}: has no problem of difficulty {difficulty}")
    return problems


def open_training(c: typing.Any, device: torch.device, solutions: bool = False
                  ) -> tuple[GPT, Tokenizer, list[dict], list[dict], list[dict]]:
    """(model, tokenizer, its lineage, training problems, validation problems) of a Config of rl.py, sft.py or
    merge.py. UserError if the problems are not for training, or do not fit into the model's context."""
    require(c.init != "", "--init is missing: give the checkpoint to start from")
    require(c.difficulty in ("easy", "hard", "all"),
            f"--difficulty {c.difficulty}: must be easy, hard or all")
    path = c.problems or f"{c.data}/train.jsonl"
    problems = load_problems(path, c.difficulty, solutions)[:c.questions or None]
    require(all(p.get("split") not in ("val", "test") for p in problems),
            f"{path}: holds validation or test problems; training on them would make every number void")
    validation = load_problems(f"{c.data}/val.jsonl", c.difficulty)[:c.eval_problems]
    model, tokenizer, content = load_model(c.init)
    longest = max(len(prompt_ids(tokenizer, p)) for p in problems + validation)
    require(longest + c.max_new <= model.config.context, f"the longest prompt has {longest} tokens: with "
            f"--max-new {c.max_new} that exceeds the model's context of {model.config.context}")
    fit(c, model, longest, device)
    return model.to(device), tokenizer, content["lineage"], problems, validation


def prompt_ids(tokenizer: Tokenizer, problem: dict) -> list[int]:
    """EOS, question, newline: in pretraining, too, every text follows the EOS of another."""
    return [tokenizer.eos, *tokenizer.encode(problem["question"] + "\n")]


def few_shot_prefix(tokenizer: Tokenizer, examples: list[dict], shots: int, seed: int) -> list[int]:
    """Ids of `shots` solved examples in one style, as in documents of several questions."""
    rng = np.random.default_rng(seed)
    style, ids = rng.integers(4), []
    for i in rng.choice(len(examples), shots, replace=False):
        solutions = examples[i]["solutions"]             # in the same order of styles for every problem
        ids += prompt_ids(tokenizer, examples[i]) + tokenizer.encode(solutions[style % len(solutions)])
    return ids


def solved_examples(tokenizer: Tokenizer, c: Config) -> list[int]:
    """What --shots puts before every question."""
    if c.shots == 0:
        return []
    examples = load_problems(f"{c.data}/train.jsonl", "easy", solutions=True)
    require(c.shots <= len(examples), f"--shots {c.shots}: there are only {len(examples)} examples")
    return few_shot_prefix(tokenizer, examples, c.shots, c.seed)


def by_difficulty(problems: list[dict], n: int) -> dict[str, list[dict]]:
    """Difficulty -> its first n problems."""
    return {d: [p for p in problems if p.get("difficulty", "all") == d][:n]
            for d in sorted({p.get("difficulty", "all") for p in problems})}


@dataclass
class Attempts:
    """P·n graded completions, row p·n + i being attempt i at problem p."""
    texts: list[str]
    grades: list[str]
    truncated: int

    @property
    def score(self) -> float:
        """pass@1."""
        return self.grades.count("right") / len(self.grades)

    def right(self, n: int) -> np.ndarray:
        """Number of right attempts (P,) of n each."""
        return np.array([g == "right" for g in self.grades]).reshape(-1, n).sum(1)


def attempt(model: GPT, tokenizer: Tokenizer, problems: list[dict], n: int, temperature: float, max_new: int,
            gen: torch.Generator, prefix: list[int] = (), bar: tqdm | None = None) -> Attempts:
    """Sample n completions of each problem and grade them."""
    result = Attempts([], [], 0)
    per_call = max(1, 2048 // n)                                         # so that the progress bar moves
    for i in range(0, len(problems), per_call):
        part = problems[i:i + per_call]
        prompts = [list(prefix) + prompt_ids(tokenizer, p) for p in part]
        longest = max(map(len, prompts))
        require(longest + max_new <= model.config.context, f"a prompt of {longest} tokens and an answer of "
                f"up to --max-new {max_new} exceed the model's context of {model.config.context}; use fewer "
                "--shots, shorter problems or a smaller --max-new")
        out = sample(model, prompts, n, max_new, tokenizer.eos, tokenizer.pad, gen, temperature)
        for row, (ids, finished) in enumerate(zip(out.completions(), out.finished.tolist())):
            text, result_grade = read_answer(tokenizer, ids, finished, part[row // n]["answer"])
            result.texts.append(text)
            result.grades.append(result_grade)
            result.truncated += not finished
        if bar is not None:
            bar.update(len(part))
    return result


def validate(model: GPT, tokenizer: Tokenizer, validation: list[dict], c: typing.Any) -> Attempts:
    """What a training run measures now and then: always the same random numbers, none of them its own."""
    return attempt(model, tokenizer, validation, c.eval_samples, .6, c.max_new,
                   generator(c.seed, "evaluation"))


def measure_problems(model: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config, prefix: list[int],
                     desc: str) -> dict:
    """Everything about one set of problems, per-problem counts included."""
    bar = tqdm(total=2 * len(problems), desc=desc, unit="problem")
    sampled = attempt(model, tokenizer, problems, c.n_samples, c.temperature, c.max_new,
                      generator(c.seed, "evaluation"), prefix, bar)
    greedy = attempt(model, tokenizer, problems, 1, 0.0, c.max_new,
                     generator(c.seed, "evaluation"), prefix, bar)
    bar.close()
    right, total = sampled.right(c.n_samples), len(sampled.grades)
    passes = np.array([[pass_at_k(c.n_samples, r, k) for k in c.k] for r in right.tolist()])     # (P, K)
    means = bootstrap_means(passes, c.seed)
    groups = [range(i, i + c.n_samples) for i in range(0, total, c.n_samples)]
    return {
        "problems": len(problems), "samples": c.n_samples,
        **{f"pass@{k}": {"mean": float(passes[:, i].mean()), "interval": interval(means[:, i])}
           for i, k in enumerate(c.k)},
        "greedy": greedy.grades.count("right") / len(problems),
        "unparsed": sampled.grades.count("unparsed") / total, "truncated": sampled.truncated / total,
        "answer_entropy": float(np.mean([entropy([sampled.texts[j].split("####")[-1] for j in g])
                                         for g in groups])),
        "distinct_completions": float(np.mean([len({sampled.texts[j] for j in g}) for g in groups])),
        "styles": {k: v / total for k, v in sorted(Counter(map(style_of, sampled.texts)).items())},
        "right_per_problem": right.tolist(),
    }


@torch.inference_mode()
def kl_divergence(model: GPT, reference: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config,
                  prefix: list[int]) -> float:
    """KL(model || reference) of the next token at temperature 1, in nats, the mean over every token of one
    answer of the model to each problem, sampled at --temperature."""
    prompts = [[*prefix, *prompt_ids(tokenizer, p)] for p in problems]
    answers = sample(model, prompts, 1, c.max_new, tokenizer.eos, tokenizer.pad, generator(c.seed, "kl"),
                     c.temperature).completions()
    total, device = 0.0, model.head.weight.device
    at_once = min(8192, 2 ** 26 // model.config.n_vocab)                 # tokens: logits of a quarter GiB
    for rows in micro_batches([len(a) + len(b) for a, b in zip(prompts, answers)], at_once):
        ids, target = pack([prompts[r] for r in rows], [answers[r] for r in rows], tokenizer.pad, device)
        logp, other = (m.logits(m.hidden(ids[:, :-1])[target[:, 1:]]).log_softmax(-1)
                       for m in (model, reference))
        total += float(torch.nn.functional.kl_div(other, logp, log_target=True, reduction="sum"))
    return total / sum(map(len, answers))


def entropy(values: list[str]) -> float:
    """Entropy, in nats, of the observed distribution of values."""
    p = np.array(list(Counter(values).values())) / len(values)
    return float(-(p * np.log(p)).sum())


# ---- general capabilities --------------------------------------------------------------------------------

def pick(scores: list[float], choices: list[str]) -> tuple[int, int]:
    """(choice by acc, choice by acc_norm) as in lm-evaluation-harness: largest log-likelihood, and largest
    log-likelihood per character of the choice without its leading space; the first of equals."""
    norm = [s / len(c.removeprefix(" ")) for s, c in zip(scores, choices)]
    return scores.index(max(scores)), norm.index(max(norm))


@torch.inference_mode()
def score_rows(model: GPT, contexts: list[list[int]], continuations: list[list[int]], pad: int,
               tokens: int = 8192) -> tuple[list[float], list[bool]]:
    """Per row: log-likelihood of the continuation given the context, and whether greedy decoding gives it."""
    longest = max(len(a) + len(b) for a, b in zip(contexts, continuations))
    require(longest <= model.config.context,
            f"a benchmark item has {longest} tokens, more than the model's context of {model.config.context}")
    device = model.head.weight.device
    sums, exact = [0.0] * len(contexts), [False] * len(contexts)
    for rows in micro_batches([len(a) + len(b) for a, b in zip(contexts, continuations)], tokens):
        ids, target = pack([contexts[r] for r in rows], [continuations[r] for r in rows], pad, device)
        logits = model.logits(model.hidden(ids[:, :-1])[target[:, 1:]])
        wanted = ids[:, 1:][target[:, 1:]]
        logp = logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1)
        hit = logits.argmax(-1) == wanted
        sizes = target.sum(1).tolist()
        for r, lp, h in zip(rows, logp.split(sizes), hit.split(sizes)):
            sums[r], exact[r] = float(lp.sum()), bool(h.all())
    return sums, exact


def measure_benchmarks(model: GPT, tokenizer: Tokenizer, items: list[dict]) -> dict:
    """Task -> accuracy (acc_norm; acc where there are two choices, exact match where there is one), standard
    error, chance, hits."""
    rows = [([tokenizer.eos, *tokenizer.encode(item["context"])], tokenizer.encode(choice))
            for item in items for choice in item["choices"]]
    sums, exact = score_rows(model, [a for a, _ in rows], [b for _, b in rows], tokenizer.pad)
    hits: dict[str, list[tuple[int, int, float]]] = {}
    at = 0
    for item in items:
        n = len(item["choices"])
        if n == 1:
            by_sum = by_norm = int(exact[at])
        else:
            by_sum, by_norm = (int(i == item["answer"]) for i in pick(sums[at:at + n], item["choices"]))
        # two choices differ in a letter or two, whose share of the length must not decide (BLiMP: acc)
        best = by_norm if n > 2 else by_sum
        hits.setdefault(item["task"], []).append((best, by_sum, by_norm, item["chance"]))
        at += n
    return {task: {"accuracy": best.mean().item(), "stderr": float(best.std() / max(1, len(best) - 1) ** .5),
                   "acc": by_sum.mean().item(), "acc_norm": by_norm.mean().item(),
                   "chance": chance[0].item(), "items": len(best), "hits": best.astype(int).tolist()}
            for task, v in hits.items() for best, by_sum, by_norm, chance in [np.array(v).T]}


@torch.inference_mode()
def bits_per_byte(model: GPT, tokenizer: Tokenizer, shard: np.ndarray, blocks: int = 128) -> float:
    """−log-likelihood / (bytes · ln 2) of a shard's first blocks; a block's first token is context only."""
    size, device = model.config.context, model.head.weight.device
    blocks = min(blocks, len(shard) // size)
    require(blocks > 0, f"the validation shard has {len(shard)} tokens, fewer than one context of {size}")
    ids = torch.from_numpy(shard[:blocks * size].astype(np.int64)).view(blocks, size)
    total = 0.0
    for part in ids.to(device).split(max(1, min(16, 4096 // size))):
        logits: Tensor = model(part[:, :-1]).float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(),
                                                         reduction="sum"))
    n_bytes = sum(len(tokenizer.encoding.decode_single_token_bytes(i)) if i < tokenizer.eos else 0
                  for i in ids[:, 1:].flatten().tolist())
    return total / (n_bytes * math.log(2))


# ---- a whole evaluation ----------------------------------------------------------------------------------

def evaluate(path: str, c: Config) -> dict:
    """Measure one checkpoint and write CHECKPOINT.SPLIT.Nshot.json beside it."""
    check(c)
    device = setup(c.device, c.threads)
    model, tokenizer, content = load_model(path, device)
    model.decode_rows = c.decode_rows
    _, data_tokenizer, shards = open_data(c.data)
    require(data_tokenizer.sha256 == tokenizer.sha256,
            f"{path}: made with another tokenizer than {c.data} holds")
    reference = None
    if c.reference:
        reference, other_tokenizer, _ = load_model(c.reference, device)
        require(other_tokenizer.sha256 == tokenizer.sha256,
                f"{c.reference}: has another tokenizer than {path}")
        require(reference.config.context >= model.config.context,
                f"{c.reference}: its context is shorter than that of {path}")
    problems = load_problems(c.problems or f"{c.data}/{c.split}.jsonl")
    listed = Path(c.data, "benchmarks.jsonl")            # none where all general text is real
    items = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    prefix = solved_examples(tokenizer, c)
    name = Path(path).name
    config = {k: v for k, v in asdict(c).items() if k not in ("checkpoints", "samples")}
    result = {"checkpoint": str(path), "lineage": content["lineage"], "config": config, "problems": {}}
    for difficulty, chosen in by_difficulty(problems, c.n_problems).items():
        measured = measure_problems(model, tokenizer, chosen, c, prefix, f"{name} {difficulty}")
        if reference:
            measured["kl"] = kl_divergence(model, reference, tokenizer, chosen, c, prefix)
        result["problems"][difficulty] = measured
    if c.benchmarks and items:
        result["benchmarks"] = measure_benchmarks(model, tokenizer, items)
        result["general_mean"] = float(np.mean([b["accuracy"] for b in result["benchmarks"].values()]))
    if c.benchmarks:
        result["bits_per_byte"] = bits_per_byte(model, tokenizer, shards["val_general"])
    out = Path(path).with_suffix(f".{c.split}.{c.shots}shot.json")
    print(f"\n{table(result)}")
    atomic_write(out, json.dumps(result, indent=1).encode())
    print(f"written: {out}")
    return result


def table(result: dict) -> str:
    c = result["config"]
    lines = [f"{result['checkpoint']}   ({c['split']}, {c['shots']}-shot, {c['n_samples']} samples "
             f"at T={c['temperature']})"]
    for name, d in result["problems"].items():
        for k in c["k"]:
            m = d[f"pass@{k}"]
            lines.append(f"  {name:8s}pass@{k:<4d}{m['mean']:7.1%}   "
                         f"[{m['interval'][0]:.1%}, {m['interval'][1]:.1%}]")
        lines.append(f"  {name:8s}greedy {d['greedy']:.1%}, unparsed {d['unparsed']:.1%}, "
                     f"truncated {d['truncated']:.1%}, answer entropy {d['answer_entropy']:.2f} nats, "
                     f"{d['distinct_completions']:.1f} distinct of {d['samples']}")
        if "kl" in d:
            lines.append(f"  {name:8s}KL to {c['reference']} {d['kl']:.4f} nats per token")
        lines.append(f"  {name:8s}styles " + ", ".join(f"{s} {v:.0%}" for s, v in d["styles"].items()))
    for task, b in result.get("benchmarks", {}).items():
        lines.append(f"  {task:10s}{b['accuracy']:6.1%} ± {b['stderr']:.1%}  (chance {b['chance']:.0%})")
    mean = f"general mean {result['general_mean']:.1%}, " if "general_mean" in result else ""
    if "bits_per_byte" in result:
        lines.append(f"  {mean}general text {result['bits_per_byte']:.3f} bits per byte")
    return "\n".join(lines)


def compare(a: dict, b: dict, seed: int) -> dict:
    """First minus second: pass@k per difficulty and the general mean, each with its paired 95 % interval."""
    differences = {}
    for difficulty in a["problems"]:
        pa, pb = a["problems"][difficulty], b["problems"][difficulty]
        for k in a["config"]["k"]:
            gap = np.array([pass_at_k(pa["samples"], x, k) - pass_at_k(pb["samples"], y, k)
                            for x, y in zip(pa["right_per_problem"], pb["right_per_problem"])])
            differences[f"{difficulty} pass@{k}"] = (float(gap.mean()), *interval(bootstrap_means(gap, seed)))
    if "benchmarks" in a:
        gaps = [np.array(a["benchmarks"][t]["hits"]) - np.array(b["benchmarks"][t]["hits"])
                for t in a["benchmarks"]]
        means = np.mean([bootstrap_means(g, seed + i) for i, g in enumerate(gaps)], axis=0)   # within tasks
        differences["general mean"] = (float(np.mean([g.mean() for g in gaps])), *interval(means))
    return differences


def show(c: Config, width: int = 110) -> None:
    """Print a few problems and, side by side, what each checkpoint answers most often: how many of the
    n_samples, their grade, their text. `width` is the terminal's, in columns. Nothing is written."""
    device, n, column = setup(c.device, c.threads), c.n_samples, (width + 4) // len(c.checkpoints) - 4
    few = 5 if c.n_problems == Config.n_problems else c.n_problems       # 200 would be too many to read
    problems = load_problems(c.problems or f"{c.data}/{c.split}.jsonl")
    problems = [p for part in by_difficulty(problems, few).values() for p in part]
    tried = []
    for path in c.checkpoints:
        model, tokenizer, _ = load_model(path, device)
        model.decode_rows = c.decode_rows
        tried.append(attempt(model, tokenizer, problems, n, c.temperature, c.max_new,
                             generator(c.seed, "evaluation"), solved_examples(tokenizer, c)))
    for i, p in enumerate(problems):
        title = f"{p['question']}   ({p.get('difficulty', 'all')}, answer {p['answer']})"
        print("", *textwrap.wrap(title, width), sep="\n")
        columns = []
        for path, attempts in zip(c.checkpoints, tried):
            mine = slice(i * n, (i + 1) * n)
            seen = Counter(zip(attempts.grades[mine], attempts.texts[mine]))
            answers = [f"{path}: {attempts.grades[mine].count('right')} of {n} right, {len(seen)} different"]
            for (mark, text), times in seen.most_common(3):
                answers.append(f"{times:4d} × {mark:8s} {text!r}".replace("\\n", "⏎ "))
            columns.append([line for answer in answers for line in textwrap.wrap(
                answer, column, subsequent_indent=" " * 16, break_on_hyphens=False)])
        for lines in zip_longest(*columns, fillvalue=""):
            print("    ".join(f"{line:{column}s}" for line in lines).rstrip())


def run(c: Config) -> list[dict]:
    """Evaluate each checkpoint; for two, print the paired differences too."""
    check(c)
    setup(c.device, c.threads)                   # before the first tensor
    for path in filter(None, (*c.checkpoints, c.reference)):
        load_model(path)                         # a bad second file is found before the first is measured
    if c.samples:
        show(c)
        return []
    results = [evaluate(path, c) for path in c.checkpoints]
    if len(results) == 2:
        print(f"\n{c.checkpoints[0]} minus {c.checkpoints[1]} (paired 95 % intervals)")
        for name, (mean, low, high) in compare(*results, c.seed).items():
            print(f"  {name:16s}{100 * mean:+6.1f} points  [{100 * low:+.1f}, {100 * high:+.1f}]")
    return results


# ---- python model.py CHECKPOINT: what it is, and a prompt to try it --------------------------------------

@dataclass
class ChatConfig:
    """Print what a checkpoint is (sizes, lineage, tokens seen), then answer prompts that you type.

    python model.py runs/base/8M.pt
    """
    checkpoint: tuple[str, ...]     # file to look at
    temperature: float = 0.6        # 0 = always the most probable token
    max_new: int = 80               # longest answer, tokens
    seed: int = 0                   # of the sampling
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def chat(c: ChatConfig) -> None:
    """Print what the checkpoint is; answer every line typed with the model's continuation of that line."""
    require(len(c.checkpoint) == 1, "one checkpoint, please")
    require(c.temperature >= 0, f"--temperature {c.temperature}: must not be negative")
    model, tokenizer, content = load_model(c.checkpoint[0], setup(c.device, c.threads))
    m = model.config
    require(0 < c.max_new < m.context - 1, f"--max-new {c.max_new}: must be between 1 and {m.context - 2}")
    n = sum(p.numel() for p in model.parameters())
    core = n - 2 * m.vocab_size * m.d_model
    print(f"{c.checkpoint[0]}: {n:,} parameters, {core:,} without embedding and head\n"
          f"  {m.n_layers} layers, width {m.d_model}, {m.n_heads} heads ({m.n_kv_heads} of keys and values), "
          f"feed-forward {m.d_ff}, context {m.context}, vocabulary {m.n_vocab}\n  lineage:")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    for stage in content["lineage"]:
        print(f"    {stage['script']}: {stage['tokens']:,} tokens, {stage['updates']} updates, "
              f"{stage['flops']:.2e} FLOPs, {stage['seconds'] / 60:.1f} min, seed {stage['config']['seed']}")
    print('  type a question, such as "Nora has 37 shells. Nora finds 48. How many shells?" (end: Ctrl-D)')
    with suppress(EOFError):
        for turn in count():
            prompt = tokenizer.encode(input("> ") + "\n")[1 + c.max_new - m.context:]  # its end, if too long
            gen = generator(c.seed, "chat", turn)
            out = sample(model, [[tokenizer.eos, *prompt]], 1, c.max_new, tokenizer.eos, tokenizer.pad, gen,
                         c.temperature)
            print(tokenizer.decode(out.completions()[0]).removesuffix("<|endoftext|>"))


if __name__ == "__main__":
    main(run, Config)
