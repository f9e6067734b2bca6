r"""BYOL with and without batch statistics: does it collapse, and what brings it back? Results: README.md

    python byol.py                                                       # the control: bn everywhere, SGD
    python byol.py --enc-norm gn --mlp-norm none                         # no batch statistics: collapses
    python byol.py --enc-norm gn --mlp-norm none --opt lars --lr 0.2     # and LARS: does not stay collapsed
    python byol.py --data stl10 --download --width 64 --stem imagenet --size 96 --batch-size 256 \
        --epochs 320 --lr 0.8 --device cuda                              # the blog's full set-up
    torchrun --nproc-per-node 2 byol.py --batch-size 128                 # one run on two processes

"The blog" is the post that it reproduces, Understanding self-supervised and contrastive learning with BYOL.
It reads top to bottom in the order data flows: arguments, images, views, networks, losses, collapse metrics,
linear evaluation, run folder, training. A run is one folder; the same command resumes a run that was cut off.
"""

import argparse
import collections
import copy
import ctypes
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.distributed.nn.functional import all_gather
from torchvision import datasets

from lars import LARS, param_groups
from resnet_norms import resnet18

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # set by torchrun


def stop(status, message):
    """One line on stderr, and out: status 2 for wrong usage, 1 for a failed run."""
    print(f"byol.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def gather(rows):
    """The rows (N / processes, ...) of all processes, (N, ...), with their gradient."""
    return torch.cat(all_gather(rows.contiguous())) if WORLD > 1 else rows


# ------------------------------------------------------------------------ arguments
RATE = {"sgd": 0.2, "lars": 0.2, "adamw": 1e-3}
DECAY = {"sgd": 1e-4, "lars": 1.5e-6, "adamw": 1e-2}    # the blog's code, the BYOL paper, torch
QUEUE = 4096                                # target projections that moco keeps
PLACES = ("out", "data_dir", "download")    # flags that may differ when a run is resumed


def within(kind, low, high=10**9):
    """An argparse type: a `kind` in [low, high]."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
    return number


def regex_factor(text):
    regex, factor = text.rsplit("=", 1)
    return [regex, within(float, 0)(factor)]


def parse_arguments(argv):
    """The flags of the command line `argv`, with the defaults that follow from other flags filled in."""
    parser = argparse.ArgumentParser("byol.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(2, message)
    norms = ["bn", "ln", "gn", "none"]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]

    def add(flag, default, text, **how):
        group.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **how)

    group = parser.add_argument_group("model")
    add("--enc-norm", "bn", "norm of the encoder", choices=["bn", "gn", "gn+ws", "none"])
    add("--mlp-norm", "bn", "norm of projection and prediction", choices=norms)
    add("--proj-norm", None, "norm of the projection, instead of --mlp-norm", choices=norms)
    add("--pred-norm", None, "norm of the prediction, instead of --mlp-norm", choices=norms)
    add("--width", 8, "channels of layer1; y has 8 times as many", type=within(int, 1, 512))
    add("--stem", "cifar", "7x7 stride 2 and max-pool, or 3x3", choices=["imagenet", "cifar"])
    group = parser.add_argument_group("loss")
    add("--loss", "byol", "what pulls the views together", choices=["byol", "moco", "simclr"])
    add("--ema", 0.996, "target's share that stays at each step, on a cosine to 1", type=within(float, 0, 1))
    group = parser.add_argument_group("optimizer")
    add("--opt", "sgd", "sgd and lars with momentum 0.9", choices=list(DECAY))
    add("--lars-on", "weights", "all: biases and norms get LARS and decay too", choices=["weights", "all"])
    add("--lars-layers", None, "regular expression: only these layers get LARS, the rest SGD")
    add("--lr", None, f"rate, not scaled by the batch, on a cosine to 0; unless given, {RATE}",
        type=within(float, 1e-9))
    add("--lr-mult", [], "multiply the rate of these layers; may be repeated", type=regex_factor,
        action="append", metavar="REGEX=FACTOR")
    add("--clip", None, "scale the whole gradient down to this norm where it is longer", type=within(float, 1e-9))
    add("--weight-decay", None, f"unless given, {DECAY}; adamw: on weights alone", type=within(float, 0))
    add("--warmup", 0.0, "share of the run with linear warm-up", type=within(float, 0, 1))
    group = parser.add_argument_group("run")
    add("--steps", 1500, "length of the run; 0: random features", type=within(int, 0))
    add("--epochs", None, "the length in passes over the images, instead of --steps", type=within(int, 0))
    add("--batch-size", 64, "images per step, of all processes", type=within(int, 2))
    add("--seed", 0, "of weights, order and views", type=within(int, 0, 2**63 - 1))
    add("--device", "cpu", "where to compute", choices=["cpu", *["cuda"] * bool(gpus), *gpus])
    add("--threads", torch.get_num_threads(), "1 where runs share a machine", type=within(int, 1, 1024))
    add("--sync-bn", False, "with torchrun on GPUs: BN statistics over all processes", action="store_true")
    add("--amp", False, "networks in bfloat16; loss and metrics stay in fp32", action="store_true")
    add("--compile", False, "torch.compile networks and views", action="store_true")
    add("--log-every", 25, "steps between lines of metrics; powers of two too", type=within(int, 1))
    add("--eval-every", 0, "steps between evaluations; 0: before and after", type=within(int, 0))
    add("--checkpoint-every", 200, "steps between checkpoints", type=within(int, 1))
    add("--out", None, "folder of the run; else runs/ and the flags that differ from the defaults")
    group = parser.add_argument_group("images")
    add("--data", "shapes", "shapes, cifar10, stl10, fashion-mnist or folder:DIR")
    add("--data-dir", "data", "where data sets lie and images are decoded to")
    add("--download", False, "download the data set if it is not there", action="store_true")
    add("--size", 16, "side of the views in pixels", type=within(int, 8, 4096))
    for word in argv:
        if re.fullmatch("--[a-z-]+=--", word):          # of which argparse makes an empty list before 3.13
            stop(2, f"{word[:-3]}: -- is no value")
    args = parser.parse_args(argv)                      # and again, with the defaults that follow from it
    parser.set_defaults(proj_norm=args.mlp_norm, pred_norm=args.mlp_norm)
    parser.set_defaults(lr=RATE[args.opt], weight_decay=DECAY[args.opt])
    args = parser.parse_args(argv)
    changed = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    for wrong, why in (
        ("steps" in changed and "epochs" in changed, "--steps and --epochs exclude each other"),
        ("lars_layers" in changed and args.opt != "lars", "--lars-layers needs --opt lars"),
        ("lars_on" in changed and args.opt != "lars", "--lars-on needs --opt lars"),
        ("pred_norm" in changed and args.loss != "byol", f"--pred-norm: {args.loss} has no prediction"),
        (args.loss == "moco" and 2 * args.batch_size > QUEUE, f"--batch-size: two overfill moco's {QUEUE}"),
        (WORLD > 1 and "MASTER_ADDR" not in os.environ, "WORLD_SIZE is set, but not by torchrun"),
        (args.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= len(gpus),
         f"--nproc-per-node: more processes than GPUs, {len(gpus)}"),
        (len(dict(args.lr_mult)) < len(args.lr_mult), "--lr-mult: a regular expression stands twice"),
        (args.batch_size % WORLD, f"--batch-size {args.batch_size} does not divide into {WORLD} processes"),
        (WORLD > 1 and ":" in args.device, "--device: torchrun gives each process its GPU, so say cuda"),
        (args.sync_bn and (WORLD == 1 or args.device == "cpu"), "--sync-bn needs torchrun and --device cuda"),
    ):
        if wrong:
            stop(2, why)
    if args.out is None:
        words = [f"{name}_{value}" for name, value in changed.items() if name not in PLACES]
        args.out = "runs/" + re.sub(r"[^\w.+=-]+", "_", "_".join(words) or "default")[:200]
    if WORLD > 1 and args.device == "cuda":
        args.device += ":" + os.environ["LOCAL_RANK"]
    return args


# ------------------------------------------------------------------------ images
# uint8 images (N, 3, side, side) and labels (N,). Pre-training sees all of `train` and no label; the labelled
# ones come first. `digest` tells whether a resumed run has the images it began with.
Images = collections.namedtuple("Images", "train train_labels test test_labels digest")
DATASETS = {"cifar10": datasets.CIFAR10, "stl10": datasets.STL10, "fashion-mnist": datasets.FashionMNIST}
FORMS = """
........ ..####.. ...##... ######## ####.... ####.... ####.... ##....## ..####.. .######.
..####.. .##..##. ...##... ######## ####.... .####... ####.... ###..### ..####.. .######.
.######. ##....## ..####.. ######## ####.... ..####.. ####.... ######## ######## .##..##.
.######. ##....## ..####.. ######## ####.... ...####. ####.... .######. ######## .##..##.
.######. ##....## .######. ........ ####.... ....#### ....#### ..####.. ..####.. .######.
.######. ##....## .######. ........ ####.... #....### ....#### ...##... ..####.. .######.
..####.. .##..##. ######## ........ ####.... ##....## ....#### ........ ........ ........
........ ..####.. ######## ######## ####.... ###....# ....#### ........ ........ ........
"""


def draw_shapes(per_class, seed, side=32):
    """`per_class` images of each of FORMS, repeated in all directions: uint8 (N, 3, side, side), labels (N,).
    The form makes the class. What else shows in every crop of an image, such as contrast, is easier to
    predict than the form and would be learned instead, so it hardly varies."""
    forms = torch.tensor([[pixel == "#" for pixel in row] for row in FORMS.split()])
    forms = forms.view(8, -1, 8).transpose(0, 1).float()
    labels = torch.arange(len(forms)).repeat_interleave(per_class)
    n, rng = len(labels), torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    scale, tilt = uniform(0.9, 1.05) / 3, uniform(-0.15, 0.15)      # a third: three by three forms are drawn
    turn = torch.stack([tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos()], 1).view(n, 2, 2)
    moved = torch.cat([scale[:, None, None] * turn, uniform(-1 / 3, 1 / 3, 2, 1)], 2)
    grid = F.affine_grid(moved, (n, 1, side, side), align_corners=False)
    form = F.grid_sample(forms.tile(3, 3)[labels][:, None], grid, mode="bilinear", align_corners=False)
    ground = uniform(0.45, 0.55, 1, 1, 1) + F.interpolate(uniform(-0.05, 0.05, 3, 3, 3), side, mode="bicubic")
    noise = 0.03 * torch.randn(n, 3, side, side, generator=rng)
    image = ground + (0.4 + uniform(-0.05, 0.05, 3, 1, 1)) * (form - 0.5) + noise
    return (image.clamp(0, 1) * 255).byte(), labels


def open_image(path):
    """The image file as RGB; ValueError if it is none."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):          # 16-bit gray, which Pillow would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from None


def open_folder(root):
    """Data sets root/train/CLASS/*, then root/unlabeled/* if there is one; root/test/CLASS/*; all paths."""
    train, test = (datasets.ImageFolder(f"{root}/{name}", loader=open_image) for name in ("train", "test"))
    if len(train.classes) < 2 or train.classes != test.classes:
        stop(2, f"--data folder:{root}: train and test need the same classes, two or more")
    train.samples += datasets.folder.make_dataset(root, {"unlabeled": -1}, train.extensions, allow_empty=True)
    left_out = sum(len(files) for *_, files in os.walk(root, followlinks=True)) - len(train + test)
    if left_out:
        print(f"{root}: {left_out} files left out: no images, by their endings, or in no class's folder")
    return train, test, [path for path, _ in test.samples + train.samples]


def decode(dataset, side):
    """A data set as the bytes of a .npy, uint8 (N, 3, side, side); other sizes are resized and cropped."""
    def pixels(i):
        image = TF.center_crop(TF.resize(dataset[i][0], side), side)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()

    header, shape = io.BytesIO(), (len(dataset), 3, side, side)
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    yield header.getvalue()
    with ThreadPoolExecutor() as pool:                  # Pillow decodes outside the GIL
        for start in range(0, len(dataset), 1024):      # no more in memory at a time
            yield from pool.map(pixels, range(start, min(start + 1024, len(dataset))))


def load_images(args):
    """The Images of --data. All but `shapes` are decoded once, into --data-dir, and mapped from there: as
    they are where they are square and of one size, else resized and cropped to --size."""
    if args.data == "shapes":
        return Images(*draw_shapes(1000, seed=0), *draw_shapes(200, seed=1), args.data)
    open_split, paths = DATASETS.get(args.data), []
    splits = ("train+unlabeled", "test") if args.data == "stl10" else (True, False)
    try:
        if args.data.startswith("folder:"):
            train, test, paths = open_folder(args.data[7:] or "no folder named")
        elif open_split:
            train, test = (open_split(args.data_dir, split, download=args.download) for split in splits)
        else:
            stop(2, f"--data {args.data}: not shapes, {', '.join(DATASETS)} or folder:DIR")
    except (RuntimeError, OSError) as error:
        needs = "another --data-dir, or --download" if open_split else "train/CLASS/* and test/CLASS/* images"
        stop(2, f"--data {args.data}: {error}; it needs {needs}")
    dataset = train + test
    sides = {side for i in range(0, len(dataset), len(dataset) // 100 + 1) for side in dataset[i][0].size}
    side = sides.pop() if len(sides) == 1 else args.size                # a hundred images tell
    stats = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    digest = hashlib.sha256(repr((args.data, side, stats)).encode()).hexdigest()[:16]
    decoded = Path(args.data_dir, "decoded", f"{digest}.npy")
    if not decoded.exists():
        decoded.parent.mkdir(parents=True, exist_ok=True)
        print(f"decoding {len(dataset):,} images to {side} x {side}", flush=True)
        write_whole(decoded, decode(dataset, side))
    pixels = torch.from_numpy(np.load(decoded, mmap_mode="c")).split([len(train), len(test)])
    name = "labels" if args.data == "stl10" else "targets"
    labels, test_labels = (torch.as_tensor(getattr(split, name)) for split in (train, test))
    return Images(pixels[0], labels[labels >= 0], pixels[1], test_labels, digest)   # STL-10 has -1 for none


# ------------------------------------------------------------------------ views
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)                   # RandomResizedCrop: area and aspect ratio
P_FLIP, P_JITTER, P_GRAY, P_BLUR = 0.5, 0.8, 0.2, 0.5
JITTER = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1))
SIGMA, REACH = (0.1 / 96, 2.0 / 96), 6 / 96                 # blur, over the view's side: 13 pixels at 96
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, per channel


def draw_views(n, side, size, rng):
    """Random parameters of n views, {name: (n,)}, distributed as torchvision's, and the order of the jitter,
    one for all. What is not applied gets the parameter that changes nothing."""
    area = side**2 * rng.uniform(*SCALE, (n, 10))
    ratio = np.exp(rng.uniform(*np.log(RATIO), (n, 10)))
    tries = np.sqrt([area / ratio, area * ratio]).round()           # heights and widths, (2, n, 10)
    fits = (tries <= side).all(0)
    first = tries[:, np.arange(n), fits.argmax(1)]                  # of ten tries the first that fits
    height, width = np.where(fits.any(1), first, side)
    params = dict(height=height, width=width, flip=rng.random(n) < P_FLIP)
    params["top"] = np.floor(rng.random(n) * (side - height + 1))
    params["left"] = np.floor(rng.random(n) * (side - width + 1))
    jittered = rng.random(n) < P_JITTER
    for name, limits in JITTER.items():
        params[name] = np.where(jittered, rng.uniform(*limits, n), name != "hue")
    params["gray"] = rng.random(n) < P_GRAY
    params["sigma"] = np.where(rng.random(n) < P_BLUR, size * rng.uniform(*SIGMA, n), 0)
    return params, [list(JITTER)[i] for i in rng.permutation(len(JITTER))]


def resized_crop(images, start, extent, flip, size):
    """Crop, resize and flip each image: uint8 (N, 3, side, side) -> (N, 3, size, size) in [0, 1], as torch's
    antialiased `upsample_bilinear2d` does, which RandomResizedCrop calls. start, extent: (2, N), y and x."""
    start, extent = start[..., None, None], extent[..., None, None]
    pixel = torch.arange(images.shape[-1], device=start.device)
    scale = extent / size
    centre = start + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight * ((pixel >= start) & (pixel < start + extent))
    rows, columns = weight / weight.sum(-1, keepdim=True)           # matrices, (N, size, side)
    columns = torch.where(flip[:, None, None] > 0, columns.flip(1), columns)
    return torch.einsum("nyh,nchw,nxw->ncyx", rows, images / 255, columns)


def adjust(images, name, factor):
    """One operation of ColorJitter with a factor for each image, (N,); images in [0, 1]."""
    factor = factor[:, None, None, None]
    if name == "hue":                           # turned through HSV, as torchvision's adjust_hue does
        value, strongest = images.max(1, keepdim=True)
        chroma = value - images.amin(1, keepdim=True)
        slope = (images.roll(-1, 1) - images.roll(1, 1)).gather(1, strongest) / chroma.clamp_min(1e-12)
        offset = torch.arange(5, 0, -2, device=images.device)[:, None, None]    # red, green, blue, in sixths
        k = (2 * strongest + slope + offset + 6 * factor) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    if name == "brightness":
        return (images * factor).clamp(0, 1)
    other = TF.rgb_to_grayscale(images)
    if name == "contrast":
        other = other.mean((2, 3), keepdim=True)
    return torch.lerp(other, images, factor).clamp(0, 1)


def gaussian_blur(images, sigma):
    """Blur with one sigma for each image, (N,), the border reflected; sigma 0 changes nothing."""
    size = images.shape[-1]
    radius = math.ceil(REACH * size)
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    padded = F.pad(torch.eye(size, device=images.device), (radius, radius), "reflect")
    matrix = torch.einsum("nt,wxt->nxw", kernel, padded.unfold(1, 2 * radius + 1, 1))
    return torch.einsum("nyh,nchw,nxw->ncyx", matrix, images, matrix)


def normalize(images):
    """ImageNet's normalization, by channels: a vector of constants would be copied to a GPU in every step."""
    channels = [(x - mean) / std for x, mean, std in zip(images.unbind(1), MEAN, STD)]
    return torch.stack(channels, -1).permute(0, 3, 1, 2)            # channels_last


compiled_once = functools.cache(torch.compile)      # to wrap a function anew at each step takes milliseconds


def make_views(images, params, order, args):
    """A view of each image, uint8 (N, 3, side, side) -> (N, 3, size, size), by draw_views' parameters."""
    compiled = compiled_once if args.compile else lambda function: function
    start = torch.stack([params["top"], params["left"]])
    extent = torch.stack([params["height"], params["width"]])
    x = compiled(resized_crop)(images, start, extent, params["flip"], args.size)
    for name in order:
        x = compiled(adjust)(x, name, params[name])
    x = torch.where(params["gray"][:, None, None, None] > 0, TF.rgb_to_grayscale(x), x)
    return normalize(compiled(gaussian_blur)(x, params["sigma"]))


@functools.lru_cache(maxsize=1)
def image_order(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, 0, epoch]).permutation(n))


def load_views(images, step, args):
    """Both views of this process's share of the batch of step 0, 1, ..., in turn: (2N, 3, size, size)."""
    batch = args.batch_size
    share = slice(RANK * batch // WORLD, (RANK + 1) * batch // WORLD)
    epoch, place = divmod(step, len(images) // batch)
    chosen = image_order(len(images), args.seed, epoch)[place * batch :][share]
    x = images[chosen.to(images.device, non_blocking=True)].to(args.device, non_blocking=True)
    rng = np.random.default_rng([args.seed, 1, step])
    params, order = draw_views(2 * batch, x.shape[-1], args.size, rng)
    table = torch.from_numpy(np.stack(list(params.values()), dtype=np.float32))
    table = table.view(-1, 2, batch)[:, :, share].flatten(1).to(args.device, non_blocking=True)
    return make_views(x.repeat(2, 1, 1, 1), dict(zip(params, table)), order, args)


# ------------------------------------------------------------------------ networks
def per_view(norm):
    """BN for a batch of two views, one after the other, each with its own statistics, as in two passes."""
    class PerView(norm):
        def forward(self, x):
            forward = super().forward
            return torch.cat([forward(view) for view in x.chunk(2)]) if self.training else forward(x)
    return PerView


def mlp(features, norm):
    """The projection or the prediction, (N, features) -> (N, 128): up to its hidden units, and the rest."""
    hidden = nn.Sequential(nn.Linear(features, 512), norm(512), nn.ReLU(inplace=True))
    return nn.Sequential(hidden, nn.Linear(512, 128))


class Network(nn.Module):
    """views v -> representations y -> projections z -> predictions q(z); contrastive losses have no
    prediction. In training the batch holds both views, (2N, 3, size, size), so that they share each pass."""

    def __init__(self, args):
        super().__init__()
        mlp_bn = per_view(nn.SyncBatchNorm if args.sync_bn else nn.BatchNorm1d)
        enc_bn = per_view(nn.SyncBatchNorm if args.sync_bn else nn.BatchNorm2d)
        group_norm = functools.partial(nn.GroupNorm, 32)
        norms = {"bn": mlp_bn, "ln": nn.LayerNorm, "gn": group_norm, "none": nn.Identity}
        self.encoder = resnet18(enc_bn if args.enc_norm == "bn" else args.enc_norm, args.width, args.stem)
        self.projection = mlp(8 * args.width, norms[args.proj_norm])
        self.prediction = mlp(128, norms[args.pred_norm]) if args.loss == "byol" else nn.Identity()
        for norm in self.modules():
            if args.amp and isinstance(norm, nn.GroupNorm):     # six times as slow in bfloat16 on a CPU
                norm.register_forward_pre_hook(lambda norm, inputs: inputs[0].float())

    def forward(self, views):
        y = self.encoder(views)
        z = self.projection(y)
        return y, z, self.prediction(z)


def make_target(online, loss):
    """The slowly moving copy: encoder and projection, and moco's queue. It stays in train mode, so that BN's
    running averages, which the EMA does not touch, are never read."""
    target = copy.deepcopy(online).requires_grad_(False)
    target.prediction = nn.Identity()
    if loss == "moco":
        target.register_buffer("queue", F.normalize(torch.randn(QUEUE, 128)))
    return target


@torch.no_grad()
def update_target(target, online, tau):
    """target = tau * target + (1 - tau) * online (BYOL, arXiv 2006.07733, equation 1)."""
    slow, fast = list(target.parameters()), list(online.parameters())
    torch._foreach_lerp_(slow, fast[: len(slow)], 1 - tau)          # the prediction comes last


# ------------------------------------------------------------------------ losses
def byol_loss(q, z_target):
    """1 - cos(q, z'), mean over the batch: BYOL, equation 2, halved as in the blog's code. The squared
    distance of the unit vectors gives it without the rounding in which a cosine close to 1 drowns."""
    return (F.normalize(q) - F.normalize(z_target)).square().sum(1).mean() / 2


def moco_loss(q, z_target, queue, temperature=0.2):
    """InfoNCE of q against its own target and `queue`, (K, 128) unit vectors (MoCo, arXiv 1911.05722)."""
    q = F.normalize(q)
    positive = (q * F.normalize(z_target)).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / temperature
    return -logits.log_softmax(1)[:, 0].mean()


def simclr_loss(q1, q2, temperature=0.2):
    """NT-Xent over the 2N views of the batch (SimCLR, arXiv 2002.05709, equation 1)."""
    q = F.normalize(torch.cat([q1, q2]))
    logits = (q @ q.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device).roll(len(q1)))


# ------------------------------------------------------------------------ collapse metrics
@torch.no_grad()
def collapse_metrics(y1, z1, y2, z2):
    """How far apart a batch's images lie, from y and z of its two views, (N, d) each: {name: float}.

    rep_dist, the representation distance, is 1 - the mean cosine of z over all pairs of different images;
    common is the share of z's variation that the two views of an image have in common; z_std and y_std, of
    unit vectors, are 1 for an even spread and 0 at collapse; y_rank is RankMe (arXiv 2210.02885). They come
    from squared distances, which stay exact where 1 - cos is smaller than rounding.
    """
    z_norm = torch.cat([z1, z2]).norm(dim=1).mean()
    y1, z1, y2, z2 = (F.normalize(t.float()) for t in (y1, z1, y2, z2))
    strangers = z1.var(0).sum() + z2.var(0).sum()       # mean squared distance of two images' z
    views = (z1 - z2).square().sum(1).mean()            # and of the two views of one image
    share = torch.linalg.svdvals(y1)
    metrics = {
        "pos_cos": 1 - views / 2,
        "neg_cos": 1 - strangers / 2,
        "rep_dist": strangers / 2,
        "common": (strangers - views) / strangers.clamp_min(1e-30),
        "z_norm": z_norm,
        "z_std": (z1.std(0) + z2.std(0)).mean() / 2 * z1.shape[1] ** 0.5,
        "y_std": (y1.std(0) + y2.std(0)).mean() / 2 * y1.shape[1] ** 0.5,
        "y_rank": torch.special.entr(share / share.sum().clamp_min(1e-30)).sum().exp(),
    }
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def collapse_state(state, rep_dist):
    """A run's state in words, from that before and the distance now: `collapsed` once it falls under 0.001,
    `recovered` when it then rises over 0.01, `healthy` if it never fell."""
    stays_down = state == "collapsed" and rep_dist <= 1e-2
    if rep_dist < 1e-3 or stays_down:
        return "collapsed"
    return "recovered" if state in ("collapsed", "recovered") else "healthy"


def layer_metrics(online, optimizer, unclipped):
    """Of the weights (no biases, no norms) of stem, layer1, ..., prediction, after a step: norm of gradient
    and weights, the largest weight over its tensor's rms, the mean local LARS rate (None without LARS).
    `unclipped`: the factor by which the gradient was longer before it was clipped."""
    rates, metrics = getattr(optimizer, "rates", {}), {}
    named = [(name, p) for name, p in online.named_parameters() if p.ndim > 1]
    layers = itertools.groupby(named, lambda pair: pair[0].removeprefix("encoder.").split(".")[0])
    for layer, pairs in layers:
        names, weights = zip(*pairs)
        local = [rates[name] for name in names if name in rates]
        peaks = [w.abs().max() / w.square().mean().sqrt().clamp_min(1e-30) for w in weights]
        metrics["stem" if layer == "conv1" else layer] = {
            "grad_norm": torch.stack([w.grad.norm() for w in weights]).norm().item() * unclipped,
            "weight_norm": torch.stack([w.norm() for w in weights]).norm().item(),
            "max_over_rms": max(peaks).item(),
            "lars_rate": torch.stack(local).mean().item() if local else None,
        }
    return metrics


@torch.no_grad()
def measure(args, online, optimizer, y, z, q, grad_norm):
    """All metrics of a step, over the batch of all processes. `live`: of the hidden units of projection and
    prediction, computed anew after the step, the share that some images switch on and others off. `grad_norm`:
    the whole gradient's before it was clipped, None if it was not."""
    (y1, y2), (z1, z2), (q1, q2) = ([gather(view) for view in t.chunk(2)] for t in (y, z, q))
    hidden = [online.projection[0](torch.cat([y1, y2])) > 0]
    if args.loss == "byol":
        hidden.append(online.prediction[0](torch.cat([z1, z2])) > 0)
    metrics = collapse_metrics(y1, z1, y2, z2)
    metrics["q_norm"] = torch.cat([q1, q2]).norm(dim=1).mean().item()
    metrics["live"] = [(on.any(0) & ~on.all(0)).float().mean().item() for on in hidden]
    clipped = nn.utils.get_total_norm([p.grad for p in online.parameters()]).item()
    metrics["grad_norm"] = clipped if grad_norm is None else grad_norm.item()
    unclipped = 1.0 if grad_norm is None else grad_norm.item() / max(clipped, 1e-30)
    metrics["layers"] = layer_metrics(online, optimizer, unclipped)
    return metrics


# ------------------------------------------------------------------------ linear evaluation
def fit_linear(x, labels):
    """Multinomial logistic regression by L-BFGS to convergence: float64 (N, d), (N,) -> weight (d, C), bias
    (C,). It minimises mean cross-entropy + ||weight||^2 / 2N, as scikit-learn with C=1. The search runs along
    the principal axes of x, scaled to the curvature expected there: some 50 iterations instead of 1000."""
    n, d = x.shape
    variance, axes = torch.linalg.eigh(x.T @ x / n)
    axes = axes * (variance.clamp_min(0) + 10 / n).rsqrt()
    x = x @ axes
    weight = torch.zeros(d, int(labels.max()) + 1, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros_like(weight[0], requires_grad=True)
    lbfgs = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-5, tolerance_change=0,
                              history_size=20, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + (axes @ weight).square().sum() / (2 * n)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return (axes @ weight).detach(), bias.detach()


def linear_accuracy(train, train_labels, test, test_labels):
    """Test accuracy in percent of a linear classifier on features (N, d), centred and divided by one scale
    for all. Deviations under 1e-5 of the features' rms, which fp32 rounding leaves of a constant, count as 0:
    scaled up, they could tell classes apart."""
    train, test = train.double(), test.double()
    mean, rounding = train.mean(0), 1e-5 * train.square().mean().sqrt().item()
    train, test = F.hardshrink(train - mean, rounding), F.hardshrink(test - mean, rounding)
    scale = train.square().mean().sqrt() or 1.0
    weight, bias = fit_linear(train / scale, train_labels)
    guess = (test / scale @ weight + bias).argmax(1)
    return 100 * (guess == test_labels).double().mean().item()


def evaluate(encoder, images, args):
    """Test accuracy in percent of a linear classifier of y, fitted on the labelled training images; y is of
    whole images, resized to --size, by the encoder in eval mode."""
    labelled, y = images.train[: len(images.train_labels)], []
    encoder.eval()
    for x in [*labelled.split(256), *images.test.split(256)]:
        x = F.interpolate(x.to(args.device) / 255, args.size, mode="bilinear", antialias=True)
        with torch.no_grad():
            y.append(encoder(normalize(x)).cpu())
    encoder.train()
    y = torch.cat(y)
    if not y.isfinite().all():
        stop(1, "the features are not finite: the run diverged; try a lower --lr")
    train, test = y.split([len(labelled), len(images.test)])
    return linear_accuracy(train, images.train_labels, test, images.test_labels)


# ------------------------------------------------------------------------ run folder
def write_whole(path, chunks):
    """Write chunks of bytes to a file, which appears as `path` whole or not at all."""
    aside = f"{path}.{os.getpid()}"
    try:
        with open(aside, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        stop(1, f"{path}: {error.strerror}")
    finally:
        Path(aside).unlink(missing_ok=True)


def save(content, path):
    buffer = io.BytesIO()               # torch's own writer meets a full disk with an abort
    torch.save(content, buffer)
    write_whole(path, [buffer.getbuffer()])


def write_line(log, line):
    """Append to the log, with six digits of each number."""
    line = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.6g}"))
    try:
        log.write(json.dumps(line).encode() + b"\n")
        log.flush()
    except OSError as error:
        stop(1, f"{log.name}: {error.strerror}")


def describe(args, digest):
    """What config.json holds: the resolved flags, and what else may decide the bits of a run."""
    flags = {name: value for name, value in vars(args).items() if name not in PLACES}
    here = shlex.quote(str(Path(__file__).resolve().parent))
    return {
        "flags": {**flags, "images": digest, "processes": WORLD},
        "command": shlex.join(["python", *sys.argv]),
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision, np)},
        "gpu": None if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "cpu": subprocess.getoutput("grep -m 1 '^model name' /proc/cpuinfo 2>/dev/null").partition(": ")[2],
        "commit": subprocess.getoutput(f"git -C {here} describe --always --abbrev=40 --dirty 2>/dev/null"),
    }


def open_run(out, config):
    """Make a run's folder, or enter it if it holds this very run. Returns its log, locked while open."""
    path = Path(out, "config.json")
    try:
        os.makedirs(out, exist_ok=True)
        if not path.exists():
            foreign = [name for name in os.listdir(out) if not name.startswith("config.json")]
            if foreign:
                stop(2, f"--out {out}: neither empty nor a run's folder, it holds {foreign[0]}")
            write_whole(path, [json.dumps(config, indent=1).encode()])
        log = open(Path(out, "metrics.jsonl"), "a+b")
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before = dict(json.loads(path.read_text())["flags"])
    except BlockingIOError:
        stop(1, f"--out {out}: another process is at this run")
    except OSError as error:
        stop(2, f"--out {out}: {error.strerror}")
    except (ValueError, LookupError, TypeError):
        stop(1, f"{path} is damaged; remove the folder to start again")
    for name, value in config["flags"].items():
        if value != before.get(name):
            stop(2, f"--out {out}: its run has {name} {before.get(name)}, not {value}; give another --out")
    return log


def load_checkpoint(out, log, parts):
    """Fill `parts`, {name: network or optimizer}, cut `log` to the checkpoint, return the run's progress.
    There is no generator to restore: what is random in a step depends on seed and step alone."""
    path, progress = Path(out, "checkpoint.pt"), {"step": 0, "state": "untrained", "log_bytes": 0}
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(content[name])
            progress.update(content["progress"])
        except Exception as error:      # torch raises nearly anything on a damaged or foreign file
            stop(1, f"{path}: cannot resume ({repr(error)[:100]}); if damaged, remove it")
    if log:
        if log.seek(0, os.SEEK_END) < progress["log_bytes"]:
            stop(1, f"{log.name} is shorter than at the last checkpoint; remove the folder to start over")
        log.truncate(progress["log_bytes"])
    return progress


# ------------------------------------------------------------------------ training
def rate(step, steps, lr, warmup):
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up over its share, then cosine to 0."""
    first = warmup * steps
    if step < first:
        return lr * (step + 1) / math.ceil(first)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def tau(step, steps, base):
    """EMA rate of step 0, 1, ... of `steps`: from `base` to 1 along a cosine (BYOL, section 3.3)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def check_memory(args):
    """Refuse a step whose feature maps, those of one pass of both views, do not fit into memory."""
    side = args.size // (4 if args.stem == "imagenet" else 1)
    values = 19 * args.width * side**2              # of a view: ResNet-18's are some 19 maps of layer1's size
    needed = 2 * args.batch_size / WORLD * values * (2 if args.amp else 4)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.device != "cpu":
        there = torch.cuda.mem_get_info(args.device)[1]
    if needed > there:
        stop(2, f"--size, --batch-size, --width: a step takes {needed / 1e9:.0f} GB of {there / 1e9:.0f}")


def set_up(args):
    """Networks and optimizer of a run: (online, target, optimizer)."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)      # what decay has killed computes in subnormal numbers, slowly
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):        # else glibc gives memory back and takes it anew, a tenth of a step
        libc.mallopt(-1, -1)            # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)             # M_MMAP_MAX
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    online = Network(args)
    target = make_target(online, args.loss)
    for network in (online, target):
        network.to(args.device, memory_format=torch.channels_last)
        if args.compile:
            network.compile()
    layers = (args.lars_layers or "") if args.opt == "lars" else None       # "" is found in every name
    decay_on = "all" if args.opt == "sgd" else args.lars_on                 # the blog's SGD: on every parameter
    try:
        groups = param_groups(online, args.weight_decay, layers, decay_on, dict(args.lr_mult))
    except ValueError as error:
        stop(2, f"--lars-layers or --lr-mult: {error}")
    if args.opt == "lars":
        return online, target, LARS(groups, args.lr)
    if args.opt == "adamw":
        return online, target, torch.optim.AdamW(groups, args.lr, fused=True)
    return online, target, torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)


def train_step(args, images, online, target, optimizer, step):
    """Step 0, 1, ... of the run. Returns loss, y, z, q of both views of this process's share of the batch, and
    the gradient's norm before it was clipped, or None without --clip."""
    views = load_views(images, step, args)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=args.amp):
        y, z, q = (t.float() for t in online(views))
        if args.loss != "simclr":
            with torch.no_grad():
                t1, t2 = target(views)[1].float().chunk(2)
    q1, q2 = q.chunk(2)
    if args.loss == "byol":
        loss = byol_loss(q1, t2) + byol_loss(q2, t1)
    elif args.loss == "moco":
        loss = moco_loss(q1, t2, target.queue) + moco_loss(q2, t1, target.queue)
    else:
        loss = simclr_loss(gather(q1), gather(q2))
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(online.parameters(), args.clip) if args.clip else None
    for group in optimizer.param_groups:
        group["lr"] = rate(step, args.steps, args.lr, args.warmup) * group["lr_mult"]
    optimizer.step()
    update_target(target, online, tau(step, args.steps, args.ema))
    if args.loss == "moco":
        keys = F.normalize(torch.cat([gather(t1), gather(t2)]))
        place = torch.arange(len(keys), device=keys.device) + step * len(keys)
        target.queue.index_copy_(0, place % QUEUE, keys)
    return *(t.detach() for t in (loss, y, z, q)), grad_norm


def begin(argv):
    """What the first step needs: flags, images, (online, target, optimizer), on process 0 the log."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    args = parse_arguments(argv)
    if WORLD > 1:
        dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    check_memory(args)
    networks = set_up(args)
    if RANK > 0:
        dist.barrier()                  # until process 0, at its own below, has decoded and made the folder
    images = load_images(args)
    n = len(images.train)
    if args.batch_size > n:
        stop(2, f"--batch-size {args.batch_size}: the data has {n} images")
    if args.epochs is not None:
        args.steps = args.epochs * (n // args.batch_size)
    if args.device != "cpu" and images.train.nbytes < torch.cuda.mem_get_info(args.device)[0] / 2:
        images = images._replace(train=images.train.to(args.device))
    log = open_run(args.out, describe(args, images.digest)) if RANK == 0 else None
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    return args, images, networks, log


def main(argv):
    """Run the command line `argv`. What goes wrong with the input, the disk, the memory or another
    process ends the script with one line on stderr."""
    again = "the same command resumes from the last checkpoint"
    try:
        run(argv)
    except KeyboardInterrupt:
        stop(130, f"interrupted; {again}")
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        stop(1, f"nobody reads standard output any more; {again}")
    except OSError as error:
        stop(1, f"{error.filename or 'the disk'}: {error.strerror}")
    except ValueError as error:
        stop(2, error)
    except (RuntimeError, MemoryError) as error:
        if any(words in repr(error) for words in ("out of memory", "allocate", "MemoryError")):
            stop(1, f"out of memory ({repr(error)[:90]}): try a smaller --batch-size, --size or --width")
        if WORLD == 1:
            raise
        stop(1, f"process {RANK} failed or lost the others ({repr(error)[:90]}); {again}")


def run(argv):
    """The whole run, from the last checkpoint if there is one."""
    args, images, (online, target, optimizer), log = begin(argv)
    if re.search(rb'{"step": %d, "accuracy.*}\n' % args.steps, Path(args.out, "metrics.jsonl").read_bytes()):
        print(f"{args.out} holds this run, finished; remove the folder to run it again")
        return
    parts = dict(online=online, target=target, optimizer=optimizer)
    progress = load_checkpoint(args.out, log, parts)
    network = nn.parallel.DistributedDataParallel(online) if WORLD > 1 else online
    print("left: minutes to go; the other columns: README.md, Has my run collapsed?")
    print("   step  left     loss   distance common     |z|     |q|   live units  state")
    clock, clock_step = time.perf_counter(), progress["step"]
    for step in range(progress["step"], args.steps + 1):
        judges = step in (0, args.steps) or args.eval_every > 0 and step % args.eval_every == 0
        if judges and log:
            accuracy = evaluate(online.encoder, images, args)
            random = progress.setdefault("random", accuracy)
            state = progress["state"]
            if step == args.steps:      # before the line that says that the run is finished
                encoder = {name: t.cpu().contiguous() for name, t in online.encoder.state_dict().items()}
                save(encoder, f"{args.out}/encoder.pt")
            write_line(log, {"step": step, "accuracy": accuracy, "state": state})
            scores = f"linear accuracy {accuracy:.2f} %, of random features {random:.2f} %"
            print(f"step {step}: {state}, {scores}")
            clock, clock_step = time.perf_counter(), step
        if step == args.steps:
            break
        loss, *outputs = train_step(args, images.train, network, target, optimizer, step)
        done = step + 1
        logs = done == args.steps or done % args.log_every == 0 or done & step == 0     # at powers of two
        saves = done % args.checkpoint_every == 0
        if logs or saves:               # nothing else in a step waits for the device
            loss = gather(loss[None]).mean().item()
            if not math.isfinite(loss):
                stop(1, f"the loss is {loss} at step {done}: the run diverged; try a lower --lr")
        if logs:                        # on every process, as it gathers
            metrics = measure(args, online, optimizer, *outputs)
            progress["state"] = collapse_state(progress["state"], metrics["rep_dist"])
        if logs and log:
            pace = (time.perf_counter() - clock) / (done - clock_step)
            clock, clock_step = time.perf_counter(), done
            write_line(log, {
                "step": done,
                "epoch": done / (len(images.train) // args.batch_size),
                "loss": loss,
                "lr": rate(step, args.steps, args.lr, args.warmup),
                "ema": tau(step, args.steps, args.ema),
                **metrics,
                "images_per_s": args.batch_size / pace,
            })
            left = pace * (args.steps - done) / 60
            live = "".join(f"{share:6.2f}" for share in metrics["live"])
            shown = "{rep_dist:10.3g} {common:6.2f} {z_norm:7.3g} {q_norm:7.3g}".format(**metrics)
            print(f"{done:7} {left:4.0f}m {loss:8.3g} {shown} {live}  {progress['state']}", flush=True)
        if saves and log:
            os.fsync(log.fileno())
            progress.update(step=done, log_bytes=log.tell())
            states = {name: part.state_dict() for name, part in parts.items()}
            save({**states, "progress": progress}, f"{args.out}/checkpoint.pt")
    if log:
        for path in [*Path(args.out).glob("*.pt.[0-9]*"), Path(args.out, "checkpoint.pt")]:
            path.unlink(missing_ok=True)        # that with a number was being written when a run was killed
    print(f"as a picture: python results/report.py {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
    if WORLD > 1:
        dist.destroy_process_group()    # whose threads can otherwise abort a process at its exit
