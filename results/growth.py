"""How the variation common to both views grows where a batch is too small to show it: python results/growth.py FLAGS

Trains as byol.py does with these flags (--steps, not --epochs), writes no run, and prints over 16,384 images, at the
start and every --log-every steps, the representation distance, the part of it that both views have in common, the
variance of that part along its strongest direction, and the slope of the prediction over the projection there.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol

IMAGES, CHUNK = 16_384, 256


@torch.no_grad()
def measure(images, online, args):
    """(representation distance, the part common to both views, its largest variance along one direction, the slope
    there of the predictions over the projections), of the unit vectors of IMAGES of the images."""
    size = min(CHUNK, len(images))
    args = argparse.Namespace(**{**vars(args), "batch_size": size, "seed": args.seed + 1})         # views of their own
    outputs = []
    for chunk in range(min(IMAGES, len(images)) // size):
        outputs.append([view for t in online(byol.draw_views(images, chunk, args, lambda part: None)) for view in t.chunk(2)])
    y1, y2, z1, z2, q1, q2 = (torch.cat(parts) for parts in zip(*outputs))
    metrics = byol.collapse_metrics(y1, z1, y2, z2)
    z1, z2, q1, q2 = (unit - unit.mean(0) for unit in (byol.unit(t.double()) for t in (z1, z2, q1, q2)))
    variance, directions = torch.linalg.eigh((z1.T @ z2 + z2.T @ z1) / (2 * len(z1)))
    z, q = torch.cat([z1, z2]) @ directions[:, -1], torch.cat([q1, q2]) @ directions[:, -1]
    return metrics["rep_dist"], metrics["rep_dist"] - (1 - metrics["pos_cos"]), variance[-1].item(), (q @ z / (z @ z)).item()


def main(argv):
    args = byol.parse_arguments(argv)
    images = byol.load_images(args.data, args.data_dir, args.download, args.size).pretrain
    online, target, optimizer = byol.set_up(args)
    print("    step  rep_dist  in common  strongest     slope")
    for step in range(args.steps):
        if step % args.log_every == 0:
            print(f"{step:8}  {'  '.join(f'{value:9.2e}' for value in measure(images, online, args))}", flush=True)
        byol.train_step(args, images, online, target, optimizer, step)


if __name__ == "__main__":
    main(sys.argv[1:])
