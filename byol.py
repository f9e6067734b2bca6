r"""BYOL with and without batch statistics: does it collapse, and what keeps it up? Results: README.md

    python byol.py                                                       # the control: bn everywhere, SGD
    python byol.py --enc-norm gn --mlp-norm none                         # no batch statistics: collapses
    python byol.py --enc-norm gn --mlp-norm none --opt lars --lr 0.2     # and LARS: does not
    python byol.py --enc-norm gn --mlp-norm none --clip 0.1              # nor SGD with its gradient clipped
    python byol.py --data stl10 --download --width 64 --stem imagenet --size 96 --batch-size 256 \
        --epochs 320 --lr 0.8 --device cuda                              # the blog's full set-up
    torchrun --nproc-per-node 2 byol.py --batch-size 128                 # one run on two processes

"The blog" is the post that it reproduces, Understanding self-supervised and contrastive learning with BYOL.
It reads top to bottom in the order data flows: arguments, several processes, files, images, views, networks,
losses, collapse metrics, linear evaluation, run folder, training, the command. BYOL itself is `update`, the
loop is `train`. A run is one folder; the same command resumes a run that was cut off.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import datetime
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
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
from PIL import Image, ImageOps
from torchvision import datasets

from lars import LARS, matching, param_groups
from resnet_norms import resnet18

try:
    import fcntl
except ImportError:         # Windows has none
    fcntl = None


def stop(status, message):
    """One line on stderr, and out: status 2 for wrong usage, 1 for a failed run."""
    print(f"byol.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


class Diverged(ValueError):
    """Values are not finite any more; ends a run with status 1."""


def is_of_memory(error):
    """Whether the error says that the machine or the GPU has too little memory."""
    if isinstance(error, RuntimeError):         # torch's
        return any(words in str(error) for words in ("out of memory", "allocate", "ALLOC_FAILED"))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


# ------------------------------------------------------------------------ arguments
DEFAULT_LR = {"sgd": 0.2, "lars": 0.2, "adamw": 1e-3}
DEFAULT_DECAY = {"sgd": 1e-4, "lars": 1.5e-6, "adamw": 1e-2}    # the blog's code, the BYOL paper, torch
QUEUE = 4096                                                    # target projections that moco keeps
NOT_THE_RUN = ("out", "data_dir", "download")                   # flags that do not change what a run is


def within(kind, low, high=10**9):
    """An argparse type: a `kind` in [low, high]."""
    def number(text):
        value = kind(text)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
    number.__name__ = "whole number" if kind is int else "number"       # for argparse's messages
    return number


def regex_factor(text):
    """[regular expression, factor], a list as config.json will have it."""
    regex, has_factor, factor = text.rpartition("=")
    if not has_factor:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=FACTOR")
    return [regex, within(float, 0)(factor)]


def parse_arguments(argv):
    """The flags of the command line `argv`, with the defaults that follow from other flags filled in."""
    parser = argparse.ArgumentParser("byol.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(2, message)
    norms = ["bn", "ln", "gn", "none"]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]

    def add(flag, default, text, **how):
        if default not in (None, []):
            text += " (default: %(default)s)"
        group.add_argument(flag, default=default, help=text, **how)

    group = parser.add_argument_group("model")
    add("--enc-norm", "bn", "norm of the encoder", choices=["bn", "gn", "gn+ws", "none"])
    add("--mlp-norm", "bn", "norm of projection and prediction", choices=norms)
    add("--proj-norm", None, "norm of the projection, instead of --mlp-norm", choices=norms)
    add("--pred-norm", None, "norm of the prediction, instead of --mlp-norm", choices=norms)
    add("--width", 8, "channels of layer1; y has 8 times as many", type=within(int, 1, 512))
    add("--stem", "cifar", "7x7 stride 2 and max-pool, or 3x3", choices=["imagenet", "cifar"])
    group = parser.add_argument_group("loss")
    add("--loss", "byol", "what pulls the views together", choices=["byol", "moco"])
    add("--ema", 0.996, "fraction of the target that a step keeps, on a cosine to 1",
        type=within(float, 0, 1))
    group = parser.add_argument_group("optimizer")
    add("--opt", "sgd", "sgd and lars have momentum 0.9", choices=list(DEFAULT_LR))
    add("--lars-on", "weights", "all: biases and norms get LARS and decay too", choices=["weights", "all"])
    add("--lars-layers", None, "regular expression: only these layers get LARS, the rest SGD")
    add("--lr", None, f"rate, on a cosine to 0; unless given, {DEFAULT_LR}", type=within(float, 1e-9))
    add("--lr-mult", [], "multiply the rate of these layers; may be repeated", type=regex_factor,
        action="append", metavar="REGEX=FACTOR")
    add("--clip", None, "norm to which a longer gradient is scaled down; unless given, none is",
        type=within(float, 1e-9))
    add("--weight-decay", None, f"of weights, with sgd of all parameters; unless given, {DEFAULT_DECAY}",
        type=within(float, 0))
    add("--warmup", 0.0, "fraction of the run with linear warm-up", type=within(float, 0, 1))
    group = parser.add_argument_group("run")
    add("--steps", None, "length of the run, 1500 without --epochs; 0: random features", type=within(int, 0))
    add("--epochs", None, "the length in passes over the images, instead of --steps", type=within(int, 0))
    add("--batch-size", 64, "images per step, of all processes", type=within(int, 2))
    add("--seed", 0, "of weights, order and views", type=within(int, 0, 2**63 - 1))
    add("--device", "cpu", "where to compute", choices=["cpu", *["cuda"] * bool(gpus), *gpus])
    add("--threads", torch.get_num_threads(), "1 where runs share a machine", type=within(int, 1, 1024))
    add("--amp", False, "networks in bfloat16; loss and metrics stay in fp32", action="store_true")
    add("--compile", False, "torch.compile networks and views", action="store_true")
    add("--log-every", 25, "steps between lines of metrics; powers of two too", type=within(int, 1))
    add("--eval-every", 0, "steps between evaluations; 0: before and after", type=within(int, 0))
    add("--checkpoint-every", 200, "steps between checkpoints", type=within(int, 1))
    add("--out", None, "folder of the run; else runs/ and the flags that differ from the defaults",
        type=os.path.expanduser)
    group = parser.add_argument_group("images")
    add("--data", "shapes", "shapes, cifar10, stl10, fashion-mnist or folder:DIR")
    add("--data-dir", "data", "where data sets lie and images are decoded to", type=os.path.expanduser)
    add("--download", False, "download the data set if it is not there", action="store_true")
    add("--size", 16, "side of the views in pixels", type=within(int, 8, 4096))
    for word in argv:
        if re.fullmatch("--[a-z-]+=--", word):          # its value is an empty list before Python 3.13
            stop(2, f"{word[:-3]}: -- is no value")
    args = parser.parse_args(argv)
    if args.steps is not None and args.epochs is not None:
        stop(2, "--steps and --epochs exclude each other")
    defaults = {name: parser.get_default(name) for name in vars(args)} | {"steps": 1500}
    defaults |= dict(proj_norm=args.mlp_norm, pred_norm=args.mlp_norm)
    defaults |= dict(lr=DEFAULT_LR[args.opt], weight_decay=DEFAULT_DECAY[args.opt])
    for name, value in vars(args).items():
        if value is None:
            setattr(args, name, defaults[name])
    changed = {name: value for name, value in vars(args).items() if value != defaults[name]}
    for wrong, why in (
        (args.out == "", "--out is empty: name a folder"),
        ("lars_layers" in changed and args.opt != "lars", "--lars-layers needs --opt lars"),
        ("lars_on" in changed and args.opt != "lars", "--lars-on needs --opt lars"),
        ("pred_norm" in changed and args.loss != "byol", f"--pred-norm: {args.loss} has no prediction"),
        (args.loss == "moco" and 2 * args.batch_size > QUEUE, f"--batch-size: at most half moco's {QUEUE}"),
        (len(dict(args.lr_mult)) < len(args.lr_mult), "--lr-mult: a regular expression stands twice"),
    ):
        if wrong:
            stop(2, why)
    if args.out is None:
        named = [name for name in changed if name not in (*NOT_THE_RUN, "threads")]
        words = [f"{name}_{changed[name]}" for name in named]
        args.out = "runs/" + re.sub(r"[^\w.+=-]+", "_", "_".join(words) or "default", flags=re.ASCII)[:200]
    return args


# ------------------------------------------------------------------------ several processes
# torchrun starts one run on several processes: each takes its rows of every batch, gradients are averaged.
RANK, WORLD = 0, 1          # which process this is, and of how many; join_processes sets them
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")       # what torchrun sets


def join_processes(args):
    """Find out which process this is, and meet the others. The first alone prints on standard output."""
    global RANK, WORLD
    RANK, WORLD = 0, 1
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    for name in LAUNCHER:
        value = os.environ.get(name, "")
        least = 1 if name == "MASTER_PORT" else 0
        fits = value.isdecimal() and least <= int(value) < 2**16
        if name == "MASTER_ADDR":
            fits = value != ""
        if not fits:
            stop(2, f"WORLD_SIZE is set, but {name} is {value or 'not'}: use torchrun, or unset WORLD_SIZE")
    RANK, WORLD, gpu = (int(os.environ[name]) for name in LAUNCHER[:3])
    has_bn = "bn" in (args.enc_norm, args.proj_norm, args.pred_norm if args.loss == "byol" else "")
    is_one_too_few = has_bn and args.device == "cpu" and args.batch_size == WORLD
    if RANK >= WORLD:
        stop(2, f"RANK is {RANK}, WORLD_SIZE {WORLD}: use torchrun, or unset WORLD_SIZE")
    for wrong, why in (
        (args.batch_size % WORLD, f"--batch-size {args.batch_size} does not divide into {WORLD} processes"),
        (is_one_too_few, "--batch-size: with BN each process needs two images"),
        (":" in args.device, "--device: torchrun gives each process its GPU, so say cuda"),
        (args.device == "cuda" and gpu >= torch.cuda.device_count(), "--nproc-per-node: more than GPUs"),
    ):
        if wrong:
            stop(2, why)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    if args.device == "cuda":
        args.device = f"cuda:{gpu}"
        torch.cuda.set_device(gpu)      # before the group is made, or all would take the first GPU
    elif has_bn:
        print("BN on several CPU processes: each takes the statistics of its own images")
    print(f"{WORLD} processes meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", flush=True)
    patience = datetime.timedelta(hours=3)              # while process 0 decodes or evaluates
    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl", timeout=patience)


@contextlib.contextmanager
def process_0_first():
    """What process 0 writes here is there when the others come."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def gather(rows):
    """The rows of all processes: (N / processes, ...) -> (N, ...)."""
    if WORLD == 1:
        return rows
    of_each = [torch.empty_like(rows) for _ in range(WORLD)]
    dist.all_gather(of_each, rows.contiguous())
    return torch.cat(of_each)


# ------------------------------------------------------------------------ files
def write_whole(path, chunks):
    """Write chunks of bytes to a file, which appears as `path` whole or not at all."""
    partial = f"{path}.{os.urandom(6).hex()}.part"      # of no other process on any machine
    try:
        with open(partial, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        stop(1, f"{path}: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):              # it was moved, or never there
            os.unlink(partial)


def leftovers(path):
    """What killed processes left of writing `path`."""
    return path.parent.glob(f"{path.name}.{'[0-9a-f]' * 12}.part")


def digest_of(content):
    return hashlib.sha256(content).hexdigest()[:16]


# ------------------------------------------------------------------------ images
# uint8 images (N, 3, side, side) and labels (N,). Pre-training sees all of `train` and no label; the labelled
# ones are the first of `train`. `digest` tells whether a resumed run has the images it began with.
Images = collections.namedtuple("Images", "train train_labels test test_labels digest")
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


# Where images come from, until they are decoded.
#   train_labels, test_labels   the class of each image, -1 for none
#   sides                       the lengths of their sides in pixels, of a sample
#   file_stats                  names, sizes and times of the files: other ones are decoded anew
#   reader                      makes the function that reads image 0, 1, ... as RGB, those of train first
Source = collections.namedtuple("Source", "train_labels test_labels sides file_stats reader")
DATASETS = {"cifar10": datasets.CIFAR10, "stl10": datasets.STL10, "fashion-mnist": datasets.FashionMNIST}
EDITION = 2             # of the decoding: another number when the same files become other pixels
DARK = 16               # an image without a brighter value is nearly black
# Hidden, a NAS's thumbnails, what other systems leave behind.
FOREIGN = re.compile(r"\.|@|#|__MACOSX$|\$RECYCLE|System Volume Information$|lost\+found$|Thumbs\.db$", re.I)


@contextlib.contextmanager
def opened(path):
    """The image file. Whatever is wrong with it, for which Pillow raises nearly anything, is a ValueError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:
        if is_of_memory(error):
            raise
        raise ValueError(f"cannot read image {path}: {error or repr(error)}") from None


def is_deep(image):
    """Has it more than 8 bits a channel? Pillow would make it white or black."""
    return image.mode == "F" or image.mode.startswith("I")


def find_white(paths):
    """The value that is white in the deep ones: that of 8, 12 or 16 bits, the least that no value exceeds;
    or 1 for floats up to 1."""
    whites, low, high = [255, 4095, 65535], 0, 0
    for path in paths:
        with opened(path) as image:
            if not is_deep(image):
                continue
            values = np.asarray(image)
            if not np.isfinite(values).all():
                raise ValueError("it has values that are not finite")
            if image.mode == "F":
                whites = [1, 255, 4095, 65535]
            low, high = min(low, values.min()), max(high, values.max())
    if 1 in whites and 1 < high < 16:           # of 0 to 1, and overshot, or of 0 to 255, and black?
        raise ValueError(f"floats up to {high:g}, neither of 0 to 1 nor of 0 to 255; clip them")
    fitting = [white for white in whites if low >= 0 and high <= white]
    if not fitting:
        raise ValueError(f"images with values from {low:g} to {high:g}; save them with 8 bits a channel")
    if high > 0:
        print(f"images of more than 8 bits: {fitting[0]} is white, the brightest value is {high:g}")
    return fitting[0]


def read_image(path, white):
    """The image as RGB, upright, with `white` as white where it is deep."""
    with opened(path) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"it is {image.width} x {image.height}, too thin to be cropped to a square")
        image = ImageOps.exif_transpose(image)
        if is_deep(image):
            image = Image.fromarray(np.rint(np.asarray(image) * (255 / white)).astype(np.uint8))
        return image.convert("RGB")


def find_images(root):
    """The paths of the image files below `root`, in order, and the number of files left out: for their
    endings, or as FOREIGN, they or their folders. A link to a folder that holds it is not followed."""
    def fail(error):
        raise error

    found, left_out = [], 0
    for folder, inner, files in os.walk(root, followlinks=True, onerror=fail):
        images = [name for name in files if name.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
        images = [name for name in images if not FOREIGN.match(name)]
        images = [name for name in images if os.path.isfile(os.path.join(folder, name))]
        left_out += len(files) - len(images)
        found += [(folder, name) for name in images]
        here = Path(os.path.abspath(folder))
        above = {os.path.realpath(path) for path in (here, *here.parents)}
        for name in inner.copy():
            path = os.path.join(folder, name)
            if FOREIGN.match(name):
                left_out += sum(len(hidden) for *_, hidden in os.walk(path))
                inner.remove(name)
            elif os.path.realpath(path) in above:
                inner.remove(name)
    return [os.path.join(*pair) for pair in sorted(found)], left_out


def open_folder(root):
    """The Source of root/train/CLASS/*, root/unlabeled/* if there is one, and root/test/CLASS/*."""
    if not os.path.isdir(root):
        raise OSError(f"{root or 'the empty name'} is no folder")
    found, left_out = find_images(root)
    train, test, unlabeled = {}, {}, []                 # {class: paths}
    for path in found:
        split, *inside = Path(path).relative_to(root).parts
        if split in ("train", "test") and len(inside) > 1:
            classes = train if split == "train" else test
            classes.setdefault(inside[0], []).append(path)
        elif split == "unlabeled":
            unlabeled.append(path)
        else:
            left_out += 1
    alone = {"train": train.keys() - test.keys(), "test": test.keys() - train.keys()}
    if any(alone.values()):
        some = {split: ", ".join(sorted(names)[:9]) for split, names in alone.items() if names}
        differ = [f"in {split} alone {names}" for split, names in some.items()]
        raise OSError(f"the classes differ: {'; '.join(differ)}")
    if len(train) < 2:
        endings = ", ".join(datasets.folder.IMG_EXTENSIONS)
        raise OSError(f"train and test have images of {len(train)} classes, not of two or more, and "
                      f"{left_out} other files; images end in {endings}")
    if left_out:
        print(f"{root}: {left_out} files left out: hidden, no images by name, or in no class's folder")
    names = sorted(train)
    files = [(path, label) for label, name in enumerate(names) for path in train[name]]
    files += [(path, -1) for path in unlabeled]
    paths, labels = zip(*files)
    test_paths, test_labels = zip(*((path, label) for label, name in enumerate(names) for path in test[name]))
    paths += test_paths
    sides = set()
    for path in paths[:: len(paths) // 100 + 1]:        # a hundred tell
        with opened(path) as image:
            sides |= set(image.size)
    file_stats = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in paths]

    def reader():
        white = find_white(paths)
        return lambda i: read_image(paths[i], white)

    return Source(labels, test_labels, sides, file_stats, reader)


def open_torchvision(args):
    """The Source of one of torchvision's data sets, downloaded if --download says so."""
    splits, labels = ((True, False), "targets")
    if args.data == "stl10":
        splits, labels = (("train+unlabeled", "test"), "labels")
    train, test = (DATASETS[args.data](args.data_dir, split, download=args.download) for split in splits)
    both = train + test
    sides = set(both[0][0].size)

    def reader():
        return lambda i: both[i][0].convert("RGB")

    return Source(getattr(train, labels), getattr(test, labels), sides, [], reader)


def open_source(args):
    """The Source of --data."""
    try:
        if args.data.startswith("folder:"):
            return open_folder(os.path.expanduser(args.data[7:]))
        if args.data in DATASETS:
            return open_torchvision(args)
    except Exception as error:          # torchvision raises nearly anything on damaged files
        if is_of_memory(error):
            raise
        hint = "try another --data-dir" if args.download else "try another --data-dir, or --download"
        if args.data.startswith("folder:"):
            hint = "it needs images in train/CLASS/ and test/CLASS/, the same classes in both"
        stop(2, f"--data {args.data}: {error or repr(error)}; {hint}")
    stop(2, f"--data {args.data}: not shapes, {', '.join(DATASETS)} or folder:DIR")


def decode(source, side):
    """Yield the bytes of a .npy, uint8 (N, 3, side, side): a Source's images, resized and cropped where they
    have another size."""
    n = len(source.train_labels) + len(source.test_labels)
    print(f"decoding {n:,} images to {side} x {side}", flush=True)
    read = source.reader()

    def pixels(i):
        image = TF.center_crop(TF.resize(read(i), side), side)
        return np.asarray(image).transpose(2, 0, 1).tobytes()

    header = io.BytesIO()
    shape = dict(descr="|u1", fortran_order=False, shape=(n, 3, side, side))
    np.lib.format.write_array_header_1_0(header, shape)
    yield header.getvalue()
    with ThreadPoolExecutor() as pool:                  # Pillow decodes outside the GIL
        for start in range(0, n, 1024):                 # no more in memory at a time
            yield from pool.map(pixels, range(start, min(start + 1024, n)))


def tell_blank(images):
    """A line each if images of a sample are nearly black, of one colour, or alike: runs would collapse."""
    sample = images[:: len(images) // 1000 + 1]
    brightest, darkest = sample.amax((1, 2, 3)), sample.amin((2, 3))
    for wrong, what in (
        (brightest < DARK, f"nearly black, with no value over {DARK - 1} of 255"),
        ((sample.amax((2, 3)) == darkest).all(1), "of a single colour"),
        ((sample == sample[0]).flatten(1).all(1), "like the first"),
    ):
        if wrong.sum() > 1:
            print(f"{wrong.sum():,} of {len(sample):,} training images looked at are {what}")


def load_decoded(source, args):
    """The Images of a Source, decoded once into --data-dir and mapped from there. Square ones of one size
    stay as they are, or become twice --size, for crops to choose from; others are cropped to --size."""
    side = min(*source.sides, 2 * args.size) if len(source.sides) == 1 else args.size
    digest = digest_of(repr((EDITION, args.data, side, source.file_stats)).encode())
    path = Path(args.data_dir, "decoded", f"{digest}.npy")
    shape = (len(source.train_labels) + len(source.test_labels), 3, side, side)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(2, f"--data-dir {args.data_dir}: {error.strerror}")
        for partial in leftovers(path):
            with contextlib.suppress(FileNotFoundError):            # another process removes it, too
                if time.time() - partial.stat().st_mtime > 3600:    # no living process writes it
                    partial.unlink()
        write_whole(path, decode(source, side))
    try:
        pixels = np.load(path, mmap_mode="c")
        is_whole = (pixels.dtype, pixels.shape) == (np.uint8, shape)
    except Exception as error:          # numpy raises nearly anything on a damaged file
        if is_of_memory(error):
            raise
        is_whole = False
    if not is_whole:
        stop(1, f"{path} is damaged; remove it")
    train, test = torch.from_numpy(pixels).split([len(source.train_labels), len(source.test_labels)])
    tell_blank(train)
    labels = torch.as_tensor(source.train_labels)
    return Images(train, labels[labels >= 0], test, torch.as_tensor(source.test_labels), digest)


def load_images(args):
    """The Images of --data, those to train on already on the GPU if they fit. Sets --steps from --epochs."""
    if args.data == "shapes":
        images = Images(*draw_shapes(1000, seed=0), *draw_shapes(200, seed=1), args.data)
    else:
        try:
            images = load_decoded(open_source(args), args)
        except ValueError as error:
            stop(2, f"--data {args.data}: {error}")
    train = images.train
    if args.batch_size > len(train):
        stop(2, f"--batch-size {args.batch_size}: the data has {len(train)} images")
    if args.epochs is not None:
        args.steps = args.epochs * (len(train) // args.batch_size)
    if args.device != "cpu" and train.nbytes < torch.cuda.mem_get_info(args.device)[0] / 2:
        train = train.to(args.device)
    return images._replace(train=train)


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
    fits = ((tries > 0) & (tries <= side)).all(0)
    fitting = tries[:, np.arange(n), fits.argmax(1)]                # of ten tries the first that fits,
    height, width = np.where(fits.any(1), fitting, side)            # the whole image if none does
    params = dict(height=height, width=width, flip=rng.random(n) < P_FLIP)
    params["top"] = np.floor(rng.random(n) * (side - height + 1))
    params["left"] = np.floor(rng.random(n) * (side - width + 1))
    jittered = rng.random(n) < P_JITTER
    for name, limits in JITTER.items():
        neutral = 0 if name == "hue" else 1
        params[name] = np.where(jittered, rng.uniform(*limits, n), neutral)
    params["gray"] = rng.random(n) < P_GRAY
    params["sigma"] = np.where(rng.random(n) < P_BLUR, size * rng.uniform(*SIGMA, n), 0)
    return params, [list(JITTER)[i] for i in rng.permutation(len(JITTER))]


def resized_crop(images, start, extent, flip, size):
    """Crop, resize and flip each image: uint8 (N, 3, side, side) -> (N, 3, size, size) in [0, 1], as torch's
    antialiased `upsample_bilinear2d` does, which RandomResizedCrop calls. start, extent: (2, N), y and x."""
    start, extent = start[..., None, None], extent[..., None, None]         # (2, N, 1, 1)
    pixel = torch.arange(images.shape[-1], device=start.device)
    scale = extent / size
    centre = start + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight * ((pixel >= start) & (pixel < start + extent))         # (2, N, size, side)
    rows, columns = weight / weight.sum(-1, keepdim=True)                   # matrices, of y and of x
    columns = torch.where(flip[:, None, None] > 0, columns.flip(1), columns)
    return torch.einsum("nyh,nchw,nxw->ncyx", rows, images / 255, columns)


def adjust(images, name, factor):
    """One operation of ColorJitter with a factor for each image, (N,); images in [0, 1]."""
    factor = factor[:, None, None, None]
    if name == "hue":       # turned through HSV, whose inverse is V - C * clamp(min(k, 4 - k), 0, 1)
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
    """This process's rows of the batch of step 0, 1, ...: first views, then second, (2N, 3, size, size)."""
    batch = args.batch_size
    rows = slice(RANK * batch // WORLD, (RANK + 1) * batch // WORLD)
    epoch, i = divmod(step, len(images) // batch)
    chosen = image_order(len(images), args.seed, epoch)[i * batch :][rows]
    x = images[chosen.to(images.device, non_blocking=True)].to(args.device, non_blocking=True)
    rng = np.random.default_rng([args.seed, 1, step])
    params, order = draw_views(2 * batch, x.shape[-1], args.size, rng)
    table = torch.from_numpy(np.stack(list(params.values()), dtype=np.float32))
    table = table.view(-1, 2, batch)[:, :, rows].flatten(1).to(args.device, non_blocking=True)
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
    """views v -> representations y -> projections z -> predictions q(z); moco has no prediction. In training
    the batch holds both views, (2N, 3, size, size), so that they go through in one pass."""

    def __init__(self, args):
        super().__init__()
        shared = WORLD > 1 and args.device != "cpu"     # statistics of all processes: torch has it on GPUs
        mlp_bn = per_view(nn.SyncBatchNorm if shared else nn.BatchNorm1d)
        enc_bn = per_view(nn.SyncBatchNorm if shared else nn.BatchNorm2d)
        group_norm = functools.partial(nn.GroupNorm, 32)
        norms = {"bn": mlp_bn, "ln": nn.LayerNorm, "gn": group_norm, "none": nn.Identity}
        self.encoder = resnet18(enc_bn if args.enc_norm == "bn" else args.enc_norm, args.width, args.stem)
        self.projection = mlp(8 * args.width, norms[args.proj_norm])
        self.prediction = mlp(128, norms[args.pred_norm]) if args.loss == "byol" else nn.Identity()
        for module in self.modules():
            if args.amp and isinstance(module, nn.GroupNorm):       # six times as slow in bfloat16 on a CPU
                module.register_forward_pre_hook(lambda module, inputs: inputs[0].float())

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
    """InfoNCE of q against its own target and `queue`, (K, 128) unit vectors (MoCo, arXiv 1911.05722; without
    its shuffled BN, at the temperature of MoCo v2)."""
    q = F.normalize(q)
    positive = (q * F.normalize(z_target)).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / temperature
    return -logits.log_softmax(1)[:, 0].mean()


@torch.no_grad()
def enqueue(queue, t1, t2, step):
    """Put both views' target projections of step 0, 1, ... in the place of the queue's oldest."""
    keys = F.normalize(torch.cat([t1, t2]))
    slots = torch.arange(len(keys), device=keys.device) + step * len(keys)
    queue.index_copy_(0, slots % QUEUE, keys)


# ------------------------------------------------------------------------ collapse metrics
@torch.no_grad()
def collapse_metrics(y1, z1, y2, z2):
    """How far apart a batch's images lie, from y and z of its two views, (N, d) each: {name: float}.

    pos_cos         mean cosine of z of the two views of an image
    neg_cos         mean cosine of z of different images, over all pairs
    rep_dist        1 - neg_cos, the representation distance
    common          fraction of z's variation that the two views of an image have in common
    z_norm          mean length of z
    z_std, y_std    spread of the unit vectors: 1 if even, 0 at collapse
    y_rank          of the first view's unit vectors, by the entropy of RankMe (arXiv 2210.02885)

    They come from squared distances, which stay exact where 1 - cos is smaller than rounding. ValueError for
    other shapes, fewer than two images, or values that are not finite.
    """
    fits = y1.shape == y2.shape and z1.shape == z2.shape and y1.ndim == z1.ndim == 2
    if not fits or len(y1) != len(z1) or len(z1) < 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in (y1, z1, y2, z2))
        raise ValueError(f"y and z of two views, (N, d) each with N at least 2, are wanted, not {shapes}")
    y1, z1, y2, z2 = (t.float() for t in (y1, z1, y2, z2))
    y_norm, z_norm = (torch.cat(pair).norm(dim=1).mean() for pair in ((y1, y2), (z1, z2)))
    if not y_norm.isfinite() or not z_norm.isfinite():
        raise Diverged("y or z is not finite: the run diverged; try a lower --lr, or --clip")
    y1, z1, y2, z2 = (F.normalize(t, eps=1e-19) for t in (y1, z1, y2, z2))      # squares underflow below
    between = z1.var(0).sum() + z2.var(0).sum()     # mean squared distance of two images: twice the variance
    within_pair = (z1 - z2).square().sum(1).mean()  # and of the two views of one image
    spectrum = torch.linalg.svdvals(y1)
    metrics = {
        "pos_cos": 1 - within_pair / 2,
        "neg_cos": 1 - between / 2,
        "rep_dist": between / 2,
        "common": (between - within_pair) / between.clamp_min(1e-30),
        "z_norm": z_norm,
        "z_std": (z1.std(0) + z2.std(0)).mean() / 2 * z1.shape[1] ** 0.5,
        "y_std": (y1.std(0) + y2.std(0)).mean() / 2 * y1.shape[1] ** 0.5,
        "y_rank": torch.special.entr(spectrum / spectrum.sum().clamp_min(1e-30)).sum().exp(),
    }
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def collapse_state(state, rep_dist, first):
    """A run's state from that before, "untrained" at first, and its representation distance now.

    collapsed   the distance is at most a hundredth of `first`, that of the untrained network
    recovered   it was, and then rose over a tenth of it
    healthy     it never was

    Raises ValueError for a distance that is not finite: nothing can be said then.
    """
    if not math.isfinite(rep_dist) or not math.isfinite(first):
        raise Diverged(f"rep_dist is {rep_dist}, first is {first}: not both finite, so nothing can be said")
    if state == "collapsed":
        return "recovered" if rep_dist > first / 10 else "collapsed"
    if rep_dist <= first / 100:         # not <: both may be 0
        return "collapsed"
    return "recovered" if state == "recovered" else "healthy"


def layer_metrics(online, optimizer, unclip):
    """Of the weights (no biases, no norms) of stem, layer1, ..., prediction: the norm of the last step's
    gradient, times `unclip`; the weights' norm after it, and the largest weight over its tensor's rms; the
    mean local LARS rate (None without LARS)."""
    rates, metrics = getattr(optimizer, "rates", {}), {}
    named = [(name, p) for name, p in online.named_parameters() if p.ndim > 1]
    layers = itertools.groupby(named, lambda pair: pair[0].removeprefix("encoder.").split(".")[0])
    for layer, pairs in layers:
        names, weights = zip(*pairs)
        local = [rates[name] for name in names if name in rates]
        peaks = [w.abs().max() / w.square().mean().sqrt().clamp_min(1e-30) for w in weights]
        metrics["stem" if layer == "conv1" else layer] = {
            "grad_norm": torch.stack([w.grad.norm() for w in weights]).norm().item() * unclip,
            "weight_norm": torch.stack([w.norm() for w in weights]).norm().item(),
            "max_over_rms": max(peaks).item(),
            "lars_rate": torch.stack(local).mean().item() if local else None,
        }
    return metrics


@torch.no_grad()
def measure(online, optimizer, y, z, q, grad_norm, args):
    """All metrics of a step, over the batch of all processes, from what `update` returned: y, z, q (2N, d),
    and the whole gradient's norm before it was clipped, None if it was not. `live`: of the hidden units of
    projection and prediction, after the step, the fraction that is on for some of y and z and off for others.
    It moves the running averages of BN in the MLPs, which nothing reads."""
    (y1, y2), (z1, z2), (q1, q2) = ([gather(view) for view in t.chunk(2)] for t in (y, z, q))
    hidden = [online.projection[0](torch.cat([y1, y2])) > 0]
    if args.loss == "byol":
        hidden.append(online.prediction[0](torch.cat([z1, z2])) > 0)
    now = nn.utils.get_total_norm([p.grad for p in online.parameters()]).item()
    before = now if grad_norm is None else grad_norm.item()
    metrics = {"grad_norm": before, **collapse_metrics(y1, z1, y2, z2)}
    metrics["q_norm"] = torch.cat([q1, q2]).norm(dim=1).mean().item()
    metrics["live"] = [(on.any(0) & ~on.all(0)).float().mean().item() for on in hidden]
    metrics["layers"] = layer_metrics(online, optimizer, before / max(now, 1e-30))
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
    scaled up, they could tell classes apart. Labels are whole numbers from 0 on, (N,) or (N, 1). Features and
    labels may be on any device, have a graph, or be inference tensors. ValueError for what does not fit."""
    train, test = as_features(train), as_features(test)
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"features of the shapes {tuple(train.shape)} and {tuple(test.shape)}")
    test_labels = as_labels(test_labels, test)
    classes, labels = as_labels(train_labels, train).unique(return_inverse=True)
    mean, rounding = train.mean(0), 1e-5 * train.square().mean().sqrt().item()
    train, test = F.hardshrink(train - mean, rounding), F.hardshrink(test - mean, rounding)
    scale = train.square().mean().sqrt() or 1.0
    with torch.inference_mode(False), torch.enable_grad():
        weight, bias = fit_linear((train / scale).clone(), labels.clone())
    guess = (test / scale @ weight + bias).argmax(1)
    return 100 * (classes[guess] == test_labels).double().mean().item()


def as_features(x):
    x = torch.as_tensor(x).detach().cpu()
    if x.ndim != 2 or x.numel() == 0 or x.is_complex() or not x.isfinite().all():
        raise ValueError(f"features of the shape {tuple(x.shape)}: not real, (N, d) and finite")
    return x.double()


def as_labels(labels, features):
    labels = torch.as_tensor(labels).cpu()
    whole = not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.numel() != len(features) or labels.long().min() < 0:
        raise ValueError(f"labels {tuple(labels.shape)} are not {len(features)} whole numbers from 0 on")
    return labels.flatten().long()


def evaluate(encoder, images, args):
    """Test accuracy in percent of a linear classifier of y, fitted on the labelled training images; y is of
    whole images, resized to --size, by the encoder in eval mode, in which an untrained BN does nothing."""
    labelled, y = images.train[: len(images.train_labels)], []
    encoder.eval()
    for x in [*labelled.split(256), *images.test.split(256)]:
        x = F.interpolate(x.to(args.device) / 255, args.size, mode="bilinear", antialias=True)
        with torch.no_grad():
            y.append(encoder(normalize(x)).cpu())
    encoder.train()
    y = torch.cat(y)
    if not y.isfinite().all():
        raise Diverged("y is not finite: the run diverged; try a lower --lr, or --clip")
    train, test = y.split([len(labelled), len(images.test)])
    return linear_accuracy(train, images.train_labels, test, images.test_labels)


# ------------------------------------------------------------------------ run folder
def save(content, path):
    buffer = io.BytesIO()               # torch's own writer meets a full disk with an abort
    torch.save(content, buffer)
    write_whole(path, [buffer.getbuffer()])


def lock(file):
    """Lock this open file until it is closed; False if another process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):   # of the file system; of the operating system
        print("no file locks here: start no second process on the same --out")
    return True


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe(args, digest):
    """What config.json holds: the resolved flags, the command, and what else may decide the bits of a run."""
    flags = {name: value for name, value in vars(args).items() if name not in NOT_THE_RUN}
    cpu = re.search("model name\\s*: (.*)", output_of("cat", "/proc/cpuinfo"))
    git = ("git", "-C", Path(__file__).resolve().parent)
    return {
        "flags": {**flags, "images": digest, "processes": WORLD},
        "command": shlex.join(["python", *sys.argv]),
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision, np)},
        "gpu": None if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "tf32": args.device != "cpu",
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": output_of(*git, "describe", "--always", "--abbrev=40", "--dirty"),
    }


WRITTEN = ("config.json", "checkpoint.pt", "encoder.pt")        # whole files; metrics.jsonl grows


def script_of(command):
    """What `command`, a config.json's, runs before its flags: byol.py, or a script that changes its step."""
    words = itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(command)[1:])
    return " ".join(Path(word).name for word in words)


class RunFolder:
    """All that a run reads and writes on disk, in the folder --out. Other processes than the first write
    nothing.

    config.json       the flags, and where it ran
    metrics.jsonl     the log, locked while the run goes on
    checkpoint.pt     where it resumes; gone when it is finished
    encoder.pt        the online encoder at the end
    """

    def __init__(self, args, digest):
        """Make the folder, or enter it if it holds this very run."""
        self.out = Path(args.out)
        self.steps = args.steps
        if RANK > 0:
            return
        config = describe(args, digest)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = open(self.path("metrics.jsonl"), "a+b")
        except OSError as error:
            stop(2, f"--out {self.out}: {error.strerror}")
        if not lock(self.log):
            stop(1, f"--out {self.out}: another process is at this run")
        if self.path("config.json").exists():
            self.compare(config)
            for partial in itertools.chain(*map(leftovers, map(self.path, WRITTEN))):
                partial.unlink(missing_ok=True)
            return
        for name in ("metrics.jsonl", "checkpoint.pt", "encoder.pt"):
            if self.path(name).exists() and self.path(name).stat().st_size > 0:
                stop(2, f"--out {self.out}: it holds {name}, but no config.json")
        self.write_config(config)

    def path(self, name):
        return self.out / name

    def write_config(self, config):
        write_whole(self.path("config.json"), [json.dumps(config, indent=1).encode()])

    def compare(self, config):
        """Refuse another run than that of config.json; note what else has changed since it began."""
        path = self.path("config.json")
        try:
            first = json.loads(path.read_text())
            flags = {**first["flags"], "script": script_of(first["command"])}
            resumed = [dict(earlier) for earlier in first.get("resumed", [])]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            stop(1, f"{path} is damaged; remove the folder to start again")
        for name, value in {**config["flags"], "script": script_of(config["command"])}.items():
            if value != flags.get(name) and name != "threads":
                has = f"{name} {flags.get(name)}, not {value}"
                stop(2, f"--out {self.out}: its run has {has}; give another --out")
        now = {name: config[name] for name in ("versions", "gpu", "cpu", "cpu_capability", "commit")}
        now["threads"] = config["flags"]["threads"]
        before = {**first, "threads": flags.get("threads")}
        for earlier in resumed:
            before |= earlier
        changed = {name: value for name, value in now.items() if value != before.get(name)}
        if changed and not self.is_finished():
            print(f"resumed with other {', '.join(changed)} than before: the bits may differ")
            first["resumed"] = [*resumed, changed]
            self.write_config(first)

    def log_until(self, n):
        """The first n bytes of the log."""
        return self.path("metrics.jsonl").read_bytes()[:n]

    def is_finished(self):
        last = rb'{"step": %d, "accuracy.*}\n' % self.steps
        ended = bool(re.search(last, self.path("metrics.jsonl").read_bytes()))
        if ended and RANK == 0 and not self.path("encoder.pt").exists():
            stop(1, f"--out {self.out} holds this run, finished, but no encoder.pt; remove it to run again")
        return ended

    def load(self, parts):
        """Fill `parts`, {name: network or optimizer}, from the checkpoint, if there is one, and cut the log
        to it. Returns the run's progress. There is no generator to restore: what is random in a step depends
        on seed and step alone."""
        path = self.path("checkpoint.pt")
        progress = {"step": 0, "state": "untrained", "log_bytes": 0, "log_digest": digest_of(b"")}
        if path.exists():
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                for name, part in parts.items():
                    part.load_state_dict(content[name])
                progress.update(content["progress"])
            except Exception as error:      # torch raises nearly anything on a damaged or foreign file
                if is_of_memory(error):
                    raise
                stop(1, f"{path}: cannot resume ({repr(error)[:100]}); if damaged, remove it")
        if RANK == 0:
            if digest_of(self.log_until(progress["log_bytes"])) != progress["log_digest"]:
                stop(1, f"{self.log.name} is not the log that {path.name} goes on from; remove the folder")
            self.log.truncate(progress["log_bytes"])
            self.log.seek(progress["log_bytes"])        # tell() goes by it
        return progress

    def write(self, line):
        """Append a line to the log, with six digits of each number."""
        if RANK > 0:
            return
        try:
            text = json.dumps(line, allow_nan=False)
        except ValueError:
            raise Diverged(f"step {line['step']} has a metric that is not finite; try a lower --lr") from None
        line = json.loads(text, parse_float=lambda text: float(f"{float(text):.6g}"))
        try:
            self.log.write(json.dumps(line).encode() + b"\n")
            self.log.flush()
        except OSError as error:
            stop(1, f"{self.log.name}: {error.strerror}")

    def save(self, parts, progress):
        """Write a checkpoint."""
        if RANK > 0:
            return
        os.fsync(self.log.fileno())
        progress["log_bytes"] = self.log.tell()
        progress["log_digest"] = digest_of(self.log_until(progress["log_bytes"]))
        states = {name: part.state_dict() for name, part in parts.items()}
        save({**states, "progress": progress}, self.path("checkpoint.pt"))

    def save_encoder(self, encoder):
        if RANK == 0:
            state = {name: t.cpu().contiguous() for name, t in encoder.state_dict().items()}
            save(state, self.path("encoder.pt"))

    def finish(self):
        """Remove what only a run that was cut off needs, and say how to look at this one."""
        if RANK == 0:
            os.fsync(self.log.fileno())
            self.path("checkpoint.pt").unlink(missing_ok=True)
        if self.steps > 0:
            print(f"as a picture: python results/report.py {shlex.quote(str(self.out))}")


# ------------------------------------------------------------------------ training
def lr_at(step, steps, lr, warmup):
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up over its part, then cosine to 0."""
    warm = warmup * steps
    if step < warm:
        return lr * (step + 1) / math.ceil(warm)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def tau_at(step, steps, base):
    """EMA rate of step 0, 1, ... of `steps`: from `base` to 1 along a cosine (BYOL, section 3.3)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def settle_torch(args):
    """Deterministic and, on narrow networks, fast."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)      # weights that decay has shrunk to subnormal numbers are slow
    if sys.platform == "linux":         # to give memory back and take it anew costs a tenth of a step
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD
            libc.mallopt(-4, 0)         # M_MMAP_MAX
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if args.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True                # as torch's convolutions do


def split_by_rate(groups, factors):
    """The parameter groups split so that each has one `lr_mult`: the product of the factors, [[regular
    expression, factor], ...], of those found in the names."""
    names = [name for group in groups for name, _ in group["params"]]
    found = [(matching(regex, names), factor) for regex, factor in factors]
    split = {}
    for i, group in enumerate(groups):
        for name, p in group["params"]:
            lr_mult = math.prod(factor for matches, factor in found if name in matches)
            subgroup = split.setdefault((i, lr_mult), {**group, "params": [], "lr_mult": lr_mult})
            subgroup["params"].append((name, p))
    return list(split.values())


def build(args):
    """Networks and optimizer of a run: (online, target, optimizer)."""
    settle_torch(args)
    torch.manual_seed(args.seed)
    try:
        online = Network(args)
    except ValueError as error:
        stop(2, f"--width: {error}")
    target = make_target(online, args.loss)
    for network in (online, target):
        network.to(args.device, memory_format=torch.channels_last)
        if args.compile:
            network.compile()
    layers = (args.lars_layers or ".*") if args.opt == "lars" else None
    decay_on = {"sgd": "all", "lars": args.lars_on, "adamw": "weights"}[args.opt]       # sgd: the blog's code
    try:
        groups = param_groups(online, args.weight_decay, layers, decay_on)
        groups = split_by_rate(groups, args.lr_mult)
    except ValueError as error:
        stop(2, f"--lars-layers or --lr-mult: {error}")
    if args.opt == "lars":
        return online, target, LARS(groups, args.lr)
    if args.opt == "adamw":
        return online, target, torch.optim.AdamW(groups, args.lr, fused=True)
    return online, target, torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)


def update(online, target, optimizer, views, step, args):
    """Learn from the two views of a batch, (2N, 3, size, size), in step 0, 1, ... of the run. Returns the
    loss, the sum of both directions, y, z and q of both views, (2N, d), and the gradient's norm before it was
    clipped, None without --clip. `online` may be wrapped for several processes."""
    with torch.autocast(views.device.type, torch.bfloat16, enabled=args.amp):
        y, z, q = (t.float() for t in online(views))
        with torch.no_grad():
            t1, t2 = target(views)[1].float().chunk(2)
    q1, q2 = q.chunk(2)
    if args.loss == "byol":
        loss = byol_loss(q1, t2) + byol_loss(q2, t1)
    else:
        loss = moco_loss(q1, t2, target.queue) + moco_loss(q2, t1, target.queue)

    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(online.parameters(), args.clip) if args.clip else None
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, args.steps, args.lr, args.warmup) * group["lr_mult"]
    optimizer.step()

    update_target(target, online, tau_at(step, args.steps, args.ema))
    if args.loss == "moco":
        enqueue(target.queue, gather(t1), gather(t2), step)
    return loss.detach(), y.detach(), z.detach(), q.detach(), grad_norm


def schedule_of(step, n, args):
    """Where step 0, 1, ... on n images stands in the run: the log's first keys."""
    return {
        "step": step + 1,
        "epoch": (step + 1) / (n // args.batch_size),
        "lr": lr_at(step, args.steps, args.lr, args.warmup),
        "ema": tau_at(step, args.steps, args.ema),
    }


def finite_loss(loss, step):
    """The mean loss of all processes, a float."""
    loss = gather(loss[None]).mean().item()
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}: the run diverged; try a lower --lr, or --clip")
    return loss


HEADER = """left: minutes to go; the other columns: README.md, Has my run collapsed?
   step  left     loss   distance common     |z|     |q|  |grad|   live units  state"""


def show(line, state, args):
    """Print what a person wants of a line of the log."""
    left = (args.steps - line["step"]) * args.batch_size / line["images_per_s"] / 60
    live = "".join(f"{fraction:6.2f}" for fraction in line["live"])
    text = "{step:7} {left:4.0f}m {loss:8.3g} {rep_dist:10.3g} {common:6.2f} {z_norm:7.3g} {q_norm:7.3g}"
    text += " {grad_norm:7.2g} {live}  {state}"
    print(text.format(**{**line, "left": left, "live": live, "state": state}), flush=True)


def score(encoder, images, step, progress, folder, args):
    """Evaluate the encoder, on process 0 alone, log and print it."""
    if RANK > 0:
        return
    accuracy = evaluate(encoder, images, args)
    untrained = progress.setdefault("untrained_accuracy", accuracy)
    folder.write({"step": step, "accuracy": accuracy, "state": progress["state"]})
    scores = f"linear accuracy {accuracy:.2f} %, of random features {untrained:.2f} %"
    print(f"step {step}: {progress['state']}, {scores}")


def is_due(step, every):
    return every > 0 and step % every == 0


def train(argv):
    """The run of the command line `argv`, from its last checkpoint if there is one."""
    args = parse_arguments(argv)
    join_processes(args)
    online, target, optimizer = build(args)
    with process_0_first():
        images = load_images(args)
        folder = RunFolder(args, images.digest)
    if folder.is_finished():
        print(f"{args.out} holds this run, finished; remove the folder to run it again")
        folder.finish()
        return
    parts = dict(online=online, target=target, optimizer=optimizer)
    progress = folder.load(parts)
    network = nn.parallel.DistributedDataParallel(online) if WORLD > 1 else online
    print(HEADER)
    clock, clock_step = time.perf_counter(), progress["step"]

    for step in range(progress["step"], args.steps):
        if step == 0 or is_due(step, args.eval_every):
            score(online.encoder, images, step, progress, folder, args)
            clock, clock_step = time.perf_counter(), step
        views = load_views(images.train, step, args)
        loss, y, z, q, grad_norm = update(network, target, optimizer, views, step, args)
        done = step + 1
        logs = done == args.steps or is_due(done, args.log_every) or (done & step) == 0     # powers of two
        saves = is_due(done, args.checkpoint_every)
        if logs or saves:               # nothing else in a step waits for the device
            loss = finite_loss(loss, done)
        if logs:
            metrics = measure(online, optimizer, y, z, q, grad_norm, args)
            first = progress.setdefault("first", metrics["rep_dist"])
            progress["state"] = collapse_state(progress["state"], metrics["rep_dist"], first)
            line = {**schedule_of(step, len(images.train), args), "loss": loss, **metrics}
            line["images_per_s"] = args.batch_size * (done - clock_step) / (time.perf_counter() - clock)
            clock, clock_step = time.perf_counter(), done
            folder.write(line)
            show(line, progress["state"], args)
        if saves:
            progress["step"] = done
            folder.save(parts, progress)
    folder.save_encoder(online.encoder)     # before the line that says that the run is finished
    score(online.encoder, images, args.steps, progress, folder, args)
    folder.finish()


# ------------------------------------------------------------------------ the command
def main(argv):
    """`train`; what goes wrong with the input, the disk, the memory or another process ends the script with
    one line on stderr."""
    again = "the same command goes on from the last checkpoint, if there is one"
    try:
        train(argv)
        print(end="", flush=True)
    except KeyboardInterrupt:
        stop(130, f"interrupted; {again}")
    except OSError as error:
        sys.stdout = open(os.devnull, "w")      # or what it could not write would fail again at the exit
        if isinstance(error, BrokenPipeError):
            stop(1, f"nobody reads standard output any more; {again}")
        stop(1, f"{error.filename or 'the disk or standard output'}: {error.strerror or error}")
    except Diverged as error:
        stop(1, error)
    except (RuntimeError, MemoryError) as error:
        if is_of_memory(error):
            stop(1, f"out of memory ({repr(error)[:90]}): try a smaller --batch-size, --size or --width")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            stop(1, f"--compile: {str(error).splitlines()[0]}")
        if WORLD == 1:
            raise
        stop(1, f"process {RANK} failed or lost the others ({repr(error)[:90]}); {again}")


if __name__ == "__main__":
    if sys.stdout:                      # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")       # names of files, on a terminal of ASCII
    main(sys.argv[1:])
    if WORLD > 1:
        dist.destroy_process_group()    # whose threads can otherwise abort a process at its exit
