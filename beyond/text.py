"""Reading outside data for data/prepare.py: text and problems.

Left out: cleaning, filtering, near-duplicates, and any check that the text does not hold the test problems.
"""
import gzip
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
        *ends, line = line.split(EOS)
        for end in ends:
            yield part + end
            part = ""
        part += line
        if len(part) > LONG:
            yield part
            part = ""
    yield part


def read_file(path: Path) -> Iterator[str | None]:
    """The texts of a .txt or .jsonl file (with .gz or without) or of a .parquet file, read as a stream."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches(1_000, columns=["text"]):
            yield from batch["text"].to_pylist()
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
        if path.name.removesuffix(".gz").endswith(".txt"):
            yield from cut(lines)
            return
        for i, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                text.encode()                    # a lone surrogate is not text
            except Exception:                    # anything that a foreign line may raise
                raise UserError(f'{path}, line {i}: not a JSON object with a "text" in UTF-8') from None
            yield text


def read_texts(paths: tuple[str, ...]) -> Iterator[str]:
    """The documents of these files, one file after the other, without white space around them or empty ones.
    UserError naming the file that cannot be read."""
    for path in map(Path, paths):
        require(re.fullmatch(r".*\.((txt|jsonl)(\.gz)?|parquet)", path.name) is not None,
                f"--text {path}: must end in .txt, .jsonl (either may end in .gz too) or .parquet")
        try:
            for text in read_file(path):
                if text and text.strip():
                    yield text.strip()
        except UserError:
            raise
        except Exception as error:               # anything that a foreign file may raise
            raise UserError(f"--text {path}: damaged, truncated, not UTF-8, no text column; or parquet, but "
                            f"not yet pip install pyarrow? ({type(error).__name__}: {error})"[:400]) from None


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


def read_problems(paths: tuple[str, ...], annotations: bool) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """(split -> problems, reason -> lines left out) of FILE or of FILE and TESTFILE. 5 % of FILE are for
    validation, and 5 % for test unless there is a TESTFILE: by hash of the question, not by its place."""
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
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
