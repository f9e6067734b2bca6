"""Speed of byol.py: a step against its floor, and beside other implementations.

    python results/bench.py [byol.py's flags]               # step, floor, and where the time goes
    python results/bench.py --peers [byol.py's flags]       # the same work in lightly and byol-pytorch

The floor is the same networks' two forwards and the backward on fixed tensors, nothing else. What is compared
runs turn about, so that what else the machine does falls on all: median, least and most of nine rounds.
"""

import copy
import importlib.util
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn as nn
import torchvision.transforms.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import byol
from resnet_norms import resnet18

PEERS = {       # module: (package on PyPI, what it leaves out of the work of byol.py)
    "lightly": ("lightly==1.6.*", "collapse metrics"),
    "byol_pytorch": ("byol-pytorch==0.9.*", "metrics, per-image augmentation, wide blur, BN by view"),
}


class Count(TorchDispatchMode):
    """Counts the operations that torch dispatches, for each of which a GPU would wait."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += 1
        return operation(*args, **(kwargs or {}))


def ready(flags):
    """A run before its first step: arguments, images, and {name: a function that does this part of a step, or
    all of it, or the floor}."""
    args = byol.parse_arguments([*flags, "--steps", str(10**6)])        # so that the schedules do not end
    images = byol.load_images(args).train.to(args.device)
    online, target, optimizer = byol.set_up(args)
    views = byol.load_views(images, 0, args)
    order = byol.image_order(len(images), 0, 0)[: args.batch_size].to(args.device)
    steps = itertools.count()
    mixed = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)
    online_forward = mixed(lambda: online(views)[2])
    target_forward = torch.no_grad()(mixed(lambda: target(views)))
    both_ways = lambda: online_forward().float().square().mean().backward()
    return args, images, {
        "step": lambda: byol.train_step(args, images, online, target, optimizer, next(steps)),
        "floor": lambda: (both_ways(), target_forward()),
        "images": lambda: images[order],
        "images and views": lambda: byol.load_views(images, next(steps), args),
        "online forward": online_forward,
        "target forward": target_forward,
        "online forward and backward": both_ways,
        "optimizer": optimizer.step,
        "EMA": lambda: byol.update_target(target, online, 0.996),
    }


def timer(work, device):
    """A function of n: milliseconds of one of n calls of `work`."""
    def milliseconds(n):
        began = time.perf_counter()
        for _ in range(n):
            work()
        if device != "cpu":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began) / n
    return milliseconds


def turn_about(timers):
    """{name: milliseconds in nine rounds}: in each, a turn of about a second, or of one call."""
    calls = {name: max(1, min(100, round(1000 / time_of(1)))) for name, time_of in timers.items()}
    rounds = [{name: time_of(calls[name]) for name, time_of in timers.items()} for _ in range(9)]
    return {name: [row[name] for row in rounds] for name in timers}


def show(table, batch_size):
    """Print what `turn_about` found; {name: median, least, most of each column}."""
    figures = {}
    print(f"{'median, least, most':28}{'milliseconds':>24}{'over step':>21}{'samples per second':>24}")
    for name, row in table.items():
        over_step = [ms / step for ms, step in zip(row, table["step"])]
        samples = [1000 * batch_size / ms for ms in row]
        columns = row, over_step, samples
        figures[name] = [f(column) for column in columns for f in (statistics.median, min, max)]
        print(f"{name:28}" + (3 * "{:8.1f}" + 3 * "{:7.2f}" + 3 * "{:8.0f}").format(*figures[name]))
    return figures


def lightly(args, images, encoder):
    """As its documentation has it: collation of a batch, loss, parameters, what follows a step."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, BYOLView1Transform

    view = BYOLView1Transform(args.size, cj_sat=0.4, min_scale=0.2, gaussian_blur=0.5)
    transform, pictures = BYOLTransform(view, view), [TF.to_pil_image(image) for image in images]
    collate = lambda chosen: torch.utils.data.default_collate([transform(pictures[i]) for i in chosen])
    online = nn.Sequential(encoder, BYOLProjectionHead(8 * args.width, 512, 128)).to(args.device)
    prediction = BYOLPredictionHead(128, 512, 128).to(args.device)
    target, distance = copy.deepcopy(online).requires_grad_(False), NegativeCosineSimilarity()
    one_way = lambda view, other: distance(prediction(online(view)), target(other))
    both_ways = lambda v1, v2: one_way(v1, v2) + one_way(v2, v1)
    parameters = [*online.parameters(), *prediction.parameters()]
    return collate, both_ways, parameters, lambda: update_momentum(online, target, 0.996)


def byol_pytorch(args, images, encoder):
    """The same of byol-pytorch, which makes the views itself."""
    from byol_pytorch import BYOL

    learner = BYOL(encoder, args.size, hidden_layer="layer4", projection_size=128, projection_hidden_size=512,
                   use_simplicial_embeddings=False)
    collate = lambda chosen: [images[chosen] / 255]
    return collate, learner, learner.parameters(), learner.update_moving_average


def peer_step(name, workers, args, images):
    """A function that trains one step by the module `name`, with so many loader workers."""
    encoder = resnet18("bn", args.width, args.stem).to(args.device)
    collate, loss_of, parameters, after = globals()[name](args, images.cpu(), encoder)
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    loader = torch.utils.data.DataLoader(range(len(images)), args.batch_size, shuffle=True, drop_last=True,
                                         num_workers=workers, collate_fn=collate)
    batches = (batch for epoch in iter(int, 1) for batch in loader)

    def step():
        loss = loss_of(*(view.to(args.device) for view in next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()

    return step


def prepare(name, workers, flags):
    """In a process of its own: makes what `there` times."""
    global own
    args, images, works = ready(flags)
    own = timer(peer_step(name, workers, args, images) if name in PEERS else works[name], args.device)


def there(n):
    return own(n)


def beside_peers(flags):
    """{name: the same as `timer`} of step, floor and the peers that are installed."""
    installed = [name for name in PEERS if importlib.util.find_spec(name)]
    for name, (package, lacks) in PEERS.items():
        print(f"{name} leaves out: {lacks}" if name in installed else f"left out: pip install '{package}'")
    timers = {}
    for name, workers in [("step", 0), ("floor", 0), *itertools.product(installed, (0, 2))]:
        fork = multiprocessing.get_context("fork")
        process = ProcessPoolExecutor(1, fork, prepare, (name, workers, flags))
        label = f"{name}, {workers} workers" if name in PEERS else name
        timers[label] = lambda n, process=process: process.submit(there, n).result()
    return timers


def main(flags):
    if "--peers" in flags:
        flags = [flag for flag in flags if flag != "--peers"]
        table = turn_about(beside_peers(flags))
        print(json.dumps(show(table, byol.parse_arguments(flags).batch_size)))
        return
    args, _, works = ready(flags)
    timers = {name: timer(work, args.device) for name, work in works.items()}
    figures = show(turn_about(timers), args.batch_size)
    for name in ("step", "images and views", "optimizer"):
        with Count() as count:
            works[name]()
        figures[f"operations of {name}"] = count.n
        print(f"operations of {name}: {count.n}")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024        # on macOS in KiB, not MiB
    figures["peak MiB"] = resident if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print(f"peak memory: {figures['peak MiB']:.0f} MiB\n{json.dumps(figures)}")


if __name__ == "__main__":
    main(sys.argv[1:])
