"""beyond/tokenizers.py: Hugging Face's tokenizers split every text into our tokens; a vocabulary that cannot
be taken over is refused."""
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import worlds
from test_data import make
from test_tokenizer import NASTY, random_text

from beyond.tokenizers import open_tokenizer, to_huggingface
from checkpoint import UserError, load_checkpoint
from data.problems import open_data
from data.tokenizer import EOS, PAD, PATTERN, Tokenizer, train_tokenizer

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")                   # of OLMo-2's tokenizer
PLAIN = "<|extra_id_0|>", "|||PHONE_NUMBER|||"           # its added tokens that are not special
ADDED = PLAIN[0], EOS, "<|fim_prefix|>", PLAIN[1], "<|im_start|>", PAD
LOOK_ALIKES = [EOS, PAD, "<|endoftext", "endoftext|>", "<|endoftext|>>", "< |endoftext|>", "<|pad|><|pad|>",
               "<|im_start|>", "<|EndOfText|>", "<s>", "</s>", "[UNK]", "\u0120", "Ġthe", "Ċ", "ĠĠ"]
EVERY = "".join(map(chr, (*range(0x800), *range(0x800, 0xd800, 64), *range(0xe000, 0x110000, 4096))))


def few_letters() -> Tokenizer:
    """300 tokens over few letters, so that merges overlap in every way."""
    rng = random.Random(0)
    texts = ["".join(rng.choice("aab bc1é\n") for _ in range(200)) for _ in range(20)]
    return train_tokenizer(texts, 300)


def adversarial(seed: int, n: int, without: Iterable[str] = ()) -> list[str]:
    """n texts (but those with one of `without`): scripts of all planes, runs of blanks of every kind, digits,
    letters for bytes in tokenizer.json, look-alikes of special tokens, and every byte that UTF-8 uses."""
    rng = random.Random(seed)
    blanks = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u2028\u202f\u3000\u200b\ufeff"
    alphabets = (blanks, "aabbc é'sSſ1\n", EVERY[:0x180], "0123456789٣３Ⅷ½")
    kinds = (lambda: rng.choices(rng.choice(alphabets), k=rng.randrange(1, 20)),
             lambda: rng.choices(LOOK_ALIKES),
             lambda: random_text(rng))
    pieces = ["".join(rng.choice(kinds)()) for _ in range(4 * n)]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 8))) for _ in range(n - len(NASTY) - 1)]
    return [text for text in (*NASTY, EVERY, *texts) if not any(x in text for x in without)]


# ---- tokenizer.json --------------------------------------------------------------------------------------

def publish_tokenizer(folder: Path) -> int:
    """Write a tokenizer.json as OLMo-2 has: bytes in GPT-2's order, merges as strings, added tokens of both
    kinds before and after EOS; returns the number of its ordinary tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(CL100K), "removed", invert=True),
        byte_level(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    texts = [(worlds.ROOT / name).read_text() for name in ("README.md", "model.py")]
    texts.append(" ".join(str(n * n) for n in range(3_000)))
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=byte_level.alphabet(), show_progress=False, limit_alphabet=256))
    n = bpe.get_vocab_size()
    for token in ADDED:
        special = token not in PLAIN
        bpe.add_tokens([tokenizers.AddedToken(token, normalized=False, special=special)])

    content = json.loads(bpe.to_str())
    content["model"]["vocab"] = bpe.get_vocab()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return n


def theirs_of(spec: dict):
    """tokenizers' reading of a spec, told to take special tokens in a text as plain text, as ours does."""
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(to_huggingface(spec)))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("which", ["few letters", "world", "bytes", "foreign"])
def test_tokenizers_splits_3000_adversarial_strings_alike(tmp_path, byte_tokenizer, which):
    """The same ids from tiktoken and from tokenizers, and the text back, for any text."""
    publish_tokenizer(tmp_path)
    ours = {"few letters": few_letters, "bytes": lambda: byte_tokenizer,
            "world": lambda: Tokenizer.load(worlds.data() / "tokenizer.json"),
            "foreign": lambda: open_tokenizer(str(tmp_path / "tokenizer.json"))}[which]()
    theirs = theirs_of(ours.spec)
    texts = adversarial(7, 3_000)
    assert len(texts) == 3_000
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        assert ours.encode(text) == encoding.ids, text
        assert theirs.decode(encoding.ids, skip_special_tokens=False) == text


def test_every_token_has_the_same_bytes():
    """Also the 13 bytes that no UTF-8 text contains: transformers has the same letter for each byte."""
    letter = pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()
    ours = few_letters()
    theirs = theirs_of(ours.spec)
    for i in range(ours.eos):
        token = ours.encoding.decode_single_token_bytes(i)
        assert theirs.id_to_token(i) == "".join(letter[b] for b in token)
    assert (theirs.id_to_token(ours.eos), theirs.id_to_token(ours.pad)) == (EOS, PAD)


@pytest.mark.parametrize("keys, value, said", [
    (["added_tokens"], [], "ids"), (["added_tokens", 1, "id"], 400, "ids"),
    (["model", "merges"], [["a", "b"], ["a", "a"]], "ids"), (["model"], {"vocab": {}}, "merges"),
    (["normalizer"], {"type": "NFC"}, "normalizer"), (["pre_tokenizer"], {"type": "ByteLevel"}, "pretok"),
    (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True, "splitting"),
    (["pre_tokenizer", "pretokenizers", 0, "invert"], True, "splitting")])
def test_another_kind_of_tokenizer_json_is_refused(keys, value, said, tmp_path):
    """Text would be split into other tokens, or ids stand for others: one line, which names the file."""
    content = to_huggingface(few_letters().spec)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"t.json.*{said}"):
        open_tokenizer(str(tmp_path / "t.json"))


# ---- data made with them ---------------------------------------------------------------------------------

def test_the_tokenizer_of_a_checkpoint(byte_tokenizer, answer_tokenizer, tmp_path):
    """--tokenizer CHECKPOINT: shards and problems that fit this checkpoint, which evaluate.py takes; the same
    hash, which it compares, from its tokenizer.json in our form and in Hugging Face's."""
    manifest = make(tmp_path / "d", tokenizer=str(worlds.base()))
    spec = load_checkpoint(worlds.base())["tokenizer"]
    assert manifest["tokenizer_sha256"] == Tokenizer(spec).sha256
    assert open_tokenizer(str(tmp_path / "d" / "tokenizer.json")).sha256 == Tokenizer(spec).sha256
    for ours in (Tokenizer(spec), few_letters(), byte_tokenizer, answer_tokenizer):
        (tmp_path / "theirs.json").write_text(json.dumps(to_huggingface(ours.spec)))
        assert open_tokenizer(str(tmp_path / "theirs.json")).sha256 == ours.sha256
    path = shutil.copy(worlds.base(), tmp_path)
    options = f"--data {tmp_path / 'd'} --n-problems 2 --n-samples 2 --k 1 --max-new 4 --threads 1"
    done = worlds.run_here("evaluate.py", path, *options.split())
    assert done.status == 0 and "bits per byte" in done.out, done.errors


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    """Beyond 65,536 tokens (here: every pair of bytes) the shards are uint32, and are the texts."""
    spec = {"pattern": PATTERN, "merges": [[a, b] for a in range(256) for b in range(256)]}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    manifest = make(tmp_path / "d", tokenizer=str(tmp_path / "t.json"))
    assert (manifest["dtype"], manifest["n_vocab"]) == ("uint32", 65_794)
    assert (tmp_path / "d" / "train.bin").stat().st_size == 4 * worlds.TINY_OPTIONS["tokens"]
    _, tokenizer, shards = open_data(str(tmp_path / "d"))
    ids = shards["train"].tolist()
    assert ids.count(65_792) > 20
    text = tokenizer.decode(ids)
    assert "How many" in text and text.isprintable() is False and text.isascii()
