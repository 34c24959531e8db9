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
EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_bpe(texts: list[str], vocab_size: int) -> list[list[int]]:
    """Merges [[left id, right id], ...] in order of creation: always the most frequent adjacent pair
    (Sennrich et al. 2016), ties to the smaller ids. Stops early if no pair occurs twice."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    pieces = {word: list(word.encode()) for word in words}
    pairs, found = Counter(), defaultdict(set)   # how often each pair occurs, and in which words it ever did

    def count(word: str, sign: int) -> None:
        for pair in zip(pieces[word], pieces[word][1:]):
            pairs[pair] += sign * words[word]
            found[pair].add(word)
    for word in words:
        count(word, 1)
    merges: list[list[int]] = []
    while 256 + len(merges) + 2 < vocab_size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        new = 256 + len(merges)
        merges.append(list(best))
        for word in found.pop(best):             # a merge touches these words only
            count(word, -1)
            ids, i = pieces[word], 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [new]
                i += 1
            count(word, 1)
    return merges


class Tokenizer:
    """tiktoken around our merges. `spec` is a plain dict (pattern, merges), which checkpoints carry along;
    one from elsewhere (convert.py) has `bytes`, those behind ids 0..255, and `special` (text -> id) too."""

    def __init__(self, spec: dict):
        self.spec = spec
        tokens = [bytes([b]) for b in spec.get("bytes", range(256))]
        for left, right in spec["merges"]:
            tokens.append(tokens[left] + tokens[right])
        if len(set(tokens)) != len(tokens):
            raise ValueError("a merge occurs twice")
        special = spec.get("special", {EOS: len(tokens), PAD: len(tokens) + 1})
        self.eos, self.pad, self.n_vocab = special[EOS], special[PAD], 1 + max(special.values())
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


# ---- tiktoken's own vocabularies -------------------------------------------------------------------------

def from_tiktoken(name: str) -> dict:
    """The spec of one of tiktoken's vocabularies ('gpt2', 'o200k_base'), which tiktoken downloads and caches:
    its ordinary tokens; our EOS and PAD follow them. ValueError if they are not all made by merges."""
    encoding = tiktoken.get_encoding(name)
    ranks = encoding._mergeable_ranks
    tokens, merges = sorted(ranks, key=ranks.get), []
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]      # a merge joins the two parts that the merges before it leave
        while len(parts) > 2:
            places = [min(ranks.get(a + b, ranks[token]), ranks[token]) for a, b in zip(parts, parts[1:])]
            i = places.index(min(places))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append([ranks[part] for part in parts])
    # possessive {1,3}+ matches the same here, but is another thing to Hugging Face's regular expressions
    spec = {"pattern": encoding._pat_str.replace("{1,3}+", "{1,3}"), "merges": merges,
            "bytes": [token[0] for token in tokens[:256]]}
    if Tokenizer(spec).encoding._mergeable_ranks != ranks:
        raise ValueError("its tokens are not bytes and merges alone")
    return spec


# ---- tokenizer.json, as Hugging Face's tokenizers read it ------------------------------------------------

HIDDEN = [b for b in range(256) if b == 32 or not chr(b).isprintable()]
# byte -> the letter for it in tokenizer.json (GPT-2): itself if that can be seen, else one beyond Latin-1
LETTERS = [chr(256 + HIDDEN.index(b) if b in HIDDEN else b) for b in range(256)]


def to_huggingface(spec: dict) -> dict:
    """A spec as tokenizer.json. Special tokens stand in its vocabulary too, which fixes their ids."""
    tokens = [LETTERS[b] for b in spec.get("bytes", range(256))]
    for left, right in spec["merges"]:
        tokens.append(tokens[left] + tokens[right])
    special = spec.get("special", {EOS: len(tokens), PAD: len(tokens) + 1})
    split = {"type": "Split", "pattern": {"Regex": spec["pattern"]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": token, **added} for token, i in special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)} | special,
                      "merges": [[tokens[left], tokens[right]] for left, right in spec["merges"]]}}


def from_huggingface(content: dict) -> dict:
    """The spec of a tokenizer.json in which merge i makes token 256+i, as in OLMo-2's and in ours. ValueError
    (or what a failed lookup raises) for any other kind: text would be split into other tokens."""
    split, level = content["pre_tokenizer"]["pretokenizers"]
    if (split["behavior"], split["invert"]) == ("Removed", True):
        split = split | {"behavior": "Isolated", "invert": False}        # the same, as the pattern covers all
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"] | special
    token = {i: token for token, i in vocab.items()}
    pairs = [x.split(" ") if isinstance(x, str) else x for x in content["model"]["merges"]]
    n = 256 + len(pairs)
    spec = {"pattern": split["pattern"]["Regex"], "merges": [[vocab[a], vocab[b]] for a, b in pairs],
            "bytes": [LETTERS.index(token[i]) for i in range(256)], "special": special}
    again = to_huggingface(spec)
    if again["model"]["vocab"] != vocab or sorted(token) != list(range(n + len(special))):
        raise ValueError("ids are not those of the bytes, then the merges, then the special tokens")
    if again["pre_tokenizer"]["pretokenizers"] != [split, level] or content["normalizer"] is not None:
        raise ValueError("another normalizer or another splitting")
    ours = {"bytes": list(range(256)), "special": {EOS: n, PAD: n + 1}}          # which our own leave unsaid
    return {key: value for key, value in spec.items() if value != ours.get(key)}
