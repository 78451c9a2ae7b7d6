"""Shipped configurations with random weights, for measurements that need no files."""

from collections.abc import Sequence

import torch
from dotmap import DotMap

from engine.configuration import resolve_config
from utils.config import load_config

EVA_E = "EVA02-CLIP-bigE-14"
SIDE_WIDTHS = {"ViT-B/32": 320, "ViT-B/16": 320, "ViT-L/14": 512, EVA_E: 576}  # of the paper's models


def untrained_config(file: str, overrides: Sequence[str], device: torch.device) -> DotMap:
    """The resolved configuration of configs/k400/<file>.yaml for the device, with a random tower."""
    changes = [*overrides, "network.init=False", "network.weights=None"]
    return resolve_config(load_config(f"configs/k400/{file}.yaml", changes, "model"), device)
