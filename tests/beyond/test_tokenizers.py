"""beyond/tokenizers.py: Hugging Face's tokenizers split every text into our tokens; a vocabulary that cannot
be taken over is refused."""
import json
import random
from pathlib import Path

import pytest
import worlds
from test_tokenizer import NASTY, random_text

import evaluate
from beyond.tokenizers import open_tokenizer, to_huggingface
from checkpoint import UserError, load_checkpoint
from data import prepare
from data.problems import open_data
from data.tokenizer import EOS, PAD, PATTERN, Tokenizer, train_tokenizer

try:
    import tokenizers
except ImportError:
    tokenizers = None
needs_tokenizers = pytest.mark.skipif(tokenizers is None, reason="needs Hugging Face's tokenizers")

OPTIONS = worlds.TINY_OPTIONS | dict(vocab_size=300)
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")                   # of OLMo-2's tokenizer
LOOK_ALIKES = [EOS, PAD, "<|endoftext", "endoftext|>", "<|endoftext|>>", "< |endoftext|>", "<|pad|><|pad|>",
               "<|im_start|>", "<|EndOfText|>", "<s>", "</s>", "[UNK]", "\u0120", "Ġthe", "Ċ", "ĠĠ"]
EVERY = "".join(map(chr, (*range(0x800), *range(0x800, 0xd800, 64), *range(0xe000, 0x110000, 4096))))


def few_letters() -> Tokenizer:
    """300 tokens over few letters, so that merges overlap in every way."""
    rng = random.Random(0)
    texts = ["".join(rng.choice("aab bc1é\n") for _ in range(200)) for _ in range(20)]
    return train_tokenizer(texts, 300)


def adversarial(seed: int, n: int) -> list[str]:
    """Scripts of all planes, runs of blanks of every kind, digits, letters that stand for bytes in
    tokenizer.json, look-alikes of special tokens, and every byte that UTF-8 uses."""
    rng = random.Random(seed)
    blanks = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u2028\u202f\u3000\u200b\ufeff"

    def some(letters: str, most: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randrange(1, most)))
    kinds = (lambda: some(blanks, 9), lambda: rng.choice(LOOK_ALIKES), lambda: some("aabbc é'sSſ1\n", 30),
             lambda: some(EVERY[:0x180], 6), lambda: random_text(rng),
             lambda: str(rng.randrange(10 ** rng.randrange(1, 15))) + rng.choice(("", "٣", "３", "Ⅷ", "½")))
    pieces = [rng.choice(kinds)() for _ in range(4 * n)]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 8))) for _ in range(n - len(NASTY) - 1)]
    return [*NASTY, EVERY, *texts]


# ---- tokenizer.json --------------------------------------------------------------------------------------

def publish_tokenizer(folder: Path) -> int:
    """Write a tokenizer.json as OLMo-2 has: bytes in GPT-2's order, merges as strings, added tokens of both
    kinds before and after EOS; returns the number of its ordinary tokens."""
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

    content = json.loads(bpe.to_str())
    n = len(content["model"]["vocab"])
    extra = ["<|extra_id_0|>", EOS, "<|fim_prefix|>", "|||PHONE_NUMBER|||", "<|im_start|>", PAD]
    content["added_tokens"] = [
        {"id": n + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": token not in ("<|extra_id_0|>", "|||PHONE_NUMBER|||")}
        for i, token in enumerate(extra)]
    content["model"]["vocab"] |= {token: n + i for i, token in enumerate(extra)}
    pairs = content["model"]["merges"]
    content["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return n


def theirs_of(spec: dict):
    """tokenizers' reading of a spec, told to take special tokens in a text as plain text, as ours does."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_huggingface(spec)))
    theirs.encode_special_tokens = True
    return theirs


@needs_tokenizers
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


@needs_tokenizers
def test_every_token_has_the_same_bytes():
    """Also the 13 bytes that no UTF-8 text contains: tokenizers' own alphabet of 256 letters, in the order of
    the bytes that it gives, is ours."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letter = {}
    for character in EVERY:
        letter |= dict(zip(character.encode(), level.pre_tokenize_str(character)[0][0]))
    ours = few_letters()
    theirs = theirs_of(ours.spec)
    assert len(letter) == 243
    assert {theirs.id_to_token(b) for b in range(256)} == set(level.alphabet())
    for i in range(ours.eos):
        token = ours.encoding.decode_single_token_bytes(i)
        if all(b in letter for b in token):
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

def make(out: Path, tokenizer: Path) -> dict:
    """The manifest of a tiny data set."""
    worlds.quietly(prepare.prepare, prepare.Config(out=str(out), tokenizer=str(tokenizer), **OPTIONS))
    return json.loads((out / "manifest.json").read_text())


def test_the_tokenizer_of_a_checkpoint(byte_tokenizer, answer_tokenizer, tmp_path):
    """--tokenizer CHECKPOINT: shards and problems that fit this checkpoint, which evaluate.py takes; the same
    hash, which it compares, from its tokenizer.json in our form and in Hugging Face's."""
    manifest = make(tmp_path / "d", worlds.base())
    spec = load_checkpoint(worlds.base())["tokenizer"]
    assert manifest["tokenizer_sha256"] == Tokenizer(spec).sha256
    assert open_tokenizer(str(tmp_path / "d" / "tokenizer.json")).sha256 == Tokenizer(spec).sha256
    for ours in (Tokenizer(spec), few_letters(), byte_tokenizer, answer_tokenizer):
        (tmp_path / "theirs.json").write_text(json.dumps(to_huggingface(ours.spec)))
        assert open_tokenizer(str(tmp_path / "theirs.json")).sha256 == ours.sha256
    path = tmp_path / "base.pt"
    path.write_bytes(worlds.base().read_bytes())
    result = worlds.quietly(lambda c: evaluate.evaluate(str(path), c), evaluate.Config(
        (str(path),), data=str(tmp_path / "d"), n_problems=2, n_samples=2, k=(1,), max_new=4, threads=1))
    assert result["bits_per_byte"] > 0


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    """More than 65,536 tokens (here: every pair of bytes): the manifest says uint32, and the shards, read as
    it says, are the texts."""
    spec = {"pattern": PATTERN, "merges": [[a, b] for a in range(256) for b in range(256)]}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    manifest = make(tmp_path / "d", tmp_path / "t.json")
    assert (manifest["dtype"], manifest["n_vocab"]) == ("uint32", 65_794)
    assert (tmp_path / "d" / "train.bin").stat().st_size == 4 * OPTIONS["tokens"]
    _, tokenizer, shards = open_data(str(tmp_path / "d"))
    ids = shards["train"].tolist()
    assert ids.count(65_792) > 20
    text = tokenizer.decode(ids)
    assert "How many" in text and text.isprintable() is False and text.isascii()
