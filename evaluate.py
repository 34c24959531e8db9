"""Measure a checkpoint: pass@k on arithmetic problems, general benchmarks, bits per byte; or compare two.

    python evaluate.py runs/base/8M.pt               on validation problems; a table, and JSON beside the file
    python evaluate.py runs/rl/final.pt runs/base/8M.pt --split test

The scorer `grade` of data/arithmetic.py is the reward of rl.py too. Intervals are 95 % bootstrap intervals
over problems (samples of one problem are not independent evidence); two models are compared on the same
resampled problems. Validation is the default, so that nobody tunes on the test problems by accident.
"""
import json
import math
import typing
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import ranks  # comes before torch: it sets how idle threads wait

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import atomic_write, check_fields, generator, load_model, main, require, setup
from data.arithmetic import numbers_of, read_answer, sound, style_shares
from data.problems import load_problems, open_data, prompt_ids, solved_examples
from data.tokenizer import Tokenizer
from model import GPT, Ids, packed, target_logits


@dataclass
class Config:
    checkpoints: tuple[str, ...]    # one checkpoint, or two to compare (first minus second)
    data: str = "data/tiny"         # folder made by data/prepare.py
    split: str = "val"              # one of val, test: tune on val only
    problem_file: str = ""          # problem file to use instead of DATA/SPLIT.jsonl
    n_problems: int = 200           # > 0: of each difficulty
    n_samples: int = 64             # > 0: per problem; fewer than 2·k make pass@k a coin flip per problem
    k: tuple[int, ...] = (1, 8, 32)  # > 0: the k of pass@k
    temperature: float = 0.6        # > 0: of the sampling; the paper's value
    max_new: int = 80               # > 0: longest answer, tokens
    shots: int = 0                  # >= 0: solved examples before each question
    decode_rows: int = 1024         # > 0: rows sampled at once (one problem's at least): bounds the cache
    reference: str = ""             # checkpoint to which the KL is measured, such as the one RL started from
    benchmarks: bool = True         # general benchmarks and bits per byte too
    seed: int = 0                   # >= 0: of the sampling, the examples and the bootstrap
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores


def check(c: Config) -> None:
    require(len(c.checkpoints) in (1, 2), f"{len(c.checkpoints)} checkpoints given: one, or two to compare")
    check_fields(c)
    require(bool(c.k), "--k: no number given")
    require(max(c.k) <= c.n_samples, f"--n-samples {c.n_samples}: pass@{max(c.k)} needs at least that many")


# ---- pass@k and intervals --------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, drawn without replacement, contain at least one right
    answer: 1 − C(n−c, k) / C(n, k), as a product (Chen et al. 2021, equation 1). ValueError if k > n."""
    if not 0 <= c <= n or not 0 < k <= n:
        raise ValueError(f"pass@{k} of {n} samples with {c} right: needs 0 <= right <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def bootstrap_means(values: np.ndarray, seed: int, replicates: int = 2_000) -> np.ndarray:
    """Means (replicates, ...) of values (problems, ...) over problems drawn with replacement. The same seed
    and number of problems draw the same problems: subtract two models' means for a paired comparison."""
    n = len(values)
    index = np.random.default_rng(seed).integers(0, n, (replicates, n))
    return np.stack([values[i].mean(0) for i in index])


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval."""
    return tuple(np.percentile(replicates, (2.5, 97.5)).tolist())


# ---- answers to problems ---------------------------------------------------------------------------------
def problems_of(c: typing.Any) -> dict[str, list[dict]]:
    """Difficulty -> its first --n-problems problems in --problem-file, or else in the split."""
    problems = load_problems(c.problem_file or f"{c.data}/{c.split}.jsonl")
    return {d: [p for p in problems if p.get("difficulty", "all") == d][:c.n_problems]
            for d in sorted({p.get("difficulty", "all") for p in problems})}


@dataclass
class Attempts:
    """P·n graded completions, row p·n + i being attempt i at problem p."""
    n: int
    texts: list[str]
    grades: list[str]
    sound: list[bool]               # right, and derived
    truncated: int

    @property
    def score(self) -> float:
        """pass@1."""
        return self.grades.count("right") / len(self.grades)

    def per_problem(self, flags: list[bool]) -> list[int]:
        """Number of attempts (P,) of n each that have the flag."""
        return np.array(flags).reshape(-1, self.n).sum(1).tolist()

    def examples(self, problems: list[dict], shown: int) -> list[dict]:
        """The first problems and two answers to each, with their grades."""
        found = []
        for p, problem in enumerate(problems[:shown]):
            answers = []
            for row in range(p * self.n, (p + 1) * self.n)[:2]:
                grade = "sound" if self.sound[row] else self.grades[row]
                answers.append([grade, self.texts[row]])
            found.append({"question": problem["question"], "answer": problem["answer"], "answers": answers})
        return found

    def transcript(self, problems: list[dict]) -> str:
        """Three examples as text."""
        lines = []
        for example in self.examples(problems, 3):
            lines.append(f"{example['question']}   (answer {example['answer']})")
            lines += [f"  [{grade}] {text!r}" for grade, text in example["answers"]]
        return "\n".join(lines)


def attempt(model: GPT, tokenizer: Tokenizer, problems: list[dict], n: int, temperature: float, max_new: int,
            gen: torch.Generator, prefix: list[int] = (), bar: tqdm | None = None) -> Attempts:
    """Sample n completions of each problem and grade them."""
    attempts = Attempts(n, [], [], [], 0)
    per_call = max(1, 2048 // n)                                         # so that the progress bar moves
    for i in range(0, len(problems), per_call):
        part = problems[i:i + per_call]
        prompts = [[*prefix, *prompt_ids(tokenizer, p)] for p in part]
        longest = max(map(len, prompts))
        require(longest + max_new <= model.config.context, f"a prompt of {longest} tokens and an answer of "
                f"up to --max-new {max_new} exceed the model's context of {model.config.context}; use fewer "
                "--shots, shorter problems or a smaller --max-new")

        out = ranks.sample_together(model, prompts, n, max_new, tokenizer.eos, tokenizer.pad, gen,
                                    temperature)
        for row, (ids, finished) in enumerate(zip(out.completions(), out.finished.tolist())):
            problem = part[row // n]
            text, grade = read_answer(tokenizer, ids, finished, problem["answer"])
            attempts.texts.append(text)
            attempts.grades.append(grade)
            attempts.sound.append(grade == "right" and sound(problem, text))
            attempts.truncated += not finished
        if bar is not None:
            bar.update(len(part))
    return attempts


def validate(model: GPT, tokenizer: Tokenizer, validation: list[dict], c: typing.Any) -> Attempts:
    """Validation during training, always from the same random numbers, which training does not use."""
    return attempt(model, tokenizer, validation, c.eval_samples, .6, c.max_new,
                   generator(c.seed, "evaluation"))


def measure_problems(model: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config, prefix: list[int],
                     desc: str) -> dict:
    """Everything about one set of problems, per-problem counts included."""
    with tqdm(total=2 * len(problems), desc=desc, unit="problem") as bar:
        sampled = attempt(model, tokenizer, problems, c.n_samples, c.temperature, c.max_new,
                          generator(c.seed, "evaluation"), prefix, bar)
        greedy = attempt(model, tokenizer, problems, 1, 0.0, c.max_new,
                         generator(c.seed, "evaluation"), prefix, bar)

    right = [grade == "right" for grade in sampled.grades]
    result = {"problems": len(problems), "samples": c.n_samples,
              "operations": [len(numbers_of(p["question"])) - 1 for p in problems],
              "right_per_problem": sampled.per_problem(right),
              "sound_per_problem": sampled.per_problem(sampled.sound)}
    for k in c.k:
        for kind, name in (("right", "pass"), ("sound", "sound")):
            each = passes(result, k, kind)
            means = bootstrap_means(each, c.seed)
            result[f"{name}@{k}"] = {"mean": float(each.mean()), "interval": interval(means)}

    total = len(sampled.grades)
    entropies = []
    distinct = []
    for i in range(0, total, c.n_samples):
        texts = sampled.texts[i:i + c.n_samples]
        entropies.append(entropy([text.split("####")[-1] for text in texts]))
        distinct.append(len(set(texts)))
    return result | {
        "greedy": greedy.score,
        "unparsed": sampled.grades.count("unparsed") / total,
        "truncated": sampled.truncated / total,
        "answer_entropy": float(np.mean(entropies)),
        "distinct_completions": float(np.mean(distinct)),
        "styles": style_shares(sampled.texts),
        "examples": sampled.examples(problems, 5),
    }


@torch.no_grad()        # as in model.decode_all
def kl_divergence(model: GPT, reference: GPT, tokenizer: Tokenizer, problems: list[dict], c: Config,
                  prefix: list[int]) -> float:
    """KL(model || reference) of the next token at temperature 1, in nats, the mean over every token of one
    answer of the model to each problem, sampled at --temperature."""
    prompts = [[*prefix, *prompt_ids(tokenizer, p)] for p in problems]
    out = ranks.sample_together(model, prompts, 1, c.max_new, tokenizer.eos, tokenizer.pad,
                                generator(c.seed, "kl"), c.temperature)
    answers = out.completions()

    total = 0.0
    at_once = min(8192, 2 ** 26 // model.config.n_vocab)                 # tokens: logits of a quarter GiB
    for _, ids, at, _ in packed(prompts, answers, tokenizer.pad, at_once, model.device):
        logp = target_logits(model, ids, at).log_softmax(-1)
        other = target_logits(reference, ids, at).log_softmax(-1)
        total += float(F.kl_div(other, logp, log_target=True, reduction="sum"))
    return total / sum(map(len, answers))


def guess_level(problems: list[dict], known: list[dict], k: int) -> float:
    """pass@k on problems of answers drawn by their frequency among other, known problems."""
    answers = Counter(p["answer"] for p in known)
    shares = np.array([answers[p["answer"]] / len(known) for p in problems])
    return float(np.mean(1 - (1 - shares) ** k))


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
def score_rows(model: GPT, contexts: Ids, continuations: Ids, pad: int,
               tokens: int = 8192) -> tuple[list[float], list[bool]]:
    """Per row: log-likelihood of the continuation given the context, and whether greedy decoding gives it."""
    longest = max(len(a) + len(b) for a, b in zip(contexts, continuations))
    require(longest <= model.config.context,
            f"a benchmark item has {longest} tokens, more than the model's context of {model.config.context}")
    sums = [0.0] * len(contexts)
    exact = [False] * len(contexts)
    for rows, ids, at, wanted in packed(contexts, continuations, pad, tokens, model.device):
        logits = target_logits(model, ids, at)
        logp = logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1)
        hit = (logits.argmax(-1) == wanted).float()
        logp, hit = torch.stack((logp, hit)).cpu()                       # one wait
        sizes = [len(continuations[r]) for r in rows]
        for r, lp, h in zip(rows, logp.split(sizes), hit.split(sizes)):
            sums[r] = float(lp.sum())
            exact[r] = bool(h.all())
    return sums, exact


def measure_benchmarks(model: GPT, tokenizer: Tokenizer, items: list[dict]) -> dict:
    """Task -> accuracy (acc_norm; of two choices acc, of one exact match), standard error, chance, hits."""
    contexts, choices = [], []
    for item in items:
        context = [tokenizer.eos, *tokenizer.encode(item["context"])]
        contexts += [context] * len(item["choices"])
        choices += [tokenizer.encode(choice) for choice in item["choices"]]
    sums, exact = score_rows(model, contexts, choices, tokenizer.pad)

    by_task = defaultdict(list)
    at = 0
    for item in items:
        n = len(item["choices"])
        picked = pick(sums[at:at + n], item["choices"])
        acc, acc_norm = (choice == item["answer"] for choice in picked)
        if n == 1:
            acc = acc_norm = exact[at]
        # two choices differ in a letter or two, whose share of the length must not decide (BLiMP: acc)
        hit = acc_norm if n > 2 else acc
        by_task[item["task"]].append((hit, acc, acc_norm, item["chance"]))
        at += n

    result = {}
    for task, scores in by_task.items():
        hits, accs, acc_norms, chance = np.array(scores).T
        n = len(hits)
        result[task] = {
            "accuracy": hits.mean().item(),
            "stderr": float(hits.std() / max(1, n - 1) ** .5),
            "acc": accs.mean().item(),
            "acc_norm": acc_norms.mean().item(),
            "chance": chance[0].item(),
            "items": n,
            "hits": hits.astype(int).tolist(),
        }
    return result


@torch.inference_mode()
def bits_per_byte(model: GPT, tokenizer: Tokenizer, shard: np.ndarray, blocks: int = 128) -> float:
    """−log-likelihood / (bytes · ln 2) of a shard's first blocks; a block's first token is context only."""
    size = model.config.context
    blocks = min(blocks, len(shard) // size)
    require(blocks > 0, f"the validation shard has {len(shard)} tokens, fewer than one context of {size}")
    ids = torch.from_numpy(shard[:blocks * size].astype(np.int64)).view(blocks, size)
    total = 0.0
    at_once = max(1, min(16, 4096 // size))
    for part in ids.to(model.device).split(at_once):
        logits = model(part[:, :-1]).flatten(0, 1)
        total += float(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))

    text = ids[:, 1:][ids[:, 1:] < tokenizer.eos]                        # EOS stands for no byte of it
    n_bytes = len(tokenizer.encoding.decode_bytes(text.tolist()))
    return total / (n_bytes * math.log(2))


# ---- a whole evaluation ----------------------------------------------------------------------------------
def result_path(checkpoint: str | Path, c: Config) -> Path:
    """8M.val.0shot.json, or 8M.val.0shot-02ddf9ff.json with a hash of the other options that are not the
    defaults and change the result: no evaluation replaces one with other options."""
    changed = {k: v for k, v in asdict(c).items() if v != getattr(Config, k, None)}
    for name in ("checkpoints", "split", "shots", "decode_rows", "device", "threads"):
        changed.pop(name, None)
    key = blake2b(json.dumps(changed, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path(checkpoint).with_suffix(f".{c.split}.{c.shots}shot{'-' + key if changed else ''}.json")


def evaluate(path: str, c: Config) -> dict:
    """Measure one checkpoint and write the result beside it."""
    device = setup(c.device, c.threads)
    model, tokenizer, lineage = load_model(path, device)
    model.decode_rows = c.decode_rows
    _, data_tokenizer, shards = open_data(c.data)
    require(data_tokenizer.sha256 == tokenizer.sha256,
            f"{path}: made with another tokenizer than {c.data} holds")
    if c.reference:                              # it scores the answers of the model
        reference, other, _ = load_model(c.reference, device)
        require(other.sha256 == tokenizer.sha256, f"{c.reference}: has another tokenizer than {path}")
        require(reference.config.context >= model.config.context,
                f"{c.reference}: its context is shorter than that of {path}")
    prefix = solved_examples(tokenizer, c.data, c.shots, c.seed)

    result = {"checkpoint": str(path), "lineage": lineage, "config": asdict(c), "problems": {}}
    for difficulty, chosen in problems_of(c).items():
        measured = measure_problems(model, tokenizer, chosen, c, prefix, f"{Path(path).name} {difficulty}")
        if not c.problem_file:
            known = load_problems(f"{c.data}/train.jsonl", difficulty)
            measured["guess"] = {k: guess_level(chosen, known, k) for k in c.k}
        if c.reference:
            measured["kl"] = kl_divergence(model, reference, tokenizer, chosen, c, prefix)
            measured["kl_reverse"] = kl_divergence(reference, model, tokenizer, chosen, c, prefix)
        result["problems"][difficulty] = measured
    listed = Path(c.data, "benchmarks.jsonl")
    if c.benchmarks and listed.exists():         # not where all general text is real
        items = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        result["benchmarks"] = measure_benchmarks(model, tokenizer, items)
        accuracies = [task["accuracy"] for task in result["benchmarks"].values()]
        result["general_mean"] = float(np.mean(accuracies))
    if c.benchmarks:
        result["bits_per_byte"] = bits_per_byte(model, tokenizer, shards["val_general"])

    out = result_path(path, c)
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
            low, high = m["interval"]
            line = f"  {name:8s}pass@{k:<4d}{m['mean']:7.1%}   [{low:.1%}, {high:.1%}]"
            line += f", sound {d[f'sound@{k}']['mean']:.1%}"
            if "guess" in d:
                line += f", guessing {d['guess'][k]:.1%}"
            lines.append(line)
        for n in sorted(set(d["operations"])):
            of_n = [d["operations"][i] == n for i in range(d["problems"])]
            means = [passes(d, c["k"][0], kind)[of_n].mean() for kind in ("right", "sound")]
            lines.append(f"  {name:8s}{n} operation{'s' * (n > 1)}: pass@{c['k'][0]} {means[0]:.1%}, "
                         f"sound {means[1]:.1%} of {sum(of_n)} problems")
        lines.append(f"  {name:8s}greedy {d['greedy']:.1%}, unparsed {d['unparsed']:.1%}, "
                     f"truncated {d['truncated']:.1%}, answer entropy {d['answer_entropy']:.2f} nats, "
                     f"{d['distinct_completions']:.1f} distinct of {d['samples']}")
        if "kl" in d:
            lines.append(f"  {name:8s}KL to {c['reference']} {d['kl']:.4f} nats per token, "
                         f"from it {d['kl_reverse']:.4f}")
        lines.append(f"  {name:8s}styles " + ", ".join(f"{s} {v:.0%}" for s, v in d["styles"].items()))
    for task, b in result.get("benchmarks", {}).items():
        lines.append(f"  {task:10s}{b['accuracy']:6.1%} ± {b['stderr']:.1%}  (chance {b['chance']:.0%})")
    mean = f"general mean {result['general_mean']:.1%}, " if "general_mean" in result else ""
    if "bits_per_byte" in result:
        lines.append(f"  {mean}general text {result['bits_per_byte']:.3f} bits per byte")
    return "\n".join(lines)


def compare(a: dict, b: dict, seed: int) -> dict:
    """First minus second: pass@k per difficulty and the general mean, each with its paired 95 % interval."""
    gaps = {}
    for difficulty, measured in a["problems"].items():
        for k in a["config"]["k"]:
            for kind, name in (("right", "pass"), ("sound", "sound")):
                gap = passes(measured, k, kind) - passes(b["problems"][difficulty], k, kind)
                gaps[f"{difficulty} {name}@{k}"] = gap
    if "benchmarks" in a:
        gaps["general mean"] = general(a["benchmarks"]) - general(b["benchmarks"])
    differences = {}
    for name, gap in gaps.items():
        means = bootstrap_means(gap, seed)
        differences[name] = (float(gap.mean()), *interval(means))
    return differences


def passes(measured: dict, k: int, kind: str = "right") -> np.ndarray:
    """pass@k (P,) of each problem; with `sound`, of answers that are derived."""
    return np.array([pass_at_k(measured["samples"], n, k) for n in measured[f"{kind}_per_problem"]])


def general(benchmarks: dict) -> np.ndarray:
    """The value (N,) of each item; their mean is the general mean. A hit counts N / (tasks · items of its
    task), which is 1 if all tasks have as many items."""
    hits = [np.array(list(task["hits"]), float) for task in benchmarks.values()]
    n = sum(map(len, hits))
    return np.concatenate([n * x / (len(hits) * len(x)) for x in hits])


def run(c: Config) -> list[dict]:
    """Evaluate each checkpoint; for two, print the paired differences too."""
    check(c)
    setup(c.device, c.threads)                   # before the first tensor
    for path in filter(None, (*c.checkpoints, c.reference)):
        load_model(path)                         # a bad second file is found before the first is measured
    results = [evaluate(path, c) for path in c.checkpoints]
    if len(results) == 2:
        print(f"\n{c.checkpoints[0]} minus {c.checkpoints[1]} (paired 95 % intervals)")
        for name, (mean, low, high) in compare(*results, c.seed).items():
            print(f"  {name:16s}{100 * mean:+6.1f} points  [{100 * low:+.1f}, {100 * high:+.1f}]")
    return results


if __name__ == "__main__":
    main(run, Config)
