"""Every shipped configuration says what it is, holds the recipe of the paper, and trains."""

from pathlib import Path

import pytest
import torch
import yaml

from datasets.loaders import build_train_loader
from engine.configuration import read_config
from engine.loops import train_one_epoch
from engine.run import Run
from modules import build_model
from modules.hashing import hash_tensors
from utils.config_schema import LEGACY
from utils.precision import resolve_precision

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = sorted(p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "configs").rglob("*.yaml"))
RUNS = [path for path in SHIPPED if not path.endswith("base.yaml")]
# side_dim, lr, epochs, warm-up, batch a process, num_sample, rand_aug, classes, template, and what is not 8 or 224
RECIPES = {
    "configs/k400/vitb32.yaml": (320, 1e-3, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/vitb16.yaml": (320, 1e-3, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/vitb16_light.yaml": (128, 1e-3, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/vitb16_video.yaml": (320, 1e-3, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/vitl14.yaml": (512, 1e-4, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/vitl14_336.yaml": (512, 1e-4, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg", {"input_size": 336}),
    "configs/k400/eva_l14.yaml": (512, 1e-4, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/k400/eva_l14_336.yaml": (512, 1e-4, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg", {"input_size": 336}),
    "configs/k400/eva_e14.yaml": (576, 1e-4, 20, 4, 1, 1, True, 400, "img_{:05d}.jpg"),
    "configs/k400/eva_e14_16f.yaml": (576, 1e-4, 20, 4, 1, 1, True, 400, "img_{:05d}.jpg", {"num_segments": 16}),
    "configs/k400/siglip2_b16.yaml": (320, 1e-3, 30, 4, 32, 1, False, 400, "img_{:05d}.jpg"),
    "configs/sthv1/eva_e14.yaml": (576, 1e-4, 30, 6, 8, 2, True, 174, "{:05d}.jpg"),
    "configs/sthv1/eva_e14_16f.yaml": (576, 1e-4, 30, 6, 8, 2, True, 174, "{:05d}.jpg", {"num_segments": 16}),
    "configs/sthv2/eva_e14.yaml": (576, 1e-4, 25, 6, 8, 2, True, 174, "{:06d}.jpg"),
    "configs/sthv2/eva_e14_16f.yaml": (576, 1e-4, 25, 6, 8, 2, True, 174, "{:06d}.jpg", {"num_segments": 16}),
    "configs/sthv1/vitb32.yaml": (320, 1e-3, 40, 4, 16, 2, True, 174, "{:05d}.jpg"),
    "configs/sthv1/vitb16.yaml": (320, 1e-3, 40, 4, 16, 2, True, 174, "{:05d}.jpg"),
    "configs/sthv1/vitb16_light.yaml": (128, 1e-3, 40, 4, 16, 2, True, 174, "{:05d}.jpg"),
    "configs/sthv1/vitl14.yaml": (512, 1e-4, 30, 4, 16, 2, True, 174, "{:05d}.jpg"),
    "configs/sthv2/vitb32.yaml": (320, 1e-3, 30, 4, 16, 2, True, 174, "{:06d}.jpg"),
    "configs/sthv2/vitb16.yaml": (320, 1e-3, 30, 4, 16, 2, True, 174, "{:06d}.jpg"),
    "configs/sthv2/vitb16_light.yaml": (128, 1e-3, 30, 4, 16, 2, True, 174, "{:06d}.jpg"),
    "configs/sthv2/vitl14.yaml": (512, 1e-4, 30, 4, 16, 2, True, 174, "{:06d}.jpg"),
}


@pytest.fixture
def load(tmp_path, make_frame_folders, motion_root):
    """load(config, *overrides): the configuration on two tiny videos of its own kind, with a random tower."""

    def load_on_tiny_data(path, *overrides):
        if "_video" in path:
            root, listed = motion_root / "videos", tmp_path / "videos.txt"
            listed.write_text("".join((motion_root / "val_videos.txt").read_text().splitlines(keepends=True)[:2]))
        else:
            base = yaml.safe_load((REPOSITORY / path).with_name("base.yaml").read_text())
            root, listed = make_frame_folders([9, 9], image_tmpl=base["data"]["image_tmpl"])
        places = [
            f"data.{part}_{what}={place}"
            for part in ("train", "val")
            for what, place in (("root", root), ("list", listed))
        ]
        random_tower = ["network.init=False", "network.weights=None"]
        return read_config(REPOSITORY / path, [*places, *random_tower, *overrides])

    return load_on_tiny_data


def test_every_run_has_a_recipe_to_hold():
    assert set(RUNS) == {*RECIPES, "configs/demo/motion.yaml", "configs/demo/widths.yaml"}


@pytest.mark.parametrize("path", RUNS)
def test_a_configuration_introduces_itself(path):
    text = (REPOSITORY / path).read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"sh scripts/run_train_vision.sh {path}" in header
    for word in ("Trains", "Hardware: ", "To expect: "):
        assert word in header, word
    data = yaml.safe_load(text).get("data") or {}
    assert not any(str(value).startswith("/") for value in data.values())


@pytest.mark.parametrize("path", RECIPES)
def test_a_configuration_holds_the_recipe(path, load):
    config = load(path)
    data, solver = config.data, config.solver
    assert (
        *(config.network.side_dim, solver.lr, solver.epochs, solver.lr_warmup_step),
        *(data.batch_size, data.num_sample, data.rand_aug, data.num_classes, data.image_tmpl),
    ) == RECIPES[path][:9]
    sizes = {"num_segments": 8, "input_size": 224, **(RECIPES[path][9] if len(RECIPES[path]) > 9 else {})}
    assert {"num_segments": data.num_segments, "input_size": data.input_size} == sizes
    assert (data.random_shift, config.seed) == (True, 1024)
    assert (solver.betas, solver.weight_decay, solver.smoothing, solver.clip_ratio) == ([0.9, 0.999], 0.15, 0.1, 1.0)
    assert (config.network.drop_fc, solver.type, data.dense) == (0.0, "cosine", False)


@pytest.mark.parametrize("path", RECIPES)
def test_a_configuration_trains_one_step_at_reduced_depth(path, load):
    changes = ["network.backbone_kwargs.depth=1", "data.batch_size=2", "data.workers=0", "data.num_sample=1"]
    if "eva" in path or "336" in path:  # too big for a quick step; and EVA's second block is the first one read
        changes += [f"network.backbone_kwargs.{what}" for what in ("embed_dim=64", "num_heads=2", "depth=2")]
        changes += ["network.side_dim=64", "data.num_segments=2"]
    config = load(path, *changes)
    torch.manual_seed(0)
    model = build_model(config)
    tower, before = hash_tensors(model.backbone.state_dict()), model.trained.side.pos.clone()
    run = Run(config, model, resolve_precision(config.solver.precision, torch.device("cpu")))
    loader = build_train_loader(config)
    assert len(loader) == 1
    train_one_epoch([run], loader, 1)
    assert run.reporter.mean_loss > 0 and not model.trained.side.pos.equal(before)
    assert hash_tensors(model.backbone.state_dict()) == tower


def test_a_configuration_with_every_legacy_key_and_no_base_loads(tmp_path, make_frame_folders):
    root, listed = make_frame_folders([3])
    plain = {
        "resume": None,
        "pretrain": None,
        "seed": 1024,
        "data": {
            "dataset": "kinetics400",
            "modality": "RGB",
            "num_segments": 8,
            "batch_size": 32,
            "workers": 8,
            "num_classes": 400,
            "image_tmpl": "img_{:05d}.jpg",
            "train_root": root,
            "train_list": listed,
            "val_root": root,
            "val_list": listed,
            "label_list": "None",
            "input_size": 224,
            "random_shift": True,
            "num_sample": 1,
            "rand_aug": False,
            "rand_erase": False,
            "dense": False,
            "shot": "None",
        },
        "network": {"arch": "ViT-B/16", "init": True, "drop_fc": 0.0, "side_dim": 320},
        "solver": {
            "type": "cosine",
            "epochs": 30,
            "start_epoch": 0,
            "lr": "1.e-3",
            "lr_warmup_step": 4,
            "lr_decay_step": [10, 20],
            "evaluate": False,
            "weight_decay": 0.15,
            "betas": [0.9, 0.999],
            "clip_ratio": 1,
            "grad_accumulation_steps": 1,
            "mixup": False,
            "smoothing": 0.1,
        },
        "logging": {"print_freq": 10, "eval_freq": 1, "skip_epoch": [1, 2, 3]},
    }
    for key, (neutral, _) in LEGACY.items():
        section, name = key.split(".")
        plain[section][name] = neutral if isinstance(neutral, bool | int | float | str | None) else "anything"
    plain["network"] |= {"n_emb": 320, "sync_bn": False}
    path = tmp_path / "legacy.yaml"
    path.write_text(yaml.safe_dump(plain))
    config = read_config(path)
    assert (config.solver.lr, config.data.label_list, config.network.side_dim) == (1e-3, None, 320)
