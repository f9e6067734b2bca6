"""Tests: each value is checked against torch, torchvision, scikit-learn or the formula, and runs drive the real script."""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # faster for networks this small, and far faster beside other work

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression

import byol
import lars
import resnet_norms
from results import growth, report

HERE = Path(__file__).parent
TIMING = {"images_per_s"}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = "--width 4 --size 16 --stem cifar --batch-size 8 --log-every 2".split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """40 training and 20 test images of ten classes, and 5 unlabeled ones, as PNG files."""
    root = tmp_path_factory.mktemp("images")
    for split, per_class in (("train", 4), ("test", 2)):
        images, labels = byol.draw_shapes(per_class, per_class)
        for i, (image, label) in enumerate(zip(images, labels)):
            path = root / split / f"class{label}"
            path.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(image).save(path / f"{i:03}.png")
    (root / "unlabeled").mkdir()
    for i in range(5):
        TF.to_pil_image(images[i]).save(root / "unlabeled" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def shapes():
    return byol.load_images("shapes", "", False, 32)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Runs and decoded images go by default into the working directory: not into the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))           # or the server could not import what it is to preload
        forkserver.ensure_running()
    os.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# Processes to kill are forked from one that has imported torch already, which saves seconds for each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def run_main(flags, output, file_limit, environment):
    os.environ.update(environment)
    byol.RANK, byol.WORLD = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)         # the old one holds a position in the file that 1 was
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
    sys.exit(byol.main(flags))


class Run:
    """byol.py in a process of its own, with its output in `lines`. No file may grow over `file_limit` bytes, if given."""

    def __init__(self, *flags, file_limit=-1, **environment):
        reader, writer = FORKS.Pipe(duplex=False)
        arguments = [str(flag) for flag in flags], writer, file_limit, environment
        self.process = FORKS.Process(target=run_main, args=arguments)
        self.process.start()
        writer.close()
        self.lines = os.fdopen(os.dup(reader.fileno()))

    def until_step(self, nth=1):
        """Read up to the nth line of a step."""
        for line in self.lines:
            nth -= line.startswith("step")
            if nth == 0:
                return
        pytest.fail(f"the run ended, {nth} lines of steps too early")

    def wait(self):
        """(exit status or minus the signal that killed it, what was still to be read of its output)"""
        rest = self.lines.read()
        self.process.join()
        return self.process.exitcode, rest


def log(out):
    """The lines of a run's log without what is allowed to differ between equal runs."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


# ---------------------------------------------------------------------------------------------------- resnet_norms


def test_resnet_equals_torchvision():
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    ours = resnet_norms.resnet18("bn", 64, "imagenet")
    fresh = {name: t.clone() for name, t in ours.state_dict().items()}
    assert list(fresh) == list(theirs.state_dict())
    for name, t in theirs.state_dict().items():         # the same initialisation, drawn with other random numbers
        if t.ndim == 4:
            assert fresh[name].std().item() == pytest.approx(t.std().item(), rel=0.05)
            assert abs(fresh[name].mean()) < 5 * t.std() / t.numel() ** 0.5
        else:
            assert torch.equal(fresh[name], t)
    ours.load_state_dict(theirs.state_dict())
    for side, mode in itertools.product((64, 32), (True, False)):       # at 32 the kernels of layer4 cover their maps
        x = torch.randn(2, 3, side, side)
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))


@pytest.mark.parametrize("ours, torchs", [
    (resnet_norms.CoveringConv2d, nn.Conv2d), (resnet_norms.CoveringWSConv2d, resnet_norms.WSConv2d),
])
@pytest.mark.parametrize("kernel, stride, padding, side, covers", [
    (3, 1, 1, 1, True), (3, 2, 1, 1, True), (3, 2, 1, 2, True), (7, 2, 3, 2, True), (1, 2, 0, 1, True),
    (3, 1, 1, 2, False), (3, 2, 1, 3, False), (1, 2, 0, 2, False), (1, 1, 0, 2, False),
])
def test_kernels_that_cover_the_map(ours, torchs, kernel, stride, padding, side, covers):
    """Where one covers it, the output has the plain convolution's bits and the gradients are its gradients."""
    torch.manual_seed(0)
    plain, x, results = torchs(3, 4, kernel, stride, padding).double(), torch.randn(50, 3, side, side).double(), []
    for make, kind in ((torchs, torch.float64), (ours, torch.float64), (ours, torch.bfloat16)):
        conv = make(3, 4, kernel, stride, padding).to(torch.float64 if kind == torch.float64 else torch.float32)
        conv.load_state_dict(plain.state_dict())
        x = x.detach().to(conv.weight.dtype, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            y = conv(x)
        assert y.dtype == kind and ("OneWindow" in type(y.grad_fn).__name__) == (covers and make is ours)
        (y.double() ** 2).sum().backward()
        results.append([t.detach().double() for t in (y, x.grad, conv.weight.grad, conv.bias.grad)])
    expected, mine, in_bf16 = results
    assert torch.equal(mine[0], expected[0])
    for want, got, rough in zip(expected, mine, in_bf16):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
        assert not covers or (rough - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("norm", ["bn", "gn", "gn+ws", "none"])
@pytest.mark.parametrize("width", [3, 16])
def test_resnet_shapes_and_gradients(norm, width, stem):
    net = resnet_norms.resnet18(norm, width, stem)
    y = net(torch.randn(2, 3, 32, 32))
    assert y.shape == (2, 8 * width)
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8, 12, 16])
def test_gradients_in_channels_last(width):
    """Alike in both memory formats at every width. With strides in their narrow shortcuts those under 8 crashed, or wrote into
    other tensors, on a CPU with AVX2, as oneDNN's issue 6035 says of up to 15 channels with AVX-512."""
    net = resnet_norms.resnet18("none", width, "cifar")
    x, grads = torch.randn(16, 3, 64, 64), {}
    for form in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=form).zero_grad()
        net(x.contiguous(memory_format=form)).square().mean().backward()
        grads[form] = torch.cat([p.grad.flatten() for p in net.parameters()])
    plain, ours = grads.values()
    assert (ours - plain).norm() < 1e-3 * plain.norm()      # where rounding crosses a ReLU's kink, 1e-4 has been seen


@pytest.mark.parametrize("norm", ["gn", "gn+ws", "none"])
def test_no_batch_statistics_without_bn(norm):
    net = resnet_norms.resnet18(norm, 8, "cifar").double()
    x = torch.randn(4, 3, 16, 16).double()
    assert torch.allclose(net(x)[:1], net(x[:1]), rtol=1e-10)


@pytest.mark.parametrize("bad", [dict(norm="ln"), dict(stem="vit"), dict(width=0)])
def test_resnet_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        resnet_norms.resnet18(**bad)


def test_group_norm_groups():
    groups = {c: resnet_norms.group_norm(c).num_groups for c in (1, 3, 12, 16, 48, 64, 128, 512)}
    assert groups == {1: 1, 3: 1, 12: 6, 16: 8, 48: 24, 64: 32, 128: 32, 512: 32}


@pytest.mark.parametrize("shape, form, kind, narrow", [
    ((130, 64, 8, 8), torch.channels_last, torch.float64, True), ((130, 64, 8, 8), torch.channels_last, torch.float32, True),
    ((43, 12, 32, 32), torch.channels_last, torch.float32, True), ((3, 2, 300, 300), torch.channels_last, torch.float32, True),
    ((4097, 128, 1, 1), torch.channels_last, torch.float32, True), ((130, 64, 8, 8), torch.contiguous_format, torch.float32, False),
    ((33, 256, 8, 8), torch.channels_last, torch.float32, False), ((128, 64, 8, 8), torch.channels_last, torch.float32, False),
    ((4097, 128), torch.contiguous_format, torch.float32, False),
    ((130, 64, 8, 8), torch.channels_last, torch.bfloat16, False),
])
def test_group_norm_is_torchs(shape, form, kind, narrow):
    """Where it takes the sums over all channels at once, it rounds no worse than torch; elsewhere it has torch's bits."""
    torch.manual_seed(0)
    norm, results = resnet_norms.group_norm(shape[1]), []
    theirs = nn.GroupNorm(norm.num_groups, shape[1])
    with torch.no_grad():
        x = (2 + torch.randn(shape)).to(kind, memory_format=form)
        x[0], weight, bias = 0.5, torch.randn(shape[1]), torch.randn(shape[1])      # an image without contrast
        grad = torch.randn(shape).to(kind)
    for net, dtype in ((theirs, torch.float64), (theirs, kind), (norm, kind)):
        net.to(torch.float32 if dtype == torch.bfloat16 else dtype).load_state_dict({"weight": weight, "bias": bias})
        net.zero_grad()
        z = x.detach().to(dtype).requires_grad_()
        y = net(z)
        assert ("NarrowGroups" in type(y.grad_fn).__name__) == (narrow and net is norm)
        assert y.is_contiguous(memory_format=form) and torch.equal(net(z.detach()), y)
        y.relu_().backward(grad.to(dtype))                  # in place and with another memory format, as in the network
        results.append([t.detach().clone() for t in (y, z.grad, net.weight.grad, net.bias.grad)])
    for exact, want, got in zip(*results):
        if narrow:
            assert got.dtype == kind and (got - exact).norm() <= 1.5 * (want - exact).norm() + 1e-15 * exact.norm()
        else:
            assert torch.equal(got, want)
    blank = torch.zeros_like(x) + torch.linspace(1, 1000, len(x)).view(-1, *[1] * (x.ndim - 1))
    assert torch.isfinite(norm(blank)).all()                # though rounding may leave a variance under 0


def test_weight_standardization():
    conv = resnet_norms.WSConv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 8, 8).double()
    out = conv(x)
    w = conv.weight
    standard = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(out, F.conv2d(x, standard, conv.bias, padding=1))
    out.square().sum().backward()
    gradient = conv.weight.grad.flatten(1)
    assert gradient.abs().sum() > 1
    # the output does not depend on a channel's mean or scale, so the gradient has no part along either
    assert gradient.sum(1).abs().max() < 1e-8 * gradient.abs().max()
    assert (gradient * w.flatten(1)).sum(1).abs().max() < 1e-8 * gradient.abs().max()
    with torch.no_grad():
        scale = 10.0 ** torch.arange(-8, 12, 4)[:, None, None, None]
        conv.weight.add_(torch.randn(5, 1, 1, 1)).mul_(scale)
    assert torch.allclose(conv(x), out, rtol=1e-6)
    nn.init.constant_(conv.weight, 0.3)
    conv.zero_grad()
    conv(x).square().sum().backward()
    assert torch.allclose(conv(x), conv.bias[:, None, None].expand(2, 5, 8, 8))
    assert torch.isfinite(conv.weight.grad).all()


# ---------------------------------------------------------------------------------------------------- lars


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))


def run_steps(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) ** 3).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_lars_off_is_sgd(momentum, weight_decay):
    ours, theirs = small_model(), small_model()
    run_steps(ours, lars.LARS([dict(params=ours.parameters(), lars=False)], 0.1, momentum, weight_decay), 7)
    run_steps(theirs, torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=weight_decay), 7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_lars_follows_the_formula(weight_decay):
    w = nn.Parameter(torch.randn(5, 7))
    optimizer = lars.LARS([("w", w)], lr=0.3, momentum=0.9, weight_decay=weight_decay, eta=2e-3)
    expected, buffer = w.detach().double(), torch.zeros(5, 7).double()
    for _ in range(4):
        w.grad = torch.randn(5, 7)
        g = w.grad.double()
        local = 2e-3 * expected.norm() / (g.norm() + weight_decay * expected.norm())
        buffer = 0.9 * buffer + local * (g + weight_decay * expected)
        expected = expected - 0.3 * buffer
        optimizer.step()
        assert optimizer.rates["w"].item() == pytest.approx(local.item(), rel=1e-5)
        assert torch.allclose(w.double(), expected, rtol=1e-5)


def test_lars_zero_norms_have_rate_one():
    zero_weight, zero_grad = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    optimizer = lars.LARS([zero_weight, zero_grad], lr=0.5, weight_decay=0.1)
    zero_weight.grad, zero_grad.grad = torch.ones(3), torch.zeros(3)
    optimizer.step()
    assert [rate.item() for rate in optimizer.rates.values()] == [1, 1] and list(optimizer.rates) == [0, 1]
    assert torch.equal(zero_weight, torch.full((3,), -0.5))
    assert torch.allclose(zero_grad, torch.full((3,), 1 - 0.5 * 0.1))


def test_lars_resumes_from_state_dict():
    straight, resumed = small_model(), small_model()
    make = lambda model: lars.LARS(lars.param_groups(model, 1e-3), 0.1)
    run_steps(straight, make(straight), 6)
    first = make(resumed)
    run_steps(resumed, first, 3)
    second = make(resumed)
    second.load_state_dict(first.state_dict())
    run_steps(resumed, second, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_lars_is_a_torch_optimizer():
    used, unused, late = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = lars.LARS([used, unused], lr=1.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    added = []

    def closure():
        optimizer.zero_grad()
        loss = (used * torch.tensor([3.0, 4.0])).sum() + sum(p.sum() for p in added)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 7
    step = 1e-3 * math.sqrt(2) / 5
    assert torch.allclose(used, torch.tensor([1 - 3 * step, 1 - 4 * step]))
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    schedule.step()
    added.append(late)
    optimizer.add_param_group(dict(params=[late], lars=False, lr=0.25))
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert torch.equal(late, torch.full((2,), 0.75)) and set(optimizer.rates) == {0}


@pytest.mark.parametrize("bad", [dict(lr=-1), dict(lr=math.nan), dict(lr=1, eta=-1), dict(lr=1, momentum=math.inf)])
def test_lars_refuses(bad):
    with pytest.raises(ValueError, match=list(bad)[-1]):
        lars.LARS([nn.Parameter(torch.ones(1))], **bad)


def test_param_groups():
    model = small_model()

    def described(**flags):
        groups = lars.param_groups(model, 0.1, **flags)
        return {name: (g["lars"], g["weight_decay"], g["lr_mult"]) for g in groups for name, _ in g["params"]}

    names = [name for name, _ in model.named_parameters()]
    plain, weights = (False, 0.0, 1), {"0.weight", "3.weight"}
    assert described() == {n: (True, 0.1, 1) if n in weights else plain for n in names}
    assert described(lars_layers=None) == {n: (False, 0.1, 1) for n in names}
    one = described(lars_layers="^3", lr_mult={"^0": 10, "weight": 2})
    assert one["3.weight"] == (True, 0.1, 2) and one["0.weight"] == (False, 0.1, 20) and one["0.bias"] == (False, 0, 10)
    for flags in (dict(lars_layers="bias"), dict(lars_layers="["), dict(lr_mult={"nothing": 2})):
        with pytest.raises(ValueError, match="regular expression|found in no layer"):
            lars.param_groups(model, 0.1, **flags)


def test_param_groups_of_the_networks_find_every_norm():
    args = byol.parse_arguments(["--enc-norm", "gn", "--proj-norm", "ln", "--pred-norm", "bn"])
    for group in lars.param_groups(byol.Network(args), 0.1):
        assert all((p.ndim > 1) == group["lars"] == (group["weight_decay"] > 0) for _, p in group["params"])


@pytest.mark.parametrize("name", ["lars", "resnet_norms"])
def test_copied_alone(name, tmp_path):
    text = (HERE / f"{name}.py").read_text()
    (tmp_path / f"{name}.py").write_text(text)
    code = f"import sys; sys.modules['torchvision'] = sys.modules['numpy'] = None; import {name}, torch"
    if name == "lars":
        code += "; m = torch.nn.Linear(2, 2); o = lars.LARS(lars.param_groups(m, 1e-6), 0.2)"
        code += "; m(torch.ones(1, 2)).sum().backward(); o.step(); assert set(o.rates) == {'weight'}"
    else:
        code += "; assert resnet_norms.resnet18('gn+ws', 8, 'cifar')(torch.ones(1, 3, 16, 16)).shape == (1, 64)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ---------------------------------------------------------------------------------------------------- views


def random_view(n=6, side=32, size=48):
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    params, order = byol.draw_view(n, side, size, torch.Generator().manual_seed(2))
    return images, params, order


@pytest.mark.parametrize("size", [16, 32, 75])
def test_resized_crop_is_torchvisions(size):
    images, params, _ = random_view(40)
    x = images / 255
    ours = byol.resized_crop(x, params["start"], params["extent"], params["flip"], size)
    for i in range(len(x)):
        top, left, height, width = (int(v) for v in (*params["start"][i], *params["extent"][i]))
        theirs = TF.resized_crop(x[i], top, left, height, width, [size, size], antialias=True)
        theirs = TF.hflip(theirs) if params["flip"][i] else theirs
        assert (ours[i] - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", list(byol.JITTER))
def test_jitter_is_torchvisions(name):
    x = torch.rand(64, 3, 9, 11)
    x[0], x[1, 1], x[2] = 0.5, x[1, 0], torch.tensor([0.0, 1.0, 1.0])[:, None, None]     # grey, ties, a corner
    factor = torch.empty(64).uniform_(*byol.JITTER[name])
    ours = byol.jitter(x, {name: factor}, [name])
    theirs = torch.stack([getattr(TF, f"adjust_{name}")(x[i], factor[i].item()) for i in range(64)])
    assert (ours - theirs).abs().max() < 2e-5


def test_blur_is_torchvisions():
    x, sigma = torch.rand(8, 3, 96, 96), torch.linspace(0.1, 2, 8)
    ours = byol.gaussian_blur(x, sigma)
    theirs = torch.stack([TF.gaussian_blur(x[i], [13, 13], [sigma[i].item()] * 2) for i in range(8)])
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(byol.gaussian_blur(x, torch.zeros(8)), x)


def test_view_is_the_composition_of_torchvisions():
    images, *drawn = random_view()
    drawn = [drawn, byol.draw_view(6, 32, 48, torch.Generator().manual_seed(3))]
    for params, order in drawn:
        ours = byol.make_view(images, params, order, 48)
        for i in range(len(images)):
            top, left, height, width = (int(v) for v in (*params["start"][i], *params["extent"][i]))
            x = TF.resized_crop(images[i] / 255, top, left, height, width, [48, 48], antialias=True)
            x = TF.hflip(x) if params["flip"][i] else x
            for name in order:
                x = getattr(TF, f"adjust_{name}")(x, params[name][i].item())
            x = TF.rgb_to_grayscale(x, 3) if params["gray"][i] else x
            x = TF.gaussian_blur(x, [7, 7], [params["sigma"][i].item()] * 2) if params["sigma"][i] else x
            assert (ours[i] - TF.normalize(x, byol.MEAN, byol.STD)).abs().max() < 1e-4


def test_drawn_parameters_have_torchvisions_distribution():
    n, side = 4000, 40
    params, _ = byol.draw_view(n, side, 96, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    blank = torch.empty(3, side, side)
    crops = np.array([torchvision.transforms.RandomResizedCrop.get_params(blank, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = torch.cat([params["start"], params["extent"]], 1).numpy()
    for column in range(4):
        assert ks_2samp(ours[:, column], crops[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] * ours[:, 3], crops[:, 2] * crops[:, 3]).pvalue > 1e-3
    jitter = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:] for _ in range(n)]
    on = params["hue"] != 0
    assert torch.equal(on, params["brightness"] != 1)
    for i, name in enumerate(byol.JITTER):
        assert ks_2samp(params[name][on].numpy(), np.array(drawn)[:, i]).pvalue > 1e-3
    blurred = params["sigma"] > 0
    sigmas = [torchvision.transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(n)]
    assert ks_2samp(params["sigma"][blurred].numpy(), sigmas).pvalue > 1e-3
    for applied, p in ((on, 0.8), (params["flip"], 0.5), (params["gray"], 0.2), (blurred, 0.5)):
        assert applied.float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_views_depend_on_seed_and_step_alone():
    draws = [byol.draw_view(3, 32, 32, byol.generator(seed, byol.VIEWS, step))[0]["start"] for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


# ---------------------------------------------------------------------------------------------------- losses, EMA, metrics


def test_losses_follow_their_formulas():
    q1, q2, t1, t2 = torch.randn(4, 10, 16).double()
    cos = F.cosine_similarity
    assert byol.byol_loss(q1, t1).item() == pytest.approx((2 - 2 * cos(q1, t1)).mean().item())
    queue = byol.unit(torch.randn(32, 16).double())
    logits = torch.cat([cos(q1, t1)[:, None], cos(q1[:, None], queue[None], dim=2)], 1) / 0.2
    assert byol.moco_loss(q1, t1, queue).item() == pytest.approx(F.cross_entropy(logits, torch.zeros(10).long()).item())
    z = torch.cat([q1, q2])
    total = 0
    for i in range(20):
        sims = torch.exp(cos(z[i : i + 1], z) / 0.2)
        total -= torch.log(sims[(i + 10) % 20] / (sims.sum() - sims[i])).item() / 20
    assert byol.simclr_loss(q1, q2).item() == pytest.approx(total)


def test_loss_and_distance_survive_near_collapse():
    base = torch.randn(1, 64).double()
    q, t = base + 1e-5 * torch.randn(32, 64).double(), base + 1e-5 * torch.randn(32, 64).double()
    exact = (2 - 2 * F.cosine_similarity(q, t)).mean().item()
    assert byol.byol_loss(q.float(), t.float()).item() == pytest.approx(exact, rel=0.02)
    distance = byol.collapse_metrics(*[x.float() for x in (q, q, t, t)])["rep_dist"]
    pairs = torch.cat([1 - F.cosine_similarity(x[:, None], x[None], dim=2) for x in (q, t)]).sum() / (2 * 32 * 31)
    assert distance == pytest.approx(pairs.item(), rel=0.02)


def test_collapse_metrics():
    y, z1, z2 = torch.randn(12, 40).abs(), torch.randn(12, 30) + 1, torch.randn(12, 30) + 1
    metrics = byol.collapse_metrics(y, z1, y, z2)
    off = ~torch.eye(12, dtype=torch.bool)
    pairs = [F.cosine_similarity(z[:, None], z[None], dim=2)[off].mean().item() for z in (z1, z2)]
    assert metrics["neg_cos"] == pytest.approx(sum(pairs) / 2, abs=1e-5)
    assert metrics["rep_dist"] == pytest.approx(1 - sum(pairs) / 2, abs=1e-5)
    assert metrics["pos_cos"] == pytest.approx(F.cosine_similarity(z1, z2).mean().item(), abs=1e-5)
    assert metrics["y_std"] == pytest.approx(F.normalize(y).std(0).mean().item() * 40**0.5, rel=1e-5)
    spread = byol.collapse_metrics(*[torch.eye(20)] * 4)
    assert spread["y_rank"] == pytest.approx(20, rel=1e-4)
    flat = byol.collapse_metrics(*[torch.ones(20, 20) + 1e-6 * torch.rand(20, 20)] * 4)
    assert flat["y_rank"] == pytest.approx(1, abs=1e-3) and flat["z_std"] < 1e-5
    wide = torch.randn(4000, 64)
    assert byol.collapse_metrics(wide[:500], wide, wide[:500], wide)["z_std"] == pytest.approx(1, abs=0.02)


def test_collapse_state():
    def states(*distances):
        state, seen = "untrained", []
        for distance in distances:
            state = byol.collapse_state(state, distance)
            seen.append(state)
        return seen

    assert states(0.5, 0.02, 0.002) == ["healthy"] * 3
    assert states(0.5, 9e-4, 0.009, 0.011, 0.002, 1e-4) == ["healthy", "collapsed", "collapsed", "recovered", "recovered", "collapsed"]


def test_schedules():
    rates = [byol.rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) == max(rates) and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    taus = [byol.tau(step, 100, 0.9) for step in (0, 50, 100)]
    assert taus == pytest.approx([0.9, 0.95, 1.0])


@pytest.mark.parametrize("norms", [
    "--enc-norm bn --mlp-norm bn", "--enc-norm gn --mlp-norm none",
    "--enc-norm gn --mlp-norm none --size 32 --batch-size 33",      # large enough for sums over all groups at once
])
def test_step_equals_the_plain_one(norms, shapes):
    """Both views in one pass, channels_last and the fused updates against BYOL written out, in 20 steps of a run.

    Each step is compared from the same state: with BN, rounding alone drives two runs apart a thousandfold a step.
    """

    def flat(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    args = byol.parse_arguments(f"--width 8 --batch-size 32 --steps 20 {norms}".split())
    online, target, optimizer = byol.set_up(args)
    plain = copy.deepcopy(online).to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        if isinstance(module, byol.PerView):
            module.__class__ = {joint: single for single, joint in byol.PER_VIEW.items()}[type(module)]
    plain_target = byol.make_target(plain, "byol")
    plain_optimizer = torch.optim.SGD(lars.param_groups(plain, 1e-4, None), 0.2, momentum=0.9)
    for step in range(20):
        for mine, theirs in ((plain, online), (plain_target, target), (plain_optimizer, optimizer)):
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        before = flat(plain)
        loss, _ = byol.train_step(args, shapes.train, online, target, optimizer, step)

        v1, v2 = byol.draw_views(shapes.train, step, args, lambda part: None).contiguous().chunk(2)
        with torch.no_grad():
            t1, t2 = plain_target(v1)[1], plain_target(v2)[1]
        plain_loss = (4 - 2 * F.cosine_similarity(plain(v1)[2], t2) - 2 * F.cosine_similarity(plain(v2)[2], t1)).mean()
        plain_optimizer.zero_grad()
        plain_loss.backward()
        for group in plain_optimizer.param_groups:
            group.update(lr=0.1 * (1 + math.cos(math.pi * step / 20)), fused=None)
        plain_optimizer.step()
        tau = 1 - 0.002 * (1 + math.cos(math.pi * step / 20))
        for slow, fast, ours in zip(plain_target.parameters(), plain.parameters(), target.parameters()):
            assert torch.allclose(tau * slow + (1 - tau) * fast, ours, rtol=1e-4, atol=1e-5)
        assert loss.item() == pytest.approx(plain_loss.item(), rel=5e-6, abs=1e-6)
        assert (flat(online) - flat(plain)).norm() < 2e-2 * (flat(plain) - before).norm()


def test_ema_moves_encoder_and_projection_alone():
    online = byol.Network(byol.parse_arguments(["--width", "2"]))
    target = byol.make_target(online, "byol")
    before = {name: p.clone() for name, p in target.named_parameters()}
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    byol.update_target(target, online, 0.75)
    assert set(before) == {name for name, _ in online.named_parameters() if not name.startswith("prediction")}
    for name, p in target.named_parameters():
        assert not p.requires_grad and torch.allclose(p, before[name] + 0.25)


# ---------------------------------------------------------------------------------------------------- linear evaluation


def test_linear_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 3000)
    x = rng.normal(size=(3000, 40)) @ rng.normal(size=(40, 40)) * 0.3 + 0.2 * rng.normal(size=(5, 40))[labels] + 7
    train, test = torch.tensor(x[:2000]).float(), torch.tensor(x[2000:]).float()
    ours = byol.linear_accuracy(train, torch.tensor(labels[:2000]), test, torch.tensor(labels[2000:]))
    scaled = (x - x[:2000].mean(0)) / (x[:2000] - x[:2000].mean(0)).std()
    theirs = LogisticRegression(max_iter=5000, tol=1e-8).fit(scaled[:2000], labels[:2000])
    assert 40 < ours < 99 and abs(ours - 100 * theirs.score(scaled[2000:], labels[2000:])) < 0.5
    weight, bias = byol.fit_linear(torch.tensor(scaled[:2000]), torch.tensor(labels[:2000]))
    assert np.abs(weight.T.numpy() - theirs.coef_).max() < 1e-2


def test_linear_accuracy_does_not_read_rounding():
    def features(labels, size):       # classes that stand well apart, `size` times as large as what all images share
        own = centres[labels] + 0.5 * torch.randn(len(labels), 32, generator=rng)
        return (common + size * own).float()

    rng = torch.Generator().manual_seed(0)
    centres, common = torch.randn(10, 32, generator=rng), 1 + torch.rand(32, generator=rng)
    train, test = torch.arange(10).repeat(100), torch.arange(10).repeat(30)
    accuracy = {size: byol.linear_accuracy(features(train, size), train, features(test, size), test)
                for size in (1, 1e-3, 1e-6)}
    assert accuracy[1] > 95 and accuracy[1e-3] > 95
    assert accuracy[1e-6] == 10                               # though there is enough of it left in fp32, as seen here:
    x, y = features(train, 1e-6), features(test, 1e-6)
    weight, bias = byol.fit_linear((x - x.mean(0)).double() * 1e6, train)
    assert (((y - x.mean(0)).double() * 1e6 @ weight + bias).argmax(1) == test).double().mean() > 0.8


def test_evaluation_refuses_a_changed_encoder(folder):
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            return x.mean((2, 3))

    images = byol.load_images(f"folder:{folder}", "", False, 16)
    with pytest.raises(RuntimeError, match="changed the encoder"):
        byol.evaluate(Leaky(), images, 16, "cpu")
    encoder = resnet_norms.resnet18("bn", 4, "cifar")
    assert 0 <= byol.evaluate(encoder, images, 16, "cpu") <= 100 and encoder.training


# ---------------------------------------------------------------------------------------------------- images


def test_shapes(shapes):
    images = shapes
    began = time.perf_counter()
    again = byol.load_images("shapes", "", False, 32)
    assert time.perf_counter() - began < 5
    assert images.train.shape == (10000, 3, 32, 32) and images.train.dtype == torch.uint8 and len(images.test) == 2000
    assert images.train_labels.bincount().tolist() == [1000] * 10 and images.test_labels.bincount().tolist() == [200] * 10
    assert all(torch.equal(a, b) for a, b in zip(images, again))
    assert not torch.equal(images.train[:200], images.test[:200])
    colours = [torch.cat([t.float().mean((2, 3)), t.float().std((2, 3))], 1) for t in (images.train, images.test)]
    assert byol.linear_accuracy(colours[0], images.train_labels, colours[1], images.test_labels) < 20


def test_stl10_in_its_binary_format(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)      # wants the real files' sums
    root = tmp_path / "stl10_binary"
    root.mkdir()
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8) for split, n in (("train", 6), ("unlabeled", 5), ("test", 4))}
    for split, x in pixels.items():
        x.transpose(0, 1, 3, 2).tofile(root / f"{split}_X.bin")                                 # column-major on disk
    for split, labels in (("train", [1, 2, 3, 10, 5, 6]), ("test", [4, 3, 2, 1])):
        np.array(labels, dtype=np.uint8).tofile(root / f"{split}_y.bin")
    (root / "class_names.txt").write_text("\n".join("abcdefghij"))
    (root / "fold_indices.txt").write_text("0 1\n")
    images = byol.load_images("stl10", tmp_path, False, 96)
    assert torch.equal(images.train[:], torch.tensor(pixels["train"])) and torch.equal(images.test[:], torch.tensor(pixels["test"]))
    assert torch.equal(images.pretrain[:], torch.tensor(np.concatenate([pixels["train"], pixels["unlabeled"]])))
    assert images.train_labels.tolist() == [0, 1, 2, 9, 4, 5] and images.test_labels.tolist() == [3, 2, 1, 0]


def test_cifar10_in_its_pickle_format(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for x, name in zip(pixels, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (root / name).write_bytes(pickle.dumps({"data": x, "labels": [3, 4]}))
    images = byol.load_images("cifar10", tmp_path, False, 32)
    assert torch.equal(images.train[:], torch.tensor(pixels[:5].reshape(10, 3, 32, 32))) and torch.equal(images.pretrain[:], images.train[:])
    assert images.train_labels.tolist() == [3, 4] * 5 and torch.equal(images.test[:], torch.tensor(pixels[5].reshape(2, 3, 32, 32)))


def test_folder(folder):
    images = byol.load_images(f"folder:{folder}", "", False, 16)
    assert images.train.shape == (40, 3, 32, 32) and len(images.pretrain) == 45 and len(images.test) == 20
    drawn, labels = byol.draw_shapes(4, 4)
    assert torch.equal(images.train[:], drawn) and torch.equal(images.train_labels, labels)
    assert torch.equal(images.pretrain[torch.tensor([39, 7])], drawn[[39, 7]]) and torch.equal(images.test[:], byol.draw_shapes(2, 2)[0])


def test_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path, capsys):
    root, data_dir = tmp_path / "images", tmp_path / "data"
    shutil.copytree(folder, root)

    def load():
        images = byol.load_images(f"folder:{root}", data_dir, False, 16)
        return images, "decoded" in capsys.readouterr().out

    assert [load()[1], load()[1]] == [True, False]
    before, _ = load()
    picture = min((root / "train").rglob("*.png"))
    TF.to_pil_image(torch.zeros(3, 32, 32, dtype=torch.uint8)).save(picture)
    after, decoded = load()
    assert decoded and after.train[0].max() == 0 and before.train[0].max() > 0       # a run under way keeps its own file
    (kept,) = (data_dir / "decoded").iterdir()
    assert len(os.listdir(kept)) == 2                                                # the lock and one file of images


def test_decoding_cut_off_leaves_nothing_half_made(tmp_path):
    root, data_dir = tmp_path / "images", tmp_path / "data"
    flags = [*TINY, "--data", f"folder:{root}", "--data-dir", data_dir, "--steps", "1", "--out", tmp_path / "run"]
    images, labels = byol.draw_shapes(15, 0)
    for split, step in (("train", 1), ("test", 15)):
        for i in range(0, 150, step):
            path = root / split / f"class{labels[i]}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(images[i]).save(path)
    last = root / "train" / "class9" / "149.png"        # not among those looked at for their size
    whole = last.read_bytes()
    last.unlink()
    os.mkfifo(last)                                     # reading it waits
    run = Run(*flags)
    while not list(data_dir.glob("decoded/*/*.tmp")):
        time.sleep(0.01)
    run.process.kill()
    assert run.wait()[0] == -signal.SIGKILL
    last.unlink()
    last.write_bytes(whole[:-60])
    assert Run(*flags).wait()[0] == 1
    assert [path.name for path in data_dir.glob("decoded/*/*")] == ["lock"]
    last.write_bytes(whole)
    assert Run(*flags).wait()[0] == 0
    decoded = {path for path in data_dir.glob("decoded/*/*") if path.name != "lock"}
    assert [path.stat().st_size for path in decoded] == [160 * 3 * 32 * 32]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_images_on_disk_stay_out_of_memory(tmp_path):
    code = """if True:
        import sys, torch, byol
        resident = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        images = byol.ImageFile(sys.argv[1], (100_000, 3, 64, 64))
        before = resident()
        for chosen in torch.arange(100_000).split(1000):
            assert len(images[chosen]) == 1000
        print(resident() - before)
    """
    path = tmp_path / "images"
    with open(path, "wb") as file:
        file.truncate(100_000 * 3 * 64 * 64)                                         # 1.2 GB of zeros
    grown = subprocess.run([sys.executable, "-c", code, path], cwd=HERE, check=True, capture_output=True, text=True).stdout
    assert float(grown) < 100


def test_folder_of_mixed_sizes_and_modes(tmp_path, capsys):
    for split in ("train", "test"):
        for i, (mode, size) in enumerate((("L", (40, 30)), ("RGBA", (32, 32)), ("P", (20, 50)), ("RGB", (32, 32)))):
            path = tmp_path / split / f"c{i % 2}"
            path.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(torch.full((3, *size[::-1]), 102, dtype=torch.uint8)).convert(mode).save(path / f"{i}.png")
    images = byol.load_images(f"folder:{tmp_path}", "", False, 24)
    assert images.train.shape == (4, 3, 24, 24) and "24 x 24" in capsys.readouterr().out
    assert (images.train[:] == 102).all()


# ---------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("flags", [
    "--enc-norm bn --mlp-norm bn",
    "--enc-norm gn --mlp-norm none --opt lars --lars-layers encoder.layer[12] --lr-mult projection=3",
    "--enc-norm gn+ws --proj-norm ln --pred-norm gn --loss byol",
    "--enc-norm none --mlp-norm none --loss moco",
    "--loss simclr --opt lars --epochs 1",
])
def test_run_writes_what_it_promises(flags, folder, tmp_path):
    flags = [*TINY, "--data", f"folder:{folder}", *flags.split()]
    flags += [] if "--epochs" in flags else ["--steps", "5", "--eval-every", "3"]
    for out in ("a", "b"):
        assert byol.main([*flags, "--out", str(tmp_path / out)]) == 0
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert (tmp_path / "a" / "encoder.pt").read_bytes() == (tmp_path / "b" / "encoder.pt").read_bytes()
    lines = log(tmp_path / "a")
    training, evaluations = [l for l in lines if "loss" in l], [l for l in lines if "accuracy" in l]
    assert [l["step"] for l in training] == [1, 2, 4, 5] and [l["step"] for l in evaluations] == ([5] if "--epochs" in flags else [3, 5])
    assert all(set(l) == {"step", "accuracy", "state"} for l in evaluations)
    names = set("step epoch loss lr ema pos_cos neg_cos rep_dist z_std y_std y_rank layers".split())
    layers = ["stem", "layer1", "layer2", "layer3", "layer4", "projection"] + ["prediction"] * ("--loss moco" not in " ".join(flags) and "simclr" not in flags)
    for line in training:
        assert set(line) == names and list(line["layers"]) == layers
        for layer, values in line["layers"].items():
            assert values["grad_norm"] > 0 and values["weight_norm"] > 0 and values["max_over_rms"] > 1
            adapted = "lars" in flags and ("--lars-layers" not in flags or layer in ("layer1", "layer2"))
            assert (values["lars_rate"] is not None) == adapted
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["flags"]["lr"] == 0.2 and config["flags"]["steps"] == 5 and config["versions"]["torch"] == torch.__version__
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "encoder.pt", "metrics.jsonl"]
    encoder = resnet_norms.resnet18(config["flags"]["enc_norm"], 4, "cifar")
    encoder.load_state_dict(torch.load(tmp_path / "a" / "encoder.pt", weights_only=True))


def test_random_features(folder, tmp_path):
    assert byol.main([*TINY, "--data", f"folder:{folder}", "--steps", "0", "--out", str(tmp_path / "r")]) == 0
    (line,) = log(tmp_path / "r")
    assert line["step"] == 0 and line["state"] == "untrained"
    torch.manual_seed(0)
    fresh = resnet_norms.resnet18("bn", 4, "cifar").state_dict()
    saved = torch.load(tmp_path / "r" / "encoder.pt", weights_only=True)
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)


def test_encoder_loads_into_torchvision(folder, tmp_path):
    flags = "--width 64 --size 16 --stem imagenet --batch-size 4 --steps 1".split()
    assert byol.main([*flags, "--data", f"folder:{folder}", "--out", str(tmp_path / "r")]) == 0
    theirs = torchvision.models.resnet18()
    missing = theirs.load_state_dict(torch.load(tmp_path / "r" / "encoder.pt", weights_only=True), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys


def wait_for(moment, out):
    """Until something is being written: a checkpoint, or a line of the log."""
    log = out / "metrics.jsonl"
    before = log.stat().st_size
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if moment == "checkpoint" and (out / "checkpoint.pt.tmp").exists() or moment == "line" and log.stat().st_size != before:
            return


@pytest.mark.parametrize("flags", [
    "--enc-norm bn --loss moco",
    "--enc-norm gn --mlp-norm none",
    "--enc-norm gn --mlp-norm none --opt lars",
])
def test_killed_and_resumed_is_never_killed(flags, folder, tmp_path):
    flags = [*TINY, "--data", f"folder:{folder}", *f"--steps 80 --eval-every 50 --checkpoint-every 7 {flags}".split()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert Run(*flags, "--out", straight).wait()[0] == 0
    rng = random.Random(0)
    for moment in itertools.islice(itertools.cycle(("checkpoint", "line", "any")), int(os.environ.get("KILLS", 3))):
        run = Run(*flags, "--out", killed)
        run.until_step(rng.randint(1, 4))
        wait_for(moment, killed) if moment != "any" else time.sleep(rng.uniform(0, 0.03))
        run.process.kill()
        assert run.wait()[0] == -signal.SIGKILL
    assert Run(*flags, "--out", killed).wait()[0] == 0
    assert log(straight) == log(killed)
    assert (straight / "encoder.pt").read_bytes() == (killed / "encoder.pt").read_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_out_of_memory(tmp_path):
    mapped = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
    command = [sys.executable, HERE / "byol.py", *"--width 64 --size 64 --batch-size 2000 --steps 1 --threads 1 --out".split(), tmp_path / "run"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (mapped + 2**31, -1))
    run = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("byol.py: out of memory") and "--batch-size" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_full_disk(folder, tmp_path):
    flags = [*TINY, "--data", f"folder:{folder}", *"--steps 60 --checkpoint-every 10".split()]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert Run(*flags, "--out", straight).wait()[0] == 0

    def runs_out_of_room():
        status, output = Run(*flags, "--out", out, file_limit=200_000).wait()         # less than a checkpoint
        assert status == 1 and "byol.py: " in output.splitlines()[-1] and "File too large" in output.splitlines()[-1]
        assert not list(out.glob("*.tmp"))

    runs_out_of_room()
    assert not (out / "checkpoint.pt").exists()
    run = Run(*flags, "--out", out)
    run.until_step(10)
    run.process.terminate()
    run.wait()
    checkpoint = (out / "checkpoint.pt").read_bytes()
    runs_out_of_room()
    assert (out / "checkpoint.pt").read_bytes() == checkpoint
    assert Run(*flags, "--out", out).wait()[0] == 0
    assert log(out) == log(straight) and (out / "encoder.pt").read_bytes() == (straight / "encoder.pt").read_bytes()


def test_a_second_process_waits_for_the_first(folder, tmp_path):
    flags = [*TINY, "--data", f"folder:{folder}", "--steps", "100", "--out", tmp_path / "run"]
    first = Run(*flags)
    first.until_step()
    second = Run(*flags)
    assert first.wait()[0] == 0
    status, output = second.wait()
    assert status == 0 and "waiting" in output and "finished" in output and "step" not in output
    assert [line["step"] for line in log(tmp_path / "run")].count(100) == 2              # trained and judged once


def test_long_log(folder, tmp_path):
    """A run that has logged for two million steps resumes at once."""
    out = tmp_path / "run"
    flags = [*TINY, "--data", f"folder:{folder}", *"--steps 100000 --log-every 25 --out".split(), out]
    run = Run(*flags)
    run.until_step(3)
    run.process.terminate()
    run.wait()
    line = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with open(out / "metrics.jsonl", "wb") as file:
        file.writelines(itertools.repeat(line, 80_000))
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"log_bytes": 80_000 * len(line)}, out / "checkpoint.pt")
    began = time.monotonic()
    run = Run(*flags)
    run.until_step()
    assert time.monotonic() - began < 20                # most of it the start of the process
    run.process.kill()
    run.wait()
    began = time.monotonic()
    assert max(report.Run(out).steps) > 2
    assert time.monotonic() - began < 20
    with open(out / "metrics.jsonl", "rb") as file:
        assert sum(1 for _ in file) > 80_000


# ---------------------------------------------------------------------------------------------------- many processes


def two_processes(*flags):
    """byol.py on two processes, as torchrun starts them but for the seconds that takes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    runs = [Run(*flags, **place, RANK=rank) for rank in "01"]
    ends = [run.wait() for run in runs]
    assert [status for status, _ in ends] == [0, 0], ends


@pytest.mark.parametrize("flags", ["--steps 50", "--loss moco --lr 0.01 --steps 10", "--loss simclr --lr 0.003 --steps 10"])
def test_two_processes_train_as_one(flags, folder, tmp_path):
    flags = [*TINY, "--data", f"folder:{folder}", *f"--enc-norm gn --mlp-norm none --log-every 1 {flags}".split()]
    one, two = tmp_path / "one", tmp_path / "two"
    assert byol.main([*flags, "--out", str(one)]) == 0
    two_processes(*flags, "--out", two)
    for ours, theirs in zip(log(one)[:-1], log(two)[:-1], strict=True):
        for name in ("loss", "rep_dist", "y_rank"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_a_killed_worker_ends_the_run_and_it_resumes(folder, tmp_path, capsys):
    flags = [*TINY, "--data", f"folder:{folder}", *"--steps 60 --checkpoint-every 20 --loss simclr".split()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    two_processes(*flags, "--out", straight)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                HERE / "byol.py", *map(str, flags), "--out", killed]
    run = subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in run.stdout:
        if line.startswith("step 24/"):
            break
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output = run.stdout.read()
    assert run.wait() == 1 and "the same command resumes" in output
    assert (killed / "checkpoint.pt").exists()
    assert "processes 2, not 1" in refused(capsys, 2, *flags, "--out", killed)
    done = subprocess.run(torchrun, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed at step" in done.stdout
    assert log(straight) == log(killed)
    assert (straight / "encoder.pt").read_bytes() == (killed / "encoder.pt").read_bytes()


# ---------------------------------------------------------------------------------------------------- run_all.sh


def run_all(*arguments, **environment):
    own = {name: value for name, value in os.environ.items() if name not in ("DATA", "SEEDS", "JOBS", "STEPS", "OUT")}
    return subprocess.Popen(["bash", "run_all.sh", *map(str, arguments)], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),    # in the background it comes ignored, and bash could not trap it
                            env={**own, "PATH": f"{Path(sys.executable).parent}:{own['PATH']}", **environment})


def test_run_all_is_clean_shell():
    subprocess.run([Path(sys.executable).parent / "shellcheck", "run_all.sh", ".ci/run"], cwd=HERE, check=True)


def test_run_all_lists_and_runs_nothing(tmp_path):
    output, _ = run_all("--list", SEEDS="0 1", OUT=str(tmp_path / "out"), STEPS="7").communicate()
    commands = [shlex.split(line) for line in output.splitlines()]
    assert len(commands) == len({c[c.index("--out") + 1] for c in commands}) and not (tmp_path / "out").exists()
    for command in commands:
        assert command[:2] == ["python", "byol.py"] and byol.parse_arguments(command[2:]).steps in (0, 7)
    output, _ = run_all("--list", "C3", "--", "--lr-mult", "layer[1]=2 ").communicate()
    assert shlex.split(output)[-2:] == ["--lr-mult", "layer[1]=2 "]
    for arguments, environment in ((["C9"], {}), (["-x"], {}), ([], {"JOBS": "0"}), ([], {"STEPS": "x"})):
        run = run_all(*arguments, **environment)
        assert run.communicate()[1].startswith("run_all.sh: ") and run.returncode == 2


def test_run_all_gives_each_job_a_gpu_of_its_own(tmp_path):
    for name, script in (("nvidia-smi", "echo 'GPU 0: one'; echo 'GPU 1: two'"), ("python", "sleep 1; echo on $CUDA_VISIBLE_DEVICES")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    run = run_all("D3", SEEDS="0 1", JOBS="2", OUT=str(tmp_path / "out"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "all 4 runs" in run.communicate()[0]
    assert sorted(path.read_text() for path in (tmp_path / "out").glob("*.txt")) == ["on 0\n"] * 2 + ["on 1\n"] * 2


def test_run_all_reports_failures_resumes_and_skips(folder, tmp_path):
    out = tmp_path / "out"
    settings = dict(DATA=f"folder:{folder}", OUT=str(out), STEPS="6", JOBS="2")
    more = ["--", *TINY, "--data-dir", tmp_path / "data"]
    (out / "gn-bn-sgd-s0").mkdir(parents=True)
    (out / "gn-bn-sgd-s0" / "mine").write_text("in the way")
    run = run_all("C4", "C5", *more, **settings)
    output, errors = run.communicate()
    assert run.returncode == 1 and "gn-none-sgd-s0: step      6 linear accuracy" in output
    assert errors.startswith("failed:\ngn-bn-sgd-s0 (exit status 2): byol.py: --out") and len(errors.splitlines()) == 2
    shutil.rmtree(out / "gn-bn-sgd-s0")
    two = [run_all("C4", "C5", *more, **settings) for _ in range(2)]                  # at once, on one folder
    outputs = [run.communicate()[0] for run in two]
    assert [run.returncode for run in two] == [0, 0] and all("gn-none-sgd-s0: finished before" in o for o in outputs)
    assert [line["step"] for line in log(out / "gn-bn-sgd-s0")].count(6) == 2         # trained and judged once
    element = run_all("C4", "C5", *more, **settings, SLURM_ARRAY_TASK_ID="1")            # one run of the two
    assert "gn-bn-sgd-s0 holds this run, finished" in element.communicate()[0] and element.returncode == 0
    beyond = run_all("C4", "C5", *more, **settings, SLURM_ARRAY_TASK_ID="2")
    assert "element 2 of 2 runs" in beyond.communicate()[1] and beyond.returncode == 2
    settings["STEPS"], settings["OUT"] = "100000", str(tmp_path / "long")
    run = run_all("C4", "C5", *more, **settings)
    logs = [tmp_path / "long" / name / "metrics.jsonl" for name in ("gn-none-sgd-s0", "gn-bn-sgd-s0")]
    while not all(path.exists() and path.stat().st_size for path in logs):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    assert "the same command resumes" in run.communicate()[0] and run.returncode == 130
    assert all(path.with_name("checkpoint.pt").exists() for path in logs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint(number, folder, tmp_path):
    run = Run(*TINY, "--data", f"folder:{folder}", "--steps", "100000", "--out", tmp_path / "r")
    run.until_step()
    os.kill(run.process.pid, number)
    status, rest = run.wait()
    assert status == 128 + number and "resumes the run" in rest
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] < 100000


@pytest.mark.parametrize("flags", ["", "--loss simclr --opt lars --enc-norm gn --amp", pytest.param("--device cuda", marks=GPU)])
def test_profile(flags, capsys):
    assert byol.main([*TINY, "--profile", *flags.split()]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    medians = {name: values[0] for name, values in figures.items() if isinstance(values, list)}
    assert set(byol.PARTS) <= set(medians) and all(least <= median <= most for median, least, most in
                                                   (figures[name] for name in medians))
    assert sum(medians[part] for part in byol.PARTS) == pytest.approx(medians["step"], rel=0.3)
    assert medians["samples_per_s"] == pytest.approx(8000 / medians["step"]) and 0 < medians["ratio"] < 1
    assert [row.split()[0] for row in table if row.split()[0] in byol.PARTS[:2]] == ["images", "views"]
    assert not os.path.exists("runs")


def test_amp_keeps_loss_and_metrics_in_fp32(shapes):
    """In bfloat16 autocast the first losses agree to its precision, and loss and metrics are fp32."""
    losses = {}
    for amp in ([], ["--amp"]):
        args = byol.parse_arguments([*"--width 4 --batch-size 16 --steps 5".split(), *amp])
        torch.manual_seed(0)
        online = byol.Network(args)
        target = byol.make_target(online, "byol")
        optimizer = torch.optim.SGD(lars.param_groups(online, 1e-4), 0.1)
        args.amp = bool(amp)                                    # on a CPU without bf16 too, where it is only slow
        loss, outputs = byol.train_step(args, shapes.train, online, target, optimizer, 0)
        assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in outputs)
        losses[bool(amp)] = loss.item()
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.03)


@pytest.mark.parametrize("norms, state", [("--enc-norm bn --mlp-norm bn", "healthy"), ("--enc-norm gn --mlp-norm none", "collapsed")])
@pytest.mark.parametrize("how", ["", "--amp", *(pytest.param(f"--device cuda {how}", marks=GPU) for how in ("", "--amp", "--compile"))])
def test_verdicts_are_the_same(norms, state, how, folder, tmp_path):
    flags = [*TINY, *norms.split(), *how.split(), "--data", f"folder:{folder}", "--steps", "80", "--out", str(tmp_path / "run")]
    assert byol.main(flags) == 0 and log(tmp_path / "run")[-1]["state"] == state


# ---------------------------------------------------------------------------------------------------- a GPU


@GPU
@pytest.mark.parametrize("flags", ["--enc-norm bn", "--enc-norm gn+ws --mlp-norm none --opt lars", "--loss moco --amp", "--loss simclr"])
def test_steps_wait_for_nothing_on_a_gpu(flags, shapes, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = byol.parse_arguments([*TINY, *flags.split(), *"--steps 4 --device cuda".split()])
    images, parts = shapes.pretrain.cuda(), byol.set_up(args)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")       # the first step sets things up
        try:
            loss, _ = byol.train_step(args, images, *parts, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@GPU
@pytest.mark.parametrize("flags", ["--enc-norm bn", "--enc-norm gn --mlp-norm none --opt lars --amp", "--enc-norm gn --mlp-norm none --compile"])
def test_killed_and_resumed_on_a_gpu(flags, folder, tmp_path):
    # not by Run: once a process has asked for a GPU, what is forked from it cannot use one
    command = [sys.executable, HERE / "byol.py", *TINY, "--data", f"folder:{folder}", *f"--steps 80 --checkpoint-every 7 --device cuda {flags}".split()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, "--out", straight], check=True)
    with subprocess.Popen([*command, "--out", killed], stdout=subprocess.PIPE, text=True) as run:
        next(line for line in run.stdout if line.startswith("step 20/"))
        run.kill()
    assert (killed / "checkpoint.pt").exists()
    subprocess.run([*command, "--out", killed], check=True)
    assert log(straight) == log(killed)
    assert (straight / "encoder.pt").read_bytes() == (killed / "encoder.pt").read_bytes()


@GPU
def test_a_gpu_collapses_as_the_cpu(tmp_path):
    """The loss agrees to the precision of TF32 while the distance falls ten thousandfold."""
    lines = {}
    for device in ("cpu", "cuda"):
        flags = "--enc-norm gn --mlp-norm none --width 32 --steps 8 --log-every 1 --eval-every 0 --device"
        assert byol.main([*flags.split(), device, "--out", str(tmp_path / device)]) == 0
        lines[device] = log(tmp_path / device)[:5]
    for cpu, gpu in zip(lines["cpu"], lines["cuda"], strict=True):
        assert cpu["loss"] == pytest.approx(gpu["loss"], rel=5e-3)
        assert cpu["rep_dist"] == pytest.approx(gpu["rep_dist"], rel=2e-2)


# ---------------------------------------------------------------------------------------------------- bad input


def refused(capsys, status, *flags):
    """The one line that the script prints on stderr when it refuses `flags`."""
    with pytest.raises(SystemExit) as end:
        byol.main([str(flag) for flag in flags])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == status and len(lines) == 1 and lines[0].startswith("byol.py: "), lines
    return lines[0]


@pytest.mark.parametrize("flags, word", [
    ("--widht 4", "--widht"),
    ("--enc-norm ln", "--enc-norm"),
    ("--opt adam", "--opt"),
    *((f"{flag} {value}", flag) for flag in "--width --size --batch-size --lr --log-every --checkpoint-every".split() for value in ("0", "-1", "x", "nan")),
    *((f"{flag} -1", flag) for flag in "--steps --epochs --seed --weight-decay --ema --warmup --eval-every".split()),
    ("--ema 1.5", "--ema"), ("--lr inf", "--lr"), ("--lr 1e308", "--lr"), ("--weight-decay 1e308", "--weight-decay"), ("--width 3.5", "--width"), ("--width 100000", "--width"),
    ("--steps 5 --epochs 5", "--epochs"),
    ("--opt lars --lars-layers [", "--lars-layers"), ("--opt lars --lars-layers layer7", "layer7"),
    ("--lars-layers layer1", "--lars-layers"),
    ("--lr-mult layer1", "--lr-mult"), ("--lr-mult layer7=2", "layer7"), ("--lr-mult (=2", "--lr-mult"), ("--lr-mult layer1=x", "--lr-mult"),
    ("--data imagenet", "--data"), ("--data folder:/nowhere/at/all", "folder:/nowhere/at/all"),
    ("--data cifar10 --data-dir nowhere", "--download"), ("--data stl10 --data-dir nowhere", "--download"),
    ("--data fashion-mnist --data-dir nowhere", "--download"),
    ("--batch-size 10001", "--batch-size"), ("--size 129", "--size"), ("--loss moco --batch-size 2049", "--batch-size"),
    ("--device tpu", "--device"), ("--device cuda:99", "--device"),
])
def test_wrong_usage(flags, word, shapes, capsys, tmp_path, monkeypatch):
    drawn = {1000: (shapes.train, shapes.train_labels), 200: (shapes.test, shapes.test_labels)}
    monkeypatch.setattr(byol, "draw_shapes", lambda n, seed: drawn[n])          # once for all of these
    assert word in refused(capsys, 2, *flags.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_folders(folder, tmp_path, capsys):
    def refuse(status, name):
        return refused(capsys, status, *TINY, "--data", f"folder:{tmp_path / name}", "--out", tmp_path / "out")

    def picture(path, colour=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(torch.full((3, 32, 32), colour, dtype=torch.uint8)).save(path)

    (tmp_path / "empty").mkdir()
    assert "train" in refuse(2, "empty")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    assert "train" in refuse(2, "bare")
    for split in ("train", "test"):
        picture(tmp_path / "single" / split / "cat" / "0.png")
        for name in ("cat", "dog"):
            picture(tmp_path / "odd" / split / name / "0.png")
            picture(tmp_path / "broken" / split / name / "0.png")
    assert "one class, cat" in refuse(2, "single")
    picture(tmp_path / "odd" / "test" / "eel" / "0.png")
    assert "eel" in refuse(2, "odd")
    (tmp_path / "broken" / "train" / "dog" / "1.png").write_bytes(b"\x89PNG not really")
    assert "1.png" in refuse(1, "broken")
    half = (tmp_path / "broken" / "test" / "cat" / "0.png").read_bytes()
    (tmp_path / "broken" / "train" / "dog" / "1.png").write_bytes(half[: len(half) // 2])
    assert "1.png" in refuse(1, "broken")


def test_bad_run_folders(folder, tmp_path, capsys):
    flags = [*TINY, "--data", f"folder:{folder}", "--steps", "4"]
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(capsys, 2, *flags, "--out", tmp_path / "file")
    assert "--out" in refused(capsys, 2, *flags, "--out", tmp_path / "file" / "below")
    assert "neither empty nor" in refused(capsys, 2, *flags, "--out", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    out = tmp_path / "run"
    byol.main([*map(str, flags), "--out", str(out)])
    assert byol.main([*map(str, flags), "--out", str(out)]) == 0 and "finished" in capsys.readouterr().out
    assert "--lr 0.2" in refused(capsys, 2, *flags, "--lr", "0.1", "--out", out)
    (out / "config.json").write_text('{"flags": [')
    assert "config.json is damaged" in refused(capsys, 1, *flags, "--out", out)


class Harm:
    """Unpickled, it makes the folder it names."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_damaged_checkpoints_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*TINY, "--data", f"folder:{folder}", "--steps", "100000", "--out", out]
    run = Run(*flags)
    run.until_step(3)
    run.process.terminate()
    run.wait()
    checkpoint, lines = (out / "checkpoint.pt").read_bytes(), log(out)
    foreign = io.BytesIO()
    torch.save({"online": Harm(tmp_path / "harm")}, foreign)
    damaged = [checkpoint[: len(checkpoint) * tenth // 10] for tenth in range(10)]
    damaged += [pickle.dumps(Harm(tmp_path / "harm")), foreign.getvalue(), checkpoint[:-1000] + bytes(1000)]
    for content in damaged:
        (out / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt" in refused(capsys, 1, *flags)
        assert log(out) == lines and (out / "checkpoint.pt").read_bytes() == content
    assert not (tmp_path / "harm").exists()
    (out / "checkpoint.pt").write_bytes(checkpoint)
    resumed = Run(*flags)
    resumed.until_step()
    resumed.process.kill()
    resumed.wait()
    assert log(out)[: len(lines)] == lines


def test_diverging_run(folder, tmp_path, capsys):
    flags = [*TINY, "--data", f"folder:{folder}", "--steps", "500", "--lr", "1e6", "--out", tmp_path / "run"]
    assert "diverged" in refused(capsys, 1, *flags)


FLAGS = """enc-norm mlp-norm proj-norm pred-norm width stem loss ema opt lr warmup weight-decay lars-layers lr-mult steps epochs
batch-size size data data-dir seed device threads log-every eval-every checkpoint-every out amp profile sync-bn""".split()
HOSTILE = ["", " ", "-", "--", "-1", "0", "1", "7", "08", "1_0", "1e3", "0x10", "１", "½", "nan", "-inf", "1e-400", "1e30", "1e308", "9" * 30,
           "none", "bn", "lars", "cuda", "cuda:-1", "cpu:", "meta", "folder:", "folder:.", "[", "(" * 9999, ".{1}{2", "a{9999999999}", "layer=1e300", "=",
           "==1", "layer1=-1", ".=0", "conv=nan", "../up", "a/../b", "~", "$HOME", "a\nb", "'\"; rm -rf x", "\udcff", "😀", "x" * 300, "/dev/null", "/proc/x"]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(flags=st.lists(st.tuples(st.sampled_from(FLAGS), st.sampled_from(HOSTILE) | st.text(max_size=8)), min_size=1, max_size=3))
def test_hostile_values(flags, folder, tmp_path_factory, monkeypatch):
    """Whatever the flags hold: a run, or one line and the right exit status; files only where they are asked for."""
    flags = [(name, value) for name, value in flags if "\0" not in value]              # the system passes none on
    root = tmp_path_factory.mktemp("hostile")
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    tiny = "--width=2 --size=8 --batch-size=4 --out=run --data-dir=decoded".split() + [f"--data=folder:{folder}"]
    tiny += [] if {"steps", "epochs"} & {name for name, _ in flags} else ["--steps=1"]
    tiny += [f"--{name}" if name in ("amp", "profile", "sync-bn") else f"--{name}={value}" for name, value in flags]
    threads, errors = torch.get_num_threads(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
            status = byol.main(tiny)
    except SystemExit as end:
        status = end.code
        assert status in (1, 2) and errors.getvalue().count("\n") == 1 and errors.getvalue().startswith("byol.py: ")
    else:
        assert status == 0 and not errors.getvalue()
    finally:
        torch.set_num_threads(threads)
    asked = [os.path.realpath(value) for name, value in [("out", "run"), ("data-dir", "decoded"), *flags] if name in ("out", "data-dir")]
    for path in root.rglob("*"):
        assert path.name == "here" or path.is_dir() or any(os.path.realpath(path).startswith(place) for place in asked), path


def test_odd_surroundings(folder, tmp_path):
    """A checkout that cannot be written to, no home, another working directory, and a name that needs quoting."""
    checkout = tmp_path / "read only"
    checkout.mkdir()
    for name in ("byol.py", "lars.py", "resnet_norms.py"):
        shutil.copy(HERE / name, checkout)
    checkout.chmod(0o555)
    out = tmp_path / "it's \"a\"\nrun"
    command = [sys.executable, checkout / "byol.py", *TINY, "--steps", "2", "--data", f"folder:{folder}", "--out", tmp_path / "away" / ".." / out]
    environment = {**os.environ, "HOME": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(log(out)) == 3 and sorted(os.listdir(checkout)) == ["byol.py", "lars.py", "resnet_norms.py"]


# ---------------------------------------------------------------------------------------------------- results/report.py

DISTANCES = {  # at steps 1 to 100
    "healthy": [0.5] * 100,
    "collapsed": [0.5] * 2 + [1e-6] * 98,
    "collapsed late": [0.5] * 60 + [1e-6] * 40,
    "recovered": [0.5] * 2 + [1e-6] * 58 + [0.1] * 40,
    "recovered early": [0.5] * 2 + [1e-6] * 8 + [0.1] * 90,
    "relapsed": [0.5] * 2 + [1e-6] * 28 + [0.1] * 30 + [1e-6] * 40,
    "recovered slowly": [0.5] * 2 + [1e-6] * 28 + [2e-3] * 30 + [0.1] * 40,
    "stirred": [0.5] * 2 + [1e-6] * 28 + [2e-3] * 70,
}
BOTH_DECAYS = "gn-none-sgd-wd1e-5-long", "gn-none-sgd-wd1e-3-long"
EVIDENCE = {  # claim: runs that bear it out, runs that contradict it; a run: its distances, its accuracy (random: 20), its layers
    "C1": ([("bn-none-sgd-slow", "recovered", 40)], [("bn-none-sgd-slow", "collapsed", 40)], [("bn-none-sgd-slow", "recovered", 21)]),
    "C2": ([("bn-none-lars", "healthy", 40), ("bn-none-sgd", "recovered", 30)], [("bn-none-lars", "healthy", 30), ("bn-none-sgd", "recovered", 40)],
           [("bn-none-lars", "recovered", 40), ("bn-none-sgd", "recovered", 30)]),
    "C3": ([("bn-bn-sgd", "healthy", 40), ("bn-none-sgd", "recovered", 30)], [("bn-bn-sgd", "recovered", 40), ("bn-none-sgd", "recovered", 30)],
           [("bn-bn-sgd", "healthy", 30), ("bn-none-sgd", "recovered", 40)]),
    "C4": ([("gn-none-sgd", "collapsed", 20)], [("gn-none-sgd", "collapsed late", 20)], [("gn-none-sgd", "recovered", 20)], [("gn-none-sgd", "healthy", 20)]),
    "C5": ([("gn-bn-sgd", "healthy", 40)], [("gn-bn-sgd", "recovered", 40)], [("gn-bn-sgd", "healthy", 22)]),
    "C6": ([("gn-none-lars", "recovered", 30), ("gn-bn-sgd", "healthy", 40)], [("gn-none-lars", "collapsed", 30), ("gn-bn-sgd", "healthy", 40)],
           [("gn-none-lars", "recovered", 50), ("gn-bn-sgd", "healthy", 40)], [("gn-none-lars", "healthy", 30), ("gn-bn-sgd", "healthy", 40)]),
    "C7": ([("gn-none-lars-0.1", "collapsed", 20)], [("gn-none-lars-0.1", "collapsed", 30)], [("gn-none-lars-0.1", "recovered", 20)]),
    "D1": ([("gn-none-sgd-wd1e-4-long", "recovered", 30)], [("gn-none-sgd-wd1e-4-long", "collapsed", 30)], [("gn-none-sgd-wd1e-4-long", "healthy", 30)]),
    "D2": ([("gn-none-sgd-wd3e-4-long", "relapsed", 30)], [("gn-none-sgd-wd3e-4-long", "collapsed", 30)]),
    "D3": ([(name, "collapsed", 20) for name in BOTH_DECAYS], [(name, "recovered", 20) for name in BOTH_DECAYS]),
    "D4": ([("gn-none-sgd-wd1e-4-long", "recovered", 30)], [("gn-none-sgd-wd1e-4-long", "recovered", 30, "flat")], [("gn-none-sgd-wd1e-4-long", "collapsed", 30)]),
    "D5": ([("gnws-none-sgd-long", "relapsed", 30)], [("gnws-none-sgd-long", "recovered", 30)]),
    "D6": ([("gn-none-lars-early", "recovered", 30)], [("gn-none-lars-early", "recovered", 30, "flat")]),
    "D7": ([("gn-none-lars-early", "recovered early", 30), ("gn-none-lars", "recovered", 30), ("gn-none-lars-mlps", "relapsed", 30)],
           [("gn-none-lars-early", "recovered", 30), ("gn-none-lars", "recovered early", 30), ("gn-none-lars-mlps", "relapsed", 30)]),
    "D8": ([("gn-none-sgd-early", "collapsed", 20)], [("gn-none-sgd-early", "relapsed", 20)]),
    "D9": ([("gn-none-lars-mlps", "relapsed", 20)], [("gn-none-lars-mlps", "collapsed", 20)], [("gn-none-lars-mlps", "recovered", 20)]),
    "D10": ([("gn-none-lars-0.5", "recovered", 30), ("gn-none-lars-0.1", "collapsed late", 20)],
            [("gn-none-lars-0.5", "recovered", 30), ("gn-none-lars-0.1", "recovered", 20)],
            [("gn-none-lars-0.5", "relapsed", 30), ("gn-none-lars-0.1", "collapsed", 20)]),
    "B1": ([("bn-none-sgd-short", "collapsed", 20)], [("bn-none-sgd-short", "collapsed", 30)]),
    "B2": ([("bn-ln-sgd-short", "collapsed", 20)], [("bn-ln-sgd-short", "collapsed", 30)]),
    "B3": ([("bn-none-moco", "healthy", 30)], [("bn-none-moco", "collapsed", 30)], [("bn-none-moco", "healthy", 20)]),
    "B4": ([("bn-bn.none-sgd", "healthy", 30), ("bn-none.bn-sgd", "healthy", 30)], [("bn-bn.none-sgd", "healthy", 30), ("bn-none.bn-sgd", "collapsed", 30)]),
    "B5": ([("gn-none-sgd", "collapsed", 30)], [("gn-none-sgd", "healthy", 30)]),
    "X1": ([("gnws-none-lars-warm", "healthy", 38), ("bn-bn-sgd", "healthy", 40)], [("gnws-none-lars-warm", "healthy", 30), ("bn-bn-sgd", "healthy", 40)]),
}


def write_run(folder, name, seed, distances, accuracy, layers=""):
    out = folder / f"{name}-s{seed}"
    out.mkdir(parents=True, exist_ok=True)
    enc = {"bn": "bn", "gn": "gn", "gnws": "gn+ws", "map": "gn", "wide": "gn"}[name.removeprefix("random-").split("-")[0]]
    flags = dict(enc_norm=enc, steps=len(distances), seed=seed, data="shapes", size=16, width=8, stem="cifar", batch_size=64,
                 opt="lars" if "lars" in name else "sgd")
    if found := report.MAP.fullmatch(name):
        flags |= dict(lr=float(found[2]), weight_decay=float(found[3]))
    (out / "config.json").write_text(json.dumps(dict(flags=flags, command=f"python byol.py --seed {seed}", versions={},
                                                     hardware=dict(cpu="CPU", gpu=None, machine="x", threads=1))))
    lines = []
    for step, distance in enumerate(distances, 1):
        values = dict(grad_norm=1.0, lars_rate=0.01, max_over_rms=5.0, weight_norm=1.0)
        if layers != "flat":            # as the appendix has it: vanishing gradients, exploding rates, a few large weights
            values |= dict(grad_norm=distance, lars_rate=0.01 / distance, max_over_rms=10.0 if distance < 0.01 else 5.0)
        lines.append(dict(step=step, loss=distance, rep_dist=distance, neg_cos=1 - distance, pos_cos=1 - distance / 2, images_per_s=64.0,
                          layers=dict.fromkeys(("layer1", "projection", "prediction"), values)))
    lines.append(dict(step=len(distances), accuracy=accuracy, state=""))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(folder, *runs_of_seed):
    for seed, runs in enumerate(runs_of_seed):
        for norm in ("bn", "gn", "gnws"):
            write_run(folder, f"random-{norm}", seed, [], 20)
        for name, distances, *rest in runs:
            write_run(folder, name, seed, DISTANCES[distances], *rest)
    return report.load(folder)


@pytest.mark.parametrize("claim", list(report.CLAIMS))
def test_verdicts_can_fail(claim, tmp_path):
    holds, *fails = EVIDENCE[claim]
    assert report.verdict(claim, write_sweep(tmp_path / "none", [])) == ("not run", [])
    assert report.verdict(claim, write_sweep(tmp_path / "holds", holds)) == ("reproduced", [0])
    for i, runs in enumerate(fails):
        assert report.verdict(claim, write_sweep(tmp_path / f"fails{i}", runs)) == ("not reproduced", [0])
    mixed = "reproduced" if claim == "D2" else "mixed (1 of 2 seeds)"
    assert report.verdict(claim, write_sweep(tmp_path / "mixed", holds, fails[0])) == (mixed, [0, 1])


def test_growth_is_the_time_of_an_e_fold():
    run = report.Run.__new__(report.Run)
    values = {1: 0.3, 2: float("nan"), 500: 1e-5, **{step: 1e-4 * math.exp((step - 1000) / 250) for step in range(1000, 3001, 100)}}
    run.steps = {step: {"common_dist": value} for step, value in values.items()}
    assert run.growth == 250
    run.steps = {step: line for step, line in run.steps.items() if step < 2500}         # 0.04 at most
    assert run.growth is None


def test_common_variation_is_pairs_against_strangers(folder, capsys):
    flags = [*TINY, "--data", f"folder:{folder}", "--enc-norm", "gn", "--mlp-norm", "none", "--steps", "3"]
    growth.main(flags)
    lines = capsys.readouterr().out.split("slope\n")[1].splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 2]
    args = byol.parse_arguments([*flags, "--seed", "1", "--batch-size", "45"])
    images = byol.load_images(args.data, args.data_dir, False, 16).pretrain
    online = byol.set_up(byol.parse_arguments(flags))[0]
    _, *outputs = online(byol.draw_views(images, 0, args, lambda part: None))
    (z1, z2), (q1, q2) = (byol.unit(t).detach().chunk(2) for t in outputs)
    strangers = sum((z @ z.T).fill_diagonal_(0).sum() / (45 * 44) for z in (z1, z2)) / 2
    distance, common, strongest, slope = (float(value) for value in lines[0].split()[1:])
    assert distance == pytest.approx(1 - strangers.item(), rel=0.01) and common == pytest.approx(((z1 * z2).sum(1).mean() - strangers).item(), rel=0.01)
    z1, z2, q1, q2 = ((t - t.mean(0)).double().numpy() for t in (z1, z2, q1, q2))
    variances, directions = np.linalg.eigh((np.cov((z1 + z2).T, bias=True) - np.cov((z1 - z2).T, bias=True)) / 4)
    along = lambda a, b: np.concatenate([a, b]) @ directions[:, -1]
    assert strongest == pytest.approx(variances[-1], rel=0.01) and slope == pytest.approx(np.polyfit(along(z1, z2), along(q1, q2), 1)[0], rel=0.01)


def test_report_is_written_alike_each_time(tmp_path):
    write_sweep(tmp_path / "sweep", *[[*EVIDENCE["C4"][0], ("map-sgd-0.1-1e-4", "collapsed", 20)]] * 2)
    report.main(tmp_path / "sweep")
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    report.main(tmp_path / "sweep")
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(SystemExit, match="no finished run"):
        report.main(tmp_path)


def test_report_shows_every_figure_and_note(tmp_path):
    more = [(f"map-{opt}-{lr}-1e-4", "recovered", 25) for opt in ("sgd", "lars") for lr in (0.1, 0.2)]
    more += [("wide-sgd-24000", "recovered", 45)]
    write_sweep(tmp_path, [run for holds, *_ in EVIDENCE.values() for run in holds] + more, EVIDENCE["C4"][0])
    (tmp_path / "notes.md").write_text("# Summary\nIt reaches {{gn-none-sgd accuracy}}.\n# C4\nLater: {{no-such-run state}}.\n")
    report.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert figures == {"summary", "map-sgd", "map-lars", *report.FIGURES, *report.WHY} and all(f"{name}.png" in text for name in figures)
    assert "It reaches 25 +- 7.1 %." in text and text.count("not run") == 1 and "\n## C4\n\nLater: not run.\n" in text


def test_report_tells_cut_off_runs_and_counts_them_nowhere(tmp_path):
    sweep = write_sweep(tmp_path, [("gn-none-sgd", "recovered", 30)], [("gn-none-sgd", "collapsed", 30)])
    assert report.verdict("C4", sweep) == ("mixed (1 of 2 seeds)", [0, 1])
    report.main(tmp_path)
    assert "Cut off" not in (tmp_path / "README.md").read_text()
    for seed, length in ((0, 20), (1, 10)):
        log = tmp_path / f"gn-none-sgd-s{seed}" / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:length]))
    assert report.verdict("C4", report.load(tmp_path)) == ("not run", [])
    report.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| gn-none-sgd | 20 | 100 |  |  |" in text and "| gn-none-sgd | 10 | 100 |  |  |" in text and "cut-off.png" in text


def test_the_early_sign_can_fail(tmp_path):
    runs = [("gn-none-lars", "recovered slowly", 30), ("gn-none-lars-0.1", "recovered", 30), ("gn-none-sgd", "collapsed", 20),
            ("gn-none-sgd-early", "stirred", 20), ("gn-bn-sgd", "healthy", 40)]
    text = report.early_sign(write_sweep(tmp_path, runs))
    assert "Of 4 runs that fell under 0.01, 2 came back" in text and "in 1 of these" in text and "(30 steps earlier" in text
    assert text.endswith("Of the 2 others, it never was in 1.")


def test_run_all_runs_what_the_report_needs():
    table = (HERE / "run_all.sh").read_text().split('CONFIGURATIONS="')[1].split('"')[0]
    rows = [line.split()[:2] for line in table.splitlines() if line]
    for claim, (_, names, *_) in report.CLAIMS.items():
        assert {name for ids, name in rows if claim in ids.split(",")} == set(names), claim
    output, _ = run_all("--list", "D7", "C5").communicate()
    asked = {shlex.split(line)[-1] for line in output.splitlines()}
    assert asked == {f"runs/{name}-s0" for claim in ("D7", "C5") for name in report.CLAIMS[claim][1]}
