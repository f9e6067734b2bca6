"""What grows in a collapsed network: python results/growth.py [byol.py's flags]

A run of byol.py whose log has a key more, `growth`: a batch is too small to see it, so each line is measured
over 4,096 images. The training, and so the rest of the log, is byol.py's to the bit.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol

IMAGES, CHUNK = 4096, 256


@torch.no_grad()
def growth(args, images, online):
    """Of unit vectors: representation distance, the part of it that both views have in common, the variance
    of that part along its strongest direction, and the slope of q over z in that direction."""
    online = copy.deepcopy(online)      # or the averages of its BN would move
    other_views = {"batch_size": CHUNK, "seed": args.seed + 1}
    args = argparse.Namespace(**{**vars(args), **other_views})
    chunks = [online(byol.load_views(images, i, args)) for i in range(IMAGES // CHUNK)]
    views = [torch.cat([chunk[i].view(2, CHUNK, -1) for chunk in chunks], 1) for i in range(3)]
    (y1, y2), (z1, z2), (q1, q2) = views
    metrics = byol.collapse_metrics(y1, z1, y2, z2)
    z1, z2, q1, q2 = (F.normalize(t.double()) for t in (z1, z2, q1, q2))
    z1, z2, q1, q2 = (t - t.mean(0) for t in (z1, z2, q1, q2))
    shared = (z1.T @ z2 + z2.T @ z1) / (2 * len(z1))
    variances, directions = torch.linalg.eigh(shared)
    z = torch.cat([z1, z2]) @ directions[:, -1]
    q = torch.cat([q1, q2]) @ directions[:, -1]
    return {
        "distance": metrics["rep_dist"],
        "common": metrics["rep_dist"] * metrics["common"],
        "strongest": variances[-1].item(),
        "slope": (q @ z / (z @ z).clamp_min(1e-300)).item(),       # 0 where every z is
    }


load_images, measure = byol.load_images, byol.measure
KEPT = {}


def keep_images(args):
    KEPT["images"] = load_images(args)
    n = len(KEPT["images"].train)
    if n < CHUNK:
        byol.stop(2, f"growth.py: --data {args.data} has {n} images to train on, not {CHUNK} or more")
    return KEPT["images"]


def measure_growth(online, *rest):
    metrics = measure(online, *rest)
    return {**metrics, "growth": growth(rest[-1], KEPT["images"].train, online)}


if __name__ == "__main__":
    byol.load_images, byol.measure = keep_images, measure_growth
    byol.main(sys.argv[1:])
