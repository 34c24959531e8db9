"""beyond/text.py and data sets made with it: every document and problem of the files is read, the held-out
ones are held out, and every fault ends in one clear line."""
import functools
import hashlib
import json
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import worlds
from test_data import make

from beyond.text import read_problems, read_texts
from checkpoint import UserError
from data import prepare
from data.arithmetic import grade
from data.problems import load_problems, open_data
from data.tokenizer import EOS, Tokenizer

def read(folder: Path, shard: str) -> list[str]:
    return worlds.texts(Tokenizer.load(folder / "tokenizer.json"), folder / shard)


@functools.cache
def stories(n: int = 400) -> list[str]:
    """Different short texts with line breaks and letters beyond ASCII."""
    rng = random.Random(0)
    words = "the a cat dog señor naïve runs sleeps, and then saw “home” 日本 12 7".split()
    return [f"Story {i}.\n" + " ".join(rng.choices(words, k=rng.randint(5, 30))) + "." for i in range(n)]


@pytest.fixture
def story_file(tmp_path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{EOS}\n".join(stories()) + f"\n{EOS}\n", encoding="utf-8")
    return str(path)


# ---- reading text ----------------------------------------------------------------------------------------

def read_text(path: Path, text: str) -> list[str]:
    """The documents of a file with this text."""
    path.write_text(text, encoding="utf-8")
    return list(read_texts((str(path),)))


def test_a_text_is_split_where_its_documents_end(tmp_path):
    """TinyStories' convention, by hand: at '<|endoftext|>' wherever it stands; empty documents and the white
    space around a document go, line breaks inside stay. A long document is cut into pieces of 8,000
    characters or a little more, which end where a line does; nothing is lost."""
    whole = "\n\n".join(["a line"] * 900)
    found = read_text(tmp_path / "t.txt", f"\n one\n\ntwo \n{EOS}\n{EOS}three{EOS}{whole}{EOS}four\n")
    assert found == ["one\n\ntwo", "three", whole, "four"]
    rng = random.Random(1)
    long = "\n".join("x" * rng.randint(1, 60) for _ in range(2_000))
    for start in ("", f"one{EOS}"):
        pieces = read_text(tmp_path / "t.txt", start + long)[start != "":]
        assert "\n".join(pieces) == long and len(pieces) > 4
        assert all(8_000 <= len(piece) < 8_062 for piece in pieces[:-1])


def test_both_forms_of_file_give_the_same_documents(story_file, tmp_path):
    """JSON lines may be empty and have other keys; several files are read one after the other."""
    lines = [json.dumps({"text": text, "id": 3}) + "\n\n" for text in stories()]
    (tmp_path / "s.jsonl").write_text("".join(lines))
    (tmp_path / "a.txt").write_text(EOS.join(stories()[:200]))
    (tmp_path / "b.jsonl").write_text("".join(lines[200:]))
    for names in ("stories.txt", "s.jsonl", "a.txt b.jsonl"):
        assert list(read_texts(tuple(str(tmp_path / name) for name in names.split()))) == stories(), names


@pytest.mark.parametrize("name", ["t.txt.gz", "t.parquet", "t"])
def test_another_form_of_file_is_refused(name, tmp_path):
    """The line names the file, and the page on which its conversion stands."""
    with pytest.raises(UserError, match=rf"{name}: must end in .txt or .jsonl; beyond/README.md"):
        read_text(tmp_path / name, "one")


@pytest.mark.parametrize("separator", [f"\n{EOS}\n", "\n\n"])
def test_a_large_text_is_not_loaded_whole(separator, tmp_path):
    """A file of 20 MB passes through less than 1 MB of memory."""
    path = tmp_path / "t.txt"
    path.write_text(separator.join(["word " * 200] * 20_000))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    n = sum(1 for _ in read_texts((str(path),)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n >= 2_000 and peak < 1e6


# ---- text in the shards ----------------------------------------------------------------------------------

def test_the_shards_hold_the_text(story_file, tmp_path):
    """With --text alone the general text is the file's; no document is in train and val (1 in 50 by CRC-32)
    or twice in one; benchmarks, which ask for the generated world, are not there."""
    made = make(tmp_path / "d", text=(story_file,), math_fraction=0., tokens=9_000, val_tokens=300)
    train, val = read(tmp_path / "d", "train.bin"), read(tmp_path / "d", "val_general.bin")
    assert len(train) > 80 and val
    assert set(train) | set(val) <= set(stories())
    assert len(set(train)) == len(train)
    assert all(crc32(text.encode()) % 50 for text in train)
    assert not any(crc32(text.encode()) % 50 for text in val)
    assert made["benchmarks"] == {} and not (tmp_path / "d" / "benchmarks.jsonl").exists()


@pytest.mark.parametrize("math, share", [(.3, 1.), (.3, .5), (0., .25)])
def test_the_mixture_with_text_is_as_asked(math, share, story_file, tmp_path):
    """--math-fraction is the share of arithmetic in train.bin, --text-share that of the text in the rest: by
    tokens, within two documents; benchmarks are there if the generated world is."""
    made = make(tmp_path / "d", text=(story_file,), math_fraction=math, text_share=share, tokens=12_000,
                val_tokens=200)
    tokenizer, size = Tokenizer.load(tmp_path / "d" / "tokenizer.json"), Counter()
    for text in read(tmp_path / "d", "train.bin"):
        kind = "real" if text in set(stories()) else "arithmetic" if "How many" in text else "general"
        size[kind] += len(tokenizer.encode(text)) + 1
    assert size["arithmetic"] / 12_000 == pytest.approx(math, abs=.03)
    assert size["real"] / 12_000 == pytest.approx((1 - math) * share, abs=.03)
    assert (size["general"] > 0) == (share < 1) == (len(made["benchmarks"]) == 7)


def test_a_text_that_runs_out(story_file, tmp_path):
    """Nothing is repeated in silence: the line names the --tokens for which the text is just enough."""
    options = dict(text=(story_file,), math_fraction=.25, val_tokens=100)
    with pytest.raises(UserError, match="enough for --tokens [0-9]+, not for 1000000") as error:
        make(tmp_path / "d", tokens=1_000_000, **options)
    most = int(re.search(r"--tokens (\d+)", str(error.value))[1])
    with pytest.raises(UserError, match=f"--tokens {most}, not for"):
        make(tmp_path / "d", tokens=most + 200, **options)
    assert not list(tmp_path.glob("d*"))
    make(tmp_path / "d", tokens=most, **options)
    with pytest.raises(UserError, match=r"val_general\.bin.*--val-tokens \d+, not for 50000"):
        make(tmp_path / "e", text=(story_file,), tokens=1_000, val_tokens=50_000)


def test_the_tokenizer_is_trained_on_the_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(f"\n{EOS}\n".join(f"number {i} zyxwvu zyxwvu" for i in range(3_000)))
    make(tmp_path / "d", text=(str(path),), val_tokens=100)
    assert len(Tokenizer.load(tmp_path / "d" / "tokenizer.json").encode(" zyxwvu")) == 1


# ---- the same bytes --------------------------------------------------------------------------------------

GOLDEN = {"benchmarks.jsonl": "41db9e8e9a3a19ce", "test.jsonl": "f5e7dd17e4025b5a",
          "tokenizer.json": "d9ef16c062b56a3e", "train.bin": "e4b29111cffa479c",
          "train.jsonl": "ab3312231101a48d", "val.jsonl": "b7ef6b1b61a2abd7",
          "val_arithmetic.bin": "04570f4b3c573256", "val_general.bin": "b1f8ef283af638eb"}


def test_the_default_data_set_is_what_it_was(tmp_path):
    """The published results were computed on data made before --text and its like existed: these sums are of
    that code. Nothing in beyond/ is read for it."""
    sums = make(tmp_path / "d")["sha256"]
    assert {name: sums[name][:16] for name in GOLDEN} == GOLDEN


def test_the_same_files_write_the_same_bytes(story_file, problem_file, tmp_path):
    """Same options, same files, same bytes, and the manifest has the sha256 of each file that was read; a
    second call changes nothing; when a file has changed, it says so."""
    options = dict(text=(story_file,), problems=(problem_file,), val_tokens=100)
    manifest = make(tmp_path / "a", **options)
    assert manifest["inputs"] == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
                                  for path in (story_file, problem_file)}
    make(tmp_path / "b", **options)
    before = worlds.snapshot(tmp_path / "a")
    assert worlds.snapshot(tmp_path / "b") == before
    make(tmp_path / "a", **options)
    assert worlds.snapshot(tmp_path / "a") == before
    with open(story_file, "a") as f:
        f.write("one more")
    with pytest.raises(UserError, match=r"stories\.txt: changed"):
        make(tmp_path / "a", **options)


def test_a_folder_made_before_these_options_is_whole(tmp_path, capsys):
    """Its manifest lacks them: they had the default's value; any other asks for another data set."""
    manifest = make(tmp_path / "d")
    for name in ("text", "text_share", "tokenizer", "problems", "annotations"):
        del manifest["config"][name]
    del manifest["dtype"]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    prepare.prepare(prepare.Config(out=str(tmp_path / "d"), **worlds.TINY_OPTIONS))
    assert "complete" in capsys.readouterr().out
    assert open_data(str(tmp_path / "d"))[2]["train"].dtype == np.uint16
    with pytest.raises(UserError, match="annotations"):
        make(tmp_path / "d", annotations=True)


# ---- problems --------------------------------------------------------------------------------------------

def gsm(i: int, question: str = "", answer: str = "") -> dict:
    """A line as GSM8K publishes them; its annotations and its thousands are there."""
    k, n = i * 1000, i * 2001
    return {"question": question or f"Ann has {i} pens and buys  2 boxes of {k:,}. How many?",
            "answer": f"The boxes have 2*{k}=<<2*{k}={2 * k}>>{2 * k:,} pens.\n"
                      f"In all {i}+{2 * k}=<<{i}+{2 * k}={n}>>{n}.\n#### {answer or f'{n:,}'}"}


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def problem_file(tmp_path) -> str:
    return write(tmp_path / "problems.jsonl", [gsm(i) for i in range(1, 201)])


@pytest.mark.parametrize("annotations, step, last", [
    (False, "", ""), (True, "<<2*7000=14000>>", "<<7+14000=14007>>")], ids=["without", "with annotations"])
def test_a_published_problem_becomes_ours(problem_file, annotations, step, last):
    """By hand: annotations go (or stay, if asked), thousands lose their commas in the answer and in the final
    line, nothing else changes. The scorer, which is the reward, calls every solution right."""
    splits, _ = read_problems((problem_file,), annotations)
    problems = sum(splits.values(), [])
    (p,) = [p for p in problems if "Ann has 7 pens" in p["question"]]
    assert (p["answer"], p["difficulty"]) == ("14007", "all")
    assert p["question"] == "Ann has 7 pens and buys  2 boxes of 7,000. How many?"
    assert p["solutions"] == [f"The boxes have 2*7000={step}14,000 pens.\nIn all 7+14000={last}14007.\n"
                              "#### 14007"]
    assert len(problems) == 200
    assert all(grade(s, p["answer"]) == "right" for p in problems for s in p["solutions"])


def test_our_own_problems_pass_through(tmp_path):
    """A file in our form: question, answer and all solutions are as they were."""
    lines = [{"question": f"{i}+{i}?", "answer": str(2 * i),
              "solutions": [f"{i}+{i}={2 * i}\n#### {2 * i}", f"#### {2 * i}"]} for i in range(60)]
    marked = [line | {"difficulty": "hard", "split": "train"} for line in lines]
    splits, _ = read_problems((write(tmp_path / "o.jsonl", marked),), False)
    found = sorted(sum(splits.values(), []), key=lambda p: int(p["answer"]))
    for p, line in zip(found, lines, strict=True):
        assert line.items() <= p.items() and p["difficulty"] == "all"
    for split, problems in splits.items():
        assert [p["id"] for p in problems] == [f"{split}-{i}" for i in range(len(problems))]
        assert {p["split"] for p in problems} == {split}


def test_problems_are_held_out(problem_file, tmp_path):
    """Some for each split, whatever the order of the file and the other problems in it."""
    splits, left_out = read_problems((problem_file,), False)
    assert [*splits] == ["train", "val", "test"] and min(map(len, splits.values())) > 3
    assert len(splits["train"]) > 150 and left_out == {"duplicates": 0, "answers that are not integers": 0}
    lines = [gsm(i) for i in range(201, 1, -1)]
    again, _ = read_problems((write(tmp_path / "again.jsonl", lines),), False)
    where = {p["question"]: split for split in splits for p in splits[split]}
    assert all(where.get(p["question"], split) == split for split in again for p in again[split])


def test_duplicates_are_dropped_and_counted(tmp_path):
    """The same question in other case and white space, in one file or in TESTFILE too, is one problem; those
    of TESTFILE are not for training, and the test problems are TESTFILE's."""
    lines = [gsm(i) for i in range(1, 101)]
    shouted = [gsm(i, question=gsm(i)["question"].upper() + "\n") for i in range(1, 11)]
    train, test = write(tmp_path / "a.jsonl", lines + shouted), write(tmp_path / "b.jsonl", shouted[:5])
    splits, left_out = read_problems((train,), False)
    assert left_out["duplicates"] == 10 and sum(map(len, splits.values())) == 100
    splits, left_out = read_problems((train, test), False)
    assert left_out["duplicates"] == 15
    assert [p["question"] + "\n" for p in splits["test"]] == [p["question"] for p in shouted[:5]]
    sets = [{" ".join(p["question"].upper().split()) for p in problems} for problems in splits.values()]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 100


def test_answers_that_are_not_integers_are_counted(tmp_path):
    """The scorer compares integers only: 2.5, 1/2 and $3 are left out and counted; -1,000 and 0 are not."""
    answers = ("2.5", "1/2", "$3", "07", "1,00", "٣", "?", "-0")
    odd = [gsm(101 + i, answer=answer) for i, answer in enumerate(answers)]
    good = [gsm(201, answer="-1,000"), gsm(202, answer=" 0")]
    path = write(tmp_path / "g.jsonl", [gsm(i) for i in range(1, 101)] + odd + good)
    splits, left_out = read_problems((path,), False)
    assert left_out == {"duplicates": 0, "answers that are not integers": 8}
    answers = Counter(p["answer"] for problems in splits.values() for p in problems)
    assert sum(answers.values()) == 102 and answers["-1000"] == answers["0"] == 1


def test_a_problem_without_difficulty_belongs_to_each(tmp_path):
    """rl.py and sft.py ask for easy ones by default: real problems, which are neither, serve them too."""
    lines = [{"question": q, "answer": "3"} | ({"difficulty": d} if d else {})
             for q, d in zip("abcd", ("", "all", "easy", "hard"))]
    path = write(tmp_path / "p.jsonl", lines)
    for difficulty, expected in (("easy", "abc"), ("hard", "abd"), ("all", "abcd")):
        assert "".join(p["question"] for p in load_problems(path, difficulty)) == expected


def test_the_whole_way_on_real_data(story_file, problem_file, tmp_path, monkeypatch):
    """With the default --difficulty: bits per byte and the problems are reported, a general mean is not."""
    make(tmp_path / "d", text=(story_file,), problems=(problem_file,), val_tokens=300)
    monkeypatch.chdir(tmp_path)
    base = "base/0.000768M.pt"
    few = "--max-new 8 --eval-problems 2 --eval-samples 2"
    for command in (
            "pretrain.py --out base --size 0.3M --context 192 --batch 2 --micro-batch 2 --tokens 768",
            f"sft.py --init {base} --teacher native --out sft --n-train 8 --epochs 1 --batch 4 {few}",
            f"rl.py --init sft/final.pt --out rl --n-problems 2 --rollouts 2 --steps 1 {few}",
            f"evaluate.py rl/final.pt {base} --split test --n-problems 2 --n-samples 2 --k 1"):
        done = worlds.run_here(*command.split(), "--data", "d", "--threads", 1)
        assert done.status == 0, done.errors
    assert "bits per byte" in done.out and "general mean" not in done.out and "all pass@1" in done.out
    result = json.loads(next(Path("rl").glob("final.test.0shot-*.json")).read_text())
    assert result["problems"]["all"]["problems"] == 2 and result["bits_per_byte"] > 0
    assert "benchmarks" not in result and "general_mean" not in result
