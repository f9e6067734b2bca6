"""What do the first steps of SGD break? python results/harm.py {lengths,units,both} [byol.py's flags]

A run of byol.py to whose networks is done once, before step 64, what SGD without a warm-up does to them:

lengths   z and q get a mean length of 240 and 2,800, with the same hidden units and the same directions
units     each hidden unit of the prediction is on for all images or off for all, at much the same lengths
both      both
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol

STEP, Z_NORM, Q_NORM = 64, 240, 2800        # where SGD at 0.2 is without a warm-up
update = byol.update


def settle(linear, inputs):
    """Shift each unit's bias until the unit is on for all inputs or off for all, whatever is nearer."""
    values = linear(inputs)
    low, high = values.min(0).values, values.max(0).values
    on = values.median(0).values > 0
    linear.bias -= torch.where(on, low.clamp(max=0), high.clamp(min=0)) * 1.5


def lengthen(linear, vectors, norm):
    """Scale the layer that made `vectors`, (N, d), to their mean length `norm`. Returns the factor."""
    factor = norm / vectors.norm(dim=1).mean()
    linear.weight *= factor
    linear.bias *= factor
    return factor


@torch.no_grad()
def harm(what, online, target, views):
    if what in ("units", "both"):
        settle(online.prediction[0][0], online(views)[1])
    if what in ("lengths", "both"):
        _, z, q = online(views)
        lengthen(online.prediction[1], q, Q_NORM)
        online.prediction[0][0].weight /= lengthen(online.projection[1], z, Z_NORM)
        lengthen(target.projection[1], target(views)[1], Z_NORM)


def harmed_update(online, target, optimizer, views, step, args):
    if step == STEP:
        harm(sys.argv[1], online, target, views)
    return update(online, target, optimizer, views, step, args)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["lengths"], ["units"], ["both"]):
        byol.stop(2, "harm.py: its first word is lengths, units or both")
    if byol.parse_arguments(sys.argv[2:]).loss != "byol":
        byol.stop(2, "harm.py: --loss byol alone has the prediction that it harms")
    byol.update = harmed_update
    byol.main(sys.argv[2:])
