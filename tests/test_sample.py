"""sample.py: a conversation with one checkpoint, the answers of two side by side. Nothing is written."""
import io
import json
from unittest import mock

import pytest
import worlds

import sample
from checkpoint import save_checkpoint
from evaluate import Attempts

# ---- one checkpoint: a conversation -----------------------------------------------------------------------


def test_a_person_can_ask_a_checkpoint():
    """The script prints sizes, lineage and tokens seen, then answers each line until the input ends; a prompt
    that is too long (its end is used), empty or not ASCII is survived."""
    prompts = "Nora has 3 shells. How many are seven?\n\n" + "long " * 300 + "\nЖ 👩 <|endoftext|>\n"
    argv = [worlds.parrot(), "--threads", "1", "--max-new", "12"]
    outcome = worlds.run_process("sample.py", *argv, stdin=prompts)
    assert outcome.status == 0, outcome.errors
    for part in ("parameters", "5 layers", "context 128", "pretrain.py", "sft.py", "1,536"):
        assert part in outcome.out
    answers = outcome.out.split("> ")[1:]
    assert len(answers) == 5   # the last one ends the conversation
    assert "#### 7" in answers[0]
    assert not outcome.errors


def test_a_greedy_answer_repeats():
    """--temperature 0 always takes the most probable token, whatever the seed."""
    argv = [worlds.parrot(), "--threads", "1", "--max-new", "12", "--temperature", "0"]
    twice = 2 * "Nora has 3 shells. How many are seven?\n"
    said = [worlds.run_here("sample.py", *argv, "--seed", seed, stdin=twice).out for seed in (0, 1)]
    answers = {answer for out in said for answer in out.split("> ")[1:3]}
    assert len(answers) == 1


@pytest.mark.parametrize("typed, kept", [("hi", 3), ("", 1), ("x" * 53, 54), ("x" * 54, 54), ("x" * 999, 54)])
def test_a_question_is_asked_after_eos(make_gpt, byte_tokenizer, tmp_path, monkeypatch, typed, kept):
    """The typed text stands after EOS and before a newline, as every question in training; of a text that
    leaves no room for 9 new tokens in the context of 64 the end is kept; with EOS before it that fits."""
    save_checkpoint(tmp_path / "a.pt", make_gpt(vocab_size=320, n_vocab=258), byte_tokenizer, [])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{typed}\n"))
    with mock.patch.object(sample, "sample", wraps=sample.sample) as spy:
        sample.run(sample.Config((str(tmp_path / "a.pt"),), max_new=9, device="cpu", threads=1))
    spy.assert_called_once()
    asked = spy.call_args.args[1]
    assert asked == [[byte_tokenizer.eos, *f"{typed}\n".encode()[-kept:]]]


def test_a_lineage_does_not_command_the_terminal(make_gpt, byte_tokenizer, tmp_path, monkeypatch, capsys):
    """A foreign checkpoint's lineage is spelled out; that of merged weights has no seed (a KeyError once)."""
    stage = dict(script="\x1b[31mred", config={}, tokens=0, updates=0, flops=0, seconds=0.0)
    save_checkpoint(tmp_path / "a.pt", make_gpt(vocab_size=320, n_vocab=258), byte_tokenizer, [stage])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    sample.run(sample.Config((str(tmp_path / "a.pt"),), max_new=9, device="cpu", threads=1))
    printed = capsys.readouterr().out
    assert "x1b[31mred" in printed and "\x1b" not in printed and "seed '-'" in printed


# ---- two checkpoints side by side -------------------------------------------------------------------------

@pytest.fixture
def shown(answering, answer_tokenizer, bigram, tmp_path, monkeypatch, capsys):
    """The output for a model that always says '#### 7' and one that says Z sixty times, each with seven easy
    and three hard problems; the folder must not gain a file."""
    t = answer_tokenizer
    newline, z = (t.encode(c)[0] for c in "\nZ")
    monkeypatch.chdir(tmp_path)
    save_checkpoint("seven.pt", answering(wrong=0.), t, [])
    save_checkpoint("z.pt", bigram({newline: {z: 1.}, z: {z: 1.}}, t.n_vocab), t, [])
    problems = [{"question": f"q{i}", "answer": "7" if i else "8", "difficulty": "easy" if i < 7 else "hard"}
                for i in range(10)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, problems)))

    def run(*checkpoints, **options):
        before = worlds.snapshot(tmp_path)
        capsys.readouterr()
        sample.run(sample.Config(checkpoints, problem_file="p.jsonl", max_new=60, **options))
        assert worlds.snapshot(tmp_path) == before
        return capsys.readouterr().out
    return run


def test_samples_of_two_checkpoints_stand_side_by_side(shown):
    """Question, right answer, and per checkpoint how often which answer was given, with its grade; a long one
    is wrapped within its column: no line is wider than 110."""
    first, *others = shown("seven.pt", "z.pt").strip().split("\n\n")
    assert first.splitlines() == [
        "q0   (easy, answer 8)",
        f"{'seven.pt: 0 of 64 right, 0 sound, 1 different':57s}z.pt: 0 of 64 right, 0 sound, 1 different",
        f"  64 × wrong    {'#### 7'!r:41s}  64 × unparsed '" + 36 * "Z",
        73 * " " + 24 * "Z" + "'"]
    assert [part.split()[0] for part in others] == ["q1", "q2", "q3", "q4", "q7", "q8", "q9"]
    assert all("seven.pt: 64 of 64 right" in part and part.count("Z") == 60 for part in others)


def test_the_options_mean_the_same_as_elsewhere(shown):
    """--n-problems counts problems of each difficulty, --n-samples answers to each."""
    lines = shown("z.pt", "seven.pt", n_problems=1, n_samples=40).splitlines()
    assert lines[1:3] == ["q0   (easy, answer 8)", f"{'z.pt: 0 of 40 right, 0 sound, 1 different':57s}"
                          "seven.pt: 0 of 40 right, 0 sound, 1 different"]
    assert [line.split()[0] for line in lines if line.startswith("q")] == ["q0", "q7"]


def test_samples_show_the_most_frequent_answers_first(shown, answering, answer_tokenizer):
    """Half right, a quarter wrong, a quarter unreadable at T = 1; one seed draws the same for both models."""
    save_checkpoint("mixed.pt", answering(1 / 3, .25), answer_tokenizer, [])
    out = shown("mixed.pt", "mixed.pt", n_samples=256, temperature=1.0)
    lines = out.split("\n\n")[1].splitlines()[1:]
    assert all(line[:53].rstrip() == line[57:] for line in lines)
    title, *answers = (line[57:] for line in lines)
    counts = [int(answer.split()[0]) for answer in answers]
    grades = [answer.split()[2] for answer in answers]
    assert grades[0] == "right"
    assert set(grades) == {"right", "wrong", "unparsed"}
    assert sum(counts) == 256
    assert abs(counts[0] - 128) < 32
    assert title.endswith(f" {counts[0]} of 256 right, 0 sound, 3 different")


def test_sound_answers_and_luck_have_names_and_on_a_terminal_colours(monkeypatch):
    """A right answer without its derivation is luck, with it sound; only a terminal gets the colours."""
    attempts = Attempts(4, ["3+4=7\n#### 7", "#### 7", "#### 7", "#### 8"], ["right"] * 3 + ["wrong"],
                        [True, False, False, False], 0)
    texts = [sample.column("m.pt", attempts, 0, derived, 60) for derived in (True, False)]
    assert [grade for _, grade in texts[0]] == ["", "luck", "sound", "wrong"]
    assert texts[0][0][0] == "m.pt: 3 of 4 right, 1 sound, 3 different"
    assert [grade for _, grade in texts[1]] == ["", "right", "right", "wrong"]
    assert sample.coloured("x", "luck") == "x"
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    assert [sample.coloured("x", grade) for grade in ("", "sound", "luck", "wrong")] == [
        "x", "\033[32mx\033[0m", "\033[33mx\033[0m", "\033[31mx\033[0m"]
