"""LARS, layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888). Needs torch alone: copy it.

    from lars import LARS, param_groups
    optimizer = LARS(param_groups(model, weight_decay=1.5e-6), lr=0.2)
    print(optimizer.rates)      # after a step: {"layer1.0.conv1.weight": tensor(0.0123), ...}
"""

import math
import re

import torch

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)      # whose weights may have more than one dimension


class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's step scaled with the local rate of You et al. 2017, equation 6:

        local = eta * ||w|| / (||grad|| + weight_decay * ||w||), 1 where ||w|| or ||grad|| is 0
        buffer = momentum * buffer + local * (grad + weight_decay * w)
        w = w - lr * buffer

    The code of the BYOL blog post has 0 for that 1, so a tensor of zeros never moves. A group with
    `lars=False` is stepped as by SGD; the parameters of one with LARS lie on one device. `rates` holds the
    last step's local rates, left on the device, by name, or by parameter if LARS was given no names.
    """

    rates = {}

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=1e-3):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, lars=True)
        super().__init__(params, settings)

    def add_param_group(self, param_group):
        """As torch's; ValueError for a setting out of range, or if two parameters have one name."""
        super().add_param_group(param_group)
        try:
            self._check()
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self):
        group = self.param_groups[-1]
        for name in ("lr", "momentum", "weight_decay", "eta"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, not a finite number of at least 0")
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(set(names)) < len(names):
            raise ValueError("two parameters have one name, by which `rates` could not tell them apart")

    def load_state_dict(self, state_dict):
        """As torch's; ValueError for the state of another optimizer, which lacks what LARS needs."""
        if not all("lars" in group for group in state_dict["param_groups"]):
            raise ValueError("this is the state of another optimizer: its groups have no `lars`")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, or None without a closure."""
        with torch.enable_grad():
            loss = closure and closure()
        self.rates = {}
        for group in self.param_groups:
            params = group["params"]
            names = group.get("param_names", params)
            named = [(name, p) for name, p in zip(names, params) if p.grad is not None]
            if named:
                self._update(group, *zip(*named))
        return loss

    def _update(self, group, names, params):
        grads = [p.grad for p in params]
        if any(grad.is_sparse for grad in grads):
            raise ValueError("LARS takes no sparse gradients")
        decay = group["weight_decay"]
        steps = torch._foreach_add(grads, params, alpha=decay)
        if group["lars"]:
            rates = local_rates(params, grads, group["eta"], decay)
            steps = torch._foreach_mul(steps, rates)
            self.rates.update(zip(names, rates))
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def widened(t):
    """In 16 bits a norm would soon be infinite."""
    return t.float() if t.element_size() == 2 else t


def local_rates(params, grads, eta, weight_decay):
    """The local rate of each parameter, a tuple of 0-d tensors (You et al. 2017, equation 6)."""
    w, g = (torch.stack(torch._foreach_norm(list(map(widened, ts)))) for ts in (params, grads))
    ratios = eta * w / (g + weight_decay * w)
    defined = (w > 0) & (g > 0)
    return torch.where(defined, ratios, 1.0).unbind()


def param_groups(model, weight_decay, lars_layers=".*", lars_on="weights"):
    """Parameter groups of `model` for LARS, or for an optimizer of torch's.

    lars_layers: regular expression; where it is found in a name there is LARS, elsewhere SGD. None: nowhere.
    lars_on: "weights" leaves without LARS and decay (BYOL paper) the parameters of norm layers, those of
        fewer than two dimensions, and what is called a bias. "all" does not.
    Raises ValueError if no parameter requires a gradient, or for an expression malformed or found nowhere.
    """
    if lars_on not in ("weights", "all"):
        raise ValueError(f"lars_on is {lars_on!r}, not weights or all")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient")
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in named.values()):
        raise ValueError("a lazy module has no shape yet: run the model once")
    plain = set()
    if lars_on == "weights":
        of_norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
        for name, p in named.items():
            is_bias = "bias" in name.rpartition(".")[2]         # LSTM's bias_ih_l0, attention's in_proj_bias
            if p.ndim < 2 or is_bias or p in of_norms:
                plain.add(name)
    weights = named.keys() - plain
    adapted = matching(lars_layers, weights) if lars_layers is not None and weights else set()
    groups = {}
    for name, p in named.items():
        lars = name in adapted
        decay = 0.0 if name in plain else weight_decay
        group = groups.setdefault((lars, decay), dict(params=[], lars=lars, weight_decay=decay))
        group["params"].append((name, p))
    return list(groups.values())


def matching(regex, names):
    """The names in which `regex` is found; raises ValueError if it is malformed or there are none."""
    try:
        found = {name for name in names if re.search(regex, name)}
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}") from None
    if not found:
        raise ValueError(f"{regex!r} is found in none of the layers {', '.join(sorted(names)[:3])}, ...")
    return found
