"""Download the weights of a CLIP tower from OpenAI. clip_pretrain/README.md lists all weight files.

    python tools/download_weights.py ViT-B/16 [--dir clip_pretrain]
    python tools/download_weights.py --list

The same command run again continues an interrupted download. The file is called `<name>.part` until its SHA-256 has
been compared with the published one.
"""

import argparse
import hashlib
import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, run_program

OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
OPENAI_FILES = {  # the end of the address: SHA-256 of the file / its name
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14-336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
EVA_PAGE = "https://huggingface.co/QuanSun/EVA-CLIP/tree/main"
EVA_FILES = {
    "EVA02-CLIP-L-14": "EVA02_CLIP_L_psz14_s4B.pt",
    "EVA02-CLIP-L-14-336": "EVA02_CLIP_L_336_psz14_s6B.pt",
    "EVA02-CLIP-bigE-14": "EVA02_CLIP_E_psz14_s4B.pt",
    "EVA02-CLIP-bigE-14-plus": "EVA02_CLIP_E_psz14_plus_s9B.pt",
}
CHUNK = 1 << 20
TIMEOUT = 30  # seconds without data


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Download the weights of a CLIP tower from OpenAI.")
    parser.add_argument("name", nargs="?", help="a value of network.arch, such as ViT-B/16")
    parser.add_argument("--dir", type=Path, default=Path("clip_pretrain"), help="folder for the file")
    parser.add_argument("--list", action="store_true", help="print names, files and addresses; download nothing")
    args = parser.parse_args(argv)
    if args.list:
        for name, tail in OPENAI_FILES.items():
            print(f"{name:24} {OPENAI_ADDRESS}/{tail}")
        for name, file in EVA_FILES.items():
            print(f"{name:24} {file}, by hand from {EVA_PAGE}")
    elif args.name in OPENAI_FILES:
        sha256, file = OPENAI_FILES[args.name].split("/")
        download(f"{OPENAI_ADDRESS}/{sha256}/{file}", args.dir / file, sha256)
    elif args.name in EVA_FILES:
        raise UserError(f"{args.name}: this program does not download it; take {EVA_FILES[args.name]} from {EVA_PAGE}")
    else:
        raise UserError(f"{args.name or 'no name given'}: choose one of {', '.join(OPENAI_FILES)}, or --list")


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`. An existing `<path>.part` is continued.

    Raises:
        UserError: the server, the network or the disk fails (the part is kept); the downloaded file is not the
            published one (it is removed); another file exists at `path` (it is kept).
    """
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists():
            if hash_file(path) != sha256:
                raise UserError(f"{path}: is not the file of {url} (another SHA-256); move it away to fetch that")
            print(f"{path} is already there and complete")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_rest(url, part)
        if hash_file(part) != sha256:
            part.unlink()
            raise UserError(f"{url}: what arrived is not the published file (another SHA-256) and was removed")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} -> {part}: {reason}; run the same command again to go on") from error
    print(f"{path} is complete, SHA-256 {sha256}")


def fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes to `part`, or start again if the server cannot send a range."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing after `have` bytes: the part is complete or wrong, its hash tells
            return
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
    with response:
        have = have if response.status == 206 else 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as progress,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if total and part.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    run_program(main)
