"""Fetch real data for prepare.py: GSM8K (5 MB), TinyStories (2.2 GB) or one file of FineWeb-Edu (2 GB).

    python data/download.py gsm8k
    python data/download.py tinystories --out data/raw

writes data/raw/NAME/FILE. A file appears under its name when it is whole and its sha256 is right: GSM8K's is
fixed here, that of the others is what Hugging Face states for them (X-Linked-Etag), so that tells a faulty
transfer, not a changed data set; prepare.py's manifest notes what was used. An interrupted download goes on
where it stopped. The data have licences of their own: see their pages.
"""
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import UserError, file_sha256, main, require  # noqa: E402

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
         "grade_school_math/data/")
HUB = "https://huggingface.co/datasets/"
SOURCES = {     # name -> [(address, sha256 if it is fixed)]
    "gsm8k": [(GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
              (GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")],
    "tinystories": [(HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", ""),
                    (HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt", "")],
    "fineweb-edu": [(HUB + "HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet", "")],
}


@dataclass
class Config:
    name: tuple[str, ...]           # gsm8k, tinystories or fineweb-edu
    out: str = "data/raw"           # folder to write; each data set has its own below it


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections with the same Range, and notes the sha256 that Hugging Face states."""
    stated = ""

    def redirect_request(self, request, file, code, message, headers, address):
        self.stated = headers.get("X-Linked-Etag", self.stated).strip('"')
        return super().redirect_request(request, file, code, message, headers, address)


def fetch(address: str, path: Path, sha256: str = "", timeout: float = 30.) -> None:
    """Download to `path`, going on from path.partial. UserError if the connection fails or ends early (what
    came is kept) or if the sha256 is wrong (it is deleted) or unknown."""
    partial, redirects = path.with_name(path.name + ".partial"), Redirects()
    path.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=timeout) as answer:
            have = have if answer.status == 206 else 0                   # 200: all of it comes again
            length = answer.headers["Content-Length"]
            total = have + int(length) if length else None
            stated = redirects.stated or answer.headers.get("X-Linked-Etag", "").strip('"')
            with open(partial, "ab" if have else "wb") as f, tqdm(
                    total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := answer.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
            require(total in (None, partial.stat().st_size), f"{address}: the connection ended after "
                    f"{partial.stat().st_size:,} of {total} bytes; the same command goes on from there")
    except urllib.error.HTTPError as error:
        if error.code != 416:                    # nothing left to send: the partial file is whole, or wrong
            raise UserError(f"{address}: the server says {error.code} {error.reason}") from None
        stated = redirects.stated
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise UserError(f"{address}: no connection, or it broke; offline? The same command goes on from what "
                        f"came ({getattr(error, 'reason', None) or error!r})") from None
    sha256 = sha256 or stated
    require(re.fullmatch(r"[0-9a-f]{64}", sha256) is not None,
            f"{address}: the server states no sha256, so {partial} cannot be checked")
    if file_sha256(partial) != sha256:
        partial.unlink()
        raise UserError(f"{address}: what came has another sha256 than {sha256} and was deleted; try again")
    os.replace(partial, path)


def download(c: Config) -> None:
    require(len(c.name) == 1 and c.name[0] in SOURCES, f"{' '.join(c.name)}: say one of {', '.join(SOURCES)}")
    for address, sha256 in SOURCES[c.name[0]]:
        path = Path(c.out) / c.name[0] / address.rsplit("/", 1)[1]
        if path.exists():
            print(f"{path} is there already; delete it to fetch it again.")
            continue
        fetch(address, path, sha256)
        print(f"written: {path}   (sha256 {sha256 or 'as the server states'}: right)")


if __name__ == "__main__":
    main(download, Config)
