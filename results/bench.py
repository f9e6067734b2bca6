"""Speed of byol.py: a step against its floor, and beside other implementations.

    python results/bench.py [byol.py's flags]               # step, floor, and where the time goes
    python results/bench.py --peers [byol.py's flags]       # and the same work in lightly and byol-pytorch

The floor is the same networks' two forwards and the backward on fixed tensors, nothing else. All runs turn
about, so that what else the machine does falls on all: median, least and most of nine rounds.
"""

import copy
import functools
import importlib.util
import json
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torchvision.transforms.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import byol

PEERS = {       # module: (package on PyPI, what it leaves out of the work of byol.py)
    "lightly": ("lightly==1.6.*", "collapse metrics"),
    "byol_pytorch": ("byol-pytorch==0.9.*", "metrics, per-image augmentation, wide blur, BN by view"),
}
# Flags of which the peers know the default alone.
UNKNOWN_TO_PEERS = "enc_norm proj_norm pred_norm loss opt clip lr_mult amp compile".split()


class Count(TorchDispatchMode):
    """Counts the operations that torch dispatches, for each of which a GPU would wait."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += 1
        return operation(*args, **(kwargs or {}))


def ready(flags):
    """A run's arguments, images and {name: a function of this part of a step, of all of it, of the floor}."""
    args = byol.parse_arguments(flags)
    if ":" in args.device:              # torch's timer waits for the current GPU alone
        byol.stop(2, f"bench.py: not --device {args.device}, but CUDA_VISIBLE_DEVICES and --device cuda")
    images = byol.load_images(args).train.to(args.device)
    args.steps, args.lr = 10**6, 1e-9   # no end, and the weights stay
    online, target, optimizer = byol.build(args)
    views = byol.load_views(images, 0, args)
    order = torch.randperm(len(images), device=images.device)[: args.batch_size]
    steps = iter(range(args.steps))
    mixed = torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp)
    online_forward = mixed(lambda: online(views)[2])
    target_forward = torch.no_grad()(mixed(lambda: target(views)))
    both_ways = lambda: online_forward().float().square().mean().backward()

    def step():
        i = next(steps)
        return byol.update(online, target, optimizer, byol.load_views(images, i, args), i, args)

    return args, images, {
        "step": step,
        "floor": lambda: (both_ways(), target_forward()),
        "images": lambda: images[order],
        "images and views": lambda: byol.load_views(images, next(steps), args),
        "online forward": online_forward,
        "target forward": target_forward,
        "online forward and backward": both_ways,
        "optimizer": optimizer.step,
        "EMA": lambda: byol.update_target(target, online, 0.996),
    }


def timer(work):
    """A function: milliseconds of a call of `work`, GPU included, from a second of calls, at least one."""
    clock = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return lambda: 1000 * clock.blocked_autorange(min_run_time=1).mean


def lightly(args, images, encoder):
    """As its documentation has it: collation of a batch, loss, networks, what follows a step."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, BYOLView1Transform

    view = BYOLView1Transform(args.size, cj_sat=0.4, min_scale=0.2, gaussian_blur=0.5)
    transform, pictures = BYOLTransform(view, view), [TF.to_pil_image(image) for image in images]
    collate = lambda chosen: torch.utils.data.default_collate([transform(pictures[i]) for i in chosen])
    online = torch.nn.Sequential(encoder, BYOLProjectionHead(8 * args.width, 512, 128))
    target = copy.deepcopy(online).requires_grad_(False)
    predict = torch.nn.Sequential(online, BYOLPredictionHead(128, 512, 128))
    distance = NegativeCosineSimilarity()
    loss = lambda v1, v2: distance(predict(v1), target(v2)) + distance(predict(v2), target(v1))
    networks = torch.nn.ModuleList([predict, target]).to(args.device)
    return collate, loss, networks, lambda: update_momentum(online, target, 0.996)


def byol_pytorch(args, images, encoder):
    """The same of byol-pytorch, which makes the views itself."""
    from byol_pytorch import BYOL

    learner = BYOL(encoder, args.size, "layer4", 128, 512, use_simplicial_embeddings=False)
    collate = lambda chosen: [images[chosen] / 255]
    return collate, learner, learner.to(args.device), learner.update_moving_average


@functools.cache
def peer_timer(name, workers, flags):
    """The timer of a step by the module `name`, with so many loader workers."""
    args, images, _ = ready(flags)
    encoder = byol.resnet18("bn", args.width, args.stem)
    collate, loss_of, networks, after = globals()[name](args, images.cpu(), encoder)
    optimizer = torch.optim.SGD(networks.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    loader = torch.utils.data.DataLoader(
        range(len(images)), args.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        collate_fn=collate, multiprocessing_context="fork" if workers else None)
    batches = (batch for epoch in iter(int, 1) for batch in loader)

    def step():
        loss = loss_of(*(view.to(args.device) for view in next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()

    return timer(step)


def in_its_process(*peer):
    return peer_timer(*peer)()


def peer_timers(args, flags):
    """(what, its timer) of the peers that are installed, each in a process of its own."""
    default = byol.parse_arguments([])
    for name in UNKNOWN_TO_PEERS:
        if getattr(args, name) != getattr(default, name):
            byol.stop(2, f"bench.py: --peers do another work than --{name.replace('_', '-')} asks for")
    for name, (package, lacks) in PEERS.items():
        if not importlib.util.find_spec(name):
            print(f"left out: pip install '{package}'")
            continue
        print(f"{name} leaves out: {lacks}")
        for workers in (0, 2):
            process = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"))
            turn = functools.partial(process.submit, in_its_process, name, workers, tuple(flags))
            yield f"{name}, {workers} workers", lambda turn=turn: turn().result()


def main(flags):
    own = [flag for flag in flags if flag != "--peers"]
    args, _, works = ready(own)
    timers = {name: timer(work) for name, work in works.items()}
    if "--peers" in flags:
        timers.update(peer_timers(args, own))
    rounds = [{name: turn() for name, turn in timers.items()} for _ in range(9)]
    figures = {}
    print(f"{'median, least, most':28}{'milliseconds':>24}{'over step':>21}{'samples per second':>24}")
    for name in timers:
        over_step = [row[name] / row["step"] for row in rounds]
        samples = [1000 * args.batch_size / row[name] for row in rounds]
        columns = [row[name] for row in rounds], over_step, samples
        figures[name] = [f(column) for column in columns for f in (statistics.median, min, max)]
        print(("{:28}" + 3 * "{:8.1f}" + 3 * "{:7.2f}" + 3 * "{:8.0f}").format(name, *figures[name]))
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
