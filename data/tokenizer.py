"""Byte-level BPE: trained here in a few lines, run by tiktoken, stored as our own JSON.

ids 0..255 are the bytes, 256+i is merge i, and the special tokens come last: EOS (ends every document and
every answer) and PAD (fills rows, never a target). Digits are single tokens, since the splitting pattern
isolates them. `encode` treats its input as plain text, so no text can inject a special token.
"""
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken

# covers every string: tiktoken drops what none matches
PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOS = "<|endoftext|>"
PAD = "<|pad|>"


def train_bpe(texts: list[str], vocab_size: int) -> list[list[int]]:
    """Merges [[left id, right id], ...] in order of creation: always the most frequent adjacent pair
    (Sennrich et al. 2016), ties to the smaller ids. Stops early if no pair occurs twice."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    pieces = {word: list(word.encode()) for word in words}
    pairs = Counter()                            # how often each pair occurs
    found = defaultdict(set)                     # words in which it ever did
    def count(word: str, sign: int) -> None:
        for pair in zip(pieces[word], pieces[word][1:]):
            pairs[pair] += sign * words[word]
            found[pair].add(word)

    for word in words:
        count(word, 1)
    merges = []
    for new in range(256, vocab_size - 2):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[best] < 2:
            break
        merges.append(list(best))
        for word in found.pop(best):             # a merge touches these words only
            count(word, -1)
            ids = pieces[word]
            for i in range(len(ids)):            # it shrinks: the last slices are shorter, or empty
                if tuple(ids[i:i + 2]) == best:
                    ids[i:i + 2] = [new]
            count(word, 1)
    return merges


class Tokenizer:
    """tiktoken around our merges. `spec` is a plain dict (pattern, merges), which checkpoints carry along;
    one from elsewhere (beyond/) has `bytes`, those behind ids 0..255, and `special` (text -> id) too."""

    def __init__(self, spec: dict):
        self.spec = spec
        tokens = [bytes([b]) for b in spec.get("bytes", range(256))]
        for left, right in spec["merges"]:
            tokens.append(tokens[left] + tokens[right])
        if len(set(tokens)) != len(tokens):
            raise ValueError("a merge occurs twice")
        special = spec.get("special", {EOS: len(tokens), PAD: len(tokens) + 1})
        self.eos = special[EOS]
        self.pad = special[PAD]
        self.n_vocab = 1 + max(special.values())
        self.encoding = tiktoken.Encoding(
            "earlybird", pat_str=spec["pattern"],
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
            special_tokens=special)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.spec))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        return cls(json.loads(Path(path).read_text()))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    return Tokenizer({"pattern": PATTERN, "merges": train_bpe(texts, vocab_size)})
