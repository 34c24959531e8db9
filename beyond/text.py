"""Reading outside data for data/prepare.py: text and problems.

Text files are read as a stream, a document at a time. Left out: cleaning, filtering, near-duplicates, and any
check that the text does not hold the test problems.
"""
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from checkpoint import UserError, require
from data.arithmetic import ANSWER
from data.tokenizer import EOS

# ---- text ------------------------------------------------------------------------------------------------

SHORT, LONG = 2_000, 8_000      # characters: where a text without separators is cut


def cut(lines: Iterator[str], separated: bool) -> Iterator[str]:
    """Documents of a plain text: the pieces between two '<|endoftext|>' (TinyStories). A file without any is
    cut at the first blank line after SHORT characters, or at the first line end after LONG ones."""
    part = ""
    for line in lines:
        *ends, line = line.split(EOS)
        for end in ends:
            yield part + end
            part = ""
        part += line
        if not separated and (len(part) > LONG or len(part) > SHORT and not line.strip()):
            yield part
            part = ""
    yield part


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with .gz or without."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
        yield from f


def read_parquet(path: Path) -> Iterator[str | None]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: a package is missing: pip install pyarrow") from None
    for batch in ParquetFile(path).iter_batches(1_000, columns=["text"]):
        yield from batch.column(0).to_pylist()


def read_jsonl(path: Path) -> Iterator[str]:
    for i, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()                    # a lone surrogate is not text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}, line {i}: not a JSON object with a "text" in UTF-8') from None
            yield text


def read_file(path: Path) -> Iterator[str | None]:
    """The texts of a .txt or .jsonl file (with .gz or without) or of a .parquet file, unchanged."""
    if path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.name.removesuffix(".gz").endswith(".txt"):
        yield from cut(read_lines(path), any(EOS in line for line in read_lines(path)))
    else:
        yield from read_jsonl(path)


def read_texts(paths: tuple[str, ...]) -> Iterator[str]:
    """The documents of these files, one file after the other, without white space around them or empty ones.
    Raises UserError naming the file that cannot be read."""
    for path in map(Path, paths):
        require(re.fullmatch(r".*\.((txt|jsonl)(\.gz)?|parquet)", path.name) is not None,
                f"--text {path}: must end in .txt, .jsonl (either may end in .gz too) or .parquet")
        try:
            for text in read_file(path):
                if text and text.strip():
                    yield text.strip()
        except UserError:
            raise
        except (OSError, EOFError, ValueError, LookupError, AttributeError, zlib.error) as error:
            raise UserError(f"--text {path}: damaged, truncated, not UTF-8 or without a text column "
                            f"({type(error).__name__}: {str(error)[:200]})") from None


# ---- problems --------------------------------------------------------------------------------------------

def integer(text: str) -> str | None:
    """' 1,000' -> '1000'; None if it is no integer. The form in which arithmetic.grade compares answers."""
    text = text.strip()
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    return text if re.fullmatch(ANSWER, text) and text != "-0" else None


def read_problem(p: dict, annotations: bool) -> dict | None:
    """A line of GSM8K ({"question", "answer": solution ending in '#### 72'}) or of ours, in our form without
    id and split. None if the answer is not an integer; ValueError if a solution ends in another one."""
    whole = p["answer"]
    solutions = p.get("solutions", [whole] if "####" in whole else [])
    answer = integer(whole.split("####")[-1])
    if answer is None:
        return None

    written = []
    for solution in solutions:
        body, _, last = solution.partition("####")
        if integer(last) != answer or body and not body.endswith("\n"):
            raise ValueError(f"a solution does not end in one line '#### {answer}'")
        if not annotations:
            body = re.sub(r"<<[^<>\n]*>>", "", body)
        written.append(f"{body}#### {answer}")
    return {"question": p["question"].strip(), "answer": answer, "solutions": written, "difficulty": "all"}


def key_of(question: str) -> str:
    """The words of a question, by which two are one, whatever the case and the white space."""
    return " ".join(question.lower().split())


def parse_problem(line: bytes, where: str, annotations: bool) -> tuple[dict | None, str, str | None]:
    """(the problem as read_problem has it, its key, the split that the line names) of a line of a file."""
    try:
        content = json.loads(line.decode())
        problem = read_problem(content, annotations)
        key = key_of(content["question"])
        key.encode()                             # a lone surrogate is not text
        if not key:
            raise ValueError("an empty question")
        return problem, key, content.get("split")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not a problem as GSM8K writes it or as we do "
                        f"({type(error).__name__}: {error})"[:400]) from None


def split_of(key: str, from_testfile: bool, has_testfile: bool) -> str:
    """By hash of the question, whatever the order of the lines."""
    bucket = crc32(key.encode()) % 20
    if from_testfile or bucket == 1 and not has_testfile:
        return "test"
    return "val" if bucket == 0 else "train"


def read_problems(paths: tuple[str, ...], annotations: bool) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """(split -> problems, reason -> lines left out) of FILE or of FILE and TESTFILE. 5 % of FILE are for
    validation, and 5 % for test unless there is a TESTFILE."""
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    left_out = Counter({"duplicates": 0, "answers that are not integers": 0})
    seen = set()
    for path in reversed(paths):                 # the problems of TESTFILE are not for training
        for i, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            problem, key, marked = parse_problem(line, f"{path}, line {i}", annotations)
            require(path != paths[0] or marked not in ("val", "test"),
                    f"{path}, line {i}: a {marked} problem; training on it would make every number void")
            if problem is None or key in seen:
                left_out["duplicates" if problem else "answers that are not integers"] += 1
                continue

            seen.add(key)
            split = split_of(key, path != paths[0], len(paths) > 1)
            splits[split].append({"id": f"{split}-{len(splits[split])}", **problem, "split": split})

    for split, problems in splits.items():
        require(bool(problems), f"--problems {','.join(paths)}: no problem is left for {split}; "
                "5 % of FILE are for validation and, without a TESTFILE, 5 % for test")
    return splits, dict(left_out)
