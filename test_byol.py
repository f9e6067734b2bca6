"""Tests: values against torch, torchvision, scikit-learn or the formula; runs drive the real script."""

import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

# Faster for networks this small, and far faster beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from torchvision.models.feature_extraction import create_feature_extractor

import byol
import lars
import resnet_norms
from results import bench, clip, growth, report

HERE = Path(__file__).parent
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = "--width 4 --batch-size 8 --log-every 2 --data folder:images".split()
GN = "--enc-norm gn --mlp-norm none"


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session", autouse=True)
def folder(tmp_path_factory):
    """40 training and 20 test images of ten classes, and 5 unlabeled ones, as PNG files in the tests' working
    directory. There, not into the checkout, go by default runs and decoded images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))           # or the server could not import what it is to preload
        multiprocessing.forkserver.ensure_running()
    os.chdir(tmp_path_factory.mktemp("work"))
    root = Path("images").resolve()
    for split, per_class in (("train", 4), ("test", 2)):
        for i, (image, label) in enumerate(zip(*byol.draw_shapes(per_class, per_class))):
            save_image(root / split / f"class{label}" / f"{i:03}.png", TF.to_pil_image(image))
    for i in range(5):
        save_image(root / "unlabeled" / "some" / f"{i}.png", TF.to_pil_image(image))
    return root


@pytest.fixture(scope="session")
def shapes():
    return byol.load_images(byol.parse_arguments([]))


# Processes to kill are forked from one that has imported torch already, which saves seconds for each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def run_main(flags, output, file_limit, environment):
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)            # the old one holds a position in the file that 1 was
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a background job ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
    main(*flags)


class Run:
    """byol.py in a process of its own, its output in `lines`. No file may grow over `file_limit` bytes."""

    def __init__(self, *flags, file_limit=-1, **environment):
        reader, writer = FORKS.Pipe(duplex=False)
        arguments = [str(flag) for flag in flags], writer, file_limit, environment
        self.process = FORKS.Process(target=run_main, args=arguments)
        self.process.start()
        writer.close()
        self.lines = os.fdopen(os.dup(reader.fileno()))

    def read_steps(self, n):
        """Read up to the nth line of a step from here."""
        steps = (line for line in self.lines if line.split()[0].isdigit())
        assert len(list(itertools.islice(steps, n))) == n

    def wait(self):
        """(exit status or minus the signal that killed it, what was still to be read of its output)"""
        rest = self.lines.read()
        self.process.join()
        return self.process.exitcode, rest


def log(out):
    """The lines of a run's log without what is allowed to differ between equal runs."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def same_run(one, other):
    return log(one) == log(other) and (one / "encoder.pt").read_bytes() == (other / "encoder.pt").read_bytes()


def main(*flags):
    """`python byol.py` with these flags, in this process."""
    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["byol.py", *flags])
        byol.main(flags)


def refused(capsys, status, *flags):
    """The one line that the script prints on stderr when it refuses `flags`."""
    code = pytest.raises(SystemExit, main, *flags).value.code      # to keep `value` would keep the log's lock
    lines = capsys.readouterr().err.splitlines()
    assert code == status and len(lines) == 1 and lines[0].startswith("byol.py: "), lines
    return lines[0]


# ---------------------------------------------------------------------------------------------- resnet_norms
def test_resnet_equals_torchvision(monkeypatch):
    for draw in ("kaiming_uniform_", "uniform_"):       # of the layers, in vain: both networks draw anew
        monkeypatch.setattr(nn.init, draw, lambda t, *_, **__: t)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    torch.manual_seed(0)
    ours = resnet_norms.resnet18("bn", 64, "imagenet")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
    assert {getattr(m, "num_groups", 32) for m in resnet_norms.resnet18("gn").modules()} == {32}


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("norm, groups", [
    ("bn", []), ("gn", [3] * 20), ("gn+ws", [3] * 20), ("none", []), (lambda n: nn.GroupNorm(1, n), [1] * 20),
])
def test_resnet_shapes_gradients_and_statistics(norm, groups, stem):
    net, x = resnet_norms.resnet18(norm, 6, stem).double(), torch.randn(2, 3, 32, 32).double()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 20 and all((conv.bias is not None) == (norm == "none") for conv in convs)
    assert norm != "none" or not any(conv.bias.any() for conv in convs)
    for conv in convs[-3:]:             # Kaiming's, for what goes out
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    y = net(x)
    assert y.shape == (2, 48)
    assert norm == "bn" or torch.allclose(y[:1], net(x[:1]), rtol=1e-10)
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == groups
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8, 12, 16])
def test_gradients_in_channels_last(width):
    """Alike in both memory formats. With strides in narrow shortcuts oneDNN wrote into others (6035)."""
    net = resnet_norms.resnet18("none", width, "cifar")
    x, grads = torch.randn(16, 3, 64, 64), []
    for form in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=form).zero_grad()
        net(x.contiguous(memory_format=form)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    # Where rounding crosses a ReLU's kink, 1e-4 has been seen.
    assert (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


@pytest.mark.parametrize("bad", [dict(norm="ln"), dict(stem="vit"), dict(width=0), dict(width=5, norm="gn"),
                                 dict(width=3, norm="gn+ws"), dict(width=1, norm="gn+ws")])
def test_resnet_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        resnet_norms.resnet18(**bad)


def test_weight_standardization():
    conv = resnet_norms.WSConv2d(3, 5, 3, padding=1).double()
    x, w = torch.randn(2, 3, 8, 8).double(), conv.weight
    with torch.no_grad():               # of any mean and scale
        w.add_(torch.randn(5, 1, 1, 1)).mul_(10.0 ** torch.arange(-8, 12, 4)[:, None, None, None])
    ours = conv(x)
    standard = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), correction=0, keepdim=True)
    theirs = F.conv2d(x, standard, conv.bias, padding=1)
    gradients = [torch.autograd.grad(out.square().sum(), w) for out in (ours, theirs)]
    torch.testing.assert_close([ours, *gradients[0]], [theirs, *gradients[1]])
    nn.init.constant_(w, 0.3)
    flat = conv(x)
    flat.square().sum().backward()
    assert torch.allclose(flat, conv.bias[:, None, None].expand(2, 5, 8, 8))
    assert torch.isfinite(w.grad).all()


# ---------------------------------------------------------------------------------------------- lars
def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))


def run_steps(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) ** 3).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("momentum, weight_decay", [*itertools.product((0.0, 0.9), (0.0, 1e-2))])
def test_lars_off_is_sgd(momentum, weight_decay):
    ours, theirs = small_model(), small_model()
    group = dict(params=ours.parameters(), lars=False, momentum=momentum)           # its own, not the default
    run_steps(ours, lars.LARS([group], 0.1, 0.5, weight_decay), 7)
    run_steps(theirs, torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=weight_decay), 7)
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize("w_scale, g_scale, weight_decay", [*itertools.product((0, 1), (0, 1), (0.0, 1e-2))])
def test_lars_follows_the_formula(w_scale, g_scale, weight_decay):
    w = nn.Parameter(w_scale * torch.randn(5, 7))
    optimizer = lars.LARS([("w", w)], lr=0.3, momentum=0.9, weight_decay=weight_decay, eta=2e-3)
    expected, buffer = w.detach().double(), torch.zeros(5, 7).double()
    for _ in range(4):
        w.grad = g_scale * torch.randn(5, 7)
        g, local = w.grad.double(), torch.tensor(1.0)
        if expected.norm() > 0 and g.norm() > 0:
            local = 2e-3 * expected.norm() / (g.norm() + weight_decay * expected.norm())
        buffer = 0.9 * buffer + local * (g + weight_decay * expected)
        expected = expected - 0.3 * buffer
        optimizer.step()
        assert optimizer.rates["w"].item() == pytest.approx(local.item(), rel=1e-5)
        assert torch.allclose(w.double(), expected, rtol=1e-5)


def test_lars_in_16_bits():
    w = nn.Parameter(torch.full((300, 300), 300.0).half())
    w.grad = torch.ones(300, 300).half()
    optimizer = lars.LARS([("w", w)], lr=1.0)
    optimizer.step()
    assert optimizer.rates["w"].item() == pytest.approx(0.3, rel=1e-3)
    assert w.unique().tolist() == [299.75]


def test_lars_goes_on_where_it_was():
    """From pickle and copy.deepcopy; from a state_dict in test_cut_off_and_resumed_is_never_cut_off."""
    model = small_model()
    optimizer = lars.LARS(lars.param_groups(model, 1e-3), 0.1)
    run_steps(model, optimizer, 3)
    copied, second = copy.deepcopy(pickle.loads(pickle.dumps((model, optimizer))))
    assert second.rates == {}
    run_steps(model, optimizer, 3)
    run_steps(copied, second, 3)
    torch.testing.assert_close([*model.parameters()], [*copied.parameters()], rtol=0, atol=0)
    assert len(second.rates) == 2


def test_lars_is_a_torch_optimizer():
    used, unused, late = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = lars.LARS([used, unused], lr=1.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 3 * used.sum() + late.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    schedule.step()
    optimizer.add_param_group(dict(params=[late], lars=False, lr=0.25))
    optimizer.step(closure)
    assert torch.allclose(used, torch.tensor((1 - 1e-3) * (1 - 1e-4)))     # rates of 1, then 0.1
    assert torch.equal(late, torch.full((2,), 0.75)) and set(optimizer.rates) == {used}
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.rates == {}


@pytest.mark.parametrize("bad", [dict(lr=-1), dict(lr=9e999), dict(lr=1, momentum=math.nan),
                                 dict(lr=1, eta=-1), dict(lr=1, weight_decay=-1)])
def test_lars_refuses(bad):
    with pytest.raises(ValueError, match=list(bad)[-1]):
        lars.LARS([nn.Parameter(torch.ones(1))], **bad)


def test_param_groups():
    model = small_model()

    def described(**flags):
        groups = lars.param_groups(model, 0.1, **flags)
        return {name: (g["lars"], g["weight_decay"]) for g in groups for name, _ in g["params"]}

    names = [name for name, _ in model.named_parameters()]
    plain, weights = (False, 0.0), {"0.weight", "3.weight"}
    assert described() == {n: (True, 0.1) if n in weights else plain for n in names}
    assert described(lars_on="all") == {n: (True, 0.1) for n in names}
    assert described(lars_layers=None, lars_on="all") == {n: (False, 0.1) for n in names}
    assert described(lars_layers=None) == {n: (False, 0.1) if n in weights else plain for n in names}
    some = {"3.weight": (True, 0.1), "0.weight": (False, 0.1), "0.bias": plain}
    assert described(lars_layers="^3").items() >= some.items()
    split = byol.split_by_rate(lars.param_groups(model, 0.1, "^3"), [["^0", 10], ["weight", 2]])
    factors = {name: (g["lr_mult"], g["lars"]) for g in split for name, _ in g["params"]}
    some = {"3.weight": (2, True), "0.weight": (20, False), "0.bias": (10, False), "4.bias": (1, False)}
    assert factors.items() >= some.items()
    factors = byol.parse_arguments(["--lr-mult", "(?<=layer1).*=3"]).lr_mult
    assert factors == [["(?<=layer1).*", 3]]
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in described()
    bad = dict(lars_layers="bias"), dict(lars_layers="["), dict(lars_layers="none"), dict(lars_on="norms")
    for flags in bad:
        with pytest.raises(ValueError, match="regular expression|none of the layers|norms"):
            lars.param_groups(model, 0.1, **flags)
    with pytest.raises(ValueError, match="gradient"):
        lars.param_groups(model.requires_grad_(False), 0.1)
    args = byol.parse_arguments(["--enc-norm", "gn", "--proj-norm", "ln", "--pred-norm", "bn"])
    for group in lars.param_groups(byol.Network(args), 0.1):
        assert all((p.ndim > 1) == group["lars"] == (group["weight_decay"] > 0) for _, p in group["params"])


def test_what_is_no_weight_gets_no_lars():
    """Whatever it is called, and whatever norm it belongs to; what cannot be told is refused."""
    modules = dict(conv=nn.Conv2d(3, 8, 3), lstm=nn.LSTM(8, 8), rms=nn.RMSNorm(8), ln=nn.LayerNorm([4, 4]),
                   attention=nn.MultiheadAttention(8, 2, add_bias_kv=True), embedding=nn.Embedding(5, 8),
                   debias=nn.Linear(8, 8))
    model = nn.ModuleDict(modules)
    model.layer_scale = nn.Parameter(torch.ones(8))
    groups = lars.param_groups(model, 0.1)
    adapted = {name for g in groups if g["lars"] for name, _ in g["params"]}
    assert adapted == {"conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight",
                       "attention.out_proj.weight", "embedding.weight", "debias.weight"}
    assert all(g["weight_decay"] == (0.1 if g["lars"] else 0) for g in groups)
    with pytest.raises(ValueError, match="lazy"):
        lars.param_groups(nn.LazyLinear(3), 0.1)
    (group,) = lars.param_groups(nn.BatchNorm1d(8), 0.1)        # no weight at all
    assert not group["lars"] and group["weight_decay"] == 0


def test_lars_says_what_it_cannot_do():
    w = nn.Parameter(torch.ones(3, 2))
    optimizer = lars.LARS([w], 0.1)
    w.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="one name"):
        lars.LARS([dict(params=[("w", nn.Parameter(torch.ones(2)))]), dict(params=[("w", w)])], 0.1)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], weight_decay=-1))
    assert len(optimizer.param_groups) == 1
    for other in (torch.optim.SGD([w], 0.1), torch.optim.Adam([w])):
        with pytest.raises(ValueError, match="another optimizer"):
            optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name, code", [
    ("lars", "m = torch.nn.Linear(2, 2); m(torch.ones(1, 2)).sum().backward()"
             "; o = lars.LARS(lars.param_groups(m, 1e-6), 0.2); o.step(); assert set(o.rates) == {'weight'}"),
    ("resnet_norms", "y = resnet_norms.resnet18('gn+ws', 8, 'cifar')(torch.ones(1, 3, 16, 16))"
                     "; assert y.shape == (1, 64)"),
])
def test_copied_alone(name, code, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    alone = f"import sys; sys.modules['torchvision'] = sys.modules['numpy'] = None; import torch, {name}; "
    subprocess.run([sys.executable, "-c", alone + code], cwd=tmp_path, check=True)


# ---------------------------------------------------------------------------------------------- views
def plain_view(image, params, i, order, size):
    """The view of `image`, (3, side, side) in [0, 1], by torchvision, from draw_views' ith parameters."""
    one = {name: values[i].item() for name, values in params.items()}
    place = [int(one[name]) for name in ("top", "left", "height", "width")]
    image = TF.resized_crop(image, *place, [size, size], antialias=True)
    image = TF.hflip(image) if one["flip"] else image
    for name in order:
        image = getattr(TF, f"adjust_{name}")(image, one[name])
    image = TF.rgb_to_grayscale(image, 3) if one["gray"] else image
    taps = 2 * math.ceil(size / 16) + 1
    image = TF.gaussian_blur(image, [taps, taps], [one["sigma"]] * 2) if one["sigma"] else image
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("size", [16, 55, 75, 96])
def test_views_are_the_composition_of_torchvisions(size):
    args = byol.parse_arguments(["--size", str(size)])
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    # Where a hue is not unique: gray, red and green alike, a corner of the cube.
    images[0] = 128
    images[1, 1] = images[1, 0]
    images[2] = torch.tensor([0, 255, 255])[:, None, None]
    for seed in range(4):
        params, order = byol.draw_views(12, 32, size, np.random.default_rng(seed))
        params = {name: torch.tensor(values).float() for name, values in params.items()}
        ours = byol.make_views(images, params, order, args)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        for i, image in enumerate(images / 255):
            assert (ours[i] - plain_view(image, params, i, order, size)).abs().max() < 1e-4


def test_drawn_parameters_have_torchvisions_distribution():
    n, side = 4000, 40
    transforms = torchvision.transforms
    params, _ = byol.draw_views(n, side, 96, np.random.default_rng(2))
    assert byol.draw_views(99, 1, 16, np.random.default_rng(2))[0]["height"].min() == 1       # of a pixel
    height, width = params["height"], params["width"]
    on = params["hue"] != 0
    blurred = params["sigma"] > 0
    torch.manual_seed(0)
    area, ratio = [0.2, 1], [3 / 4, 4 / 3]
    image = torch.empty(3, side, side)
    crops = np.array([transforms.RandomResizedCrop.get_params(image, area, ratio) for _ in range(n)])
    limits = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]
    jitters = np.array([transforms.ColorJitter.get_params(*limits)[1:] for _ in range(n)])
    sigmas = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(n)]
    pairs = [(params[name], crops[:, i]) for i, name in enumerate(("top", "left", "height", "width"))]
    pairs += [(params[name][on], jitters[:, i]) for i, name in enumerate(byol.JITTER)]
    pairs += [(height * width, crops[:, 2] * crops[:, 3]), (params["sigma"][blurred], sigmas)]
    half_as_large, _ = byol.draw_views(n, side, 48, np.random.default_rng(3))
    pairs += [(2 * half_as_large["sigma"][half_as_large["sigma"] > 0], sigmas)]
    assert all(ks_2samp(ours, theirs).pvalue > 1e-3 for ours, theirs in pairs)
    assert np.array_equal(on, params["brightness"] != 1)
    for applied, p in ((on, 0.8), (params["flip"] > 0, 0.5), (params["gray"] > 0, 0.2), (blurred, 0.5)):
        assert applied.mean() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    orders = {tuple(byol.draw_views(2, 32, 16, np.random.default_rng(seed))[1]) for seed in range(40)}
    assert len(orders) > 12             # of the jitter, of 24


def test_draws_are_independent_of_each_other():
    """Of images, of both views of one, of what else is drawn; a crop's place and size are not."""
    n = 4000
    params, _ = byol.draw_views(2 * n, 40, 96, np.random.default_rng(2))
    params["sigma"] = params["sigma"] > 0
    on = params["hue"] != 0
    params |= {name: np.where(on, params[name], np.mean(params[name][on])) for name in byol.JITTER}
    params["jittered"] = on
    rows = lambda chosen: np.stack([values[chosen] for values in params.values()]).astype(float)
    even, odd, first, second = map(rows, (slice(0, None, 2), slice(1, None, 2), slice(n), slice(n, None)))
    crop = ["height", "width", "top", "left"]
    for one, other, same in ((even, odd, False), (first, second, False), (first, first, True)):
        r = np.corrcoef(one, other)[: len(one), len(one) :]
        for (i, a), (j, b) in itertools.product(enumerate(params), repeat=2):
            related = a in crop and b in crop or a == b
            assert same and related or abs(r[i, j]) < 4.5 / n**0.5, (a, b)


def test_shapes_hardly_vary_in_what_is_not_the_form(shapes):
    x = shapes.train.view(10, 1000, 3, 32, 32).float()
    contrast, brightness = x.std((3, 4)), x.mean((3, 4))
    assert (contrast.std(1) / contrast.mean(1)).max() < 0.12 and brightness.std(1).max() < 12
    assert [x.mean().item(), x.std().item()] == pytest.approx([129.12, 45.99], abs=0.5)


# -------------------------------------------------------------------------------------- losses, EMA, metrics
def test_loss_and_distances_are_exact_also_near_collapse():
    torch.manual_seed(0)
    # own: of what varies in a view, the share that the other does not have
    for own, spread in itertools.product((0.2, 1.0), (1e-5, 1.0)):
        base, common = torch.randn(1, 64).double(), torch.randn(32, 64).double()
        q, t = ((base + spread * ((1 - own) ** 0.5 * common + own**0.5 * noise)).float()
                for noise in torch.randn(2, 32, 64).double())
        exact = (1 - F.cosine_similarity(q.double(), t.double())).mean().item()
        rel = 1e-6 + 2e-7 / spread
        assert byol.byol_loss(q, t).item() == pytest.approx(exact, rel=rel)
        metrics = byol.collapse_metrics(common.float(), q, common.float(), t)
        both = [x.double() for x in (q, t)]
        pairs = torch.cat([1 - F.cosine_similarity(x[:, None], x[None], dim=2) for x in both])
        pairs = pairs.sum().item() / (2 * 32 * 31)
        assert metrics["rep_dist"] == pytest.approx(pairs, rel=rel)
        assert metrics["common"] == pytest.approx(1 - exact / pairs, abs=0.02)
        assert [metrics["pos_cos"], metrics["neg_cos"]] == pytest.approx([1 - exact, 1 - pairs], abs=1e-5)
    dead = byol.collapse_metrics(*[torch.ones(32, 64)] * 4)
    assert dead["rep_dist"] == dead["common"] == 0
    assert all(map(math.isfinite, byol.collapse_metrics(*[torch.zeros(32, 64)] * 4).values()))


def test_collapse_metrics():
    y, z1, z2 = torch.randn(12, 40).abs(), torch.randn(12, 30) + 1, torch.randn(12, 30) - 1
    metrics = byol.collapse_metrics(y, z1, y, z2)
    z_std = [F.normalize(z).std(0).mean().item() * 30**0.5 for z in (z1, z2)]          # of each view
    assert metrics["z_std"] == pytest.approx(sum(z_std) / 2, rel=1e-5)
    assert metrics["y_std"] == pytest.approx(F.normalize(y).std(0).mean().item() * 40**0.5, rel=1e-5)
    assert metrics["z_norm"] == pytest.approx(torch.cat([z1, z2]).norm(dim=1).mean().item(), rel=1e-5)
    flat = byol.collapse_metrics(*[torch.ones(20, 20) + 1e-6 * torch.rand(20, 20)] * 4)
    assert flat["y_rank"] == pytest.approx(1, abs=1e-3) and flat["z_std"] < 1e-5


def test_queue_begins_as_unit_vectors_and_comes_round():
    _, target, _ = byol.build(byol.parse_arguments([*TINY, "--loss", "moco"]))
    torch.testing.assert_close(target.queue.norm(dim=1), torch.ones(byol.QUEUE))
    assert target.queue.mean(0).abs().max() < 0.01              # in all directions
    queue, batches = target.queue.clone(), torch.randn(100, 48, 128)
    for step, t in enumerate(batches):          # 4,800 keys: the last 704 lie over the first
        byol.enqueue(queue, *t.chunk(2), step)
    expected = F.normalize(batches.view(-1, 128))
    assert torch.equal(queue[: 4800 - byol.QUEUE], expected[byol.QUEUE :])
    assert torch.equal(queue[4800 - byol.QUEUE :], expected[4800 - byol.QUEUE : byol.QUEUE])


def test_running_averages_are_of_both_views():
    norm, plain = byol.per_view(nn.BatchNorm2d)(3), nn.BatchNorm2d(3)
    views = torch.randn(2, 8, 3, 4, 4) * torch.tensor([1.0, 5.0])[:, None, None, None, None]
    norm(views.flatten(0, 1))
    for view in views:
        plain(view)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    net = byol.Network(byol.parse_arguments(TINY))
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_y_rank_and_layers_follow_their_formulas():
    y = torch.randn(12, 40)
    s = np.linalg.svd(F.normalize(y).numpy(), compute_uv=False)
    p = s / s.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    assert byol.collapse_metrics(y, y, y, y)["y_rank"] == pytest.approx(expected, rel=1e-4)
    args = byol.parse_arguments([*TINY, *GN.split(), "--opt", "lars"])
    online, _, optimizer = byol.build(args)
    online(torch.randn(4, 3, 16, 16))[2].sum().backward()
    optimizer.step()
    layers = byol.layer_metrics(online, optimizer, 3.0)
    for layer, values in layers.items():
        begin = layer if layer.startswith("pr") else "encoder." + layer.replace("stem", "conv1")
        ws = {n: p for n, p in online.named_parameters() if n.startswith(begin + ".") and p.ndim > 1}
        norm = lambda ts: torch.cat([t.flatten() for t in ts]).norm().item()
        peaks = [(w.abs().max() / w.square().mean().sqrt()).item() for w in ws.values()]
        rates = [optimizer.rates[n].item() for n in ws]
        grads = [p.grad for p in ws.values()]
        expected = [3 * norm(grads), norm(ws.values()), max(peaks), sum(rates) / len(rates)]
        assert list(values.values()) == pytest.approx(expected, rel=1e-4), layer


def test_live_units_are_on_for_some_and_off_for_others():
    args = byol.parse_arguments([*TINY, *GN.split()])
    online, _, optimizer = byol.build(args)
    online(torch.randn(4, 3, 16, 16))[2].sum().backward()
    y, z, q = torch.randn(16, 32), torch.randn(16, 128), torch.randn(16, 128)
    with torch.no_grad():
        online.projection[0][0].bias[:128] += 1000          # always on
        online.projection[0][0].bias[128:256] -= 1000       # always off
        online.prediction[0][0].bias[200:] -= 1000
        online.prediction[0][0].weight[:200] = torch.eye(128).repeat(2, 1)[:200]        # on where z > 0
        z[:, :64], q[:, :64] = z[:, :64].abs() + 1, -q[:, :64].abs()
    metrics = byol.measure(online, optimizer, y, z, q, None, args)
    assert metrics["live"] == [pytest.approx(0.5, abs=0.02), 72 / 512]      # those of z's other half
    assert metrics["q_norm"] == pytest.approx(q.norm(dim=1).mean().item())


def test_collapse_state():
    """Relative to the untrained network; once collapsed, ten times the threshold is needed to recover."""
    for first in (0.5, 5e-4):
        distances = [first * d for d in (1, 0.02, 0.011, 0.009, 0.09, 0.11, 0.02, 0.001)]
        states = "untrained healthy healthy healthy collapsed collapsed recovered recovered collapsed".split()
        judge = lambda state, distance: byol.collapse_state(state, distance, first)
        assert list(itertools.accumulate(distances, judge, initial="untrained")) == states
    assert byol.collapse_state("healthy", 0.0, 0.0) == "collapsed"
    for bad in ((math.nan, 0.1), (math.inf, 0.1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="finite"):
            byol.collapse_state("collapsed", *bad)


def test_metrics_of_what_has_no_distance():
    for bad in (torch.randn(1, 8), torch.full((4, 8), math.nan), torch.full((4, 8), math.inf)):
        with pytest.raises(ValueError, match="at least 2|not finite"):
            byol.collapse_metrics(*[bad] * 4)
    good = torch.randn(8, 16)
    for bad in (good[:1], good[:, :8], good[0], good[None], good * 1e30):
        with pytest.raises(ValueError, match="at least 2|not finite"):
            byol.collapse_metrics(good, good, good, bad)
    with pytest.raises(ValueError, match="not finite"):
        byol.collapse_metrics(good * 1e30, good, good, good)
    with pytest.raises(ValueError, match="at least 2"):
        byol.collapse_metrics(good[..., None], good, good[..., None], good)
    assert byol.collapse_metrics(*[1e-25 * good] * 4)["rep_dist"] < 1e-9            # squares are 0 there
    small = byol.collapse_metrics(*[1e-16 * good] * 4)          # whatever the length, directions count
    assert small["rep_dist"] == pytest.approx(byol.collapse_metrics(*[good] * 4)["rep_dist"], rel=1e-4)


def test_schedules():
    rates = [byol.lr_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert [rates[step] for step in (0, 9, 10, 55)] == pytest.approx([0.2, 2.0, 2.0, 1.0])
    assert max(rates) == rates[9] and 0 < rates[99] < 0.001
    assert max(byol.lr_at(step, 94, 2.0, 0.1) for step in range(94)) <= 2.0         # a warm-up of 9.4 steps
    assert [byol.tau_at(step, 100, 0.9) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])


class Plain:
    """BYOL written out from the papers and the flags, one view after the other: what a step makes of the
    weights of `online` and `target`."""

    def __init__(self, args):
        norms = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm, "gn": lambda n: nn.GroupNorm(32, n)}

        def mlp(features, norm):
            between = [norms[norm](512)] if norm != "none" else []
            return nn.Sequential(nn.Linear(features, 512), *between, nn.ReLU(), nn.Linear(512, 128))

        self.args = args
        self.encoder = resnet_norms.resnet18(args.enc_norm, args.width, args.stem)
        self.projection = mlp(8 * args.width, args.proj_norm)
        self.prediction = mlp(128, args.pred_norm) if args.loss == "byol" else nn.Identity()
        self.online = nn.ModuleList([self.encoder, self.projection, self.prediction])
        self.target = copy.deepcopy(self.online[:2])

    def views(self, images, step):
        """Both views of the batch of a step, (N, 3, size, size) each."""
        n, args = self.args.batch_size, self.args
        epoch, i = divmod(step, len(images) // n)
        chosen = np.random.default_rng([args.seed, 0, epoch]).permutation(len(images))[i * n : (i + 1) * n]
        rng = np.random.default_rng([args.seed, 1, step])
        params, order = byol.draw_views(2 * n, images.shape[-1], args.size, rng)
        params = {name: torch.tensor(values).float() for name, values in params.items()}
        both = [images[j] / 255 for j in [*chosen, *chosen]]
        views = [plain_view(image, params, i, order, args.size) for i, image in enumerate(both)]
        return torch.stack(views).chunk(2)

    def loss(self, v1, v2, queue):
        with torch.no_grad():
            t1, t2 = (self.target[1](self.target[0](v)) for v in (v1, v2))
        q1, q2 = (self.prediction(self.projection(self.encoder(v))) for v in (v1, v2))
        cos = F.cosine_similarity
        if self.args.loss == "byol":
            return (2 - cos(q1, t2) - cos(q2, t1)).mean(), t1, t2
        logits = lambda q, t: torch.cat([cos(q, t)[:, None], F.normalize(q) @ queue.T], 1) / 0.2
        first = torch.zeros(len(q1)).long()
        return F.cross_entropy(logits(q1, t2), first) + F.cross_entropy(logits(q2, t1), first), t1, t2

    def lr(self, step):
        warm = self.args.warmup * self.args.steps
        if step < warm:
            return self.args.lr * (step + 1) / math.ceil(warm)
        return self.args.lr / 2 * (1 + math.cos(math.pi * (step - warm) / (self.args.steps - warm)))

    def moved(self, name, p, grad, state, step):
        """Where a parameter is after the step, in float64; `state`: the optimizer's of before."""
        args, w, g = self.args, p.detach().double(), grad.double()
        lr = self.lr(step) * math.prod(factor for regex, factor in args.lr_mult if re.search(regex, name))
        on_all = args.opt == "sgd" or args.lars_on == "all"
        decay = args.weight_decay if on_all or p.ndim > 1 else 0
        if args.opt == "adamw":
            m = 0.9 * state.get("exp_avg", 0) + 0.1 * g
            v = 0.999 * state.get("exp_avg_sq", 0) + 0.001 * g**2
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            return w - lr * (decay * w + m / (v.sqrt() + 1e-8))
        update = g + decay * w
        adapted = args.opt == "lars" and (on_all or p.ndim > 1) and re.search(args.lars_layers or "", name)
        if adapted and w.norm() > 0 and g.norm() > 0:
            update = update * 1e-3 * w.norm() / (g.norm() + decay * w.norm())
        return w - lr * (0.9 * state.get("momentum_buffer", 0) + update)


@pytest.mark.parametrize("flags", [
    "--enc-norm bn --mlp-norm bn",
    GN,
    f"{GN} --loss moco --width 6",
    f"{GN} --clip 0.1 --seed 3 --size 20",
    f"{GN} --opt adamw --lr-mult layer1=3 --ema 0.9",
    "--enc-norm gn+ws --proj-norm ln --pred-norm gn --opt lars --lars-on all --warmup 0.5",
    "--enc-norm none --proj-norm gn --pred-norm ln --opt lars --lars-layers encoder.layer[12] --size 32 "
    "--stem imagenet --weight-decay 0.01",
    "--enc-norm gn --proj-norm bn --pred-norm none --lr-mult ^encoder=2 --lr-mult bias=3 --weight-decay 0.01",
])
def test_step_equals_the_plain_one(flags, shapes):
    """Both views in one pass, channels_last and the fused updates against BYOL written out, in 5 steps of two
    epochs, each from the same state: with BN, rounding alone drives two runs apart very fast."""
    args = byol.parse_arguments(f"--width 8 --batch-size 16 --steps 5 {flags}".split())
    images, plain = shapes.train[::250], Plain(args)
    online, target, optimizer = byol.build(args)
    named = dict(online.named_parameters())
    for step in range(args.steps):
        for mine, theirs in ((plain.online, online), (plain.target, target)):
            for p, value in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.data.copy_(value)
        queue = target.queue.clone() if args.loss == "moco" else None
        states = {name: dict(copy.deepcopy(optimizer.state.get(p, {}))) for name, p in named.items()}
        views = byol.load_views(images, step, args)
        for ours, theirs in zip(views.chunk(2), plain.views(images, step)):
            assert (ours - theirs).abs().max() < 1e-4
        loss, t1, t2 = plain.loss(*views.contiguous().chunk(2), queue)
        grads = torch.autograd.grad(loss, [*plain.online.parameters()])
        norm = torch.cat([g.flatten() for g in grads]).norm()
        scale = min(1, args.clip / norm) if args.clip else 1
        olds = [p.detach().clone() for p in plain.online.parameters()]
        expected = {name: plain.moved(name, p, g * scale, states[name], step)
                    for (name, _), p, g in zip(named.items(), olds, grads)}

        ours, y, z, q, grad_norm = byol.update(online, target, optimizer, views, step, args)
        assert ours.item() == pytest.approx(loss.item(), rel=5e-6, abs=1e-6)
        metrics = byol.measure(online, optimizer, y, z, q, grad_norm, args)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=0.02)
        stem = metrics["layers"]["stem"]["grad_norm"]
        assert stem == pytest.approx(grads[0].norm().item(), rel=0.05, abs=1e-8)
        wrong = torch.cat([(p - expected[name]).flatten() for name, p in named.items()]).norm()
        assert wrong < 2e-2 * torch.cat([(p - old).flatten() for p, old in zip(named.values(), olds)]).norm()
        for name, old in zip(named, olds):              # each layer moved, and moved right
            step_length = (named[name] - old).norm()
            assert (named[name] - expected[name]).norm() < 0.2 * step_length + 1e-7, name
        tau = 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for slow, before, fast in zip(target.parameters(), plain.target.parameters(), online.parameters()):
            torch.testing.assert_close(slow.detach(), (tau * before + (1 - tau) * fast).detach())
        if args.loss == "moco":
            keys = F.normalize(torch.cat([t1, t2]))
            full = torch.cat([queue[: 32 * step], keys, queue[32 * step + 32 :]])
            assert torch.allclose(target.queue, full, atol=1e-6)


def test_what_differs_by_optimizer_and_seed_reaches_the_optimizer():
    """Rates, and decay by parameter, of the optimizer that `build` makes; weights by --seed."""
    for opt, lr, decay in (("sgd", 0.2, 1e-4), ("lars", 0.2, 1.5e-6), ("adamw", 1e-3, 1e-2)):
        online, _, optimizer = byol.build(byol.parse_arguments([*TINY, "--opt", opt]))
        for group in optimizer.param_groups:
            assert group["lr"] == lr
            for p in group["params"]:
                assert group["weight_decay"] == (decay if opt == "sgd" or p.ndim > 1 else 0)
    built = [byol.build(byol.parse_arguments([*TINY, "--seed", seed]))[0] for seed in "001"]
    one, same, other = (online.encoder.conv1.weight for online in built)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_threads_are_set(tmp_path):
    before = torch.get_num_threads()
    byol.build(byol.parse_arguments([*TINY, "--threads", str(before + 1)]))
    now = torch.get_num_threads()
    torch.set_num_threads(before)
    assert now == before + 1


def test_a_short_gradient_is_not_clipped(shapes):
    after = []
    for clip in ([], ["--clip", "1e6"]):
        args = byol.parse_arguments([*TINY, *GN.split(), "--steps", "3", *clip])
        parts = byol.build(args)
        byol.update(*parts, byol.load_views(shapes.train, 0, args), 0, args)
        after.append([p.detach() for p in parts[0].parameters()])
    torch.testing.assert_close(*after, rtol=0, atol=0)


def test_losses_are_given_fp32(shapes, monkeypatch):
    seen = []
    for name, loss in (("byol", byol.byol_loss), ("moco", byol.moco_loss)):
        def spy(*given, loss=loss):
            seen.extend(given)
            assert all(t.dtype == torch.float32 for t in given)
            return loss(*given)
        monkeypatch.setattr(byol, f"{name}_loss", spy)
        args = byol.parse_arguments([*TINY, "--amp", "--steps", "3", "--loss", name])
        byol.update(*byol.build(args), byol.load_views(shapes.train, 0, args), 0, args)
    assert len(seen) == 10


def test_amp_keeps_loss_and_metrics_in_fp32(shapes):
    losses = {}
    for amp in (False, True):
        args = byol.parse_arguments([*"--width 4 --batch-size 16 --steps 5".split(), *["--amp"] * amp])
        views, parts, kinds = byol.load_views(shapes.train, 0, args), byol.build(args), []
        for net in parts[:2]:
            net.encoder.conv1.register_forward_hook(lambda _, __, y: kinds.append(y.dtype))
        loss, *outputs, _ = byol.update(*parts, views, 0, args)
        assert set(kinds) == {torch.bfloat16 if amp else torch.float32} and len(kinds) == 2
        assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in outputs)
        losses[amp] = loss.item()
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.03)


# ----------------------------------------------------------------------------------------- linear evaluation
def test_linear_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 3000)
    x = rng.normal(size=(3000, 40)) @ rng.normal(size=(40, 40)) * 0.3
    x += 0.2 * rng.normal(size=(5, 40))[labels] + 7
    train, test = torch.tensor(x[:2000]).float(), torch.tensor(x[2000:]).float()
    ours = byol.linear_accuracy(train, torch.tensor(labels[:2000]), test, torch.tensor(labels[2000:]))
    scaled = (x - x[:2000].mean(0)) / (x[:2000] - x[:2000].mean(0)).std()
    theirs = LogisticRegression(max_iter=5000, tol=1e-8).fit(scaled[:2000], labels[:2000])
    assert 40 < ours < 99 and abs(ours - 100 * theirs.score(scaled[2000:], labels[2000:])) < 0.5
    odd, parts = labels[2000:] % 2 == 1, 0               # a test image's class does not hang on the others
    for some in (odd, ~odd):
        part = test[torch.tensor(some)], torch.tensor(labels[2000:][some])
        parts += byol.linear_accuracy(train, torch.tensor(labels[:2000]), *part) * some.mean()
    assert parts == pytest.approx(ours)
    weight, bias = byol.fit_linear(torch.tensor(scaled[:2000]), torch.tensor(labels[:2000]))
    assert np.abs(weight.T.numpy() - theirs.coef_).max() < 1e-2


def test_linear_accuracy_takes_what_people_have():
    """Features with a graph, of any float type, inference tensors; labels of any whole type, (N,), (N, 1)."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    y = torch.randn(3, 8, generator=rng)[labels] + 0.9 * torch.randn(120, 8, generator=rng)
    expected = byol.linear_accuracy(y[:60], labels[:60], y[60:], labels[60:])
    assert 50 < expected < 100
    def accuracy(y, labels):
        return byol.linear_accuracy(y[:60], labels[:60], y[60:], labels[60:])
    assert accuracy((y.clone().requires_grad_() * 1), labels) == expected
    assert accuracy(y.double(), labels[:, None]) == accuracy(y.numpy(), labels.numpy()) == expected
    assert accuracy(y.half(), labels) == pytest.approx(expected, abs=2)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert accuracy(y, labels.to(kind)) == expected
    assert accuracy(y, labels * 10**7) == expected              # names of classes, not a count of them
    with torch.inference_mode():
        assert accuracy(y * 1, labels * 1) == expected
    with torch.no_grad():
        assert accuracy(y, labels) == expected
    for bad in ((y, labels[:-1]), (y, F.one_hot(labels)), (y, labels.float()), (y, labels - 1),
                (y / 0, labels), (y[0], labels)):
        with pytest.raises(ValueError, match="labels|features"):
            accuracy(*bad)
    with pytest.raises(ValueError, match="shapes"):
        byol.linear_accuracy(y, labels, y[:, :1], labels)


@pytest.mark.parametrize("norm", ["bn", "gn", "gn+ws", "none"])
def test_encoders_can_be_traced(norm):
    net = resnet_norms.resnet18(norm, 4, "cifar").eval()
    x = torch.rand(2, 3, 16, 16)
    layer1 = create_feature_extractor(net, ["layer1"])(x)["layer1"]
    assert layer1.shape == (2, 4, 16, 16)               # the cifar stem keeps the size
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_linear_accuracy_does_not_read_rounding():
    """Of classes that stand well apart, `size` times as far as what all images share is long."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(130)
    own = torch.randn(10, 32, generator=rng)[labels] + 0.5 * torch.randn(1300, 32, generator=rng)
    common = 1 + torch.rand(32, generator=rng)
    accuracy = lambda x: byol.linear_accuracy(x[:1000], labels[:1000], x[1000:], labels[1000:])
    assert accuracy(common + own) > 95 and accuracy(common + 1e-3 * own) > 95
    tiny = common + 1e-6 * own
    assert accuracy(tiny) == 10 and accuracy(tiny - common) > 80       # though there is enough left in fp32


def test_evaluation_leaves_the_encoder_alone_and_sees_no_test_label(shapes, monkeypatch):
    encoder = resnet_norms.resnet18("bn", 4, "cifar")
    before = copy.deepcopy(encoder.state_dict())
    few = shapes._replace(train=shapes.train[::20], train_labels=shapes.train_labels[::20])
    accuracy = byol.evaluate(encoder, few, byol.parse_arguments([]))
    assert encoder.training and all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    wrong = byol.evaluate(encoder, few._replace(test_labels=9 - shapes.test_labels), byol.parse_arguments([]))
    assert accuracy > 15 > wrong
    resized = [TF.resize(images.float() / 255, 16, antialias=True) for images in (few.train, few.test)]
    features = [encoder.eval()(TF.normalize(x, byol.MEAN, byol.STD)).detach() for x in resized]
    seen = []
    monkeypatch.setattr(byol, "linear_accuracy", lambda *given: seen.extend(given))
    byol.evaluate(encoder, few, byol.parse_arguments([]))
    torch.testing.assert_close([seen[0], seen[2]], features, rtol=1e-3, atol=1e-4)
    assert torch.equal(seen[1], few.train_labels) and torch.equal(seen[3], few.test_labels)


# ---------------------------------------------------------------------------------------------- images
def load(data, data_dir="data", size=16):
    flags = ["--data", str(data), "--data-dir", str(data_dir), "--size", str(size), "--batch-size", "2"]
    return byol.load_images(byol.parse_arguments(flags))


def test_shapes(shapes):
    assert shapes.train.shape == (10000, 3, 32, 32) and shapes.train.dtype == torch.uint8
    assert shapes.train_labels.bincount().tolist() == [1000] * 10
    assert shapes.test_labels.bincount().tolist() == [200] * 10
    assert not torch.equal(shapes.train[:200], shapes.test[:200])
    images = shapes.train, shapes.test
    colours = [torch.cat([t.float().mean((2, 3)), t.float().std((2, 3))], 1) for t in images]
    assert byol.linear_accuracy(colours[0], shapes.train_labels, colours[1], shapes.test_labels) < 30


def test_stl10_in_its_binary_format(tmp_path, monkeypatch):
    # The real one wants the real files' sums.
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    root = tmp_path / "stl10_binary"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (15, 3, 96, 96), dtype=np.uint8)
    for split, x in zip(("train", "unlabeled", "test"), np.split(pixels, [6, 11])):
        x.transpose(0, 1, 3, 2).tofile(root / f"{split}_X.bin")     # by columns on disk
    (root / "train_y.bin").write_bytes(bytes([1, 2, 3, 10, 5, 6]))
    (root / "test_y.bin").write_bytes(bytes([4, 3, 2, 1]))
    images = load("stl10", tmp_path, size=48)
    assert np.array_equal(images.train, pixels[:11]) and np.array_equal(images.test, pixels[11:])
    assert images.train_labels.tolist() == [0, 1, 2, 9, 4, 5] and images.test_labels.tolist() == [3, 2, 1, 0]


def test_cifar10_in_its_pickle_format(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for x, name in zip(pixels, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({"data": x, "labels": [3, 4]}))
    images = load("cifar10", tmp_path)
    assert np.array_equal(images.train, pixels[:5].reshape(10, 3, 32, 32))
    assert images.train_labels.tolist() == [3, 4] * 5
    assert np.array_equal(images.test, pixels[5].reshape(2, 3, 32, 32))
    assert images.test_labels.tolist() == [3, 4]


@pytest.mark.parametrize("download", [[], ["--download"]])
def test_torchvision_is_told_to_download_and_grey_images_become_colour(download, tmp_path, monkeypatch):
    asked = []

    class Data(list):
        targets = [0, 1]

        def __init__(self, root, train, download):
            super().__init__([(Image.new("L", (28, 28), 7), 0)] * 2)
            asked.append((root, train, download))

        def __add__(self, other):
            return [*self, *other]

    monkeypatch.setitem(byol.DATASETS, "fashion-mnist", Data)
    place = str(tmp_path)
    flags = f"--data fashion-mnist --data-dir {place} --batch-size 2".split()
    args = byol.parse_arguments([*flags, *download])
    assert torch.equal(byol.load_images(args).train, torch.full((2, 3, 28, 28), 7, dtype=torch.uint8))
    assert asked == [(place, True, bool(download)), (place, False, bool(download))]


def test_test_labels_of_a_folder(folder, tmp_path):
    assert torch.equal(load(f"folder:{folder}", tmp_path).test_labels, byol.draw_shapes(2, 2)[1])


def test_an_image_changed_at_equal_size_is_decoded_anew(tmp_path):
    for split, label in itertools.product(("train", "test"), "ab"):
        save_image(tmp_path / split / label / "0.bmp", Image.new("RGB", (16, 16), "red"))
    first = load(f"folder:{tmp_path}", tmp_path)
    path = tmp_path / "train" / "a" / "0.bmp"
    Image.new("RGB", (16, 16), "blue").save(path)
    os.utime(path, (1e9, 1e9))
    changed = load(f"folder:{tmp_path}", tmp_path)
    assert changed.digest != first.digest and changed.train[0, 2].min() == 255


def test_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    last = max((root / "train" / "class4").iterdir())
    (last.parent / "more").mkdir()
    last.rename(last.parent / "more" / "9.PNG")
    first = load(f"folder:{root}", tmp_path)
    drawn, labels = byol.draw_shapes(4, 4)
    assert len(first.train) == 45
    assert torch.equal(first.train[:40], drawn)
    assert torch.equal(first.train_labels, labels)
    assert torch.equal(first.test, byol.draw_shapes(2, 2)[0]) and "decoding 65" in capsys.readouterr().out
    assert load(f"folder:{root}", tmp_path).digest == first.digest and not capsys.readouterr().out
    (path,) = (tmp_path / "decoded").iterdir()
    path.unlink()
    old, young = (Path(f"{path}.{letter * 12}.part") for letter in "ab")    # of a killed, a living process
    for partial in (old, young):
        partial.touch()
    os.utime(old, (1e9, 1e9))
    load(f"folder:{root}", tmp_path)
    assert path.exists() and young.exists() and not old.exists()
    save_image(min((root / "train").rglob("*.png")), Image.new("RGB", (32, 32)))
    (root / "train" / "notes.txt").write_text("left out")
    changed = load(f"folder:{root}", tmp_path)
    assert changed.train[0].max() == 0 and first.train[0].max() > 0 and changed.digest != first.digest
    assert "1 files left out" in capsys.readouterr().out


def test_folder_of_mixed_sizes_and_modes(tmp_path):
    gray = Image.fromarray(np.full((30, 40), 102, np.uint8))
    ramp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pictures = [gray.convert(mode) for mode in ("L", "RGBA", "P", "RGB")]
    pictures.append(Image.fromarray(np.full((30, 40), 102 * 257, np.uint16)))             # 16 bits
    for split, (i, picture) in itertools.product(("train", "test"), enumerate(pictures)):
        save_image(tmp_path / split / f"c{i % 2}" / f"{i}.png", picture)
    images = load(f"folder:{tmp_path}", size=24)
    assert images.train.shape == (5, 3, 24, 24) and (images.train == 102).all()
    turned = Image.Exif()
    turned[0x0112] = 6                  # on its side, to be turned right by a viewer
    save_image(tmp_path / "train" / "c1" / "9.png", ramp)
    ramp.save(tmp_path / "train" / "c1" / "99.png", exif=turned)
    *_, straight, upright = load(f"folder:{tmp_path}", size=24).train
    for ours, theirs in ((straight, ramp), (upright, ramp.transpose(Image.Transpose.ROTATE_270))):
        expected = TF.center_crop(TF.resize(theirs, 24), 24)
        assert torch.equal(ours, TF.pil_to_tensor(expected))


@pytest.mark.parametrize("white, kind, ending", [
    (255, np.uint16, "png"), (4095, np.uint16, "png"), (65535, np.uint16, "png"), (255, np.int32, "tif"),
    (1, np.float32, "tif"), (255, np.float32, "tif"), (4095, ">u2", "tif")])
def test_deep_images_keep_their_contrast(white, kind, ending, tmp_path, capsys):
    values = np.random.default_rng(0).random((4, 16, 16)) * white
    values[:, 0, 0] = white
    for split, (i, image) in itertools.product(("train", "test"), enumerate(values)):
        save_image(tmp_path / split / f"c{i % 2}" / f"{i}.{ending}", Image.fromarray(image.astype(kind)))
    images = load(f"folder:{tmp_path}", tmp_path)
    expected = np.rint(values[[0, 2, 1, 3]].astype(kind) * (255 / white))
    assert np.abs(images.train[:, 1].numpy() - expected).max() <= 1
    assert f"{white} is white" in capsys.readouterr().out


def test_deep_images_share_one_white(tmp_path):
    for split, (i, level) in itertools.product(("train", "test"), enumerate((200, 4000, 60000))):
        image = Image.fromarray(np.full((16, 16), level + (split == "test"), np.uint16))
        save_image(tmp_path / split / f"c{i % 2}" / f"{i}.png", image)
    images = load(f"folder:{tmp_path}", tmp_path)
    for pixels, more in ((images.train, 0), (images.test, 1)):
        assert [int(x[0, 0, 0]) for x in pixels] == [round((v + more) / 257) for v in (200, 60000, 4000)]


def test_images_that_cannot_be_learned_from_are_told(tmp_path, capsys):
    noise = lambda: Image.fromarray(np.random.randint(0, 256, (16, 16, 3), dtype=np.uint8))
    same = noise()
    blank = lambda colour: lambda: Image.new("RGB", (16, 16), colour)
    alike = lambda: same
    kinds = {"black": blank("black"), "single colour": blank("red"), "like the first": alike, "": noise}
    for words, draw in kinds.items():
        root = tmp_path / (words or "noise")
        for split, label, i in itertools.product(("train", "test"), ("a", "b"), range(3)):
            save_image(root / split / label / f"{i}.png", draw())
        for _ in range(2):              # decoded, and found decoded
            load(f"folder:{root}", tmp_path)
            output = capsys.readouterr().out
            assert ("training images looked at are" in output) == bool(words) and words in output
    refuse = lambda: refused(capsys, 2, *TINY, "--data", f"folder:{tmp_path / 'noise'}")
    for value, kind, word in ((-3, np.int32, "8 bits"), (1.5, np.float32, "neither of 0 to 1")):
        image = Image.fromarray(np.full((16, 16), value, kind))
        save_image(tmp_path / "noise" / "train" / "a" / "9.tif", image)
        assert word in refuse()
    save_image(tmp_path / "noise" / "train" / "a" / "9.tif", Image.new("RGB", (1, 1600)))
    assert "9.tif" in refuse()          # its resized pixels would fill the memory


def test_what_counts_as_a_training_image(folder, tmp_path, capsys):
    """Hidden files and folders, thumbnails, companions, what is no file do not; linked folders do, once."""
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    picture = min((folder / "train").rglob("*.png"))
    hidden = [".0.png", "._0.png", ".ipynb_checkpoints/0.png", "@eaDir/0.png/THUMB_M.jpg", "__MACOSX/0.png"]
    for name in hidden:
        for place in ("train/class0", "train", "unlabeled"):
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, root / place / name)
    (root / "train" / "class0" / "up").symlink_to(root, target_is_directory=True)
    (root / "train" / "class0" / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "train" / "class0" / "pipe.png")
    shutil.move(root / "train" / "class1", tmp_path / "elsewhere")
    (root / "train" / "class1").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    images = load(f"folder:{root}", tmp_path)
    assert torch.equal(images.train, load(f"folder:{folder}", tmp_path).train)
    assert f"{3 * len(hidden) + 2} files left out" in capsys.readouterr().out


def test_large_squares_are_decoded_at_twice_the_size(tmp_path):
    for split, label in itertools.product(("train", "test"), "ab"):
        save_image(tmp_path / split / label / "0.png", Image.effect_noise((200, 200), 50))
    assert load(f"folder:{tmp_path}", tmp_path).train.shape == (2, 3, 32, 32)
    assert load(f"folder:{tmp_path}", tmp_path, size=100).train.shape == (2, 3, 200, 200)
    for i in range(130):                # the last differ from the first hundred
        save_image(tmp_path / "train" / "b" / f"{i:03}.png", Image.effect_noise((20 + (i > 110), 20), 50))
    for path in (tmp_path / "train" / "a", tmp_path / "train" / "b"):
        (path / "0.png").unlink(missing_ok=True)
    save_image(tmp_path / "train" / "a" / "0.png", Image.effect_noise((20, 20), 50))
    assert load(f"folder:{tmp_path}", tmp_path).train.shape == (131, 3, 16, 16)


def test_damaged_decoded_images(folder, tmp_path, capsys):
    load(f"folder:{folder}", tmp_path, size=16)
    (path,) = (tmp_path / "decoded").glob("*.npy")
    whole = path.read_bytes()
    for content in (b"", whole[:1000], bytes(1000), whole[:128] + whole[128:-5000]):
        path.write_bytes(content)
        assert str(path) in refused(capsys, 1, *TINY, "--data", f"folder:{folder}", "--data-dir", tmp_path)
    np.save(path, np.zeros((65, 3, 32, 32), np.uint16))
    assert str(path) in refused(capsys, 1, *TINY, "--data", f"folder:{folder}", "--data-dir", tmp_path)
    assert "--data-dir" in refused(capsys, 2, *TINY, "--data", f"folder:{folder}", "--data-dir", path)


def test_bad_folders(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse = lambda name: refused(capsys, 2, *TINY, "--data", f"folder:{name}")
    blank = Image.new("RGB", (32, 32))
    for path in ("train/cat", "test/cat"):
        save_image(Path("few", path, "0.png"), blank)
    assert "allocated is no folder; it needs images" in refuse("allocated")     # no word of memory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "of 1 classes" in refuse("~/few")
    save_image(Path("few/train/eel/0.png"), blank)
    save_image(Path("few/test/Eel/0.png"), blank)
    assert "in train alone eel; in test alone Eel" in refuse("few")
    avif = io.BytesIO()
    Image.effect_noise((48, 48), 50).save(avif, "AVIF")
    Path("few/train/cat/7.jpg").write_bytes(avif.getvalue()[:300] + bytes(300))     # a download that stopped
    shutil.move("few/test/Eel", "few/test/eel")
    assert "7.jpg" in refuse("few")
    shutil.copytree(folder, "broken")
    broken = min(Path("broken/train").rglob("*.png"))
    whole = broken.read_bytes()
    for content in (b"", whole[:-60], b"no image"):
        broken.write_bytes(content)
        assert str(broken) in refuse("broken") and not list(tmp_path.rglob("*.npy*"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)         # a decompression bomb
    broken.write_bytes(whole)
    assert "exceeds limit" in refuse("broken")


# ---------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("flags", [
    "--enc-norm bn --mlp-norm bn",
    f"{GN} --opt lars --lars-layers encoder.layer[12] --lr-mult projection=3",
    "--enc-norm gn+ws --proj-norm ln --pred-norm gn --opt lars --lars-on all",
    "--enc-norm none --mlp-norm none --loss moco",
    "--loss moco --opt lars --epochs 1",
])
def test_run_writes_what_it_promises(flags, tmp_path, capsys, monkeypatch):
    built, build = [], byol.build
    monkeypatch.setattr(byol, "build", lambda args: built.append(build(args)) or built[-1])
    flags = [*TINY, *flags.split()]
    flags += ["--log-every", "5", *([] if "--epochs" in flags else ["--steps", "5", "--eval-every", "3"])]
    a, b = tmp_path / "a", tmp_path / "b"
    main(*flags, "--out", a)
    b.mkdir()
    shutil.copy(a / "config.json", b)                   # what a kill right at the start leaves
    main(*flags, "--out", b)
    assert same_run(a, b) and sorted(os.listdir(a)) == ["config.json", "encoder.pt", "metrics.jsonl"]
    training = [line for line in log(a) if "loss" in line]
    evaluations = [line for line in log(a) if "accuracy" in line]
    assert [line["step"] for line in training] == [1, 2, 4, 5]
    assert [line["step"] for line in evaluations] == [0, 5] if "--epochs" in flags else [0, 3, 5]
    assert all(set(line) == {"step", "accuracy", "state"} for line in evaluations)
    random, last = evaluations[0]["accuracy"], evaluations[-1]["accuracy"]
    assert f"{last:.2f} %, of random features {random:.2f} %" in capsys.readouterr().out.splitlines()[-2]
    names = set("step epoch loss lr ema pos_cos neg_cos rep_dist common".split())
    names |= set("z_norm q_norm live z_std y_std y_rank grad_norm layers".split())
    layers = ["stem", "layer1", "layer2", "layer3", "layer4", "projection", "prediction"]
    contrastive = "moco" in flags
    for line in training:
        assert set(line) == names and list(line["layers"]) == layers[: 7 - contrastive]
        assert len(line["live"]) == 2 - contrastive
        for layer, values in line["layers"].items():
            assert values["grad_norm"] > 0 and values["weight_norm"] > 0
            adapted = "lars" in flags and ("--lars-layers" not in flags or layer in ("layer1", "layer2"))
            assert (values["lars_rate"] is not None) == adapted
    config = json.loads((a / "config.json").read_text())
    assert config["flags"]["steps"] == 5
    assert config["versions"]["torch"] == torch.__version__
    assert config["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    encoder = resnet_norms.resnet18(config["flags"]["enc_norm"], 4, "cifar")
    encoder.load_state_dict(torch.load(a / "encoder.pt", weights_only=True))
    online, target, _ = built[0]
    torch.testing.assert_close([*encoder.parameters()], [*online.encoder.parameters()], rtol=0, atol=0)
    assert not torch.equal(encoder.conv1.weight, target.encoder.conv1.weight)


def test_what_is_printed_and_logged_of_a_step(tmp_path, capsys, monkeypatch):
    """The log's schedule is the optimizer's; each column of the table is the log's value of that name. The
    first evaluation takes 1,000 s, step i takes i minutes."""
    took = itertools.chain([0, 1000], *((60 * i, 0) for i in range(1, 9)))
    clock = types.SimpleNamespace(perf_counter=itertools.accumulate(took).__next__, time=time.time)
    monkeypatch.setattr(byol, "time", clock)
    flags = [*TINY, *GN.split(), *"--clip 0.1 --warmup 0.5 --ema 0.9 --steps 8 --log-every 1".split()]
    main(*flags, "--out", tmp_path)
    output = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in output if re.match(r" +\d+ +\d+m", line)]
    lines = [line for line in log(tmp_path) if "loss" in line]
    speeds = [json.loads(text).get("images_per_s") for text in (tmp_path / "metrics.jsonl").open()]
    speeds = list(filter(None, speeds))
    assert speeds == pytest.approx([8 / 60 / i for i in range(1, 9)], rel=1e-5)
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        assert line["lr"] == pytest.approx(byol.lr_at(i, 8, 0.2, 0.5), rel=1e-5)
        assert line["ema"] == pytest.approx(byol.tau_at(i, 8, 0.9), rel=1e-5)
        assert line["epoch"] == pytest.approx((i + 1) / 5)
        names = ["loss", "rep_dist", "common", "z_norm", "q_norm", "grad_norm"]
        assert row[1] == f"{(8 - line['step']) * (i + 1)}m"
        logged = [line[name] for name in names]
        assert [*map(float, row[2:8])] == pytest.approx(logged, rel=0.06, abs=0.006)
    # The accuracy is the online encoder's, as encoder.pt has it.
    args = byol.parse_arguments(flags)
    encoder = resnet_norms.resnet18("gn", 4, "cifar")
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    accuracy = byol.evaluate(encoder, byol.load_images(args), args)
    assert log(tmp_path)[-1]["accuracy"] == pytest.approx(accuracy)


def test_the_log_keeps_six_digits_of_any_size(tmp_path):
    folder = byol.RunFolder(byol.parse_arguments(["--out", str(tmp_path)]), "")
    folder.write({"a": 1.23456789e-12, "b": [123456.789, 3], "c": {"d": None}})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "a": 1.23457e-12, "b": [123457.0, 3], "c": {"d": None}}
    with pytest.raises(byol.Diverged, match="step 3"):
        folder.write({"step": 3, "layers": {"lars_rate": math.inf}})


def test_config_names_the_scripts_commit():
    git = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert byol.describe(byol.parse_arguments([]), "")["commit"] == commit


def test_a_folder_is_named_by_what_differs_from_the_defaults():
    out = lambda flags: byol.parse_arguments(flags.split()).out
    assert out("--steps 3 --batch-size 8") == out("--batch-size 8 --lr 0.2 --steps 3 --proj-norm bn")
    assert out("") == "runs/default" and out("--lr 0.1 --opt lars") == "runs/opt_lars_lr_0.1"
    assert out("--out ~/x") == os.path.expanduser("~/x")
    assert len(out(f"--data folder:{'дx' * 150}").encode()) < 256        # what a file's name may have


@pytest.mark.parametrize("flags", ["--enc-norm bn --loss moco", GN, f"{GN} --opt lars"])
def test_cut_off_and_resumed_is_never_cut_off(flags, tmp_path):
    """By a full disk and by SIGKILL. KILLS=10 python -m pytest -k never_cut_off: ten times."""
    flags = [*TINY, *f"--steps 150 --eval-every 49 --checkpoint-every 7 {flags} --data-dir".split(), tmp_path]
    straight, out = tmp_path / "straight", tmp_path / "run"

    def runs_out_of_room(limit, where):
        run = Run(*flags, "--out", out, file_limit=limit)
        status, output = run.wait()
        assert status == 1 and re.search(rf"(?m)^byol\.py: .*{where}: File too large\n\Z", output), output
        assert "Traceback" not in output
        assert not list(tmp_path.rglob("*.part"))                       # what it was writing

    runs_out_of_room(100_000, ".npy")
    assert Run(*flags, "--out", straight).wait()[0] == 0
    runs_out_of_room(250_000, "checkpoint.pt")
    runs_out_of_room(2_000, "metrics.jsonl")
    rng = np.random.default_rng(0)
    for i in range(int(os.environ.get("KILLS", 2))):
        run = Run(*flags, "--out", out)
        run.read_steps(rng.integers(1, 5) + 4 * (i == 0))       # at first up to step 8 and so a checkpoint
        deadline = time.monotonic() + (1 if i % 2 else rng.uniform(0, 0.05))
        while time.monotonic() < deadline and not list(out.glob("checkpoint.pt.*.part")):
            pass                        # every other kill is while it writes a checkpoint
        run.process.kill()
        assert run.wait()[0] == -signal.SIGKILL
    checkpoint = (out / "checkpoint.pt").read_bytes()
    runs_out_of_room(250_000, "checkpoint.pt")
    assert (out / "checkpoint.pt").read_bytes() == checkpoint
    status, output = Run(*flags, "--out", out).wait()
    assert status == 0 and f"of random features {log(out)[0]['accuracy']:.2f} %" in output.splitlines()[-2]
    assert same_run(straight, out) and len(os.listdir(out)) == 3


def test_cut_off_runs_and_what_is_not_resumed(folder, tmp_path, capsys):
    """Other flags or images, a log cut short, a damaged or foreign file, a checkpoint that would run code."""
    root, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(folder, root)
    flags = [*TINY, "--data", f"folder:{root}", "--data-dir", tmp_path, "--out", out]
    flags += "--steps 100000 --checkpoint-every 10".split()
    run = Run(*flags)
    run.read_steps(12)                  # up to step 22
    assert "another process" in refused(capsys, 1, *flags)
    os.kill(run.process.pid, signal.SIGINT)
    status, output = run.wait()
    assert status == 130 and output.splitlines()[-1].startswith("byol.py: interrupted")
    script = shlex.join(map(str, [sys.executable, HERE / "byol.py", *flags]))
    for reader, told in (("| head -n 3", "nobody reads"), ("> /dev/full", ".*: No space left")):
        command = f"{script} {reader}; exit $PIPESTATUS"
        unread = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert re.fullmatch(f"byol.py: {told}.*\n", unread.stderr) and unread.returncode == 1
    metrics, checkpoint, config = (out / name for name in ("metrics.jsonl", "checkpoint.pt", "config.json"))
    assert "lr 0.2, not 0.1" in refused(capsys, 2, *flags, "--lr", "0.1")

    whole = checkpoint.read_bytes()
    damaged = [(checkpoint, whole[: tenths * len(whole) // 10]) for tenths in (0, 3, 6, 9)]
    logged, told = metrics.read_bytes(), config.read_bytes()
    damaged += [(metrics, logged[:100]), (metrics, logged.replace(b"loss", b"lost"))]
    damaged += [(config, told[:100]), (config, told[:-2] + b', "resumed": [3]}')]
    damaged += [(checkpoint, f"cos\nmkdir\n(V{tmp_path}/executed\ntR.".encode())]       # a pickle of a call
    for path, content in damaged:
        before = path.read_bytes()
        path.write_bytes(content)
        assert str(path) in refused(capsys, 1, *flags)
        path.write_bytes(before)
    assert not (tmp_path / "executed").exists()
    min((root / "train").rglob("*.png")).unlink()
    assert "images" in refused(capsys, 2, *flags)
    config.unlink()
    assert "no config.json" in refused(capsys, 2, *flags)
    checkpoint.unlink()
    kept = metrics.read_bytes()
    assert "no config.json" in refused(capsys, 2, *flags) and metrics.read_bytes() == kept


def test_a_resumed_run_knows_what_state_it_was_in(tmp_path, monkeypatch):
    """Collapsed before the checkpoint; what comes after it is judged by the first distance before it."""
    measure, calls = byol.measure, itertools.count()

    def scripted(*given):
        i = next(calls)
        if i == 4:
            raise KeyboardInterrupt
        return measure(*given) | {"rep_dist": [0.5, 1e-6, 1e-6, 1e-6, 0, 0.02, 0.02][i]}

    monkeypatch.setattr(byol, "measure", scripted)
    flags = [*TINY, *GN.split(), *"--log-every 1 --steps 6 --checkpoint-every 4 --out".split(), tmp_path]
    with pytest.raises(SystemExit):
        main(*flags)
    main(*flags)
    assert log(tmp_path)[-1]["state"] == "collapsed"


def test_cut_off_in_the_last_evaluation(tmp_path, capsys, monkeypatch):
    flags = [*TINY, *GN.split(), "--steps", "4", "--out"]
    main(*flags, tmp_path / "straight")
    evaluate, calls = byol.evaluate, itertools.count()

    def interrupted(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setattr(byol, "evaluate", interrupted)
    assert "interrupted" in refused(capsys, 130, *flags, tmp_path / "cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 4, "accuracy": 1')        # a line half written is none
    main(*flags, tmp_path / "cut")
    assert same_run(tmp_path / "straight", tmp_path / "cut")
    (tmp_path / "cut" / "encoder.pt").unlink()
    assert "no encoder.pt" in refused(capsys, 1, *flags, tmp_path / "cut")


@pytest.mark.parametrize("flags", ["", f"{GN} --opt lars --lars-on all --clip 0.1"])
def test_a_finer_log_is_of_the_same_run(flags, tmp_path):
    """To look more often changes no bit of what is seen."""
    flags = [*TINY, *flags.split(), *"--steps 9 --out".split()]
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    main(*flags, fine, "--log-every", "1")
    main(*flags, coarse, "--log-every", "100")
    assert len(log(fine)) == 11 and len(log(coarse)) == 7           # of 1, 2, 4, 8 and 9, and two evaluations
    assert all(line in log(fine) for line in log(coarse))
    assert (fine / "encoder.pt").read_bytes() == (coarse / "encoder.pt").read_bytes()


def test_epochs_are_whole(tmp_path):
    """Of 45 images in batches of 8 an epoch takes 40; none at all is a run too."""
    args = byol.parse_arguments([*TINY, "--epochs", "3"])
    byol.load_images(args)
    assert args.steps == 15
    main(*TINY, "--epochs", "0", "--out", tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [0]


def test_what_does_not_forbid_a_run(tmp_path, capsys, monkeypatch):
    """The shell's own log in --out, no locks, other threads, another machine's versions."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("log.txt", "mine.part"):
        (out / name).touch()
    killed = out / "checkpoint.pt.0123456789ab.part"
    killed.touch()
    flags = [*TINY, *GN.split(), *"--steps 4 --out".split(), out]
    monkeypatch.setattr(byol.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
    main(*flags, "--threads", "1")
    assert "no file locks here" in capsys.readouterr().out
    monkeypatch.setattr(byol, "fcntl", None)            # Windows
    threads = torch.get_num_threads()
    config = json.loads((out / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (out / "config.json").write_text(json.dumps(config))
    told = (out / "config.json").read_text()
    main(*flags, "--threads", threads + 1)              # finished: nothing is resumed
    assert (out / "config.json").read_text() == told and "resumed with" not in capsys.readouterr().out
    lines = (out / "metrics.jsonl").read_text().splitlines()
    for more, changed in ((1, "versions, threads"), (2, "threads"), (2, None), (1, "threads")):
        (out / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")     # cut off in its last evaluation
        main(*flags, "--threads", threads + more)
        notes = re.findall("resumed with other (.*) than before", capsys.readouterr().out)
        assert notes == ([changed] if changed else [])
    torch.set_num_threads(threads)
    assert (out / "mine.part").exists() and not killed.exists()
    resumed = json.loads((out / "config.json").read_text())["resumed"]
    assert [change["threads"] - threads for change in resumed] == [1, 2, 1]
    assert [change.get("versions", {}).get("torch") for change in resumed] == [torch.__version__, None, None]
    code = "import sys; sys.modules['fcntl'] = None; from byol import collapse_metrics"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@pytest.mark.parametrize("left, word", [
    (dict(WORLD_SIZE="4"), "RANK"),
    (dict(WORLD_SIZE="x"), "WORLD_SIZE is x"), (dict(WORLD_SIZE="0"), "RANK is 0"),
    (dict(WORLD_SIZE="2", RANK="2"), "RANK is 2"), (dict(WORLD_SIZE="2", RANK="x"), "RANK is x"),
    (dict(WORLD_SIZE="2", MASTER_PORT="99999"), "MASTER_PORT"),
    (dict(WORLD_SIZE="2", MASTER_ADDR=""), "MASTER_ADDR"),
    (dict(WORLD_SIZE="8"), "two images"), (dict(WORLD_SIZE="3"), "does not divide"),
    (dict(WORLD_SIZE="8", flags="--enc-norm gn --proj-norm none --pred-norm bn"), "two images"),
    (dict(WORLD_SIZE="8", flags="--enc-norm gn --proj-norm bn --pred-norm none"), "two images"),
    (dict(WORLD_SIZE="2", flags="--device cuda:0"), "so say cuda"),
    (dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", flags="--device cuda"), "--nproc-per-node"),
])
def test_what_another_launcher_left(left, word, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(byol, "RANK", 0)
    monkeypatch.setattr(byol, "WORLD", 1)
    given = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")
    if word == "RANK":                  # by something else than torchrun
        given = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {**given, **left}.items():
        monkeypatch.setenv(name, value)
    assert word in refused(capsys, 2, *TINY, *left.get("flags", "").split(), "--out", tmp_path)


def test_moco_has_no_bn_in_a_prediction(monkeypatch, capsys):
    """Two CPU processes of one image each may train what has no BN."""
    for name in ("RANK", "WORLD"):
        monkeypatch.setattr(byol, name, getattr(byol, name))
    place = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="here", MASTER_PORT="29500")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(byol.dist, "init_process_group", lambda *given, **named: None)
    flags = "--loss moco --enc-norm gn --proj-norm none --batch-size 2".split()
    byol.join_processes(byol.parse_arguments(flags))
    assert byol.WORLD == 2 and "BN" not in capsys.readouterr().out


def test_out_of_memory(tmp_path):
    command = ["bash", "-c", f'ulimit -v {2**22}; exec "$@"', "bash", sys.executable, HERE / "byol.py"]
    command += "--width 64 --size 64 --batch-size 600".split()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert re.fullmatch("byol.py: out of memory.*\n", run.stderr)


def test_compile_without_a_compiler(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler",))
    flags = [*TINY, *f"--steps 1 --compile --out {tmp_path}".split()]
    assert refused(capsys, 1, *flags).startswith("byol.py: --compile: InvalidCxxCompiler")


@pytest.mark.parametrize("reader", [(byol.torch, "load"), (byol.Image, "open")])
def test_what_memory_lacked_for_is_not_called_damaged(reader, tmp_path, capsys, monkeypatch):
    """A checkpoint that does not fit into memory, an image that does not."""
    def fail(*args, **kwargs):
        raise MemoryError

    flags = [*TINY, "--steps", "8", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    monkeypatch.setattr(byol, "score", lambda *given: None)
    monkeypatch.setattr(byol.RunFolder, "finish", lambda folder: folder.save({}, {"step": 8}))
    if reader[1] == "load":
        main(*flags)                    # leaves a checkpoint
    monkeypatch.setattr(*reader, fail)
    assert "out of memory" in refused(capsys, 1, *flags)


@pytest.mark.parametrize("norms, state", [("", "healthy"), (GN, "collapsed")])
@pytest.mark.parametrize("how", ["", "--amp", *(
    pytest.param(f"--device cuda {how}", marks=GPU) for how in ("", "--amp", "--compile"))])
def test_verdicts_are_the_same(norms, state, how, tmp_path):
    main(*TINY, *norms.split(), *how.split(), "--steps", 60, "--out", tmp_path)
    assert log(tmp_path)[-1]["state"] == state


# ----------------------------------------------------------------------------------------- many processes
def two_processes(*flags):
    """byol.py on two processes, as torchrun starts them but for the seconds that takes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    runs = [Run(*flags, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ends = [run.wait() for run in runs]
    assert [status for status, _ in ends] == [0, 0], ends


@pytest.mark.parametrize("flags", ["--steps 50", "--loss moco --lr 0.01", "--clip 0.1"])
def test_two_processes_train_as_one(flags, tmp_path):
    flags = [*TINY, *f"{GN} --log-every 1 --threads 1 --steps 9 {flags}".split()]
    main(*flags, "--out", tmp_path / "one")
    two_processes(*flags, "--out", tmp_path / "two")
    training = [[line for line in log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    for ours, theirs in zip(*training, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in "rep_dist y_rank q_norm z_norm z_std y_std grad_norm live".split():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_killed_worker_ends_the_run_and_it_resumes(tmp_path, capsys):
    flags = [*TINY, *"--steps 60 --checkpoint-every 20 --threads 1".split()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    two_processes(*flags, "--out", straight)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                HERE / "byol.py", *map(str, flags), "--out", killed]
    run = subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    next(line for line in run.stdout if line.split()[0] == "24")
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output = run.stdout.read()
    assert run.wait() == 1 and "the same command goes on" in output
    assert "processes 2, not 1" in refused(capsys, 2, *flags, "--out", killed)
    two_processes(*flags, "--out", killed)
    assert same_run(straight, killed)


# ---------------------------------------------------------------------------------------------- run_all.sh
def run_all(*arguments, **environment):
    settings = ("DATA", "SEEDS", "JOBS", "STEPS", "OUT", "CUDA_VISIBLE_DEVICES", "SLURM_ARRAY_TASK_ID")
    own = {name: value for name, value in os.environ.items() if name not in settings}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    command = ["bash", "run_all.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, text=True, capture_output=True, env={**own, **environment})


def fake(folder, **scripts):
    """A PATH that begins with stand-ins of programs, made in `folder`; _ in a name stands for -."""
    for name, script in scripts.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_run_all_is_clean_shell():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "run_all.sh", ".ci/run"], cwd=HERE, check=True)


def test_run_all_lists_and_runs_nothing(tmp_path):
    settings = dict(SEEDS="0 1", OUT=str(tmp_path / "out"), STEPS="7")
    output = run_all("--list", **settings).stdout
    words = "tries full why long fashion wide blog map".split()
    output += run_all("--list", *words, **settings).stdout
    commands = [shlex.split(line) for line in output.splitlines()]
    assert len(commands) == len({command[command.index("--out") + 1] for command in commands}) > 400
    assert not any("@" in line for line in run_all("--list").stdout.splitlines())
    assert "@" in run_all("--list", "C6").stdout and "@" not in run_all("--list", "C4").stdout
    assert not (tmp_path / "out").exists()
    for python, script, *words in commands:
        flags = [word for word in words if word.startswith("--")]
        assert len(flags) == len(set(flags)) and ("fashion-mnist" in words) == ("/fashion-" in words[-1])
        assert python == "python" and (HERE / script).exists()
        args = byol.parse_arguments(words[script in ("results/harm.py", "results/clip.py") :])
        name = words[-1]
        assert args.steps == 7
        told = re.search(r"-(sgd|lars|adamw)-([\d.]+(e-\d)?)-[^@]*$", name)           # names tell the flags
        assert not told or (args.opt, args.lr) == (told[1], float(told[2])), name
        told = re.search(r"-clip-([\d.]+)-(long-)?(code|paper)-", name)
        assert not told or args.clip == float(told[1]), name
    one = run_all("--list", "gn-none-lars-0.5").stdout.splitlines()
    assert len(one) == 2 and all("--lr 0.5" in command for command in one)
    run = run_all("--list", "C4", "--", "--lr-mult", "layer[1]=2 ", DATA="folder:a b", OUT="c d")
    words = shlex.split(run.stdout)
    assert all(shlex.join(shlex.split(line)) == line for line in run.stdout.splitlines())  # as in config.json
    assert words[-3:] == ["c d/gn-none-sgd-paper-s0", "--lr-mult", "layer[1]=2 "] and "folder:a b" in words
    taken = [["C4", "--", flag, "7"] for flag in ("--seed", "--steps", "--epochs", "--out")]
    for arguments in (["C9"], [".*"], [""], ["-x"], *taken):
        run = run_all("--list", *arguments)
        assert run.stderr.startswith("run_all.sh: ") and run.returncode == 2
    head = (HERE / "run_all.sh").read_text().split("\n\n")[0].splitlines()[1:]
    assert run_all("--help").stdout == "".join(line[2:] + "\n" for line in head)
    for bad in ({"JOBS": "0x"}, {"JOBS": "0"}, {"STEPS": "08"}, {"SEEDS": "a"}, {"SEEDS": " "},
                {"STEPS": "9" * 20}):
        assert run_all("--list", **bad).returncode == 2


def test_recorded_runs_are_those_of_run_all():
    """Each committed run's command is one of run_all.sh's, its flags are what byol.py makes of it today."""
    settings = dict(SEEDS="0 1 2 3 4 10 11", DATA="folder:data/cifar10-jpeg", OUT="results/runs")
    groups = [[], ["tries", "full", "why", "long", "fashion", "wide", "map"]]
    listed = {line for words in groups for line in run_all("--list", *words, **settings).stdout.splitlines()}
    paths = list((HERE / "results" / "runs").glob("*/config.json"))
    assert len(paths) > 500
    for path in paths:
        config = json.loads(path.read_text())
        assert config["command"] in listed
        python, script, *words = shlex.split(config["command"])
        flags = vars(byol.parse_arguments(words[script in ("results/harm.py", "results/clip.py") :]))
        assert flags.pop("out") == f"results/runs/{path.parent.name}"
        recorded = {name: config["flags"].get(name) for name in flags if name not in byol.NOT_THE_RUN}
        assert recorded == {name: value for name, value in flags.items() if name not in byol.NOT_THE_RUN}


def test_run_all_says_that_it_needs_gnus_tools(tmp_path):
    """On macOS; here with a stand-in for BSD's xargs."""
    run = run_all("C4", PATH=fake(tmp_path, xargs="echo 'xargs: illegal option -- -' >&2; exit 1"))
    assert run.returncode == 2 and "GNU xargs" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "4,7"}])
def test_run_all_gives_each_job_a_gpu_of_its_own(visible, tmp_path):
    path = fake(tmp_path, nvidia_smi="echo 'GPU 0: one'; echo 'GPU 1: two'",
                python="sleep 1; echo on $CUDA_VISIBLE_DEVICES")
    run = run_all("C4", SEEDS="0 1", JOBS="2", OUT=str(tmp_path / "out"), PATH=path, **visible)
    assert "all runs are finished" in run.stdout
    used = sorted(path.read_text() for path in (tmp_path / "out").glob("*.txt"))
    assert used == [f"on {gpu}\n" for gpu in ("4477" if visible else "0011")]


def test_run_all_reports_failures_resumes_and_skips(folder, tmp_path):
    out = tmp_path / "o[u]t, of today"
    settings = dict(DATA=f"folder:{folder}", OUT=str(out), STEPS="6", JOBS="2")
    arguments = ["C4", "--", "--width", 4, "--batch-size", 8, "--data-dir", tmp_path]
    (out / "gn-none-sgd-code-s0").mkdir(parents=True)
    (out / "gn-none-sgd-code-s0" / "encoder.pt").write_text("in the way")
    run = run_all(*arguments, **settings)
    assert run.returncode == 1 and "gn-none-sgd-paper-s0: step 6" in run.stdout
    assert run.stdout.startswith("2 runs, 12 steps, 2 at a time.")
    places = [line.split()[0] for line in run.stdout.splitlines() if line.startswith("[")]
    assert places == ["[1/2]", "[2/2]"]
    assert run.stderr.startswith("failed:\ngn-none-sgd-code-s0 (exit status 2): byol.py: --out")
    shutil.rmtree(out / "gn-none-sgd-code-s0")
    run = run_all(*arguments, **settings)
    assert run.returncode == 0 and "gn-none-sgd-paper-s0: finished before" in run.stdout
    assert re.search("^C4: GroupNorm, no MLP norm, SGD: .*(yes|no) .code's form", run.stdout, re.M)
    assert f"picture: {out}/report.png" in run.stdout
    steps = [line["step"] for line in log(out / "gn-none-sgd-code-s0")]
    assert steps.count(6) == 2          # trained and judged once
    lines = (out / "gn-none-sgd-code-s0" / "metrics.jsonl").read_text().splitlines()
    (out / "gn-none-sgd-code-s0" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    run = run_all(*arguments, **settings)
    assert "code-s0: step 6" in run.stdout and "paper-s0: finished before" in run.stdout
    element = run_all(*arguments, **settings, SLURM_ARRAY_TASK_ID="1")
    assert "gn-none-sgd-paper-s0 holds this run, finished" in element.stdout and element.returncode == 0
    for bad in (dict(SLURM_ARRAY_TASK_ID="08"), dict(OUT="/proc/nowhere")):
        run = run_all(*arguments, **{**settings, **bad})
        assert run.returncode == 2 and re.fullmatch("run_all.sh: .*\n", run.stderr), run.stderr
    beyond = run_all(*arguments, **settings, SLURM_ARRAY_TASK_ID="2")
    assert "element 2 of 2 runs" in beyond.stderr and beyond.returncode == 2


def test_what_is_run_at_another_size_is_the_same():
    """wide-NAME and blog-NAME are NAME but for size and length, of the blog's size those of blog."""
    lines = run_all("--list").stdout + run_all("--list", "why", "wide", "blog").stdout
    flags = {}
    for words in map(shlex.split, re.findall("python byol.py.*", lines)):
        flags[Path(words[-1]).name] = vars(byol.parse_arguments(words[2:]))
    sizes = {"width", "stem", "size", "batch_size", "steps", "epochs", "log_every", "eval_every", "out"}
    compared = []
    for name, of_wide in flags.items():
        scale, _, base = name.partition("-")
        if scale in ("wide", "blog") and base in flags:
            assert {flag for flag, value in of_wide.items() if value != flags[base][flag]} <= sizes
            compared.append(scale)
        if scale == "blog":
            blogs = (64, "imagenet", 96, 256)
            assert tuple(of_wide[flag] for flag in ("width", "stem", "size", "batch_size")) == blogs
    assert compared.count("wide") > 15 and compared.count("blog") > 4


def test_run_all_runs_as_many_at_a_time_as_gpus(tmp_path):
    path = fake(tmp_path, python="true", nvidia_smi="for i in 0 1 2 3 4; do echo GPU $i: x; done")
    for i, flags in enumerate((["--device", "cuda"], ["--device=cuda"])):
        assert "5 at a time" in run_all("C4", "--", *flags, OUT=str(tmp_path / str(i)), PATH=path).stdout
    assert "5 at a time" not in run_all("C4", OUT=str(tmp_path / "o"), PATH=path).stdout
    path = fake(tmp_path, python="echo on ${CUDA_VISIBLE_DEVICES-all}")
    run = run_all("C4", "--", "--device", "cuda:1", OUT=str(tmp_path / "second"), PATH=path)
    assert "1 at a time" in run.stdout
    assert [path.read_text() for path in (tmp_path / "second").glob("*.txt")] == ["on all\n"] * 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone gives a process its cores")
def test_run_all_counts_the_cores_it_may_use(tmp_path):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        path = fake(tmp_path, python="true")
        run = run_all("C4", OUT=str(tmp_path / "out"), PATH=path, OMP_NUM_THREADS="7")
    finally:
        os.sched_setaffinity(0, cores)
    assert "1 at a time" in run.stdout


def test_run_all_says_how_long_it_takes(tmp_path):
    """The first of 6,000 steps takes 3 s, or a little more; the others nothing. Two at a time take half."""
    path = fake(tmp_path, python='case "$*" in *gn-none-sgd-code-s0*) sleep 3 ;; esac')
    run = run_all("C4", "full", OUT=str(tmp_path / "out"), JOBS="1", PATH=path)
    total = int(re.search(r"(\d+) steps", run.stdout)[1])
    minutes = [int(n) for n in re.findall(r"(\d+) minutes left", run.stdout)]
    rest = (total - 6000) / 6000
    assert rest * 3 // 60 - 1 <= minutes[0] <= rest * 5 / 60 and minutes[-1] == 0
    path = fake(tmp_path, python='case "$*" in *gn-none-sgd-*-s0*) sleep 4 ;; esac')
    run = run_all("C4", "full", OUT=str(tmp_path / "two of them"), JOBS="2", PATH=path)
    minutes = [int(n) for n in re.findall(r"(\d+) minutes left", run.stdout)]
    assert rest * 4 // 120 - 1 <= minutes[0] <= rest * 6 / 120


def test_run_all_names_all_that_failed(tmp_path):
    run = run_all("C4", OUT=str(tmp_path / "out"), PATH=fake(tmp_path, python="exit 3"))
    failed = re.findall(r"(\w+)-s0 \(exit status 3\)", run.stderr)
    assert sorted(failed) == ["code", "paper"] and run.returncode == 1


def test_run_all_is_stopped_by_ctrl_c(tmp_path):
    path = f"{fake(tmp_path, python='exec sleep 99')}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(tmp_path / "out")}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)         # a background job ignores it
    run = subprocess.Popen(["bash", "run_all.sh", "C4"], cwd=HERE, env=environment, text=True,
                           stdout=subprocess.PIPE, start_new_session=True, preexec_fn=heed)
    while "begins" not in run.stdout.readline():
        pass
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=30)             # its end: no run has it open any more
    assert output.splitlines()[-1] == "stopped; the same command resumes" and run.returncode == 130


def test_run_all_does_not_take_another_run_for_finished(folder, tmp_path):
    settings = dict(DATA=f"folder:{folder}", OUT=str(tmp_path / "out"), STEPS="2", JOBS="2")
    arguments = ["gn-none-sgd-0.2-clip-0.1-code", "--", "--batch-size", 8, "--data-dir", tmp_path, "--width"]
    assert run_all(*arguments, 4, **settings).returncode == 0
    other = run_all(*arguments, 6, **settings)
    assert "finished before" not in other.stdout and "width 4, not 6" in other.stderr


# ---------------------------------------------------------------------------------------------- a GPU
@GPU
@pytest.mark.parametrize("flags", [
    "", f"{GN} --opt lars", "--enc-norm gn+ws", "--loss moco --amp", f"{GN} --clip 0.1", f"{GN} --opt adamw"])
def test_steps_wait_for_nothing_on_a_gpu(flags, shapes, request):
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    args = byol.parse_arguments([*TINY, *flags.split(), *"--steps 4 --device cuda".split()])
    images, parts = shapes.train.cuda(), byol.build(args)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")     # the first step sets things up
        loss, *_ = byol.update(*parts, byol.load_views(images, step, args), step, args)
    torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@GPU
@pytest.mark.parametrize("flags", ["--enc-norm bn", f"{GN} --opt lars --amp", f"{GN} --compile"])
def test_killed_and_resumed_on_a_gpu(flags, tmp_path):
    # not by Run: once a process has asked for a GPU, what is forked from it cannot use one
    command = [sys.executable, HERE / "byol.py", *TINY, *flags.split()]
    command += [*"--steps 80 --checkpoint-every 7 --device cuda --out".split()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, straight], check=True)
    with subprocess.Popen([*command, killed], stdout=subprocess.PIPE, text=True) as run:
        next(line for line in run.stdout if line.split()[0] == "20")
        run.kill()
    assert (killed / "checkpoint.pt").exists()
    subprocess.run([*command, killed], check=True)
    assert same_run(straight, killed)


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, word", [
    ("--widht 4", "--widht"), ("--enc-norm ln", "--enc-norm"), ("--opt adam", "--opt"),
    ("--clip 0", "--clip"),
    ("--width 5 --enc-norm gn", "width"),
    *((f"{flag} {value}", flag) for flag in "--width --size --batch-size --lr --log-every".split()
      for value in ("0", "-1", "x", "nan")),
    *((f"{flag} -1", flag)
      for flag in "--steps --epochs --seed --weight-decay --ema --warmup --eval-every".split()),
    ("--ema 1.5", "--ema"), ("--lr inf", "--lr"), ("--width 3.5", "--width"), ("--width 100000", "--width"),
    ("--steps 5 --epochs 5", "--epochs"), ("--loss moco --pred-norm ln", "--pred-norm"),
    ("--lars-layers layer1", "--lars-layers"), ("--lars-on all", "--lars-on"), ("--threads=--", "--threads"),
    ("--opt lars --lars-layers [", "--lars-layers"), ("--opt lars --lars-layers layer7", "layer7"),
    ("--lr-mult 1=2 --lr-mult 1=3", "twice"), ("--data folder:", "folder"),
    ("--steps 1500 --epochs 1", "--epochs"),
    ("--lr-mult layer1", "--lr-mult"), ("--lr-mult layer7=2", "layer7"), ("--lr-mult (=2", "--lr-mult"),
    ("--data imagenet", "--data"), ("--data folder:/nowhere/at/all", "folder:/nowhere/at/all"),
    *((f"--data {data} --data-dir nowhere", "--download") for data in ("cifar10", "stl10", "fashion-mnist")),
    ("--batch-size 10001", "--batch-size"), ("--loss moco --batch-size 2049", "--batch-size"),
    ("--loss simclr", "--loss"), ("--sync-bn", "--sync-bn"),
    ("--device tpu", "--device"), ("--device mps", "--device"), ("--device cuda:99", "--device"),
])
def test_wrong_usage(flags, word, capsys, tmp_path):
    assert word in refused(capsys, 2, *flags.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "--out" in refused(capsys, 2, "--out", "")


def test_a_diverged_run(tmp_path, capsys, monkeypatch):
    flags = [*TINY, *GN.split(), "--steps", "60"]
    assert "--lr" in refused(capsys, 1, *flags, "--lr", "1e6", "--out", tmp_path / "a")
    assert len(log(tmp_path / "a")) > 0
    loss, calls = byol.byol_loss, itertools.count()         # two calls a step: NaN from step 6 on
    monkeypatch.setattr(byol, "byol_loss", lambda q, z: loss(q, z) * (math.nan if next(calls) > 9 else 1))
    flags += ["--log-every", "60", "--checkpoint-every", "3", "--out", tmp_path / "b"]
    assert "nan at step 6" in refused(capsys, 1, *flags)    # before a checkpoint would hold it


FLAGS = sorted({name.replace("_", "-") for name in vars(byol.parse_arguments([]))} - {"compile", "download"})
HOSTILE = r"""0 1 -1 3 nan inf 1e-9 1e308 999999999999999999999999999999 0x10 -- --lr lars adamw moco gn meta
folder: folder:. [ .{1}{2 a{9999999999} layer=1e300 = ==1 layer1=-1 .=0 conv=nan ../up a/../b ~ $HOME 😀
/dev/null""".split()
HOSTILE += ["", "(" * 9999, "a\nb", "'\"; rm -rf x", "\udcff", "x" * 300]
ANYTHING = st.tuples(st.sampled_from(FLAGS), st.sampled_from(HOSTILE) | st.text(max_size=8))
EXAMPLES = int(os.environ.get("HOSTILE", 100))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(flags=st.lists(ANYTHING, min_size=1, max_size=3))
def test_hostile_values(flags, folder, tmp_path_factory, monkeypatch, capsys):
    """Whatever the flags hold: a run, or one line and the right exit status; files only where asked for.
    HOSTILE=300 python -m pytest -k hostile: more of them."""
    flags = [(name, value) for name, value in flags if "\0" not in value]      # the system passes none on
    root = tmp_path_factory.mktemp("hostile")
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    tiny = "--width=2 --size=8 --batch-size=4 --out=run --data-dir=decoded".split()
    tiny.append(f"--data=folder:{folder}")
    tiny += [] if {"steps", "epochs"} & {name for name, _ in flags} else ["--steps=1"]
    tiny += [f"--{name}" if name == "amp" else f"--{name}={value}" for name, value in flags]
    sys.stderr.reconfigure(errors="backslashreplace")       # as the interpreter's own
    status = 0
    try:
        byol.main(tiny)
    except SystemExit as end:
        status = end.code
    torch.set_num_threads(1)
    assert status in (0, 1, 2)
    assert re.fullmatch("byol.py: .*\n" if status else "", capsys.readouterr().err)
    asked = ["run", "decoded", *(value for name, value in flags if name in ("out", "data-dir"))]
    for path in root.rglob("*"):
        real = Path(os.path.realpath(path))
        inside = any(real.is_relative_to(os.path.realpath(place)) for place in asked)
        assert path.name == "here" or path.is_dir() or inside, path


def test_odd_surroundings(tmp_path):
    """A checkout that cannot be written to, no home, another directory, and a name that needs quoting."""
    checkout, out = tmp_path / "read only", tmp_path / "it's \"a\"\nrun"
    checkout.mkdir()
    for name in ("byol.py", "lars.py", "resnet_norms.py"):
        shutil.copy(HERE / name, checkout)
    checkout.chmod(0o555)
    command = [sys.executable, checkout / "byol.py", *TINY, "--steps", "2", "--out", out]
    environment = {**os.environ, "HOME": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    closed = ["bash", "-c", '"$@" >&-', "bash", *map(str, command)]         # no standard output either
    done = subprocess.run(closed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(log(out)) == 4 and sorted(os.listdir(checkout)) == ["byol.py", "lars.py", "resnet_norms.py"]


# ---------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("script, steps", [(["growth.py"], 2), (["harm.py", "both"], 66)])
def test_growth_and_harm_are_runs_of_byol(script, steps, folder, tmp_path):
    """growth.py's log has a key more, harm.py's is another one from the step on at which it interferes."""
    data = "shapes" if steps == 2 else f"folder:{folder}"
    flags = [*TINY, *GN.split(), "--log-every", "70", "--steps", str(steps), "--data", data, "--out"]
    main(*flags, tmp_path / "plain")
    file, *what = script
    subprocess.run([sys.executable, HERE / "results" / file, *what, *flags, tmp_path / "other"], check=True)
    plain, other = log(tmp_path / "plain"), log(tmp_path / "other")
    measured = [line.pop("growth") for line in other if "growth" in line]
    if steps == 2:
        assert other == plain and len(measured) == 2
        assert all(0 <= values["strongest"] <= values["distance"] for values in measured)
    else:
        assert other[:-2] == plain[:-2]
        assert other[-2]["live"][1] < 0.01
        assert [other[-2][name] for name in ("z_norm", "q_norm")] == pytest.approx([240, 2800], rel=0.1)


def test_growth_is_along_the_strongest_direction(monkeypatch):
    """Of z it has a spread of 0.1 and of q of 0.03; both views of an image are alike."""
    strong, weak, ones = 0.1 * torch.randn(4096), 0.02 * torch.randn(4096), torch.ones(4096)
    z, q = torch.stack([ones, strong, weak], 1), torch.stack([ones, 0.3 * strong, weak], 1)
    monkeypatch.setattr(byol, "load_views", lambda _, i, args: torch.arange(4096).split(256)[i].repeat(2))
    values = growth.growth(byol.parse_arguments([]), None, lambda chosen: (z[chosen], z[chosen], q[chosen]))
    assert [values["strongest"], values["slope"]] == pytest.approx([0.01, 0.3], rel=0.1)
    assert values["common"] == pytest.approx(values["distance"], rel=1e-3)


@pytest.mark.parametrize("words, why", [
    ("clip.py early", "--clip is among"), ("clip.py --clip 0.1", "first word"),
    ("harm.py", "first word"), ("harm.py both --loss moco", "--loss byol alone"),
])
def test_wrong_usage_of_what_changes_a_step(words, why, capsys, monkeypatch):
    script, *flags = words.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / "results" / script), run_name="__main__")
    assert re.fullmatch(f"byol.py: .*{why}.*\n", capsys.readouterr().err)


def test_another_script_does_not_take_the_run_for_its_own(tmp_path):
    """The flags of clip.py early, clip.py late and byol.py are the same, their runs are not."""
    flags = [*TINY, *GN.split(), *"--steps 2 --clip 0.1 --out".split(), tmp_path]
    early, late = ([HERE / "results" / "clip.py", what] for what in ("early", "late"))
    others = (late, "script clip.py early, not clip.py late"), ([HERE / "byol.py"], "early, not byol.py")
    for script, has in ((early, ""), *others):
        run = subprocess.run([sys.executable, *script, *flags], capture_output=True, text=True)
        assert run.returncode == (2 if has else 0) and has in run.stderr
        assert run.stderr.count("\n") == (1 if has else 0)
    again = subprocess.run([sys.executable, *early, *flags], capture_output=True, text=True)
    assert again.returncode == 0 and not again.stderr


def test_growth_needs_a_batch_of_its_own(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        growth.keep_images(byol.parse_arguments([*TINY, "--data", f"folder:{folder}"]))
    assert "256 or more" in capsys.readouterr().err


def test_the_gradient_is_clipped_early_late_or_scaled(tmp_path, monkeypatch):
    """By clip.py: up to STEP the log is that of a run always clipped, or never, and then it is not. Scaled to
    a norm that no gradient has, another one from the first step on."""
    flags = [*TINY, *GN.split(), *"--steps 6 --log-every 1 --out".split()]
    main(*flags, tmp_path / "never")
    main(*flags, tmp_path / "always", "--clip", "0.1")
    monkeypatch.setattr(clip, "STEP", 4)
    monkeypatch.setattr(byol, "update", clip.partly_clipped_update)
    for what, before in (("early", "always"), ("late", "never")):
        monkeypatch.setattr(clip, "WHAT", what)
        main(*flags, tmp_path / what, "--clip", "0.1")
        same = [a == b for a, b in zip(log(tmp_path / what), log(tmp_path / before), strict=True)]
        assert same[:6] == [True] * 5 + [False]     # random features, steps 1 to 4; step 5
    command = [sys.executable, HERE / "results" / "clip.py", "scaled", *flags]
    subprocess.run([*command, tmp_path / "scaled", "--clip", "99"], check=True)
    same = [a == b for a, b in zip(log(tmp_path / "scaled"), log(tmp_path / "never"), strict=True)]
    assert same[0] and not any(same[2:])
    for scale in (1e-3, 1e3):
        layer = nn.Linear(3, 4)
        (scale * layer(torch.ones(2, 3)).square()).sum().backward()
        before = torch.cat([p.grad.flatten() for p in layer.parameters()])
        norm = clip.scale_grad_norm_(layer.parameters(), 0.5)
        after = torch.cat([p.grad.flatten() for p in layer.parameters()])
        torch.testing.assert_close([norm, after], [before.norm(), before * 0.5 / before.norm()])


@pytest.mark.parametrize("flags", ["", f"{GN} --opt lars --amp", pytest.param("--device cuda", marks=GPU)])
def test_bench_times_every_part(flags, capsys, monkeypatch):
    monkeypatch.setattr(bench.Timer, "blocked_autorange", lambda timer, min_run_time: timer.timeit(1))
    bench.main([*TINY, "--data", "shapes", *flags.split()])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("step", "floor", "images and views", "optimizer", "EMA"):
        median, least, _, *over_step_and_samples = figures[name]
        assert least > 0 and over_step_and_samples[3] == pytest.approx(8000 / median)
    assert figures["step"][3:6] == [1, 1, 1]
    assert 0 < figures["operations of images and views"] < min(300, figures["operations of step"])
    assert "lars" not in flags or figures["operations of optimizer"] < 40
    assert "peak MiB" in figures


def test_bench_takes_a_runs_flags_and_refuses_what_it_cannot_time(capsys, monkeypatch):
    args, _, works = bench.ready([*TINY, "--epochs", "1", "--lr", "0.3"])
    assert (args.steps, args.lr) == (10**6, 1e-9) and "step" in works
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for flags, why in (("--device cuda:1", "CUDA_VISIBLE_DEVICES"), ("--peers --amp", "--amp asks")):
        with pytest.raises(SystemExit, match="2"):
            bench.main([*TINY, *flags.split()])
        assert why in capsys.readouterr().err


DISTANCES = {  # at steps 1 to 100
    "healthy": [0.5] * 100,
    "down": [0.5] * 2 + [1e-6] * 98,
    "down-late": [0.5] * 15 + [1e-6] * 85,
    "near": [0.5] * 2 + [0.05] * 98,
    "soon": [0.5] * 2 + [1e-6] * 8 + [0.1] * 90,
    "back": [0.5] * 2 + [1e-6] * 58 + [0.1] * 40,
    "far": [0.5] * 2 + [1e-6] * 8 + [0.6] * 90,
    "down-again": [0.5] * 2 + [1e-6] * 28 + [0.1] * 30 + [1e-6] * 40,
    "back-again": [0.5] * 2 + [1e-6] * 28 + [0.1] * 30 + [1e-6] * 20 + [0.1] * 20,
}
# Of each claim's runs, in the order of report.CLAIMS: DISTANCES, accuracy (random features: 20), and what is
# unlike the appendix: `flat` where neither the loss nor anything in the layers changes, `dip` where the loss
# does in one step alone, `half` where gradients fall to no tenth, `calm` where rates stay, `even` where no
# weight grows by half. The first bears the claim out, the others do not.
EVIDENCE = """
C1,D1 back 40 dip | down 40 | back 21 | back 40 flat | healthy 30
C2,C3 healthy 40, back 30 | healthy 30, back 40 | back 40, back 30 | healthy 40, healthy 40
C4,C7 down 20 | down-late 20 | back 20 | healthy 20
C5,B3 healthy 40 | back 40 | healthy 21 | down 30
C6  back 30, healthy 40 | down 30, healthy 40 | back 50, healthy 40 | healthy 30, healthy 40
D2  down-again 30 | down 30
D3  down 20, down 20 | back 20, down 20
D4  back 30 | back 30 flat | back 30 even | down 30
D5  back-again 30 | back 30 | down-again 30
D6  back 30 | back 30 flat | healthy 30 | back 30 half | back 30 calm
D7  far 30, down 3, down 3 | back 30, far 30, down 3 | healthy 30, down 3, down 3 | far 21, down 3, down 3
D8  down 20 | down-again 20
D9  down-again 20 | down 20 | back 20
D10 back 30, down-late 20 | back 30, back 20 | down-again 30, down 20 | back 30, down 20
B1,B2 down 20 | down 30
B4  healthy 30, healthy 30 | healthy 30, down 30
B5  down 30 | healthy 30 | near 30
X1  healthy 31, healthy 40 | healthy 29, healthy 40 | down 31, healthy 40 | healthy 21, healthy 22
"""
READINGS = """
C1  back 40 | back 40 dip | back 21 | down 40
C6  back 50 | back 21 | down 40 | healthy 40
C7,D8 down 21 | down 23 | down-late 21 | back 21
D1  back 40 | back 40 flat | soon 40 | healthy 40
D5  back-again 20 | down 40 | down-again 40
D6  back 30 | back 30 calm | near 30
B1,B2 healthy 31, healthy 30 | healthy 32, healthy 30
X1  healthy 40, healthy 40 | healthy 39, healthy 40 | down 40, healthy 40
"""


def write_run(folder, ending, run, lr=0.2):
    """A run's folder, NAME and `ending`, as EVIDENCE describes it."""
    name, distances, accuracy, *other = run.split()
    out = folder / (name + ending)
    out.mkdir(parents=True)
    flags = dict(steps=100, seed=int(ending.rpartition("s")[2] or 0), lr=lr, weight_decay=1e-4, warmup=0.1)
    flags |= dict(enc_norm="gn", proj_norm="none", pred_norm="none", loss="byol")
    flags |= dict(opt="lars", lars_on="all", lars_layers=None)
    (out / "config.json").write_text(json.dumps(dict(flags=flags, command="python byol.py", cpu="C")))
    lines = [dict(step=0, accuracy=20, state="untrained")]
    for step, distance in enumerate(DISTANCES[distances], 1):
        values = dict(grad_norm=1.0, lars_rate=0.01, max_over_rms=5.0)
        if other != ["flat"]:   # the appendix's: vanishing gradients, exploding rates, a few large weights
            peak = (7.0 if other == ["even"] else 10.0) if distance < 0.01 else 5.0
            values = dict(grad_norm=distance, lars_rate=0.01 / distance, max_over_rms=peak)
        if other == ["half"]:
            values["grad_norm"] = max(distance, 0.25)
        if other == ["calm"]:
            values["lars_rate"] = 0.01
        layers = dict.fromkeys(("layer1", "projection", "prediction"), values)
        loss = {"flat": 1.0, "dip": 1.0 - (step == 9)}.get("".join(other), 2 * distance)
        line = dict(step=step, loss=loss, rep_dist=distance, neg_cos=1 - distance, common=0.1)
        lines.append(dict(line, q_norm=1.0, live=[1.0, distance / 2], layers=layers))
    lines.append(dict(step=100, accuracy=int(accuracy), state=""))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.mark.parametrize("claim", [claim for claim, row in report.CLAIMS.items() if row.rule])
def test_verdicts_can_fail_and_flip(claim, tmp_path):
    rows = [row.split(maxsplit=1) for row in EVIDENCE.strip().splitlines()]
    holds, *fails = next(runs for claims, runs in rows if claim in claims.split(",")).split(" | ")

    def verdict(folder, *seeds, switch=""):
        for seed, runs in enumerate(seeds):
            for name, values in zip(report.CLAIMS[claim].names, runs.split(", "), strict=True):
                write_run(tmp_path / folder, f"-paper-s{seed}", f"{name}{switch} {values}")
        return report.judge(report.load(tmp_path / folder), claim)

    yes = "trivially" if claim in report.TRIVIAL else "yes"
    accuracy = f"{float(holds.split(', ')[0].split()[1]):.1f}"
    assert fails and verdict("holds", holds)[:6] == ("not run", "1 of 1", yes, "", accuracy, "20.0")
    for i, runs in enumerate(fails):
        assert verdict(f"fails{i}", runs)[:4] == ("not run", "0 of 1", "no", "none of 0 tried")
    outcome = (yes, "") if claim == "D2" else ("no", "none of 0 tried")
    assert verdict("several", fails[0], holds, fails[0])[:4] == ("not run", "1 of 3", *outcome)
    assert verdict("even", fails[0], holds)[1:3] == ("1 of 2", outcome[0])
    flips = "half the rate, paper's form: 1 of 1; of 1 tried"
    assert verdict("fails0", holds, switch="@half-the-rate")[2:4] == ("changed", flips)
    flips = "twice the rate, paper's form: 2 of 2; of 2 tried"                  # tried in more seeds
    assert verdict("fails0", holds, holds, switch="@twice-the-rate")[2:4] == ("changed", flips)
    tried = report.tried(report.load(tmp_path / "fails0"), claim)
    assert tried == ["", "half the rate (1 of 1), twice the rate (2 of 2)"]
    for line in run_all("--list", claim).stdout.splitlines():
        write_run(tmp_path / "listed", "", f"{Path(shlex.split(line)[-1]).name} healthy 40")
    assert verdict("listed").outcome != "not run"   # run_all.sh's own lines are enough for the rule


@pytest.mark.parametrize("claim", report.READINGS)
def test_other_readings_can_fail(claim, tmp_path):
    reading = report.READINGS[claim]
    rows = [row.split(maxsplit=1) for row in READINGS.strip().splitlines()]
    evidence = next(runs for claims, runs in rows if claim in claims.split(",")).split(" | ")
    for i, runs in enumerate(evidence):
        for name, values in zip(reading.names, runs.split(", "), strict=True):
            write_run(tmp_path / str(i), "-code-s0", f"{name} {values}")
    verdicts = [report.judge(report.load(tmp_path / str(i)), claim, reading) for i in range(len(evidence))]
    assert [verdict.code for verdict in verdicts] == ["1 of 1"] + ["0 of 1"] * (len(evidence) - 1)
    assert f"| {claim} | {reading.words} |" in report.other_readings(report.load(tmp_path / "0"))


@pytest.mark.parametrize("learning, outcome", [
    ({}, ""),
    ({"gn-none-sgd-0.2-clip-0.1-code": 3, "none-none-sgd-0.2-clip-0.1-code": 3}, ""),           # one rate
    ({"gn-none-sgd-0.2-clip-0.1-code": 3, "gn-none-adamw-1e-3-paper": 3}, ""),          # one rate of each
    ({"gn-none-sgd-0.2-clip-0.1-code": 3, "gn-none-sgd-0.8-clip-0.1-code": 1}, ""),
    ({"gn-none-sgd-0.2-clip-0.1-code": 3, "gn-none-sgd-0.8-clip-0.1-code": 2},
     "refuted: clipped SGD learns at 0.2 (3 of 3), 0.8 (2 of 3)"),
    ({"gn-none-adamw-1e-3-paper": 2, "gn-none-adamw-3e-4-code": 3},
     "refuted: AdamW learns at 0.0003 (3 of 3), 0.001 (2 of 3)"),
])
def test_lars_alone_can_hold_and_be_refuted(learning, outcome, tmp_path):
    names = itertools.chain(*report.NOT_LAYERWISE.values())
    for name, form, seed in itertools.product(names, report.FORMS, range(3)):
        lr = float(re.search(r"-(\d[.\d]*(e-\d)?)-", f"{name}-")[1])
        learns = seed < learning.get(f"{name}-{form}", 0)
        run = "healthy 22" if learns else ["healthy 21", "down 30"][seed % 2]
        write_run(tmp_path, f"-{form}-s{seed}", f"{name} {run}", lr)
    verdict = report.judge(report.load(tmp_path), "D11")
    assert (verdict.outcome, verdict.flipped_by) == ("no" if outcome else "yes", outcome)


def test_what_is_printed_of_a_folder(tmp_path, capsys):
    write_run(tmp_path, "-code-s0", "gn-none-lars-0.2 back 40")
    write_run(tmp_path, "-code-s1", "gn-none-lars-0.2 down-again 40")
    cut_off = write_run(tmp_path, "-code-s0", "gn-none-sgd down 20") / "metrics.jsonl"
    cut_off.write_text("\n".join(cut_off.read_text().splitlines()[:50]) + "\n")
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    row = "| gn-none-lars-0.2-code-s0 | recovered | collapsed at 3, recovered at 61 | 20.0 | 40.0 |  |"
    assert row in output and "| collapsed at 3, recovered at 31, collapsed at 61 |" in output
    assert "C4:" not in output        # of a run that is not finished there is no verdict


def test_two_seeds_say_nothing_on_lars_alone(tmp_path):
    for seed in (0, 1):
        for name, lr in (("gn-none-adamw-1e-3", 1e-3), ("gn-none-adamw-3e-4", 3e-4)):
            write_run(tmp_path, f"-code-s{seed}", f"{name} healthy 40", lr)
    assert report.judge(report.load(tmp_path), "D11").outcome == "not run"


def test_panels_show_what_their_axes_say(tmp_path):
    write_run(tmp_path, "-code-s0", "x back 40")
    runs = report.load(tmp_path)
    lines = runs["x-code-s0"].lines
    keys = dict(distance=lambda x: x["rep_dist"], loss=lambda x: x["loss"], length=lambda x: x["q_norm"],
                live=lambda x: x["live"][-1], rate=lambda x: x["layers"]["layer1"]["lars_rate"],
                largest=lambda x: x["layers"]["prediction"]["max_over_rms"])
    places = report.draw(runs, list(keys), {"x": "x-code"}).axes
    for place, (panel, value) in zip(places, keys.items(), strict=True):
        shown = place.lines[0]
        assert [*shown.get_xdata()] == [*lines] and [*shown.get_ydata()] == [value(x) for x in lines.values()]


def test_a_map_shows_the_last_distances(tmp_path):
    for name, how in (("map-sgd-0.1-1e-4", "back"), ("map-sgd-0.2-1e-4", "down")):
        write_run(tmp_path, "-paper-s0", f"{name} {how} 30", float(name.split("-")[2]))
    place = report.Figure().subplots()
    shown = report.draw_map(place, report.load(tmp_path), report.MAPS[1]).get_array().tolist()
    assert shown == [[pytest.approx(-1), pytest.approx(-6)]]
    assert [text.get_text() for text in place.texts] == ["recovered", "collapsed"]


def test_both_widths_beside_each_other(tmp_path):
    """What most seeds do at each; and what was run at one alone."""
    for seed in range(3):
        for run in ("gn-none-sgd down 25", f"wide-gn-none-sgd {'down' if seed else 'healthy'} 25",
                    "gn-none-lars-0.1 down 20", "wide-gn-none-lars-0.1 healthy 40",
                    "wide-gn-none-sgd-early down 20"):
            write_run(tmp_path, f"-code-s{seed}", run)
    runs = report.load(tmp_path)
    by_claim = [row.split(" | ") for row in report.claims_at_both_widths(runs).splitlines()[2:]]
    assert {row[0].strip("| "): row[-1].strip("| ") for row in by_claim} == {
        "C4": "same", "C7": "differs", "D8": "not run", "B5": "same"}
    ends = [row.rpartition(" | ")[2].strip("| ") for row in report.both_widths(runs).splitlines()[2:]]
    assert ends == ["", "differs", "", "same", "not run"]


def test_equal_runs_count_once(tmp_path):
    """Under two names, with and without the flags that came later."""
    for name in ("a healthy 40", "b healthy 40", "c healthy 40"):
        write_run(tmp_path, "-code-s0", name, 0.1 if name[0] == "c" else 0.2)
    config = tmp_path / "a-code-s0" / "config.json"
    config.write_text(config.read_text().replace('"steps"', '"clip": null, "lr_mult": [], "steps"'))
    assert report.distinct(report.load(tmp_path)).keys() == {"b-code-s0", "c-code-s0"}


def test_a_warning_and_the_state_by_then(tmp_path):
    """Long q in three of five; of the two that collapse without it one recovers."""
    for i, (how, q) in enumerate((("down", 200), ("healthy", 200), ("down", 1), ("back", 1), ("down", 200))):
        metrics = write_run(tmp_path, "-code-s0", f"x{i} {how} 40") / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"q_norm": 1.0', f'"q_norm": {q}'))
    row = report.warnings(report.load(tmp_path)).splitlines()[2].split(" | ")
    assert row[2].startswith("2 of 3") and row[3:5] == ["2 of 3", "2 of 3"] and row[5].startswith("1 of 2")


def test_any_folder_of_runs_is_a_picture(tmp_path, capsys):
    """Also beside a cut-off run, an empty folder and a damaged log; the page of somebody else stays."""
    with pytest.raises(SystemExit, match="no run that can be read"):
        report.main([str(tmp_path)])
    healthy = write_run(tmp_path, "", "batch-size_8 healthy 40")
    cut_off = write_run(tmp_path, "", "x-s0-old down 20") / "metrics.jsonl"
    cut_off.write_text("\n".join(cut_off.read_text().splitlines()[:50]) + '\n{"step": 5, "layers": {}')
    (tmp_path / "empty").mkdir()
    (write_run(tmp_path, "", "damaged healthy 40") / "metrics.jsonl").write_text("x}\n")
    for name, value in (("null", "null"), ("nan", "NaN")):
        metrics = write_run(tmp_path, "", f"{name} healthy 40") / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"loss": 1.0', f'"loss": {value}'))
    metrics = write_run(tmp_path, "", "elsewhere healthy 40") / "metrics.jsonl"
    metrics.write_text(re.sub('"lars_rate": [^,}]*', '"lars_rate": null', metrics.read_text()))
    (tmp_path / "README.md").write_text("mine")
    report.main([str(tmp_path)])
    output = capsys.readouterr()
    assert "collapsed (step 49 of 100)" in output.out and "not on its way: common 0.10" in output.out
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(output.err.splitlines()) == 4
    report.main([str(healthy)])
    report.main([str(metrics.parent)])                  # without a rate of layer1
    with pytest.raises(SystemExit, match="nowhere: no such"):
        report.main([str(tmp_path / "nowhere")])


def test_the_studys_page_is_what_the_logs_say(tmp_path, monkeypatch):
    """results/README.md and the list of runs are, to the byte, what report.py makes of results/runs and
    notes.md, and the pictures come alike each time."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    committed, runs = HERE / "results", tmp_path / "runs"
    runs.mkdir()                        # a link to the whole would have the list written through it
    for run in (path for path in (committed / "runs").iterdir() if path.is_dir()):
        (runs / run.name).symlink_to(run)
    shutil.copy(committed / "notes.md", tmp_path)
    report.main([])
    pictures = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    report.main([])
    assert pictures == {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    for name in ("README.md", "runs/README.md"):
        assert (tmp_path / name).read_text() == (committed / name).read_text()
    assert sorted(os.listdir(tmp_path / "figures")) == sorted(os.listdir(committed / "figures"))
    shutil.rmtree(runs)
    write_run(runs, "", "bn-none-sgd-long-code-s0 down 20")
    with pytest.raises(SystemExit, match="no finished run of bn-none-lars-code"):
        report.main([])
    with pytest.raises(SystemExit, match="no finished run is called gn-nine"):
        report.page("{{gn-nine gain}}", report.load(runs))


# ---------------------------------------------------------------------------------------------- README.md
def test_readme_commands_run(folder, tmp_path, monkeypatch):
    """Each byol.py command of README.md and of the docstring is taken as it stands, and runs small."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    text = (HERE / "README.md").read_text() + byol.__doc__
    lines = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    commands = [line.split("byol.py", 1)[1].split("&&")[0] for line in lines if " byol.py" in line]
    for i, command in enumerate(commands):
        byol.parse_arguments(shlex.split(command))
        small = re.sub(r"--epochs \d+|--download|--eval-every \d+", "", command)
        sizes = "--device cpu --width 4 --size 16 --batch-size 8 --steps 1 --threads 1".split()
        main(*shlex.split(small), *sizes, "--data", f"folder:{folder}", "--out", tmp_path / str(i))
    assert len(commands) > 9
    sweeps = re.findall(r"bash run_all\.sh([^|\n#]*)", "\n".join(lines))
    assert len(sweeps) > 2 and all(run_all("--list", *words.split()).returncode == 0 for words in sweeps)
    array = next(line for line in lines if "sbatch" in line).replace("sbatch", "echo")
    shown = subprocess.run(["bash", "-c", array], cwd=HERE, capture_output=True, text=True).stdout
    assert shown == f"--array=0-{run_all('--list').stdout.count(chr(10)) - 1} run_all.sh\n"


def test_readme_snippets_run(folder, tmp_path, monkeypatch):
    """As pasted: in the folder of a default run, the probe on the features of its own encoder; torchvision's
    network beside the encoder.pt of a run as it wants it."""
    monkeypatch.chdir(tmp_path)
    main(*TINY, "--data", f"folder:{folder}", "--steps", "2", "--out", "runs/default")
    flags = "--enc-norm bn --width 64 --stem imagenet --batch-size 4 --steps 0 --out .".split()
    main("--data", f"folder:{folder}", *flags)
    (line,) = log(".")
    assert line["step"] == 0 and line["state"] == "untrained"
    images = load(f"folder:{folder}")
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    names = dict(torch=torch, model=model)
    names |= dict(loss=model(torch.randn(4, 3)).sum(), images=images.train[:40])
    names |= {name: torch.randn(8, 16) for name in ("y1", "z1", "y2", "z2", "q1", "q2")}
    names |= dict(labels_train=images.train_labels, labels_test=images.train_labels)
    blocks = (HERE / "README.md").read_text().split("\n\n")
    code = re.compile(" {4,}(from|import|model|torch)")
    blocks = [block for block in blocks if code.match(block)]
    for block in blocks:
        exec(textwrap.dedent(block), names)
        if "flags" in names and "y_train" not in names:
            assert names["y"].shape == (40, 32)
            names.update(y_train=names["y"], y_test=names["y"])
    assert len(blocks) == 7 and names["state"] == "healthy"
    assert names["model"].eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 512)


def test_readmes_answer_is_the_pages():
    readme, page = (" ".join(path.read_text().split())
                    for path in (HERE / "README.md", HERE / "results" / "README.md"))
    for words in (r"(\d+) hold .*?(\d+) (?:hold )?with one thing changed[,;.] (\d+) do not",
                  r"clipped runs without BN of 24,000 steps (\d+ of \d+) collapsed late",
                  r"with averages of images in it \[random features\]\S* are ([\d.]+) "):
        assert re.search(words, readme).groups() == re.search(words, page).groups()
    at_64 = re.search(r"and ([\d.]+) at width 64", readme)[1]
    assert f"of filled averages](#other-readings), {at_64} %" in page
    rows = (HERE / "results" / "README.md").read_text().splitlines()
    first = next(i for i, row in enumerate(rows) if row.startswith("| BN everywhere"))
    table = list(itertools.takewhile(lambda row: row.startswith("|"), rows[first:]))
    assert len(table) == len(report.REMEDIES)
    ends = [row.split(" | ")[:2] for row in table]
    for rate, words in (("0.2", "runs at a learning rate of 0.2"), ("0.8", "at 0.8")):
        counts = [end.split(" of ") for row, end in ends if f"SGD {rate}, gradient clipped" in row]
        collapsed, n = (sum(map(int, column)) for column in zip(*counts))
        assert f"in {n - collapsed} of {n} {words}" in readme
    at_64 = " ".join(row.split(" | ")[-1] for row in table if "clipped" in row)
    states = [state for state, seeds in re.findall(r"(\w+) \(([\d, ]+)\)", at_64) for _ in seeds.split(",")]
    assert f"{states.count('collapsed')} of {len(states)} clipped runs ended collapsed" in readme
    ends = [row.strip("| ").split(" | ") for row in rows if re.match(r"\| (up to|over) 0", row)]
    up_to = {words: [int(n) for n in counts] for words, *counts, _, _, _ in ends}
    best, short, long = ([up_to[words] for words in group] for group in (
        ["up to 0.01", "up to 0.03"], [*up_to][:5], [*up_to][5:]))
    n, collapsed = lambda group: sum(map(sum, group)), lambda group: sum(row[2] for row in group)
    assert f"Of [{n(up_to.values())} runs of 3,000 steps]" in readme and [*up_to][4] == "up to 0.1"
    assert f"none of these {n(best)} ended collapsed" in readme and collapsed(best) == 0
    assert f"Of all {n(short)} with a product of up to 0.1 one did" in readme and collapsed(short) == 1
    assert f"of {n(long)} above it {collapsed(long)}." in readme
    assert "\n".join(table) in (HERE / "README.md").read_text()         # report.py makes it, README copies it


def test_readmes_row_is_the_committed_run():
    readme = " ".join((HERE / "README.md").read_text().replace("\\\n", "").split())
    command = re.search("python byol.py ([^`]*) --out runs/row distances", readme)[1]
    path = HERE / "results" / "runs" / re.search(r"results/runs/([\w.-]+)\)", readme.split("diff <(")[1])[1]
    recorded = json.loads((path / "config.json").read_text())["flags"]
    flags = vars(byol.parse_arguments(shlex.split(command)))
    for name in flags.keys() - set(byol.NOT_THE_RUN):
        assert recorded.get(name) == flags[name], name
