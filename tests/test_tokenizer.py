"""The tokenizer: every text survives, no text can act as a special token, merges are those of byte-level
BPE."""
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
    def piece() -> str:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(NASTY[1:])
        if kind == 1:
            return chr(rng.choice((rng.randrange(0xd800), rng.randrange(0xe000, 0x110000))))
        if kind == 2:
            return chr(rng.randrange(128))
        return rng.choice((" ", "\n", "7", "abc", "Nora has 37 shells."))
    return "".join(piece() for _ in range(rng.randrange(31)))


def test_every_utf8_string_round_trips(tokenizer):
    """Nothing is dropped or changed, whatever the script, the blanks or the code points."""
    rng = random.Random(1)
    for text in NASTY + [random_text(rng) for _ in range(3_000)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_are_the_bytes_of_the_text(tokenizer):
    """The bytes of the tokens concatenate to the UTF-8 of the text, which bits per byte relies on."""
    rng = random.Random(2)
    for text in [random_text(rng) for _ in range(300)]:
        tokens = (tokenizer.encoding.decode_single_token_bytes(i) for i in tokenizer.encode(text))
        assert b"".join(tokens) == text.encode()


def test_digits_are_single_tokens(tokenizer):
    """A number is one token per digit, so that place value can be learned."""
    rng = random.Random(3)
    for number in ["0", "7", "10", "199", *(str(rng.randrange(10 ** 9)) for _ in range(200))]:
        for text in (number, f" {number}", f"x{number}y", f"#### {number}\n"):
            ids = tokenizer.encode(text)
            assert [i for i in ids if 48 <= i < 58] == list(number.encode())
    for left, right in tokenizer.spec["merges"]:
        assert not {left, right} & set(range(48, 58))


def test_no_text_yields_a_special_token(tokenizer):
    """User text can never inject EOS or PAD; only the trainers append them."""
    rng = random.Random(4)
    for text in NASTY + [random_text(rng) + EOS + random_text(rng) for _ in range(500)]:
        assert max(tokenizer.encode(text), default=0) < min(tokenizer.eos, tokenizer.pad)
    assert tokenizer.decode(tokenizer.encode(EOS)) == EOS


def test_special_tokens_are_two_and_apart(tokenizer):
    """Padding is not EOS, and both lie above every ordinary token, inside the vocabulary."""
    assert {tokenizer.eos, tokenizer.pad} == {tokenizer.n_vocab - 2, tokenizer.n_vocab - 1}
    assert tokenizer.decode([tokenizer.eos]) == EOS


def test_prompt_and_solution_are_tokenized_apart_as_together(tokenizer):
    """A prompt followed by its solution gives the tokens of the joined text that pretraining saw: else SFT
    and RL would train on another distribution than pretraining."""
    for split in ("train", "val", "test"):
        for p in worlds.lines(worlds.data() / f"{split}.jsonl"):
            prompt = tokenizer.encode(p["question"] + "\n")
            for solution in p["solutions"]:
                together = tokenizer.encode(p["question"] + "\n" + solution)
                assert prompt + tokenizer.encode(solution) == together


def test_context_and_choice_are_tokenized_apart_as_together(tokenizer):
    """The log-likelihood of a choice is that of the text's own tokens, as the choices begin with their
    space."""
    for item in worlds.lines(worlds.data() / "benchmarks.jsonl"):
        for choice in item["choices"]:
            together = tokenizer.encode(item["context"] + choice)
            assert tokenizer.encode(item["context"]) + tokenizer.encode(choice) == together


def test_merges_of_an_example_done_by_hand():
    """BPE by hand (Sennrich et al. 2016). Words: abab x2, ab x1, bc x2. Pairs: ab 2·2+1 = 5, ba 2, bc 2.
    First ab (256): now (ab)(ab) x2, (ab), bc x2. Pairs: (ab)(ab) 2, bc 2: the smaller ids win, so bc (257).
    Then (ab)(ab) (258). Then no pair is left."""
    a, b, c = b"abc"
    assert train_bpe(["abab", "abab", "ab", "bc", "bc"], 1_000) == [[a, b], [b, c], [256, 256]]


def test_overlapping_pairs_merge_from_left_to_right():
    """aaaaa has the pair aa four times; merged from the left it is (aa)(aa)a, whose most frequent pair is, by
    the smaller ids, a after (aa) or (aa)(aa): both once per word, (256, 97) < (256, 256)."""
    a = ord("a")
    assert train_bpe(["aaaaa", "aaaaa"], 259) == [[a, a]]
    assert train_bpe(["aaaaa", "aaaaa"], 260) == [[a, a], [256, a]]


def slow_bpe(texts: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The textbook: every word as a list of byte strings, all pairs counted anew for each merge."""
    words = [[bytes([x]) for x in word.encode()]
             for text in texts for word in re.findall(r"[0-9]| ?[a-z]+| ?[.]+|\s+", text)]
    rank, merges = {bytes([i]): i for i in range(256)}, []
    while len(merges) < n_merges:
        pairs = Counter((x, y) for w in words for x, y in zip(w, w[1:]))
        x, y = max(pairs, key=lambda p: (pairs[p], -rank[p[0]], -rank[p[1]]))
        if pairs[x, y] < 2:
            break
        rank[x + y] = 256 + len(merges)
        merges.append((x, y))
        for k, w in enumerate(words):
            new, i = [], 0
            while i < len(w):
                if w[i:i + 2] == [x, y]:
                    new.append(x + y)
                    i += 2
                else:
                    new.append(w[i])
                    i += 1
            words[k] = new
    return merges


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_merges_equal_the_textbook_algorithm(seed):
    """The word-count shortcut of train_bpe finds the same merges as counting every occurrence."""
    rng = random.Random(seed)

    def word() -> str:
        return rng.choice("abc") * rng.randrange(1, 4) + rng.choice(("", "bca", "cab"))
    texts = [" ".join(word() for _ in range(40)) + "." for _ in range(10)]
    tokenizer = train_tokenizer(texts, 258 + 30)
    name = [bytes([i]) for i in range(256)]
    for left, right in tokenizer.spec["merges"]:
        name.append(name[left] + name[right])
    found = [(name[left], name[right]) for left, right in tokenizer.spec["merges"]]
    assert len(found) == 30
    assert found == slow_bpe(texts, 30)


def test_encoding_applies_merges_in_rank_order():
    """tiktoken runs our merges as BPE does: lowest rank first. With ab < bc, 'abc' is ab·c and 'xbc' is
    x·bc."""
    tokenizer = Tokenizer({"pattern": PATTERN, "merges": [[97, 98], [98, 99]]})
    assert tokenizer.encode("abc") == [256, 99]
    assert tokenizer.encode("xbc") == [120, 257]


def test_vocabulary_is_as_large_as_asked(tokenizer):
    """--vocab-size counts bytes, merges and the two special tokens."""
    assert tokenizer.n_vocab == 512 == 256 + len(tokenizer.spec["merges"]) + 2


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    """Our own JSON is all there is; a reader in another language can rebuild the tokenizer from it."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert json.loads(path.read_text()) == tokenizer.spec == again.spec
    assert again.sha256 == tokenizer.sha256
    rng = random.Random(5)
    for text in [random_text(rng) for _ in range(300)]:
        assert again.encode(text) == tokenizer.encode(text)


def test_an_overwritten_tokenizer_file_is_read_anew(tmp_path):
    """There is no cache by path: the same file name with other merges gives the other tokenizer."""
    path = tmp_path / "tokenizer.json"
    Tokenizer({"pattern": PATTERN, "merges": [[97, 98]]}).save(path)
    assert Tokenizer.load(path).encode("ab") == [256]
    Tokenizer({"pattern": PATTERN, "merges": [[98, 99]]}).save(path)
    assert Tokenizer.load(path).encode("ab") == [97, 98]


def test_sha256_tells_tokenizers_apart(tokenizer):
    """A checkpoint of another tokenizer is recognized by this hash, so it must depend on merges and
    pattern."""
    merges = [list(m) for m in tokenizer.spec["merges"]]
    merges[7], merges[8] = merges[8], merges[7]
    try:
        swapped = Tokenizer({"pattern": PATTERN, "merges": merges}).sha256
    except Exception:
        swapped = None
    other = Tokenizer({"pattern": PATTERN + "|x", "merges": tokenizer.spec["merges"]}).sha256
    assert len({tokenizer.sha256, swapped, other}) == 3
