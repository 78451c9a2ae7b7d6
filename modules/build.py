"""Configuration -> model."""

import torch
from dotmap import DotMap

from modules.backbones import FrozenTower, find_architecture
from modules.pretrained import load_tower_weights
from modules.side4video import Side4Video, SideClassifier
from modules.side_network import SideNetwork
from utils.errors import ConfigError


def build_model(config: DotMap, load_tower: bool = True) -> Side4Video:
    """Build the model of a configuration on the CPU: the tower of `network.backbone_dtype`, the rest in float32.

    Random parts are drawn from torch's global generator.

    Args:
        config: resolved; its sections `network` and `data` are read.
        load_tower: False leaves the tower without weights, on the meta device; for callers that load a checkpoint
            which holds the tower.

    Raises:
        ConfigError: unknown architecture, impossible sizes, or the weight file is absent.
        CheckpointError: the weight file does not fit the architecture.
    """
    network, data = config.network, config.data
    architecture = find_architecture(network.arch)
    filled_later = network.init or not load_tower
    tower = FrozenTower(
        architecture.timm_name, data.input_size, network.backbone_kwargs, network.side_layers, filled_later
    )
    tower.convert(getattr(torch, network.backbone_dtype))
    if network.init and load_tower:
        load_tower_weights(tower, architecture, network.arch, network.weights)
    try:
        side = SideNetwork(
            backbone_width=tower.width,
            side_width=network.side_dim,
            num_layers=len(tower.layers),
            patch_size=tower.patch_size,
            num_patches=tower.num_patches,
            norm_placement=network.side_variant,
        )
    except ValueError as error:
        raise ConfigError(f"network.side_dim: {error}") from error
    return Side4Video(tower, SideClassifier(side, data.num_classes, network.drop_fc))
