"""Configuration -> model."""

import torch
from dotmap import DotMap

from modules.backbones import FrozenTower, find_architecture
from modules.pretrained import load_tower_weights
from modules.probes import PROBES, Probe
from modules.side4video import Side4Video, SideClassifier
from modules.side_network import SideNetwork
from utils.errors import ConfigError


def build_model(config: DotMap, load_tower: bool = True) -> Side4Video:
    """Build the model of a configuration on the CPU: the tower in `network.backbone_dtype`, the rest in float32.

    Random weights are drawn from torch's global generator.

    Args:
        config: resolved; its sections `network`, `data` and `solver` are read.
        load_tower: whether the tower gets weights here, from its file or, without `network.init`, random ones. With
            False its parameters stay on the meta device, for callers that load a checkpoint which holds the tower.

    Raises:
        ConfigError: unknown architecture, impossible sizes, or the weight file is absent.
        CheckpointError: the weight file does not fit the architecture.
    """
    tower = build_tower(config, load_tower)
    return Side4Video(tower, build_trained(config, tower))


def build_tower(config: DotMap, load_tower: bool = True) -> FrozenTower:
    """The frozen tower; arguments and errors as of `build_model`."""
    network = config.network
    architecture = find_architecture(network.arch)
    draw_tower = load_tower and not network.init
    tower = FrozenTower(
        architecture.timm_name,
        config.data.input_size,
        network.backbone_kwargs,
        network.side_layers,
        on_meta=not draw_tower,
    )
    tower.convert(getattr(torch, network.backbone_dtype))
    if load_tower and network.init:
        load_tower_weights(tower, architecture, network.arch, network.weights)
    return tower


def build_trained(config: DotMap, tower: FrozenTower) -> SideClassifier:
    """What is trained beside the tower: the side network or probe of `network.side`, and the head.

    Raises:
        ConfigError: impossible sizes.
    """
    network, data, solver = config.network, config.data, config.solver
    side: SideNetwork | Probe
    if network.side in PROBES:
        side = PROBES[network.side](tower.width, data.num_segments, network.average_frames)
    else:
        try:
            side = SideNetwork(
                backbone_width=tower.width,
                side_width=network.side_dim,
                num_layers=len(tower.layers),
                patch_size=tower.patch_size,
                num_patches=tower.num_patches,
                norm_placement=network.side_variant,
                recompute=bool(solver.recompute),  # training settles `auto` before; elsewhere nothing is kept anyway
                sync_bn=solver.sync_bn,
            )
        except ValueError as error:
            raise ConfigError(f"network.side_dim: {error}") from error
    return SideClassifier(side, data.num_classes, network.drop_fc)
