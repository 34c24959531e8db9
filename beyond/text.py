"""Reading outside data for data/prepare.py: text and problems.

Left out: cleaning, filtering, near-duplicates, and any check that the text does not hold the test problems.
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from checkpoint import UserError, require
from data.arithmetic import ANSWER
from data.tokenizer import EOS

LONG = 8_000        # characters: a longer document of a plain text is cut


def cut(lines: Iterator[str]) -> Iterator[str]:
    """Documents of a plain text: the pieces between two '<|endoftext|>' (TinyStories), each cut at the first
    line end after LONG characters."""
    part = ""
    for line in lines:
        *whole, part = (part + line).split(EOS)
        yield from whole
        if len(part) > LONG:
            yield part
            part = ""
    yield part


def read_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """The texts of JSON lines."""
    for i, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
            text.encode()                        # a lone surrogate is not text
        except Exception:                        # anything that a foreign line may raise
            raise UserError(f'{path}, line {i}: not a JSON object with a "text" in UTF-8') from None
        yield text


def read_texts(paths: tuple[str, ...]) -> Iterator[str]:
    """The documents of these files, read as a stream, without white space around them or empty ones.
    UserError naming the file that cannot be read."""
    for path in map(Path, paths):
        require(path.suffix in (".txt", ".jsonl"),
                f"--text {path}: must end in .txt or .jsonl; beyond/README.md converts .gz and .parquet")
        try:
            with open(path, encoding="utf-8-sig") as lines:
                texts = cut(lines) if path.suffix == ".txt" else read_lines(path, lines)
                yield from filter(None, map(str.strip, texts))
        except (OSError, UnicodeError) as error:
            raise UserError(f"--text {path}: no such file, or not UTF-8 ({error})"[:400]) from None


def integer(text: str) -> str | None:
    """' 1,000' -> '1000'; None if it is no integer. The form in which arithmetic.grade compares answers."""
    text = text.strip()
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    return text if re.fullmatch(ANSWER, text) and text != "-0" else None


def read_problem(line: bytes, annotations: bool) -> dict:
    """A line of GSM8K ({"question", "answer": solution ending in '#### 72'}) or of ours, in our form without
    id; its answer is None if it is no integer. ValueError if a solution ends in another one."""
    p = json.loads(line.decode())
    question = p["question"].strip()
    if not question.encode():                    # which a lone surrogate does not survive
        raise ValueError("an empty question")
    whole = p["answer"]
    answer = integer(whole.split("####")[-1])
    solutions = []
    for solution in p.get("solutions", [whole] if "####" in whole else []):
        body, _, last = solution.partition("####")
        if answer and (integer(last) != answer or body and not body.endswith("\n")):
            raise ValueError(f"a solution does not end in one line '#### {answer}'")
        if not annotations:
            body = re.sub(r"<<[^<>\n]*>>", "", body)
        solutions.append(f"{body}#### {answer}")
    return {"question": question, "answer": answer, "solutions": solutions, "difficulty": "all",
            "split": p.get("split")}


def read_problems(paths: tuple[str, ...], annotations: bool) -> tuple[dict, dict]:
    """(split -> problems, reason -> lines left out) of FILE or of FILE and TESTFILE. 5 % of FILE are for
    validation, and 5 % for test unless there is a TESTFILE: by hash of the question, not by its place."""
    splits = {"train": [], "val": [], "test": []}
    left_out = {"duplicates": 0, "answers that are not integers": 0}
    seen = set()
    for path in reversed(paths):                 # the problems of TESTFILE are not for training
        for i, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                problem = read_problem(line, annotations)
            except Exception as error:           # anything that a foreign line may raise
                raise UserError(f"{path}, line {i}: not a problem as GSM8K writes it or as we do "
                                f"({type(error).__name__}: {error})"[:400]) from None
            require(path != paths[0] or problem["split"] not in ("val", "test"), f"{path}, line {i}: a "
                    f"{problem['split']} problem; training on it would make every number void")

            key = " ".join(problem["question"].lower().split())          # without case and white space
            if problem["answer"] is None or key in seen:
                left_out["duplicates" if problem["answer"] else "answers that are not integers"] += 1
                continue
            seen.add(key)
            bucket = crc32(key.encode()) % 20
            split = "val" if bucket == 0 else "train"
            if path != paths[0] or bucket == 1 and len(paths) == 1:
                split = "test"
            splits[split].append({"id": f"{split}-{len(splits[split])}", **problem, "split": split})

    for split, problems in splits.items():
        require(bool(problems), f"--problems {','.join(paths)}: no problem is left for {split}; "
                "5 % of FILE are for validation and, without a TESTFILE, 5 % for test")
    return splits, left_out
