"""When must the gradient be clipped? python results/clip.py {early,late,scaled} --clip NORM [byol.py's flags]

A run of byol.py whose clipping is not that of all steps alike:

early     before step 600 alone
late      from step 600 on alone
scaled    in each step the gradient is scaled to NORM, up as well as down: each step before momentum is as long
"""

import sys
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol

STEP = 600
WHAT = sys.argv[1] if len(sys.argv) > 1 else ""
update = byol.update


@torch.no_grad()
def scale_grad_norm_(parameters, norm):
    """Scale the whole gradient to `norm`. Returns its norm before."""
    grads = [p.grad for p in parameters]
    total = get_total_norm(grads)
    torch._foreach_mul_(grads, norm / total.clamp_min(1e-30))
    return total


def partly_clipped_update(online, target, optimizer, views, step, args):
    """byol.py's, without its clipping where there is to be none."""
    clip = args.clip
    if (step < STEP) != (WHAT == "early"):
        args.clip = None
    outputs = update(online, target, optimizer, views, step, args)
    args.clip = clip
    return outputs


if __name__ == "__main__":
    is_clipped = any(word.partition("=")[0] == "--clip" for word in sys.argv)
    if WHAT not in ("early", "late", "scaled") or not is_clipped:
        byol.stop(2, "clip.py: its first word is early, late or scaled, and --clip is among its flags")
    if WHAT == "scaled":
        byol.nn.utils.clip_grad_norm_ = scale_grad_norm_
    else:
        byol.update = partly_clipped_update
    byol.main(sys.argv[2:])
