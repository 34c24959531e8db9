"""The tokenizer: every text survives, none can act as a special token, merges are those of byte-level BPE."""
import json
import random
import re
from collections import Counter

import pytest
import worlds

from data.tokenizer import EOS, PAD, PATTERN, Tokenizer, train_bpe, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(worlds.data() / "tokenizer.json")


NASTY = [
    "", " ", "  ", "\n", "\r\n", "\t \n\n  x", "a  b   c ", "\0", "a\0b", "'s don't WE'LL", "1,234.5e-6",
    "####", "#### 12\n", "a" * 999, " " * 300, "\n" * 300, "12345678901234567890",
    "é", "e\u0301", "ﷺ", "שלום עולם", "مرحبا ١٢٣", "\u202eabc\u202c", "हिन्दी",
    "한국어", "𝔘𝔫𝔦",
    "👩\u200d👩\u200d👧\u200d👦", "🇩🇪🇫🇷", "１２３", "½²Ⅷ",
    "\ufeffBOM", "\uffff\ufffe", "\U0010ffff", "\u200b\u2028\u2029\u0085\u00a0",
    EOS, PAD, f"{EOS}{EOS}", f"x {EOS}\n{PAD}y", "<|endoftext", "|>"]


def random_text(rng: random.Random) -> str:
    """Up to 30 pieces: nasty strings, single code points of any plane (no surrogates), ASCII."""
    kinds = (lambda: rng.choice(NASTY),
             lambda: rng.choice((" ", "\n", "7", "abc", "Nora has 37 shells.")),
             lambda: chr(rng.randrange(128)),
             lambda: chr(rng.randrange(0xd800)),
             lambda: chr(rng.randrange(0xe000, 0x110000)))
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(31)))


def random_texts(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(n)]


def test_every_utf8_string_round_trips(tokenizer):
    """Nothing is dropped or changed, whatever the script, the blanks or the code points. The bytes of the
    tokens concatenate to the UTF-8 of the text, which bits per byte relies on."""
    for text in NASTY + random_texts(1, 3_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        tokens = map(tokenizer.encoding.decode_single_token_bytes, ids)
        assert b"".join(tokens) == text.encode()


def test_digits_are_single_tokens(tokenizer):
    """A number is one token per digit, so that place value can be learned."""
    rng = random.Random(3)
    for number in ("0", "7", "10", "199", *map(str, rng.sample(range(10 ** 9), 200))):
        for text in (number, f" {number}", f"x{number}y", f"#### {number}\n"):
            ids = tokenizer.encode(text)
            assert [i for i in ids if 48 <= i < 58] == list(number.encode())
    for left, right in tokenizer.spec["merges"]:
        assert not {left, right} & set(range(48, 58))


def test_no_text_yields_a_special_token(tokenizer):
    """User text can never inject EOS or PAD; only the trainers append them."""
    for text in NASTY + [f"{text}{EOS}x" for text in random_texts(4, 500)]:
        assert max(tokenizer.encode(text), default=0) < min(tokenizer.eos, tokenizer.pad)
    assert tokenizer.decode(tokenizer.encode(EOS)) == EOS


def test_the_vocabulary_is_bytes_merges_and_two_special_tokens(tokenizer):
    """--vocab-size counts them all. Padding is not EOS, and both lie above every ordinary token."""
    n = tokenizer.n_vocab
    assert n == 512 == 256 + len(tokenizer.spec["merges"]) + 2
    assert {tokenizer.eos, tokenizer.pad} == {n - 2, n - 1}
    assert tokenizer.decode([tokenizer.eos]) == EOS


@pytest.mark.parametrize("file, prompt, answers", [
    ("train.jsonl", "question", "solutions"),
    ("val.jsonl", "question", "solutions"),
    ("test.jsonl", "question", "solutions"),
    ("benchmarks.jsonl", "context", "choices")])
def test_prompt_and_answer_are_tokenized_apart_as_together(tokenizer, file, prompt, answers):
    """They give the tokens of the joined text that pretraining saw: else SFT and RL would train on another
    distribution, and the log-likelihood of a choice would not be that of the text's own tokens."""
    for line in worlds.lines(worlds.data() / file):
        text = line[prompt] + "\n" * (prompt == "question")
        for answer in line[answers]:
            apart = tokenizer.encode(text) + tokenizer.encode(answer)
            assert apart == tokenizer.encode(text + answer)


def test_merges_of_an_example_done_by_hand():
    """BPE by hand (Sennrich et al. 2016). Words: abab x2, ab x1, bc x2. Pairs: ab 2·2+1 = 5, ba 2, bc 2.
    First ab (256): now (ab)(ab) x2, (ab), bc x2. Pairs: (ab)(ab) 2, bc 2: the smaller ids win, so bc (257).
    Then (ab)(ab) (258). Then no pair is left."""
    a, b, c = b"abc"
    assert train_bpe("abab abab ab bc bc".split(), 1_000) == [[a, b], [b, c], [256, 256]]


def test_overlapping_pairs_merge_from_left_to_right():
    """aaaaa has the pair aa four times; merged from the left it is (aa)(aa)a, whose most frequent pair is, by
    the smaller ids, a after (aa) or (aa)(aa): both once per word, (256, 97) < (256, 256)."""
    a = ord("a")
    assert train_bpe(["aaaaa", "aaaaa"], 259) == [[a, a]]
    assert train_bpe(["aaaaa", "aaaaa"], 260) == [[a, a], [256, a]]


def slow_bpe(text: str, n_merges: int) -> list[list[int]]:
    """The textbook: every word as a string of chr(id), all pairs counted anew for each merge."""
    words = re.findall(r"[0-9]| ?[a-z]+| ?[.]+|\s+", text)
    merges = []
    for i in range(n_merges):
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:]))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append([ord(left), ord(right)])
        words = [word.replace(left + right, chr(256 + i)) for word in words]
    return merges


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_merges_equal_the_textbook_algorithm(seed):
    """The word-count shortcut of train_bpe finds the same merges as counting every occurrence."""
    pieces = "a", "bb", "ab", "cab", "c ", ". "
    text = "".join(random.Random(seed).choices(pieces, k=1_000))
    assert train_tokenizer([text], 258 + 30).spec["merges"] == slow_bpe(text, 30)


def test_encoding_applies_merges_in_rank_order():
    """tiktoken takes the lowest rank first, as BPE does: with ab < bc, 'abc' is ab·c and 'xbc' is x·bc."""
    tokenizer = Tokenizer({"pattern": PATTERN, "merges": [[97, 98], [98, 99]]})
    assert tokenizer.encode("abc") == [256, 99]
    assert tokenizer.encode("xbc") == [120, 257]


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    """Our own JSON is all there is; a reader in another language can rebuild the tokenizer from it. There is
    no cache by path: an overwritten file is read anew."""
    path = tmp_path / "tokenizer.json"
    Tokenizer({"pattern": PATTERN, "merges": [[97, 98]]}).save(path)
    assert Tokenizer.load(path).encode("ab") == [256]
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert json.loads(path.read_text()) == tokenizer.spec == again.spec
    assert again.sha256 == tokenizer.sha256
    for text in random_texts(5, 300):
        assert again.encode(text) == tokenizer.encode(text)


def test_sha256_tells_tokenizers_apart():
    """A checkpoint of another tokenizer is recognized by this hash, so it depends on merges and pattern."""
    merges = [[97, 98], [98, 99]]
    hashes = set()
    for pattern, pairs in (PATTERN, merges), (PATTERN, merges[::-1]), ("x", merges):
        hashes.add(Tokenizer({"pattern": pattern, "merges": pairs}).sha256)
    assert len(hashes) == 3
