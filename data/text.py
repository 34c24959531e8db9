"""What comes from outside, for prepare.py: real text, real problems, and tokenizers of others.

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

from checkpoint import UserError, load_checkpoint, require
from data.tokenizer import EOS, Tokenizer, from_huggingface, from_tiktoken

# ---- text ------------------------------------------------------------------------------------------------

SHORT, LONG = 2_000, 8_000      # characters: where a text without separators is cut


def cut(lines: Iterator[str], separated: bool) -> Iterator[str]:
    """Documents of a plain text: what stands between two '<|endoftext|>' (TinyStories). A file without any
    is cut at the first blank line after SHORT characters, or at the first line end after LONG ones."""
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


def read_file(path: Path) -> Iterator[str]:
    """The texts of a .txt or .jsonl file (with .gz or without) or of a .parquet file, as they stand there."""
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f"{path}: a package is missing: pip install pyarrow") from None
        for batch in ParquetFile(path).iter_batches(1_000, columns=["text"]):
            yield from batch.column(0).to_pylist()
        return

    def lines() -> Iterator[str]:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            yield from f
    if path.name.removesuffix(".gz").endswith(".txt"):
        yield from cut(lines(), any(EOS in line for line in lines()))
        return
    for i, line in enumerate(lines(), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()                    # a lone surrogate is not text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}, line {i}: not a JSON object with a "text" in UTF-8') from None
            yield text


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
    """' 1,000' -> '1000'; None if it is no integer. The form in which evaluate.grade compares answers."""
    text = text.strip()
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    return text if re.fullmatch(r"0|-?[1-9][0-9]*", text) else None


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
        written.append((body if annotations else re.sub(r"<<[^<>\n]*>>", "", body)) + f"#### {answer}")
    return {"question": p["question"].strip(), "answer": answer, "solutions": written, "difficulty": "all"}


def key_of(question: str) -> str:
    """What makes two questions one: their words, whatever the case and the white space."""
    return " ".join(question.lower().split())


def read_problems(paths: tuple[str, ...], annotations: bool) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """(split -> problems, reason -> lines left out) of FILE or of FILE and TESTFILE. 5 % of FILE are for
    validation, and 5 % for test unless there is a TESTFILE, by hash of the question, whatever the order."""
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    left_out, seen = Counter({"duplicates": 0, "answers that are not integers": 0}), set()
    for path in reversed(paths):                 # what stands in TESTFILE is not for training
        for i, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode())
                problem, marked = read_problem(content, annotations), content.get("split")
                key = key_of(content["question"])
                key.encode()                     # a lone surrogate is not text
                if not key:
                    raise ValueError("an empty question")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f'{path}, line {i}: not a problem as GSM8K writes it or as we do '
                                f'({type(error).__name__}: {error})'[:400]) from None
            require(path != paths[0] or marked not in ("val", "test"),
                    f"{path}, line {i}: a {marked} problem; training on it would make every number void")
            if problem is None or key in seen:
                left_out["duplicates" if problem else "answers that are not integers"] += 1
                continue
            seen.add(key)
            bucket = crc32(key.encode()) % 20
            split = ("test" if path != paths[0] or bucket == 1 and len(paths) == 1
                     else "val" if bucket == 0 else "train")
            splits[split].append({"id": f"{split}-{len(splits[split])}", **problem, "split": split})
    for split, problems in splits.items():
        require(bool(problems), f"--problems {','.join(paths)}: no problem is left for {split}; "
                "5 % of FILE are for validation and, without a TESTFILE, 5 % for test")
    return splits, dict(left_out)


# ---- tokenizers ------------------------------------------------------------------------------------------

def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a checkpoint or of a tokenizer.json (ours, or one of OLMo-2's kind from Hugging Face),
    or one of tiktoken's by its name."""
    try:
        if Path(name).suffix == ".pt":
            return Tokenizer(load_checkpoint(name)["tokenizer"])
        if not Path(name).is_file():
            return Tokenizer(from_tiktoken(name))
        spec = json.loads(Path(name).read_bytes())
        return Tokenizer(from_huggingface(spec) if "model" in spec else spec)
    except UserError:
        raise
    except Exception as error:                   # whatever a foreign dict or the network may cause
        raise UserError(f"--tokenizer {name}: no tokenizer.json, no checkpoint (.pt), no vocabulary that "
                        f"tiktoken knows and can download; offline? ({type(error).__name__}: {error})"[:300]
                        ) from None
