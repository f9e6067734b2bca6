"""BYOL with and without batch statistics: does it collapse, and what brings it back? Results: README.md

    python byol.py                                                           # the control: bn everywhere, SGD
    python byol.py --enc-norm gn --mlp-norm none                             # no batch statistics: collapses
    python byol.py --enc-norm gn --mlp-norm none --opt lars --lr 0.2         # and LARS, which turns the collapse
    python byol.py --data stl10 --download --width 64 --size 96 --batch-size 256 --epochs 320 --device cuda
    torchrun --nproc-per-node 2 byol.py --enc-norm gn --mlp-norm none        # one run on two processes

The script reads top to bottom in the order data flows: arguments, images, views, networks, loss, collapse metrics,
linear evaluation, checkpoint, training. A run is one folder, and the same command resumes a run that was stopped.
"""

import argparse
import collections
import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset
from torchvision import datasets

from lars import LARS, param_groups
from resnet_norms import group_norm, resnet18

HIDDEN, PROJECTION = 512, 128        # features of the MLPs, as in the blog's code
TEMPERATURE, QUEUE = 0.2, 4096       # moco and simclr (MoCo v2); the queue holds target projections
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)                        # RandomResizedCrop: area and aspect ratio of a crop
P_FLIP, P_JITTER, P_GRAY, P_BLUR = 0.5, 0.8, 0.2, 0.5
JITTER = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1))
JITTER_RANGE = torch.tensor([(low, high - low, name != "hue") for name, (low, high) in JITTER.items()]).T[..., None]
BLUR_SIGMA, BLUR_REACH = (0.1 / 96, 2.0 / 96), 6 / 96            # sigma and kernel radius over the view's side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet's, per channel
COLLAPSED, RECOVERED = 1e-3, 1e-2    # representation distances, see collapse_state
OPTIMIZERS = {                       # defaults per optimizer
    "sgd": dict(lr=0.2, weight_decay=1e-4, warmup=0.0),                          # the blog's code
    "lars": dict(lr=0.2, weight_decay=1.5e-6, warmup=0.2, lars_layers=".*"),    # the BYOL paper; its warm-up: README
}
MLP_NORMS = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm, "gn": group_norm, "none": lambda features: nn.Identity()}
PARTS = "images", "views", "online forward", "target forward", "backward", "optimizer", "EMA", "metrics"
PRINTED = "loss", "lr", "pos_cos", "neg_cos", "rep_dist", "z_std", "y_std", "y_rank", "images_per_s"
ORDER, VIEWS = 0, 1                  # what a random stream is for
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # of torchrun
CPUINFO = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""


def stop(status, message):
    """One line on stderr, and out: status 2 for wrong usage, 1 for a failed run."""
    print(f"byol.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def generator(seed, stream, index):
    """A CPU generator that depends on nothing but (seed, stream, index), so no generator state needs saving."""
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def uniform_from(n, rng):
    """A function (low, high, *shape) that draws (n, *shape) from U[low, high]."""
    return lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=rng)


def gather(rows):
    """The rows (N / processes, ...) of all processes in the batch's order; this process's own keep their gradient."""
    if WORLD == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat([*parts[:RANK], rows, *parts[RANK + 1 :]])


def agree(number):
    """The largest `number` of all processes."""
    return gather(torch.tensor([number])).max().item()


# ------------------------------------------------------------------------ arguments

def number(kind, low, high=1e18, above=False):
    """An argparse type: a `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low):
                return value
        whole, bound = "whole " * (kind is int), "above" if above else "from"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number {bound} {low} to {high:g}")

    return parse


def regex_factor(text):
    regex, equals, factor = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=FACTOR")
    return regex, number(float, 0)(factor)


def parse_arguments(argv):
    """The flags of the command line `argv`, with the defaults that follow from other flags filled in."""
    parser = argparse.ArgumentParser(prog="byol.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(2, message)
    add, mlp_norms = parser.add_argument, list(MLP_NORMS)
    add("--enc-norm", choices=["bn", "gn", "gn+ws", "none"], default="bn", help="norm of the encoder (bn)")
    add("--mlp-norm", choices=mlp_norms, default="bn", help="norm of projection and prediction (bn)")
    add("--proj-norm", choices=mlp_norms, help="norm of the projection (--mlp-norm)")
    add("--pred-norm", choices=mlp_norms, help="norm of the prediction (--mlp-norm)")
    add("--width", type=number(int, 1, 512), default=8, help="channels of layer1; y has 8 times as many (8)")
    add("--stem", choices=["imagenet", "cifar"], default="cifar", help="7x7/2 and max-pool, or 3x3 (cifar)")
    add("--loss", choices=["byol", "moco", "simclr"], default="byol", help="moco: a queue; simclr: the batch (byol)")
    add("--ema", type=number(float, 0, 1), default=0.996, help="target's share kept per step, cosine to 1 (0.996)")
    add("--opt", choices=list(OPTIMIZERS), default="sgd", help="optimizer, momentum 0.9 (sgd)")
    add("--lr", type=number(float, 0, above=True), help="the rate, not scaled by the batch; cosine to 0 (0.2)")
    add("--warmup", type=number(float, 0, 1), help="share of the run with linear warm-up (sgd 0, lars 0.2)")
    add("--weight-decay", type=number(float, 0), help="(sgd 1e-4 on all, lars 1.5e-6 on weights)")
    add("--lars-layers", metavar="REGEX", help="with --opt lars: layers that get LARS, the rest SGD (all)")
    add("--lr-mult", metavar="REGEX=FACTOR", type=regex_factor, action="append", default=[],
        help="multiply the rate of the layers in which REGEX is found; repeatable")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 0, 10**9), default=700, help="length; 0: random features (700)")
    length.add_argument("--epochs", type=number(int, 0, 10**9), help="the length in passes over the images")
    add("--batch-size", type=number(int, 2), default=64, help="images per step (64)")
    add("--size", type=number(int, 8), default=16, help="side of the views in pixels (16)")
    add("--data", default="shapes", help="shapes, cifar10, stl10, fashion-mnist or folder:DIR (shapes)")
    add("--data-dir", default="data", help="where cifar10, stl10 and fashion-mnist lie (data)")
    add("--download", action="store_true", help="download the data set if it is not there")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights, order and views (0)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=number(int, 1, 1024), help="CPU threads; 1 where runs share a machine (all cores)")
    add("--sync-bn", action="store_true", help="with torchrun, on GPUs: BN statistics over all processes")
    add("--amp", action="store_true", help="networks in bfloat16 autocast; loss and metrics stay in fp32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--profile", action="store_true", help="time the parts of a step instead of training; writes nothing")
    add("--log-every", type=number(int, 1), default=25, help="steps between lines of metrics; powers of two too (25)")
    add("--eval-every", type=number(int, 0), default=0, help="steps between evaluations; 0: one at the end (0)")
    add("--checkpoint-every", type=number(int, 1), default=200, help="steps between checkpoints (200)")
    add("--out", help="folder of the run (runs/ and the flags given)")
    for flag in argv:
        if flag.endswith("=--"):        # argparse would make it an empty list
            stop(2, f"{flag[:-3]}: '--' is no value")
    args = parser.parse_args(argv)
    for wrong, why in (
        (args.lars_layers is not None and args.opt != "lars", "--lars-layers needs --opt lars"),
        (args.loss == "moco" and 2 * args.batch_size > QUEUE, f"--batch-size: two views do not fit a queue of {QUEUE}"),
        (args.batch_size % WORLD, f"--batch-size {args.batch_size} does not divide into {WORLD} processes"),
        (args.sync_bn and (WORLD == 1 or args.device.startswith("cpu")), "--sync-bn needs torchrun and --device cuda"),
        (args.profile and WORLD > 1, "--profile times one process: leave torchrun away"),
    ):
        if wrong:
            stop(2, why)

    flags = re.sub(r"[^\w.+=-]+", "_", " ".join(argv).replace("--", "")).strip("_")[:200]
    defaults = {"proj_norm": args.mlp_norm, "pred_norm": args.mlp_norm, "out": os.path.join("runs", flags or "default")}
    for name, value in {**OPTIMIZERS[args.opt], **defaults, "processes": WORLD}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if WORLD > 1 and args.device == "cuda":
        args.device = "cuda:" + os.environ["LOCAL_RANK"]
    try:
        if torch.empty(1, device=args.device).device.type not in ("cpu", "cuda"):
            stop(2, f"--device {args.device}: neither cpu nor cuda")
    except (RuntimeError, AssertionError) as error:
        stop(2, f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.amp and args.device.startswith("cpu") and "bf16" not in CPUINFO:
        print("--amp: this CPU has no bf16 instructions, so the run is in fp32")
        args.amp = False
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


# ------------------------------------------------------------------------ images

# uint8 images (N, 3, side, side) and int64 labels (N,). Pre-training sees `pretrain` and no label.
Images = collections.namedtuple("Images", "pretrain train train_labels test test_labels")
FORMS = {  # fields over a cell [-1, 1] x [-1, 1] that repeats; a form is where its field is lowest
    "disc": lambda x, y: torch.hypot(x, y),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.65).abs(),
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()),
    "triangle": lambda x, y: torch.maximum(0.87 * x.abs() + 0.5 * y, -y),
    "rows": lambda x, y: y.abs(),
    "columns": lambda x, y: x.abs(),
    "diagonals": lambda x, y: 0.7 * fold(x + y).abs(),
    "grid": lambda x, y: torch.minimum(x.abs(), y.abs()),
    "net": lambda x, y: 0.7 * torch.minimum(fold(x + y).abs(), fold(x - y).abs()),
    "checks": lambda x, y: torch.sign(x * y) * torch.maximum((x.abs() - 0.5).abs(), (y.abs() - 0.5).abs()).sub(0.5),
}


def fold(t):
    return t - 2 * (t / 2).round()


def draw_shapes(per_class, seed, side=32):
    """`per_class` images of each of FORMS: uint8 (N, 3, side, side), labels (N,).

    The form alone makes the class: its position, size and tilt, the colours, the mottled ground and the noise are drawn
    alike for all classes. Light on dark, contrast and area are the same in every image, for what varies from image to
    image and shows in every crop, such as contrast, is easier to predict than the form and is then learned instead.
    """
    n, rng, images = per_class, torch.Generator().manual_seed(seed), []
    uniform = uniform_from(n, rng)
    grid = (torch.arange(side) + 0.5) / side * 2 - 1
    for field in FORMS.values():
        cell, tilt = uniform(0.95, 1.1, 1, 1), uniform(-0.15, 0.15, 1, 1)             # side of a cell over the image's
        x = (tilt.cos() * grid + tilt.sin() * grid[:, None]) / cell + uniform(-1, 1, 1, 1)
        y = (tilt.cos() * grid[:, None] - tilt.sin() * grid) / cell + uniform(-1, 1, 1, 1)
        height = field(fold(x), fold(y))
        level = height.flatten(1).kthvalue(int(0.43 * side**2)).values[:, None, None]    # every form covers as much
        form = (0.5 - (height - level) * cell * side / 2).clamp(0, 1)[:, None]        # antialiased: 1 inside, 0 outside
        contrast = 0.4 + uniform(-0.05, 0.05, 3, 1, 1)
        ground = uniform(0.45, 0.55, 1, 1, 1) + F.interpolate(uniform(-0.05, 0.05, 3, 3, 3), side, mode="bicubic")
        image = ground + contrast * (form - 0.5) + 0.03 * torch.randn(n, 3, side, side, generator=rng)
        images.append((image.clamp(0, 1) * 255).byte())
    return torch.cat(images), torch.arange(len(FORMS)).repeat_interleave(n)


class ImageFile:
    """uint8 images (N, 3, side, side) in a raw file, read like a tensor by a slice or an index tensor. Each access maps
    the file anew, so that pages read earlier do not pile up in this process's memory."""

    device = torch.device("cpu")

    def __init__(self, path, shape, skip=0):
        self.file, self.shape, self.offset = open(path, "rb"), torch.Size(shape), skip * math.prod(shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        images = np.memmap(self.file, np.uint8, "r", self.offset, self.shape)
        return torch.from_numpy(np.array(images[index]))


def picture(path):
    try:
        return datasets.folder.pil_loader(path)             # converts any mode to RGB
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from None


def open_folder(root):
    """DIR/train/CLASS/*, DIR/unlabeled/*, which may be missing, and DIR/test/CLASS/*: three data sets."""
    try:
        train, test = (datasets.ImageFolder(os.path.join(root, split), loader=picture) for split in ("train", "test"))
    except OSError as error:
        stop(2, f"--data folder:{root}: {error}; it needs train/CLASS/* and test/CLASS/* images")
    if len(train.classes) < 2:
        stop(2, f"--data folder:{root}: train has one class, {train.classes[0]}; the evaluation needs two")
    for name in set(train.classes) ^ set(test.classes):
        stop(2, f"--data folder:{root}: class {name} is in one of train and test only")
    unlabeled, paths = copy.copy(train), sorted(map(str, Path(root, "unlabeled").glob("*")))
    unlabeled.samples = [(path, 0) for path in paths if path.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
    return train, unlabeled, test


def open_torchvision(name, root, download):
    """The same of cifar10, stl10 or fashion-mnist, in torchvision's format in `root`."""
    dataset = {"cifar10": datasets.CIFAR10, "stl10": datasets.STL10, "fashion-mnist": datasets.FashionMNIST}[name]
    splits = ("train", "test") if name == "stl10" else (True, False)
    try:
        train, test = (dataset(root, split, download=download) for split in splits)
    except (RuntimeError, OSError) as error:
        if download:
            stop(1, f"--data {name}: cannot download to {root}: {error}")
        stop(2, f"--data {name}: not found in {root}; add --download, or name its folder with --data-dir")
    unlabeled = copy.copy(train)
    unlabeled.data = train.data[:0]
    if name == "stl10":         # mapped: torchvision would read 3 GB
        source = os.path.join(root, train.base_folder, "unlabeled_X.bin")
        unlabeled.data = np.memmap(source, np.uint8, "r").reshape(-1, 3, 96, 96).swapaxes(2, 3)    # it holds columns
        unlabeled.labels, train.targets, test.targets = np.zeros(len(unlabeled.data), int), train.labels, test.labels
    return train, unlabeled, test


def decode_once(dataset, side, files, folder):
    """The path of a raw file of all images of `dataset`, resized by the shorter side and centre-cropped where they are
    not `side` wide and high. It is made in `folder` if it is not yet there or the `files` that hold the images have
    changed; a second run that wants the same waits for the first."""
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    path = os.path.join(folder, hashlib.sha256(repr((stats, side)).encode()).hexdigest()[:16])

    def decode(i):
        image = dataset[i][0]
        if image.size != (side, side):
            image = TF.center_crop(TF.resize(image, side), side)
        return TF.pil_to_tensor(image.convert("RGB")).numpy().tobytes()

    def write(file):
        with ThreadPool() as pool:                          # Pillow decodes without holding the GIL
            for i, image in enumerate(pool.imap(decode, range(len(dataset)), chunksize=64), 1):
                file.write(image)
                if i % 10000 == 0 or i == len(dataset):
                    print(f"decoded {i:,} of {len(dataset):,} images to {side} x {side}", flush=True)

    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            for stale in set(os.listdir(folder)) - {"lock"}:
                os.remove(os.path.join(folder, stale))
            write_whole(path, write)
    return path


def load_images(data, data_dir, download, size):
    """The images of --data. All but the embedded ones are decoded once, into `data_dir`, and mapped from there: as they
    are where they are square and of one size, else resized and cropped to `size`."""
    if data == "shapes":
        train, labels = draw_shapes(1000, seed=0)
        return Images(train, train, labels, *draw_shapes(200, seed=1))
    root = os.path.abspath(data.removeprefix("folder:"))
    if data.startswith("folder:"):
        splits = open_folder(root)
        folder = f"{os.path.basename(root)}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
        files = [path for split in splits for path, _ in split.samples]
    elif data in ("cifar10", "stl10", "fashion-mnist"):
        splits, folder, files = open_torchvision(data, data_dir, download), data, []
    else:
        stop(2, f"--data {data}: not shapes, cifar10, stl10, fashion-mnist or folder:DIR")
    dataset = ConcatDataset(splits)
    train, pretrain, n = dataset.cumulative_sizes           # where each split ends
    try:
        sides = {side for i in range(0, n, n // 100 + 1) for side in dataset[i][0].size}        # a hundred images tell
        side = sides.pop() if len(sides) == 1 else size
        path = decode_once(dataset, side, files, os.path.join(data_dir, "decoded", folder))
    except ValueError as error:
        stop(1, f"--data {data}: {error}")
    part = lambda start, end: ImageFile(path, (end - start, 3, side, side), start)
    labels = [torch.as_tensor(split.targets).long() for split in (splits[0], splits[2])]
    return Images(part(0, pretrain), part(0, train), labels[0], part(pretrain, n), labels[1])


# ------------------------------------------------------------------------ views

@torch.inference_mode()
def draw_view(n, side, size, rng):
    """The random parameters of one view of n square images, drawn on the CPU with torchvision's distributions. Crops
    are RandomResizedCrop's: the first of ten tries that fits, else the whole image. An operation that is not applied
    gets the parameter that changes nothing. The order of the jitter is drawn once per batch."""
    uniform, chance = uniform_from(n, rng), lambda p: torch.rand(n, generator=rng) < p
    area = side * side * uniform(*SCALE, 10)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), 10).exp()
    tries = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).round()           # (n, 2, 10): height, width
    fits = (tries <= side).all(1)
    extent = torch.where(fits.any(1)[:, None], tries[torch.arange(n), :, fits.int().argmax(1)], side)
    start = (uniform(0, 1, 2) * (side - extent + 1)).floor()
    apply = chance(P_JITTER)
    params = {"start": start, "extent": extent, "flip": chance(P_FLIP)}
    low, span, still = JITTER_RANGE
    params |= zip(JITTER, torch.where(apply, low + span * torch.rand(len(JITTER), n, generator=rng), still))
    params["gray"] = chance(P_GRAY)
    params["sigma"] = torch.where(chance(P_BLUR), size * uniform(*BLUR_SIGMA), 0.0)
    return params, [list(JITTER)[i] for i in torch.randperm(len(JITTER), generator=rng).tolist()]


def resize_matrix(start, extent, side, size):
    """(..., size, side) rows that resize pixels [start, start + extent) of `side` to `size`: bilinear with antialiasing,
    by the weights of torch's `upsample_bilinear2d`, which RandomResizedCrop calls. start and extent: (...)."""
    start, extent = start[..., None, None], extent[..., None, None]
    pixel, scale = torch.arange(side, device=start.device), extent / size
    centre = start + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight * ((pixel >= start) & (pixel < start + extent))
    return weight / weight.sum(-1, keepdim=True)


def separable(images, rows, columns):
    """rows @ channel @ columns^T for each channel of (N, C, H, W) images, matrices (N, H', H) and (N, W', W)."""
    n, c, h, w = images.shape
    x = images.reshape(n, c * h, w) @ columns.mT                # channels folded: one product an image, not three
    x = rows @ x.view(n, c, h, -1).transpose(1, 2).reshape(n, h, -1)
    return x.view(n, rows.shape[1], c, -1).transpose(1, 2)


def resized_crop(images, start, extent, flip, size):
    """Crop, resize and flip each image: (N, 3, side, side) -> (N, 3, size, size)."""
    rows, columns = resize_matrix(start.T, extent.T, images.shape[-1], size)
    return separable(images, rows, torch.where(flip[:, None, None], columns.flip(1), columns))


def grayscale(images):
    r, g, b = images.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b                   # torchvision's rgb_to_grayscale


def adjust_hue(images, shift):
    """Rotate the hue by `shift` turns, (N, 1, 1, 1), through HSV as torchvision's adjust_hue does."""
    r, g, b = images.split(1, dim=1)
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    c = chroma.clamp_min(1e-12)
    hue = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)) / 6
    k = hue + shift + per_channel((5 / 6, 3 / 6, 1 / 6), images.device)
    k.sub_(k.floor()).mul_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def jitter(images, params, order):
    """ColorJitter with one factor per image and operation; images in [0, 1]."""
    for name in order:
        factor = params[name][:, None, None, None]
        if name == "hue":
            images = adjust_hue(images, factor)
        elif name == "brightness":
            images = (images * factor).clamp_(0, 1)
        else:
            gray = grayscale(images)
            base = gray.mean((2, 3), keepdim=True) if name == "contrast" else gray
            images = torch.lerp(base, images, factor).clamp_(0, 1)
    return images


@functools.lru_cache
def blur_taps(size, device):
    """The taps' offsets in pixels, (taps,), and the blur matrix that each alone would make, (taps, size * size). They
    reach three of the largest sigmas: 13 pixels at 96 px, as many as torchvision's GaussianBlur(13)."""
    radius = math.ceil(BLUR_REACH * size)
    offset = torch.arange(-radius, radius + 1, device=device)
    source = (torch.arange(size, device=device) + offset[:, None]).abs()
    source = size - 1 - (size - 1 - source).abs()                                 # (taps, size): reflected pixel
    return offset, F.one_hot(source, size).float().flatten(1)


def gaussian_blur(images, sigma):
    """Blur with one sigma per image, the border reflected; sigma 0 changes nothing."""
    size = images.shape[-1]
    offset, taps = blur_taps(size, images.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]) ** 2)
    matrix = (kernel / kernel.sum(1, keepdim=True) @ taps).view(-1, size, size)
    return separable(images, matrix, matrix)


@functools.lru_cache
def per_channel(values, device):
    """(3, 1, 1), made once: a copy to the device in every step would wait for it."""
    return torch.tensor(values, device=device)[:, None, None]


def normalize(images):
    return (images - per_channel(MEAN, images.device)) / per_channel(STD, images.device)


@torch.inference_mode()
def make_view(images, params, order, size):
    """One random view of each uint8 image: (N, 3, side, side) -> float (N, 3, size, size), normalized."""
    x = resized_crop(images / 255, params["start"], params["extent"], params["flip"], size)
    x = jitter(x, params, order)
    x = torch.where(params["gray"][:, None, None, None], grayscale(x), x)
    return normalize(gaussian_blur(x, params["sigma"]))


@functools.lru_cache(maxsize=1)
def image_order(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def draw_views(images, step, args, lap):
    """Both views of this process's share of the batch of step 0, 1, ..., one after the other, on the device:
    (2 * batch / processes, 3, size, size). They are drawn for the whole batch, so that every number of processes trains
    on the same ones."""
    epoch, batch = divmod(step, len(images) // args.batch_size)
    share = slice(RANK * args.batch_size // WORLD, (RANK + 1) * args.batch_size // WORLD)
    chosen = image_order(len(images), args.seed, epoch)[batch * args.batch_size :][share]
    x = images[chosen.to(images.device, non_blocking=True)].to(args.device, non_blocking=True)
    lap("images")
    some = len(x) if x.is_cuda else 1 + 2**19 // (3 * args.size**2)         # as many as stay in a CPU's cache
    rng, threads, views = generator(args.seed, VIEWS, step), torch.get_num_threads(), []
    torch.set_num_threads(1)        # torch would wake the others for 5,000 numbers, and wait 10 ms where a core is busy
    drawn = [draw_view(args.batch_size, x.shape[-1], args.size, rng) for _ in range(2)]
    torch.set_num_threads(threads)
    for params, order in drawn:
        params = {name: t[share].to(args.device, non_blocking=True) for name, t in params.items()}
        for start in range(0, len(x), some):
            part = slice(start, start + some)
            views.append(make_view(x[part], {name: t[part] for name, t in params.items()}, order, args.size))
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------ networks

def mlp(features, norm):
    """The projection or the prediction: (N, features) -> (N, 128)."""
    layers = nn.Linear(features, HIDDEN), MLP_NORMS[norm](HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, PROJECTION)
    return nn.Sequential(*layers)


class PerView:
    """Batch normalization of a batch that holds two views, one after the other, each with its own statistics."""

    def forward(self, x):
        return torch.cat([super(PerView, self).forward(view) for view in x.chunk(2 if self.training else 1)])


PER_VIEW = {norm: type(norm.__name__, (PerView, norm), {})
            for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)}


class Network(nn.Module):
    """views v -> representations y -> projections z -> predictions q(z); the contrastive losses have no prediction.

    In training the batch holds both views, (2N, 3, size, size), so that they share each pass through the convolutions.
    """

    def __init__(self, args):
        super().__init__()
        self.encoder = resnet18(args.enc_norm, args.width, args.stem)
        self.projection = mlp(8 * args.width, args.proj_norm)
        self.prediction = mlp(PROJECTION, args.pred_norm) if args.loss == "byol" else nn.Identity()
        if args.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        for module in self.modules():
            module.__class__ = PER_VIEW.get(type(module), type(module))

    def forward(self, views):
        y = self.encoder(views)
        z = self.projection(y)
        return y, z, self.prediction(z)


def make_target(online, loss):
    """The slowly moving copy: encoder and projection, and moco's queue. It stays in train mode, so BN uses the batch's
    statistics, and its running averages, which the EMA does not touch, are never read."""
    target = copy.deepcopy(online).requires_grad_(False)
    target.prediction = nn.Identity()
    if loss == "moco":
        target.register_buffer("queue", unit(torch.randn(QUEUE, PROJECTION)))
    return target


@torch.no_grad()
def update_target(target, online, tau):
    """target = tau * target + (1 - tau) * online (BYOL, arXiv 2006.07733, equation 1)."""
    own = parameters(target)
    torch._foreach_lerp_(own, parameters(online)[: len(own)], 1 - tau)


@functools.lru_cache(maxsize=2)
def parameters(network):
    """Those of online and target, listed once: to walk the modules takes longer than the EMA itself."""
    return list(network.parameters())


# ------------------------------------------------------------------------ loss

def unit(x):
    return F.normalize(x, dim=1)


def byol_loss(q, z_target):
    """Squared distance of the unit vectors, mean over the batch, in [0, 4]: equal to 2 - 2 cos (BYOL, equation 2),
    without the rounding that drowns the latter when both agree."""
    return (unit(q) - unit(z_target)).square().sum(1).mean()


def moco_loss(q, z_target, queue):
    """InfoNCE of q against its own target and `queue` (K, 128) of unit vectors (MoCo, arXiv 1911.05722, equation 1)."""
    q = unit(q)
    positive = (q * unit(z_target)).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / TEMPERATURE
    return -logits.log_softmax(1)[:, 0].mean()


def simclr_loss(q1, q2):
    """NT-Xent over the 2N views of the batch (SimCLR, arXiv 2002.05709, equation 1)."""
    q, n = unit(torch.cat([q1, q2])), len(q1)
    logits = (q @ q.T / TEMPERATURE).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=q.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=q.device).roll(n))


# ------------------------------------------------------------------------ collapse metrics

@torch.no_grad()
def collapse_metrics(y1, z1, y2, z2):
    """How far apart a batch's images lie, (N, d) each; dict of floats. pos_cos is the mean cosine of z over the two
    views of an image, neg_cos that over all pairs of different images in one view, rep_dist 1 - neg_cos; z_std, y_std
    and y_rank (RankMe, arXiv 2210.02885) are 0, 0 and 1 at collapse. Cosines come from squared differences, which stay
    exact where 1 - cos is smaller than rounding."""
    y1, z1, y2, z2 = (unit(t.float()) for t in (y1, z1, y2, z2))
    variance = sum((z - z.mean(0)).square().sum(1).mean() for z in (z1, z2)) / 2
    rep_dist = variance * len(z1) / (len(z1) - 1)
    share = torch.linalg.svdvals(y1)
    metrics = {
        "pos_cos": 1 - (z1 - z2).square().sum(1).mean() / 2,
        "neg_cos": 1 - rep_dist,
        "rep_dist": rep_dist,
        "z_std": (z1.std(0).mean() + z2.std(0).mean()) / 2 * z1.shape[1] ** 0.5,
        "y_std": (y1.std(0).mean() + y2.std(0).mean()) / 2 * y1.shape[1] ** 0.5,
        "y_rank": torch.special.entr(share / share.sum()).sum().exp(),
    }
    return {name: value.item() for name, value in metrics.items()}


def collapse_state(state, rep_dist):
    """The state of a run in words, from the state before and the representation distance now: `collapsed` once that
    falls under COLLAPSED, `recovered` when it then rises over RECOVERED, `healthy` if it never fell."""
    if rep_dist < COLLAPSED or state == "collapsed" and rep_dist <= RECOVERED:
        return "collapsed"
    return "recovered" if state in ("collapsed", "recovered") else "healthy"


LAYERS = {"stem": "encoder.conv1.", **{f"layer{i}": f"encoder.layer{i}." for i in (1, 2, 3, 4)},
          "projection": "projection.", "prediction": "prediction."}


@torch.no_grad()
def layer_metrics(online, optimizer):
    """Per layer group, over its weights (biases and norms left out), after a step: norm of the gradient and of the
    weights, largest weight over its tensor's rms, and the mean local LARS rate (None without LARS)."""
    rates, layers = getattr(optimizer, "rates", {}), {}
    for layer, prefix in LAYERS.items():
        weights = {n: p for n, p in online.named_parameters() if n.startswith(prefix) and p.ndim > 1}
        if weights:
            local = [rates[name] for name in weights if name in rates]
            peaks = [p.abs().max() / p.square().mean().sqrt().clamp_min(1e-30) for p in weights.values()]
            layers[layer] = {
                "grad_norm": torch.stack([p.grad.norm() for p in weights.values()]).norm().item(),
                "weight_norm": torch.stack([p.norm() for p in weights.values()]).norm().item(),
                "max_over_rms": torch.stack(peaks).max().item(),
                "lars_rate": torch.stack(local).mean().item() if local else None,
            }
    return layers


# ------------------------------------------------------------------------ linear evaluation

@torch.no_grad()
def features(encoder, images, size, device):
    """y of whole images, resized to `size`, without augmentation: (N, 8 * width), fp32, on the CPU."""
    chunks = []
    for start in range(0, len(images), 256):
        x = images[start : start + 256].to(device) / 255
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        chunks.append(encoder(normalize(x)).cpu())
    return torch.cat(chunks)


def fit_linear(x, labels):
    """Multinomial logistic regression by L-BFGS to convergence: float64 (N, d), (N,) -> weight (d, classes), bias.
    Minimises the mean cross-entropy + ||weight||^2 / 2N, as scikit-learn with C = 1. The search runs along the
    principal axes of x, each scaled to the curvature expected there: some 50 iterations instead of 1000."""
    decay, classes = 1 / len(x), int(labels.max()) + 1
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    axes = axes * (variance.clamp_min(0) + 10 * decay).rsqrt()
    x = x @ axes
    weight, bias = (torch.zeros(shape, dtype=x.dtype, requires_grad=True) for shape in ((x.shape[1], classes), classes))
    lbfgs = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-5, tolerance_change=0,
                              history_size=20, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + decay / 2 * (axes @ weight).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    return (axes @ weight).detach(), bias.detach()


def linear_accuracy(train, train_labels, test, test_labels):
    """Test accuracy in percent of a linear classifier on frozen features (N, d), centred and divided by one common
    scale, their standard deviation. A deviation under 1e-5 of the features' rms, which is what fp32 rounding leaves of
    a constant, counts as 0: scaled up, it could tell classes apart."""
    train, test = train.double(), test.double()
    mean, rounding = train.mean(0), 1e-5 * train.square().mean().sqrt().item()
    train, test = F.hardshrink(train - mean, rounding), F.hardshrink(test - mean, rounding)
    scale = train.square().mean().sqrt() or 1.0
    weight, bias = fit_linear(train / scale, train_labels)
    guess = (test / scale @ weight + bias).argmax(1)
    return 100 * (guess == test_labels).double().mean().item()


def evaluate(encoder, images, size, device):
    """Linear evaluation of the frozen encoder, which is checked to come out of it bit for bit as it went in."""
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    encoder.eval()
    train, test = (features(encoder, split, size, device) for split in (images.train, images.test))
    encoder.train()
    if not train.isfinite().all() or not test.isfinite().all():
        stop(1, "the encoder's features are not finite: the run diverged; try a lower --lr")
    accuracy = linear_accuracy(train, images.train_labels, test, images.test_labels)
    if any(not torch.equal(t, before[name]) for name, t in encoder.state_dict().items()):
        raise RuntimeError("the linear evaluation changed the encoder")
    return accuracy


# ------------------------------------------------------------------------ checkpoint

def write_whole(path, write):
    """`write(file)` into a file beside `path`, then rename: `path` appears whole or not at all."""
    aside = f"{path}.tmp"
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def describe(args, argv):
    """What config.json holds: the resolved flags, and what else may decide the bits of a run."""
    git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--abbrev=40", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    cpu = re.search(r"model name\s*: (.*)", CPUINFO)
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    return {
        "flags": {name: value for name, value in vars(args).items() if name != "out"},
        "command": shlex.join(["python", "byol.py", *argv]),
        "commit": commit,
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, torchvision, np)}},
        "hardware": dict(machine=platform.machine(), cpu=cpu and cpu[1], threads=torch.get_num_threads(), gpu=gpu),
    }


@contextlib.contextmanager
def open_run(out, config):
    """Make the run's folder, or enter it if it holds this very run: (its log, locked, so that a second process with the
    same run waits until the first is done; whether the run is finished)."""
    path, log = Path(out, "config.json"), Path(out, "metrics.jsonl")
    try:
        os.makedirs(out, exist_ok=True)
        foreign = [name for name in os.listdir(out) if not name.endswith(".tmp") and os.path.getsize(f"{out}/{name}")]
        if foreign and not path.exists():
            stop(2, f"--out {out}: neither empty nor a run's folder (it holds {foreign[0]})")
        file = open(log, "ab")
    except OSError as error:
        stop(2, f"--out {out}: {error.strerror}")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process runs {out}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        text = json.dumps(config, indent=1).encode() + b"\n"
        if not path.exists():
            write_whole(path, lambda file: file.write(text))
        try:
            theirs = dict(json.loads(path.read_bytes())["flags"])
        except (ValueError, KeyError, TypeError):
            stop(1, f"{path} is damaged; remove the folder to start again")
        for name, now in json.loads(text)["flags"].items():
            if theirs.get(name) != now:
                stop(2, f"--out {out} holds a run with --{name.replace('_', '-')} {theirs.get(name)}, not {now}: "
                        "give another --out")
        with open(log, "rb") as written:
            written.seek(max(0, log.stat().st_size - 200))
            yield file, b'{"step": %d, "accuracy"' % config["flags"]["steps"] in written.read()


def load_checkpoint(path, parts):
    """Fill `parts`, {name: network or optimizer}; returns (step, state, log_bytes), the start's without a file."""
    if not os.path.exists(path):
        return 0, "untrained", 0
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content[name])
        return content["step"], content["state"], content["log_bytes"]
    except Exception as error:      # torch.load and load_state_dict raise nearly anything on a damaged or foreign file
        stop(1, f"cannot resume from {path} ({type(error).__name__}: {str(error)[:80]}); remove it to start again")


# ------------------------------------------------------------------------ training

def rate(step, steps, lr, warmup):
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up over a share of the run, then cosine to 0."""
    first = warmup * steps
    if step < first:
        return lr * (step + 1) / math.ceil(first)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def tau(step, steps, base):
    """EMA rate of step 0, 1, ... of `steps`: from `base` to 1 along a cosine (BYOL, section 3.3)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def autocast(args):
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)


def train_step(args, images, online, target, optimizer, step, lap=lambda part: None):
    """Step 0, 1, ... of the run; returns the loss and both views' y and z, of this process's share of the batch. `lap`
    hears of each part as it ends."""
    views = draw_views(images, step, args, lap)
    lap("views")
    with autocast(args):
        outputs = online(views)
    (y1, y2), (z1, z2), (q1, q2) = (t.float().chunk(2) for t in outputs)
    lap("online forward")
    if args.loss != "simclr":
        with torch.no_grad(), autocast(args):
            t1, t2 = target(views)[1].float().chunk(2)
    lap("target forward")
    if args.loss == "byol":
        loss = byol_loss(q1, t2) + byol_loss(q2, t1)
    elif args.loss == "moco":
        loss = (moco_loss(q1, t2, target.queue) + moco_loss(q2, t1, target.queue)) / 2
    else:
        loss = simclr_loss(gather(q1), gather(q2))
    optimizer.zero_grad()
    (loss * WORLD if args.loss == "simclr" else loss).backward()        # simclr's gradient is a sum over processes
    lap("backward")
    for group in optimizer.param_groups:
        group["lr"] = rate(step, args.steps, args.lr, args.warmup) * group["lr_mult"]
    optimizer.step()
    lap("optimizer")
    update_target(target, online, tau(step, args.steps, args.ema))
    if args.loss == "moco":
        keys = unit(torch.cat([gather(t1), gather(t2)]))
        target.queue.index_copy_(0, (torch.arange(len(keys), device=keys.device) + step * len(keys)) % QUEUE, keys)
    lap("EMA")
    return loss.detach(), (y1, z1, y2, z2)


def profile(args, images, online, target, optimizer, rounds=5, steps=4):
    """Print where the time of a step goes, and its floor: both networks' forwards and the backward on fixed tensors.
    Steps and floors alternate, so that what else the machine does falls on both; medians are over `rounds`."""
    views = torch.randn(2 * args.batch_size, 3, args.size, args.size).to(args.device, memory_format=torch.channels_last)
    args.steps = max(args.steps, (rounds + 1) * steps)                          # the schedules end with the run
    cuda, table, clock = args.device.startswith("cuda"), [], 0.0

    def lap(part):
        nonlocal clock
        if cuda:
            torch.cuda.synchronize(args.device)
        before, clock = clock, time.perf_counter()
        table[-1][part] += 1000 / steps * (clock - before)

    for step in range((rounds + 1) * steps):
        table += [collections.Counter()] if step % steps == 0 else []
        lap("between")
        loss, outputs = train_step(args, images, online, target, optimizer, step, lap)
        collapse_metrics(*outputs), layer_metrics(online, optimizer), loss.item()
        lap("metrics")
        with autocast(args):
            prediction = online(views)[2]
            if args.loss != "simclr":
                with torch.no_grad():
                    target(views)
        prediction.float().square().mean().backward()
        lap("floor")
    print(f"{'':16}{'median':>10}{'least':>10}{'most':>10}   ms a step")
    for row in table:
        row["metrics"] /= args.log_every                                       # a step's share of them
        row["step"] = sum(row[part] for part in PARTS)
        row.update(ratio=row["floor"] / row["step"], samples_per_s=1000 / row["step"] * args.batch_size)
    figures = {"threads": torch.get_num_threads()}
    for name in (*PARTS, "step", "floor", "ratio", "samples_per_s"):
        values = sorted(row[name] for row in table[1:])                         # the first round warmed up
        figures[name] = values[rounds // 2], values[0], values[-1]
        print(f"{name:16}" + "".join(f"{value:10.4g}" for value in figures[name]))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024          # on macOS in KiB, not MiB
    figures["peak_memory_mib"] = torch.cuda.max_memory_allocated(args.device) / 2**20 if cuda else resident
    print(f"{'peak memory':16}{figures['peak_memory_mib']:10.4g} MiB\n{json.dumps(figures)}")


def train(args, images, online, target, optimizer, log, checkpoint):
    """Train to the end, from the checkpoint if there is one. Returns the signal that stopped the run, or 0. `log` is
    open in process 0 alone, which does all the writing."""
    parts = dict(online=online, target=target, optimizer=optimizer)
    start, state, log_bytes = load_checkpoint(checkpoint, parts)
    if RANK == 0:
        log.truncate(log_bytes)         # what a killed run wrote after its last checkpoint comes again
    if start:
        print(f"resumed at step {start}")
    network = DistributedDataParallel(online) if WORLD > 1 else online         # it averages the gradients

    def write_line(line):
        if RANK == 0:
            short = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.6g}"))
            log.write(json.dumps(short).encode() + b"\n")
            log.flush()

    def evaluation(step):
        if RANK > 0:
            return
        accuracy = evaluate(online.encoder, images, args.size, args.device)
        if step == args.steps:          # before the line that says that the run is finished
            encoder = {name: t.cpu().contiguous() for name, t in online.encoder.state_dict().items()}
            write_whole(os.path.join(args.out, "encoder.pt"), lambda file: torch.save(encoder, file))
        write_line({"step": step, "accuracy": accuracy, "state": state})
        print(f"step {step:>6} linear accuracy on test {accuracy:.2f} %, {state}", flush=True)

    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if args.steps == 0:
        evaluation(0)
    began = clock = time.perf_counter()
    clock_step = start
    for step in range(start, args.steps):
        loss, outputs = train_step(args, images.pretrain, network, target, optimizer, step)
        done, stopped_by = step + 1, agree(signals[0] if signals else 0)
        ends, logs = done == args.steps, done % args.log_every == 0 or done & (done - 1) == 0
        saves = not ends and (done % args.checkpoint_every == 0 or stopped_by)
        if logs or saves or ends:
            loss, outputs = gather(loss[None]).mean(), [gather(t) for t in outputs]
            if not math.isfinite(loss):         # the one place that waits for the device
                stop(1, f"the loss is {loss.item()} at step {done}: the run diverged; try a lower --lr")
        if logs or ends:
            metrics, now = collapse_metrics(*outputs), time.perf_counter()
            state = collapse_state(state, metrics["rep_dist"])
            line = {"step": done, "epoch": done * args.batch_size / len(images.pretrain), "loss": loss.item(),
                    "lr": rate(step, args.steps, args.lr, args.warmup), "ema": tau(step, args.steps, args.ema),
                    **metrics, "images_per_s": (done - clock_step) * args.batch_size / (now - clock),
                    "layers": layer_metrics(online, optimizer)}
            write_line(line)
            left = int((now - began) / (done - start) * (args.steps - done))
            print(f"step {done}/{args.steps} {done / args.steps:.0%} left {left // 60}m{left % 60:02}s ",
                  *(f"{name} {line[name]:.4g} " for name in PRINTED), state, flush=True)
        if ends or args.eval_every and done % args.eval_every == 0:
            evaluation(done)
        if logs:
            clock, clock_step = time.perf_counter(), done
        if saves and RANK == 0:
            content = {name: part.state_dict() for name, part in parts.items()}
            content |= dict(step=done, state=state, log_bytes=log.tell())
            write_whole(checkpoint, lambda file: torch.save(content, file))
        if stopped_by and not ends:
            return stopped_by
    return 0


def set_up(args):
    """Networks and optimizer of a run: (online, target, optimizer)."""
    torch.set_flush_denormal(True)      # a network that decay has killed computes in subnormal numbers: ten times slower
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    online = Network(args)
    target = make_target(online, args.loss)
    for network in (online, target):
        network.to(args.device, memory_format=torch.channels_last)
        if args.compile:
            network.compile()
    try:
        groups = param_groups(online, args.weight_decay, args.lars_layers, dict(args.lr_mult))
    except ValueError as error:
        stop(2, f"--lars-layers or --lr-mult: {error}")
    optimizer = LARS(groups, args.lr) if args.opt == "lars" else torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)
    return online, target, optimizer


def run(argv):
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")       # for names that are not UTF-8
    args = parse_arguments(argv)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    images = load_images(args.data, args.data_dir, args.download, args.size)
    n, side = len(images.pretrain), images.pretrain.shape[-1]
    if args.batch_size > n:
        stop(2, f"--batch-size {args.batch_size}: the data has {n} images")
    if args.size > 4 * side:
        stop(2, f"--size {args.size}: more than four times the images' {side} pixels")
    if args.epochs is not None:
        args.steps = args.epochs * (n // args.batch_size)
    if args.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # without it cuBLAS is not deterministic
        torch.backends.cuda.matmul.allow_tf32 = True
        if images.pretrain.shape.numel() < torch.cuda.mem_get_info(args.device)[0] / 2:
            images = images._replace(pretrain=images.pretrain[:].to(args.device))
    online, target, optimizer = set_up(args)
    if args.profile:
        profile(args, images.pretrain, online, target, optimizer)
        return 0

    checkpoint = Path(args.out, "checkpoint.pt")
    mine = open_run(args.out, describe(args, argv)) if RANK == 0 else contextlib.nullcontext((None, False))
    with mine as (log, finished):
        if agree(finished):
            print(f"{args.out} holds this run, finished; remove the folder to run it again")
            stopped_by = 0
        else:
            print(f"{n:,} images of {args.data}, {args.steps} steps of {args.batch_size}, into {args.out}")
            for group in optimizer.param_groups:
                size, lars = sum(p.numel() for p in group["params"]), "on" if group["lars"] else "off"
                print(f"{size:,} parameters: LARS {lars}, weight decay {group['weight_decay']:g}, "
                      f"rate x {group['lr_mult']:g}", flush=True)
            stopped_by = train(args, images, online, target, optimizer, log, checkpoint)
    if stopped_by:
        print(f"stopped by {signal.Signals(stopped_by).name}; the same command resumes the run", flush=True)
        return 128 + stopped_by
    checkpoint.unlink(missing_ok=True)
    return 0


def main(argv):
    """Run the command line `argv`; returns the exit status, or exits with one line on what went wrong."""
    try:
        return run(argv)
    except KeyboardInterrupt:
        stop(130, "stopped before the first step")
    except OSError as error:
        stop(1, f"{error.filename or 'the disk'}: {error.strerror}")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "out of memory" in reason or "allocate memory" in reason:        # as a GPU and a CPU say it
            stop(1, f"out of memory ({reason}): try a smaller --batch-size, --size or --width")
        if WORLD == 1:
            raise
        stop(1, f"process {RANK} lost the others ({reason}); the same command resumes from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
