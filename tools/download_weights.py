"""Download the weights of a frozen tower from its publisher. clip_pretrain/README.md lists all weight files.

    python tools/download_weights.py ViT-B/16 [--dir clip_pretrain]
    python tools/download_weights.py EVA02-CLIP-L-14
    python tools/download_weights.py --list

The same command run again continues an interrupted download. The file is called `<name>.part` until its SHA-256 has
been compared with the published one. EVA-CLIP's files come from the Hugging Face Hub; the variable HF_ENDPOINT names a
mirror. The library huggingface_hub is not used: version 2.4.0 starts an interrupted download anew, and the files have
up to 10 GB.
"""

import argparse
import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, run_program
from utils.published_weights import (
    CHUNK,
    EVA_REPOSITORY,
    HUB_ADDRESS,
    OPENAI,
    OPENAI_ADDRESS,
    PUBLISHED_FILES,
    PublishedFile,
    hash_file,
)

TIMEOUT = 30  # seconds without data


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Download the weights of a frozen tower from its publisher.")
    parser.add_argument("name", nargs="?", help="a value of network.arch, such as ViT-B/16")
    parser.add_argument("--dir", type=Path, default=Path("clip_pretrain"), help="folder for the file")
    parser.add_argument("--list", action="store_true", help="print names, files and addresses; download nothing")
    args = parser.parse_args(argv)
    if args.list:
        for name, file in PUBLISHED_FILES.items():
            print(f"{name:24} {address(file)}")
    elif args.name in PUBLISHED_FILES:
        download(PUBLISHED_FILES[args.name], args.dir)
    else:
        raise UserError(f"{args.name or 'no name given'}: choose one of {', '.join(PUBLISHED_FILES)}, or --list")


def address(file: PublishedFile) -> str:
    if file.publisher == OPENAI:
        return f"{OPENAI_ADDRESS}/{file.sha256}/{file.name}"
    endpoint = os.environ.get("HF_ENDPOINT") or HUB_ADDRESS
    return f"{endpoint.rstrip('/')}/{EVA_REPOSITORY}/resolve/main/{file.name}"


def download(file: PublishedFile, folder: Path) -> None:
    """Download a file into `folder`. What an earlier call has fetched of it, in `<name>.part`, is continued.

    Raises:
        UserError: the server, the network or the disk fails (the part is kept); the downloaded file is not the
            published one (it is removed); another file of that name exists (it is kept).
    """
    url, path = address(file), folder / file.name
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists():
            if hash_file(path) != file.sha256:
                raise UserError(f"{path}: is not the file of {url} (another SHA-256); move it away to fetch that")
            print(f"{path} is already there and complete")
            return
        folder.mkdir(parents=True, exist_ok=True)
        fetch_rest(url, part)
        if hash_file(part) != file.sha256:
            part.unlink()
            raise UserError(f"{url}: what arrived is not the published file (another SHA-256) and was removed")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} -> {part}: {reason}; run the same command again to go on") from error
    print(f"{path} is complete, SHA-256 {file.sha256}")


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


if __name__ == "__main__":
    run_program(main)
