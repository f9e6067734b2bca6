"""Speed of byol.py: a step against its floor, and beside other implementations.

    python results/bench.py [byol.py's flags]               # step, floor, and where the time goes
    python results/bench.py --peers [byol.py's flags]       # the same work in lightly and byol-pytorch

The floor is the same networks' two forwards and the backward on fixed tensors, nothing else. What is compared
runs turn about, so that what else the machine does falls on all: median, least and most of five rounds.
"""

import copy
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
    """A run before its first step: arguments, images, (online, target, optimizer)."""
    args = byol.parse_arguments([*flags, "--steps", str(10**6)])        # so that the schedules do not end
    images = byol.load_images(args).train
    return args, images if args.device == "cpu" else images.to(args.device), byol.set_up(args)


def timed(work, device, n):
    """Milliseconds of one of n calls of `work`, which gets the numbers 0 to n - 1."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    began = time.perf_counter()
    for i in range(n):
        work(i)
    wait()
    return 1000 * (time.perf_counter() - began) / n


def parts(args, images, online, target, optimizer):
    """{name: a function that does this part of a step, or the floor, or the whole, once}."""
    views = byol.load_views(images, 0, args)
    mixed = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)

    def forward(network):
        with mixed:
            return network(views)

    def both_ways(i):
        forward(online)[2].float().square().mean().backward()

    def floor(i):
        both_ways(i)
        torch.no_grad()(forward)(target)

    return {
        "step": lambda i: byol.train_step(args, images, online, target, optimizer, i),
        "floor": floor,
        "images": lambda i: images[byol.image_order(len(images), 0, 0)[: args.batch_size].to(images.device)],
        "images and views": lambda i: byol.load_views(images, i, args),
        "online forward": lambda i: forward(online),
        "target forward": lambda i: torch.no_grad()(forward)(target),
        "online forward and backward": both_ways,
        "optimizer": lambda i: optimizer.step(),
        "EMA": lambda i: byol.update_target(target, online, 0.996),
    }


def turn_about(works, turns):
    """{name: milliseconds in five rounds} of {name: function of n: milliseconds of one of n calls}. In a
    round each has so many turns, of a second or of one call."""
    calls = {name: max(1, min(100, round(1000 / work(2)))) for name, work in works.items()}
    table = {name: [] for name in works}
    for _ in range(5):
        blocks = [{name: work(calls[name]) for name, work in works.items()} for _ in range(turns)]
        for name in works:
            table[name].append(statistics.mean(block[name] for block in blocks))
    return table


def show(name, values, digits=1):
    three = statistics.median(values), min(values), max(values)
    print(f"{name:32}" + "".join(f"{value:10.{digits}f}" for value in three))
    return three


def profile(flags):
    args, images, networks = ready(flags)
    works = parts(args, images, *networks)
    timers = {name: partial(timed, work, args.device) for name, work in works.items()}
    table = turn_about({name: timers.pop(name) for name in ("step", "floor")}, turns=5)
    table |= turn_about(timers, turns=1)
    print(f"{'milliseconds':32}{'median':>10}{'least':>10}{'most':>10}")
    figures = {name: show(name, values) for name, values in table.items()}
    figures["floor / step"] = show("floor / step", [f / s for f, s in zip(table["floor"], table["step"])], 3)
    figures["samples/s"] = show("samples per second", [1000 * args.batch_size / ms for ms in table["step"]])
    for name in ("step", "images and views", "optimizer"):
        with Count() as count:
            works[name](0)
        figures[f"operations of {name}"] = count.n
        print(f"{'operations of ' + name:32}{count.n:10}")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024        # on macOS in KiB, not MiB
    figures["peak MiB"] = resident if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print(f"{'peak memory in MiB':32}{figures['peak MiB']:10.0f}\n{json.dumps(figures)}")


def lightly(args, images, encoder):
    """By lightly's documentation: collation of a batch, its loss, parameters, what follows a step."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, BYOLView1Transform

    view = BYOLView1Transform(args.size, cj_sat=0.4, min_scale=0.2, gaussian_blur=0.5)
    transform, pictures = BYOLTransform(view, view), [TF.to_pil_image(image) for image in images]
    online = nn.Sequential(encoder, BYOLProjectionHead(8 * args.width, 512, 128)).to(args.device)
    prediction = BYOLPredictionHead(128, 512, 128).to(args.device)
    target, loss = copy.deepcopy(online).requires_grad_(False), NegativeCosineSimilarity()

    def loss_of(v1, v2):
        t1, t2 = target(v1), target(v2)
        return loss(prediction(online(v1)), t2) + loss(prediction(online(v2)), t1)

    collate = lambda chosen: torch.utils.data.default_collate([transform(pictures[i]) for i in chosen])
    parameters = [*online.parameters(), *prediction.parameters()]
    return collate, loss_of, parameters, lambda: update_momentum(online, target, 0.996)


def byol_pytorch(args, images, encoder):
    """The same by byol-pytorch's, which makes the views itself."""
    from byol_pytorch import BYOL

    learner = BYOL(encoder, args.size, hidden_layer="layer4", projection_size=128, projection_hidden_size=512,
                   use_simplicial_embeddings=False)
    collate = lambda chosen: [images[chosen] / 255]
    return collate, learner, learner.parameters(), learner.update_moving_average


THERE = {}


def peer(name, workers, args, images):
    """A function that trains one step by the module `name`, with so many loader workers."""
    encoder = resnet18("bn", args.width, args.stem).to(args.device)
    collate, loss_of, parameters, after = globals()[name](args, images.cpu(), encoder)
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    loader = torch.utils.data.DataLoader(range(len(images)), args.batch_size, shuffle=True, drop_last=True,
                                         num_workers=workers, collate_fn=collate)
    batches = (batch for epoch in iter(int, 1) for batch in loader)

    def step(i):
        loss = loss_of(*(view.to(args.device) for view in next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()

    return step


def prepare(name, workers, flags):
    """In a process of its own: the work that `timed_there` times."""
    args, images, networks = ready(flags)
    work = peer(name, workers, args, images) if name in PEERS else parts(args, images, *networks)[name]
    THERE.update(work=work, device=args.device)


def timed_there(n):
    return timed(**THERE, n=n)


def compare(flags):
    there = [name for name in PEERS if importlib.util.find_spec(name)]
    for name in PEERS.keys() - there:
        print(f"left out, not installed: pip install '{PEERS[name][0]}'")
    works = {}
    peers = [(name, workers) for name in there for workers in (0, 2)]
    for name, workers in [("step", 0), ("floor", 0), *peers]:
        fork = multiprocessing.get_context("fork")
        process = ProcessPoolExecutor(1, fork, prepare, (name, workers, flags))
        label = f"{name}, {workers} workers" if name in there else name
        works[label] = lambda n, process=process: process.submit(timed_there, n).result()
    table = turn_about(works, turns=3)
    batch = byol.parse_arguments(flags).batch_size
    print(f"{'samples per second':32}{'median':>10}{'least':>10}{'most':>10}")
    figures = {name: show(name, [1000 * batch / ms for ms in table[name]]) for name in works}
    for name in list(works)[1:]:
        pairs = [theirs / ours for ours, theirs in zip(table["step"], table[name])]
        figures[f"ratio {name}"] = show(f"byol.py over {name}", pairs, 2)
    for name in there:
        print(f"{name} leaves out: {PEERS[name][1]}")
    print(json.dumps(figures))


if __name__ == "__main__":
    if "--peers" in sys.argv:
        compare([flag for flag in sys.argv[1:] if flag != "--peers"])
    else:
        profile(sys.argv[1:])
