"""Problem files and token shards as the other scripts read them: every file checked before it is used."""
import json
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import UserError, file_sha256, require
from data.arithmetic import ANSWER_IS, grade
from data.tokenizer import Tokenizer
from model import GPT


def open_data(folder: str) -> tuple[dict, Tokenizer, dict[str, np.ndarray]]:
    """(manifest, tokenizer, shard name -> memory-mapped tokens), every file checked by its sha256."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        require(manifest["tokenizer_sha256"] == tokenizer.sha256,
                f"{path / 'tokenizer.json'}: not that of the shards")
        require({"train.bin", "val_general.bin", "val_arithmetic.bin"} <= manifest["shards"].keys(),
                f"{path / 'manifest.json'}: lists not all of the shards; make the data again")
        for name, digest in manifest["sha256"].items():
            require((path / name).is_file(), f"{path / name}: not found, although the manifest lists it")
            require(file_sha256(path / name) == digest, f"{path / name}: changed; make the data again")
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[manifest.get("dtype", "uint16")]
        shards = {Path(name).stem: np.memmap(path / name, dtype, "r") for name in manifest["shards"]}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; run python data/prepare.py --out {folder}") from None
    except (UserError, OSError):
        raise
    except Exception as error:                   # anything that a foreign manifest may raise
        raise UserError(f"{folder}: manifest.json or tokenizer.json is damaged ({error!r})") from None
    return manifest, tokenizer, shards


def load_problems(path: str | Path, difficulty: str = "all", solutions: bool = False) -> list[dict]:
    """Problems of a JSON-lines file; one without difficulty belongs to each. UserError: file, line, fault."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such problem file")
    manifest = path.parent / "manifest.json"
    if manifest.exists():                        # a file of ours: it must be the one that was made
        try:
            known = json.loads(manifest.read_bytes()).get("sha256", {}).get(path.name)
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{manifest}: damaged, or foreign: make the data again, or move it") from None
        require(known in (None, file_sha256(path)), f"{path}: checksum differs from manifest.json")
    problems = []
    for i, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            problem = read_problem(line, f"{path}, line {i}", solutions)
            if difficulty == "all" or problem.get("difficulty", "all") in (difficulty, "all"):
                problems.append(problem)
    require(bool(problems), f"{path}: has no problem of difficulty {difficulty}")
    return problems


def read_problem(line: bytes, where: str, solutions: bool) -> dict:
    """A line of a problem file. UserError if it, or one of its solutions where needed, is not right."""
    try:
        p = json.loads(line.decode())
        json.dumps(p, ensure_ascii=False).encode()           # a lone surrogate is not text
    except (ValueError, RecursionError):
        p = None
    require(isinstance(p, dict), f"{where}: not a JSON object in UTF-8")
    for key in ("question", "answer"):
        require(isinstance(p.get(key), str) and p[key].strip() != "", f"{where}: {key!r} must be a text")
    answer = p["answer"]
    require(grade(f"#### {answer}", answer) == "right", f"{where}: answer {answer[:40]!r} is not {ANSWER_IS}")
    require(isinstance(p.get("difficulty", "all"), str), f"{where}: 'difficulty' must be a text")
    if solutions:
        texts = p.get("solutions")
        some = isinstance(texts, list) and texts
        require(some and all(isinstance(text, str) and grade(text, answer) == "right" for text in texts),
                f"{where}: 'solutions' must be texts that end in the line '#### {answer}'")
    return p


def training_problems(c: Any, model: GPT, tokenizer: Tokenizer,
                      solutions: bool = False) -> tuple[list, list, dict[str, str]]:
    """(training problems, validation problems, file -> sha256) of a Config of rl.py, sft.py or merge.py.
    UserError if the problems are not for training, or do not fit into the model's context."""
    teacher = getattr(c, "teacher", "native")
    name = "train" if teacher == "native" else f"train-{teacher}"
    path = c.problem_file or f"{c.data}/{name}.jsonl"
    known = c.problem_file or teacher == "native" or Path(path).exists()
    require(bool(known), f"{path}: no such problem file; where the problems are not the generated ones, only "
            "--teacher native has solutions")
    val = f"{c.data}/val.jsonl"
    problems = load_problems(path, c.difficulty, solutions)[:c.n_train or None]
    require(all(p.get("split") not in ("val", "test") for p in problems),
            f"{path}: holds validation or test problems; training on them would make every number void")
    validation = load_problems(val, c.difficulty)[:c.eval_problems]
    longest = max(len(prompt_ids(tokenizer, p)) for p in problems + validation)
    require(longest + c.max_new <= model.config.context, f"the longest prompt has {longest} tokens: with "
            f"--max-new {c.max_new} that exceeds the model's context of {model.config.context}")
    return problems, validation, {path: file_sha256(path), val: file_sha256(val)}


def prompt_ids(tokenizer: Tokenizer, problem: dict) -> list[int]:
    """EOS, question, newline: in pretraining, too, every text follows the EOS of another."""
    return [tokenizer.eos, *tokenizer.encode(problem["question"] + "\n")]


def solved_examples(tokenizer: Tokenizer, data: str, shots: int, seed: int) -> list[int]:
    """The ids that --shots puts before every question: solved examples in one style, as in documents of
    several questions."""
    if shots == 0:
        return []
    examples = load_problems(f"{data}/train.jsonl", "easy", solutions=True)
    require(shots <= len(examples), f"--shots {shots}: there are only {len(examples)} examples")
    rng = np.random.default_rng(seed)
    style = rng.integers(4)
    ids = []
    for i in rng.choice(len(examples), shots, replace=False):
        solutions = examples[i]["solutions"]             # in the same order of styles for every problem
        ids += prompt_ids(tokenizer, examples[i])
        ids += tokenizer.encode(solutions[style % len(solutions)])
    return ids
