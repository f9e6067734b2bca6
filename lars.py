"""LARS, layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888). Needs torch alone; copy this file.

    from lars import LARS, param_groups
    groups = param_groups(model, weight_decay=1.5e-6)    # biases and norms: neither LARS nor decay
    optimizer = LARS(groups, lr=0.2)
    loss.backward(); optimizer.step()
    print(optimizer.rates)                               # {"layer1.0.conv1.weight": tensor(0.0123), ...}
"""

import re

import torch
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["LARS", "param_groups"]

NORMS = (_NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.LocalResponseNorm, torch.nn.RMSNorm)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, with the local rate of You et al. 2017, equation 6:

        local = eta * ||w|| / (||grad|| + weight_decay * ||w||)      (1 where ||w|| or ||grad|| is 0)
        buffer = momentum * buffer + local * (grad + weight_decay * w)
        w = w - lr * buffer

    A group with `lars=False` has local rate 1 and is torch.optim.SGD, bit for bit; weight_decay=0 switches nothing off.
    `rates` holds the local rates of the last step, 0-d tensors on the parameters' devices: by parameter name where the
    optimizer was given named parameters, otherwise by position, as in `state_dict`. A step reads nothing back from the
    device. Raises ValueError for a negative or non-finite setting and RuntimeError for a sparse gradient.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=1e-3):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, not a finite number of at least 0")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, lars=True))
        self.rates = {}

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.rates = {}
        first = 0
        for group in self.param_groups:
            names = group.get("param_names", range(first, first + len(group["params"])))
            first += len(group["params"])
            named = [(name, p) for name, p in zip(names, group["params"]) if p.grad is not None]
            if named:
                self._update(group, *zip(*named))
        return loss

    def _update(self, group, names, params):
        grads = [p.grad for p in params]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("LARS does not support sparse gradients")
        steps = grads
        if group["weight_decay"]:
            steps = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["lars"]:
            rates = local_rates(params, grads, group["eta"], group["weight_decay"])
            steps = torch._foreach_mul(steps, rates)
            self.rates.update(zip(names, rates))
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        torch._foreach_add_(params, steps, alpha=-group["lr"])


def local_rates(params, grads, eta, weight_decay):
    """The local rate of each parameter, a list of 0-d tensors (You et al. 2017, equation 6)."""
    w_norms, g_norms = torch._foreach_norm(params), torch._foreach_norm(grads)
    ratios = torch._foreach_div(torch._foreach_mul(w_norms, eta), torch._foreach_add(g_norms, w_norms, alpha=weight_decay))
    return [torch.where((w > 0) & (g > 0), r, 1.0) for w, g, r in zip(w_norms, g_norms, ratios)]


def param_groups(model, weight_decay, lars_layers=".*", lr_mult=None):
    """Parameter groups of `model` for LARS, or for torch.optim.SGD where lars_layers is None.

    lars_layers: regular expression, searched in the parameter names. What it finds gets LARS, what it does not is left
        to SGD with momentum; biases and the parameters of norm layers (found by module type) get neither LARS nor
        weight decay. None asks for SGD alone: no LARS, and weight decay on every parameter.
    lr_mult: {regular expression: factor}. A group's "lr_mult" is the product of the factors whose expression is found
        in its names, 1 if none is. The caller sets group["lr"] = rate * group["lr_mult"] at each step: a torch
        scheduler does so if the groups' "lr" was multiplied once before it was made.
    Raises ValueError for a malformed expression or one that is found in no name.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    norm_params = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    plain = {n for n, p in model.named_parameters() if p in norm_params or n.endswith("bias")}
    adapted = find(lars_layers, [n for n in names if n not in plain]) if lars_layers is not None else set()
    factors = [(find(regex, names), factor) for regex, factor in (lr_mult or {}).items()]

    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        lars = name in adapted
        decay = weight_decay if lars_layers is None or name not in plain else 0.0
        mult = 1.0
        for found, factor in factors:
            mult *= factor if name in found else 1.0
        group = dict(params=[], lars=lars, weight_decay=decay, lr_mult=mult)
        groups.setdefault((lars, decay, mult), group)["params"].append((name, p))
    return list(groups.values())


def find(regex, names):
    """The names in which `regex` is found; raises ValueError if it is malformed or there are none."""
    try:
        found = {name for name in names if re.search(regex, name)}
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}") from None
    if not found:
        raise ValueError(f"{regex!r} is found in no layer; the names run from {names[0]} to {names[-1]}")
    return found
