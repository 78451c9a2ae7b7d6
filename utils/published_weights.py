"""Weight files of the frozen towers as their publishers offer them: names, SHA-256, addresses.

Nothing here imports torch, so that a download starts at once.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

OPENAI = "OpenAI (CLIP)"
BAAI = "BAAI (EVA-CLIP)"
OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models"  # then /SHA-256/name
HUB_ADDRESS = "https://huggingface.co"
EVA_REPOSITORY = "QuanSun/EVA-CLIP"  # of the Hugging Face Hub
CHUNK = 1 << 20


class PublishedFile(NamedTuple):
    """A file with the weights of a tower. clip_pretrain/README.md says where the hashes come from."""

    name: str
    sha256: str
    publisher: str


PUBLISHED_FILES = {  # value of network.arch -> file
    "ViT-B/32": PublishedFile(
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", OPENAI
    ),
    "ViT-B/16": PublishedFile(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", OPENAI
    ),
    "ViT-L/14": PublishedFile(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", OPENAI
    ),
    "ViT-L/14-336px": PublishedFile(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", OPENAI
    ),
    "EVA02-CLIP-L-14": PublishedFile(
        "EVA02_CLIP_L_psz14_s4B.pt", "1ce4a40dfa4b7a2fb5bd059a49400daacb11d5a01653ae4f3459b1ff28ee5ace", BAAI
    ),
    "EVA02-CLIP-L-14-336": PublishedFile(
        "EVA02_CLIP_L_336_psz14_s6B.pt", "84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05", BAAI
    ),
    "EVA02-CLIP-bigE-14": PublishedFile(
        "EVA02_CLIP_E_psz14_s4B.pt", "f475a6024cf42fd1760eb7ac972d05f1131179fd4f647bcf98c087cb07b01575", BAAI
    ),
    "EVA02-CLIP-bigE-14-plus": PublishedFile(
        "EVA02_CLIP_E_psz14_plus_s9B.pt", "7cfb55832d0011e36e3ac1d5d575895ef61dc03fd43895506a66f6aa697b9b1c", BAAI
    ),
}


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
