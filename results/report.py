"""The verdict on every claim, drawn from the logs of a sweep: python results/report.py [DIR]

Reads the runs of `run_all.sh` in DIR (the folder of this script), each a folder NAME-sSEED with config.json and
metrics.jsonl, and writes DIR/README.md and DIR/figures. Each claim is a row of CLAIMS: its wording, the runs it needs and
the rule that one seed's runs must meet. Same logs, same files, byte for byte.
"""

import collections
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["axes.formatter.min_exponent"] = 2          # 6, not 6 x 10^0
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from byol import COLLAPSED, RECOVERED, collapse_state

USEFUL = 5          # points above random features of the same encoder that make a representation useful
COMMON = 0.3        # share of the variation common to both views that announces a recovery
NOISE, GROWN = 2e-4, 0.05       # variation common to both views: what 32 images do not show, and where its growth ends
RANDOM = {"bn": "random-bn", "gn": "random-gn", "gn+ws": "random-gnws"}


class Run:
    """One run's log: `steps` {step: line}, `accuracies` {step: percent}, and the states that its distances went through."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        self.flags, self.hardware = config["flags"], config["hardware"]
        self.command = config["command"].replace("|", "\\|")        # or it would end a table's cell
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.steps = {line["step"]: line for line in lines if "loss" in line}
        self.accuracies = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
        self.finished = self.flags["steps"] in self.accuracies
        logged = [0, *self.steps]
        self.seconds = sum((b - a) * self.flags["batch_size"] / self.steps[b]["images_per_s"] for a, b in zip(logged, logged[1:]))
        for line in self.steps.values():        # pos_cos is logged to 1e-6, so of a smaller variation it says nothing
            line["common"] = 1 - (1 - line["pos_cos"]) / line["rep_dist"] if line["rep_dist"] > 1e-5 else float("nan")
            line["common_dist"] = line["common"] * line["rep_dist"]
        self.states, state = {}, "untrained"
        for step, line in self.steps.items():
            self.states[step] = state = collapse_state(state, line["rep_dist"])
        self.state = state

    def series(self, name, layer=None):
        """(steps, values) of a metric, or of a layer's."""
        return list(self.steps), [line["layers"][layer][name] if layer else line[name] for line in self.steps.values()]

    @property
    def device(self):
        return self.hardware["gpu"] or self.hardware["cpu"] or self.hardware["machine"]

    def final(self, name):
        return list(self.steps.values())[-1][name]

    @property
    def accuracy(self):
        """The last linear accuracy."""
        return self.accuracies[max(self.accuracies)]

    def entries(self, state):
        """Steps at which the run enters a state."""
        steps = list(self.states)
        return [b for a, b in zip([None, *steps], steps) if self.states[b] == state != self.states.get(a)]

    @property
    def collapsed_at(self):
        return next(iter(self.entries("collapsed")), None)

    @property
    def recovered_at(self):
        return next(iter(self.entries("recovered")), None)

    @property
    def lowest(self):
        """The smallest representation distance."""
        return min(line["rep_dist"] for line in self.steps.values())

    @property
    def separated_from(self):
        """The step from which on the distance stays over RECOVERED, or infinity."""
        low = [step for step, line in self.steps.items() if line["rep_dist"] <= RECOVERED]
        later = [step for step in self.steps if not low or step > low[-1]]
        return later[0] if later else float("inf")

    def fallen_then(self, name, bound):
        """The first step at which a metric is over a bound, after the distance's first fall under RECOVERED; or None."""
        fallen = next((step for step, line in self.steps.items() if line["rep_dist"] < RECOVERED), float("inf"))
        return next((step for step, line in self.steps.items() if step > fallen and line[name] > bound), None)

    @property
    def announced_at(self):
        return self.fallen_then("common", COMMON)

    @property
    def growth(self):
        """Steps in which the variation common to both views grows e-fold on its way from NOISE to GROWN, or None where it
        does not get there."""
        fallen, start = False, None
        for step, value in zip(*self.series("common_dist")):
            if value < NOISE:
                fallen, start = True, None
            elif fallen and value >= NOISE:
                start = start or (step, value)
                if value > GROWN:
                    return round((step - start[0]) / math.log(value / start[1])) if step > start[0] else None
        return None

    def at_lowest(self, name, layer):
        """A layer's metric where the distance is smallest, over its value at step 1."""
        _, values = self.series(name, layer)
        _, distances = self.series("rep_dist")
        return values[distances.index(min(distances))] / values[0]


def gain(runs, name):
    """Points of accuracy above random features of the same encoder."""
    return runs[name].accuracy - runs[RANDOM[runs[name].flags["enc_norm"]]].accuracy


def late_recovery(run):
    return run.collapsed_at is not None and run.collapsed_at <= run.flags["steps"] / 10 and run.state == "recovered"


def loss_rises(run):
    """Whether the final loss is over ten times the loss at the smallest distance."""
    _, losses = run.series("loss")
    _, distances = run.series("rep_dist")
    return losses[-1] > 10 * losses[distances.index(min(distances))]


def large_weights_come_down(run):
    """Whether the largest weight, over its tensor's rms, grows into the collapse and is smaller again at the recovery."""
    if run.collapsed_at is None or run.recovered_at is None:
        return False
    largest = {s: max(layer["max_over_rms"] for layer in line["layers"].values()) for s, line in run.steps.items()}
    peak = max(value for step, value in largest.items() if step <= run.recovered_at)
    return peak > 1.2 * largest[1] and largest[run.recovered_at] < 0.9 * peak


def rate_peak(run):
    steps, rates = run.series("lars_rate", "layer1")
    return steps[rates.index(max(rates))]


CLAIMS = {  # id: (wording, runs it needs beside random features, rule for the runs of one seed, what the original reports)
    "C1": ("BN encoder, no MLP norm, SGD: collapses, then leaves the collapse; loss rises, encodings become useful",
           ["bn-none-sgd-slow"], lambda r: late_recovery(r["bn-none-sgd-slow"]) and loss_rises(r["bn-none-sgd-slow"])
           and gain(r, "bn-none-sgd-slow") >= USEFUL, ""),
    "C2": ("the same with LARS 0.2: no collapse, better than with SGD", ["bn-none-lars", "bn-none-sgd"],
           lambda r: r["bn-none-lars"].state == "healthy" and r["bn-none-lars"].accuracy > r["bn-none-sgd"].accuracy, ""),
    "C3": ("BN everywhere, SGD: never collapses, better than without MLP norm", ["bn-bn-sgd", "bn-none-sgd"],
           lambda r: r["bn-bn-sgd"].state == "healthy" and r["bn-bn-sgd"].accuracy > r["bn-none-sgd"].accuracy, ""),
    "C4": ("no batch statistics, SGD: collapses almost at once and never recovers", ["gn-none-sgd"],
           lambda r: r["gn-none-sgd"].collapsed_at is not None and r["gn-none-sgd"].state == "collapsed"
           and r["gn-none-sgd"].collapsed_at <= r["gn-none-sgd"].flags["steps"] / 20, ""),
    "C5": ("GN encoder, BN in the MLPs: they alone prevent the collapse", ["gn-bn-sgd"],
           lambda r: r["gn-bn-sgd"].state == "healthy" and gain(r, "gn-bn-sgd") >= USEFUL, ""),
    "C6": ("no batch statistics, LARS 0.2: collapses, recovers, learns; stays below C5", ["gn-none-lars", "gn-bn-sgd"],
           lambda r: r["gn-none-lars"].state == "recovered" and gain(r, "gn-none-lars") >= USEFUL
           and r["gn-none-lars"].accuracy < r["gn-bn-sgd"].accuracy, ""),
    "C7": ("no batch statistics, LARS 0.1: collapses and learns nothing", ["gn-none-lars-0.1"],
           lambda r: r["gn-none-lars-0.1"].state == "collapsed" and gain(r, "gn-none-lars-0.1") < USEFUL, ""),
    "D1": ("SGD, a small weight decay (1e-5; here 1e-4): leaves the collapse late, loss rising", ["gn-none-sgd-wd1e-4-long"],
           lambda r: late_recovery(r["gn-none-sgd-wd1e-4-long"]) and loss_rises(r["gn-none-sgd-wd1e-4-long"]), "56 %"),
    "D2": ("SGD, a larger one (1e-4; here 3e-4): occasional recovery", ["gn-none-sgd-wd3e-4-long"],
           lambda r: r["gn-none-sgd-wd3e-4-long"].recovered_at is not None, ""),
    "D3": ("SGD, weight decay below and above those (here 1e-5 and 1e-3): no recovery", ["gn-none-sgd-wd1e-5-long", "gn-none-sgd-wd1e-3-long"],
           lambda r: all(r[name].collapsed_at is not None and r[name].recovered_at is None
                         for name in ("gn-none-sgd-wd1e-5-long", "gn-none-sgd-wd1e-3-long")), ""),
    "D4": ("mechanism of D1: the collapsed network holds a few large weights, and decay brings them down",
           ["gn-none-sgd-wd1e-4-long"], lambda r: large_weights_come_down(r["gn-none-sgd-wd1e-4-long"]), ""),
    "D5": ("GN and weight standardization, SGD: collapses and recovers, repeatedly", ["gnws-none-sgd-long"],
           lambda r: r["gnws-none-sgd-long"].recovered_at is not None and len(r["gnws-none-sgd-long"].entries("collapsed")) > 1, "51 %"),
    "D6": ("as the network collapses, the gradient of layer1 vanishes and its LARS rate explodes", ["gn-none-lars-early"],
           lambda r: r["gn-none-lars-early"].at_lowest("grad_norm", "layer1") < 0.1
           and r["gn-none-lars-early"].at_lowest("lars_rate", "layer1") > 10, ""),
    "D7": ("LARS on layer1 and layer2 only separates representations fastest",
           ["gn-none-lars-early", "gn-none-lars", "gn-none-lars-mlps"],
           lambda r: r["gn-none-lars-early"].separated_from < min(r["gn-none-lars"].separated_from,
                                                                  r["gn-none-lars-mlps"].separated_from), ""),
    "D8": ("SGD with ten times the rate on layer1 and layer2 does not recover", ["gn-none-sgd-early"],
           lambda r: r["gn-none-sgd-early"].collapsed_at is not None and r["gn-none-sgd-early"].recovered_at is None, ""),
    "D9": ("LARS on the MLPs only disrupts the collapse for a while, then collapses again", ["gn-none-lars-mlps"],
           lambda r: r["gn-none-lars-mlps"].recovered_at is not None and r["gn-none-lars-mlps"].state == "collapsed", ""),
    "D10": ("LARS 0.5: layer1's rate peaks early and learning follows; 0.1: it peaks late and nothing recovers",
            ["gn-none-lars-0.5", "gn-none-lars-0.1"],
            lambda r: rate_peak(r["gn-none-lars-0.5"]) < rate_peak(r["gn-none-lars-0.1"])
            and r["gn-none-lars-0.5"].state != "collapsed" and r["gn-none-lars-0.1"].state == "collapsed", ""),
    "B1": ("no MLP norm, short run: no better than random features", ["bn-none-sgd-short"],
           lambda r: gain(r, "bn-none-sgd-short") < USEFUL, ""),
    "B2": ("LayerNorm in the MLPs, short run: does not help", ["bn-ln-sgd-short"],
           lambda r: gain(r, "bn-ln-sgd-short") < USEFUL, ""),
    "B3": ("explicit negatives (MoCo), no MLP norm: learns", ["bn-none-moco"],
           lambda r: r["bn-none-moco"].state == "healthy" and gain(r, "bn-none-moco") >= USEFUL, ""),
    "B4": ("BN in the projection only, or in the prediction only, prevents the collapse", ["bn-bn.none-sgd", "bn-none.bn-sgd"],
           lambda r: r["bn-bn.none-sgd"].state == r["bn-none.bn-sgd"].state == "healthy", ""),
    "B5": ("in a collapsed run the projections of different images are almost identical", ["gn-none-sgd"],
           lambda r: r["gn-none-sgd"].final("neg_cos") > 0.999 and r["gn-none-sgd"].final("loss") < 0.01, ""),
    "X1": ("GN and weight standardization, LARS: learns about as well as BN", ["gnws-none-lars-warm", "bn-bn-sgd"],
           lambda r: r["gnws-none-lars-warm"].accuracy > r["bn-bn-sgd"].accuracy - USEFUL, ""),
}


def verdict(claim, sweep):
    """(verdict in words, the seeds that have every run it needs)."""
    _, names, rule, _ = CLAIMS[claim]
    held = {}
    for seed, runs in sweep.items():
        needed = names + [RANDOM[runs[name].flags["enc_norm"]] for name in names if name in runs]
        if all(name in runs for name in needed):
            held[seed] = rule(runs)
    if not held:
        words = "not run"
    elif all(held.values()) or claim == "D2" and any(held.values()):       # D2 says that some recover, not all
        words = "reproduced"
    elif not any(held.values()):
        words = "not reproduced"
    else:
        words = f"mixed ({sum(held.values())} of {len(held)} seeds)"
    return words, list(held)


def seeds_of(name, sweep):
    """The runs of a configuration, one for each seed that has it."""
    return [runs[name] for _, runs in sorted(sweep.items()) if name in runs]


def load(folder, finished=True):
    """{seed: {name: Run}} of the finished runs of a folder, or of those that were cut off."""
    sweep = {}
    for path in sorted(folder.glob("*-s*/metrics.jsonl")):
        name, seed = re.fullmatch(r"(.+)-s(\d+)", path.parent.name).groups()
        run = Run(path.parent)
        if run.finished == finished and (finished or run.steps):
            sweep.setdefault(int(seed), {})[name] = run
    return sweep


FIGURES = {  # file: (title, runs, metric, layer), after the appendix's figures
    "accuracy-bn": ("BN encoder", ["bn-bn-sgd", "bn-none-sgd-slow", "bn-none-sgd", "bn-none-lars"], "accuracy", None),
    "accuracy-gn": ("GN encoder", ["gn-bn-sgd", "gn-none-sgd", "gn-none-lars", "gn-none-lars-0.1"], "accuracy", None),
    "decay-distance": ("SGD, weight decay", ["gn-none-sgd-wd1e-5-long", "gn-none-sgd-wd1e-4-long", "gn-none-sgd-wd3e-4-long",
                                             "gn-none-sgd-wd1e-3-long"], "rep_dist", None),
    "decay-loss": ("SGD, weight decay", ["gn-none-sgd-wd1e-4-long"], "loss", None),
    "decay-weights": ("largest weight over rms, prediction", ["gn-none-sgd-wd1e-5-long", "gn-none-sgd-wd1e-4-long", "gn-none-sgd-wd3e-4-long"],
                      "max_over_rms", "prediction"),
    "standardized-distance": ("GN with weight standardization, SGD", ["gnws-none-sgd-long", "gnws-none-sgd-24000", "gnws-none-sgd-slow"], "rep_dist", None),
    "standardized-loss": ("GN with weight standardization, SGD", ["gnws-none-sgd-long", "gnws-none-sgd-24000", "gnws-none-sgd-slow"], "loss", None),
    "early-rate": ("LARS on layer1 and layer2 only: rate of layer1", ["gn-none-lars-early"], "lars_rate", "layer1"),
    "early-gradient": ("gradient of layer1", ["gn-none-lars-early", "gn-none-sgd-early"], "grad_norm", "layer1"),
    "early-distance": ("LARS, or a higher rate, on layer1 and layer2", ["gn-none-lars-early", "gn-none-sgd-early"],
                       "rep_dist", None),
    "mlps-rate": ("LARS on the MLPs only: rate of the projection", ["gn-none-lars-mlps"], "lars_rate", "projection"),
    "mlps-loss": ("LARS on the MLPs only", ["gn-none-lars-mlps"], "loss", None),
    "warm-up": ("Warm-up of 0 or 4,100 steps", ["gn-none-sgd", "scan-sgd-warm", "gn-none-lars", "scan-lars-0.2-warm"],
                "rep_dist", None),
    "return": ("Warm-up of 600 steps: EMA, length or decay varied",
               ["gn-none-sgd-wd1e-4", "scan-sgd-ema-0.99", "scan-sgd-ema-0.999", "gn-none-sgd-wd1e-4-long", "scan-sgd-12000-wd0"],
               "rep_dist", None),
    "growth": ("Variation of z common to both views: share x distance", ["gn-none-sgd-wd3e-4-long", "gn-none-sgd-wd1e-4-long", "gn-none-sgd-wd1e-5-long",
                                                  "scan-sgd-12000-wd0"], "common_dist", None),
    "wide": ("Without batch statistics, at the original's width and view size",
             ["wide-gn-none-lars", "wide-sgd-24000", "wide-sgd-24000-wd1e-5", "wide-sgd-12000"], "rep_dist", None),
    "common": ("Share of the variation of z that is common to both views", ["gn-none-lars", "gn-none-lars-0.1", "gn-none-sgd-wd1e-4-long",
                                                                            "scan-sgd-warm", "gn-none-lars-mlps"], "common", None),
    "rates-rate": ("LARS: rate of layer1", ["gn-none-lars-0.5", "gn-none-lars", "gn-none-lars-0.1"], "lars_rate", "layer1"),
    "rates-distance": ("LARS", ["gn-none-lars-0.5", "gn-none-lars", "gn-none-lars-0.1"], "rep_dist", None),
}
FIGURE_OF = {"C1": "accuracy-bn", "C2": "accuracy-bn", "C3": "accuracy-bn", "C4": "accuracy-gn", "C5": "accuracy-gn",
             "C6": "accuracy-gn", "C7": "accuracy-gn", "D1": "decay-distance", "D2": "decay-distance", "D3": "decay-distance",
             "D4": "decay-weights", "D5": "standardized-distance", "D6": "early-rate", "D7": "early-distance",
             "D8": "early-distance", "D9": "mlps-loss", "D10": "rates-rate"}
LABELS = {"accuracy": "linear accuracy in %", "rep_dist": "representation distance", "loss": "training loss",
          "common": "share common to both views", "common_dist": "share x representation distance", "lars_rate": "local LARS rate",
          "grad_norm": "gradient norm", "weight_norm": "weight norm", "max_over_rms": "largest weight / rms"}
SHADED = {"rep_dist": COLLAPSED, "common_dist": NOISE}           # under this
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]     # Okabe and Ito: colour-blind safe
WHY = {  # file: (title, run): every layer around the moment of collapse and of recovery
    "layers-sgd": ("SGD, no batch statistics", "gn-none-sgd"),
    "layers-decay": ("SGD with weight decay, no batch statistics", "gn-none-sgd-wd1e-4-long"),
    "layers-early": ("LARS on layer1 and layer2 only", "gn-none-lars-early"),
    "layers-0.5": ("LARS 0.5", "gn-none-lars-0.5"),
    "layers-0.1": ("LARS 0.1", "gn-none-lars-0.1"),
}
MAP = re.compile(r"map-(sgd|lars)-([^-]+)-(.+)")                # optimizer, rate, weight decay


def curves(axes, runs, colour, label, metric, layer=None):
    """A thin line for each run and a thick one for their mean."""
    drawn = []
    for run in runs:
        steps, values = run.series(metric, layer) if metric != "accuracy" else map(list, zip(*run.accuracies.items()))
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.6)
        drawn.append(values)
    means = [statistics.fmean(column) for column in zip(*drawn)]        # as far as the shortest goes
    axes.plot(steps[: len(means)], means, color=colour, linewidth=2, label=label)


def draw_curves(title, names, metric, layer, sweep):
    """A metric of some runs, one colour for each configuration."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, colour in zip(names, COLOURS):
        if runs := seeds_of(name, sweep):
            curves(axes, runs, colour, name, metric, layer)
    if metric not in ("accuracy", "common"):
        axes.set_yscale("log")
    if metric in SHADED:
        axes.set_ylim(bottom=axes.get_ylim()[0])
        axes.axhspan(0, SHADED[metric], color="0.93", zorder=0)
    axes.set(title=title, xlabel="optimizer steps", ylabel=LABELS[metric])
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))         # outside, so on no curve
    return figure


def draw_layers(title, name, sweep):
    """What D4, D6 and D10 speak of, for every layer group of one configuration, over the logarithm of the step."""
    runs = seeds_of(name, sweep)
    metrics = ["grad_norm", "weight_norm", "max_over_rms", "lars_rate" if runs[0].flags["opt"] == "lars" else "loss"]
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex=True, gridspec_kw=dict(wspace=0.35, hspace=0.15))
    for axes, metric in zip(panels.flat, metrics):
        if metric == "loss":
            curves(axes, runs, COLOURS[0], metric, metric)
        for (layer, values), colour in zip(runs[0].final("layers").items(), COLOURS):
            if metric != "loss" and values[metric] is not None:
                curves(axes, runs, colour, layer, metric, layer)
        distance = axes.twinx()
        curves(distance, runs, "0.6", "representation distance", "rep_dist")
        distance.set(yscale="log", ylim=(1e-8, 2))
        distance.tick_params(colors="0.5")
        axes.set(xscale="log", yscale="log", title=LABELS[metric])
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; grey, right: representation distance", y=0.95)
    figure.supxlabel("optimizer steps", y=0.04)
    return figure


def draw_map(optimizer, sweep):
    """Rate against weight decay: the final representation distance as colour, the linear accuracy in the cell."""
    cells = {}
    for runs in sweep.values():
        for name, run in runs.items():
            if (found := MAP.fullmatch(name)) and found[1] == optimizer:
                cells.setdefault((run.flags["weight_decay"], run.flags["lr"]), []).append(run)
    decays, rates = (sorted({key[i] for key in cells}) for i in (0, 1))
    # under the colours' range all is alike; the mean over seeds is of the logarithms, as the colours are
    distance = [[statistics.geometric_mean(max(run.final("rep_dist"), 1e-8) for run in cells[decay, rate])
                 if (decay, rate) in cells else float("nan") for rate in rates] for decay in decays]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    image = axes.imshow(distance, norm=LogNorm(1e-7, 1), cmap="cividis", origin="lower", aspect="auto")
    for (decay, rate), runs in cells.items():
        place = decays.index(decay), rates.index(rate)
        recovered = sum(run.state == "recovered" for run in runs)
        text = f"{statistics.fmean(run.accuracy for run in runs):.1f}" + f"\n{recovered} of {len(runs)}" * (len(runs) > 1)
        text += "\nrecovered" * (recovered > 0 or len(runs) > 1)
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=9,
                  color="black" if distance[place[0]][place[1]] > 1e-3 else "white")
    axes.set(xticks=range(len(rates)), xticklabels=[f"{rate:g}" for rate in rates], yticks=range(len(decays)),
             yticklabels=[f"{decay:g}" for decay in decays], xlabel="learning rate", ylabel="weight decay",
             title=f"{optimizer.upper()}, no batch statistics, {runs[0].flags['steps']:,} steps: linear accuracy in %")
    figure.colorbar(image, label="final representation distance")
    return figure


def draw_summary(sweep):
    """Every configuration of the claims: the final representation distance, and the accuracy beside random features."""
    names = [name for name in dict.fromkeys(name for row in CLAIMS.values() for name in row[1]) if seeds_of(name, sweep)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.3 * len(names)), sharey=True, layout="constrained")
    for place, name in enumerate(reversed(names)):
        runs = seeds_of(name, sweep)
        points = dict(color=[COLOURS[run.state == "collapsed"] for run in runs], alpha=0.7)
        left.scatter([max(run.final("rep_dist"), 3e-8) for run in runs], [place] * len(runs), clip_on=False, **points)
        right.scatter([run.accuracy for run in runs], [place] * len(runs), **points)
        random = [run.accuracy for run in seeds_of(RANDOM[runs[0].flags["enc_norm"]], sweep)]
        right.plot(random, [place] * len(random), color="0.5", marker="|", linestyle="", markersize=9)
    left.set(xscale="log", xlim=(3e-8, 2), xlabel="final representation distance (at the edge: or less)", yticks=range(len(names)), yticklabels=names[::-1])
    left.axvspan(3e-8, COLLAPSED, color="0.93", zorder=0)
    left.text(1e-7, len(names) - 0.4, f"under {COLLAPSED:g}", color="0.4", fontsize=9)
    for colour, label in zip(COLOURS, ("ends healthy or recovered", "ends collapsed")):
        left.scatter([], [], color=colour, alpha=0.7, label=label)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    right.set(xlabel="linear accuracy in % (grey bars: random features)", ylim=(-0.7, len(names)))
    for axes in (left, right):
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def draw_all(folder, sweep, cut):
    """Write every figure that the sweep has runs for, and one of the runs cut off; returns their names."""
    figures = {"summary": functools.partial(draw_summary, sweep)}
    for name, (title, names, metric, layer) in FIGURES.items():
        if any(seeds_of(run, sweep) for run in names):
            figures[name] = functools.partial(draw_curves, title, names, metric, layer, sweep)
    for name, (title, run) in WHY.items():
        if seeds_of(run, sweep):
            figures[name] = functools.partial(draw_layers, title, run, sweep)
    for optimizer in ("sgd", "lars"):
        if any(name.startswith(f"map-{optimizer}-") for runs in sweep.values() for name in runs):
            figures[f"map-{optimizer}"] = functools.partial(draw_map, optimizer, sweep)
    if cut:
        names = sorted({name for runs in cut.values() for name in runs})
        figures["cut-off"] = functools.partial(draw_curves, "Runs that were cut off", names, "rep_dist", None, cut)
    for name, make in figures.items():
        figure = make()
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return list(figures)


def spread(values, digits):
    """Mean and, of several, standard deviation."""
    text = f"{statistics.fmean(values):.{digits}g}" if values else ""
    return text + (f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def shown(steps):
    return ", ".join("never" if step in (None, float("inf")) else f"{step:,}" for step in steps)


FACTS = {  # what {{run fact}} in notes.md stands for
    "accuracy": lambda runs: spread([run.accuracy for run in runs], 4) + " %",
    "distance": lambda runs: ", ".join(f"{run.final('rep_dist'):.2g}" for run in runs),
    "lowest": lambda runs: ", ".join(f"{run.lowest:.2g}" for run in runs),
    "state": lambda runs: ", ".join(run.state for run in runs),
    "collapsed": lambda runs: shown(run.collapsed_at for run in runs),
    "recovered": lambda runs: shown(run.recovered_at for run in runs),
    "growth": lambda runs: shown(run.growth for run in runs),
    "announced": lambda runs: shown(run.announced_at for run in runs),
    "separated": lambda runs: shown(run.separated_from for run in runs),
    "peak": lambda runs: shown(rate_peak(run) for run in runs),
}


def notes(folder, sweep, cut):
    """{heading: text} of DIR/notes.md, where there is one: what is written by hand, with every figure of a run filled in
    from its log, over the seeds. A run that never finished is filled in as far as it went, one that is not there reads
    `not run`."""
    if not (folder / "notes.md").exists():
        return {}

    def fact(found):
        runs = seeds_of(found[1], sweep) or seeds_of(found[1], cut)
        return FACTS[found[2]](runs) if runs else "not run"

    text = re.sub(r"\{\{(\S+) (\w+)\}\}", fact, (folder / "notes.md").read_text())
    headings = re.split(r"^# (.+)$", text, flags=re.MULTILINE)[1:]
    return {heading: body.strip() for heading, body in zip(headings[::2], headings[1::2])}


def table(sweep, figures):
    """The verdict table, and the table of the runs behind it, as lines of Markdown."""
    yield "| claim | verdict | seeds | accuracy in % | random features | original | final distance | collapsed | recovered at step | figure |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for claim, (wording, names, _, original) in CLAIMS.items():
        words, seeds = verdict(claim, sweep)
        runs = [sweep[seed][names[0]] for seed in seeds]
        random = [sweep[seed][RANDOM[run.flags["enc_norm"]]].accuracy for seed, run in zip(seeds, runs)]
        figure = FIGURE_OF.get(claim)
        link = f"[{figure}](figures/{figure}.png)" if figure in figures else ""
        yield (f"| {claim}: {wording} | {words} | {len(seeds)} | {spread([run.accuracy for run in runs], 4)} "
               f"| {spread(random, 4)} | {original} | {FACTS['distance'](runs)} | {FACTS['collapsed'](runs)} | {FACTS['recovered'](runs)} | {link} |")
    yield ""
    yield "Figures are those of the first run that the claim names, over its seeds. All runs, by name, with their commands:"
    yield ""
    yield "| run | claims | seeds | accuracy in % | final representation distance | collapsed at step | recovered at step | command of the first seed |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in sorted({name for runs in sweep.values() for name in runs if not MAP.fullmatch(name)}):
        runs = seeds_of(name, sweep)
        trained = [run for run in runs if run.steps]
        claims = ", ".join(claim for claim, row in CLAIMS.items() if name in row[1])
        yield (f"| {name} | {claims} | {', '.join(str(run.flags['seed']) for run in runs)} | {', '.join(f'{run.accuracy:.2f}' for run in runs)} | {FACTS['distance'](trained)} "
               f"| {FACTS['collapsed'](trained)} | {FACTS['recovered'](trained)} | `{runs[0].command}` |")


def cut_off(cut):
    """What the logs of unfinished runs say, as lines of Markdown."""
    if not cut:
        return
    yield "## Cut off\n"
    yield "Runs that did not reach their last step. No verdict counts them.\n"
    yield "| run | last step | of | accuracy in % | at step | smallest distance | last distance | collapsed | recovered at step | on | command |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name in sorted({name for runs in cut.values() for name in runs}):
        for run in seeds_of(name, cut):
            accuracy = f"{run.accuracy:.2f} | {max(run.accuracies):,}" if run.accuracies else " | "
            yield (f"| {name} | {max(run.steps):,} | {run.flags['steps']:,} | {accuracy} | {run.lowest:.2g} | {run.final('rep_dist'):.2g} "
                   f"| {shown([run.collapsed_at])} | {shown([run.recovered_at])} | {run.device} | `{run.command}` |")
    yield ""


def early_sign(sweep):
    """In words, how well the share common to both views announces that a fallen run comes back."""
    fallen = [run for runs in sweep.values() for run in runs.values() if run.steps and run.lowest < RECOVERED]
    back = {run: step for run in fallen if (step := run.fallen_then("rep_dist", RECOVERED))}
    ahead = [step - run.announced_at for run, step in back.items() if run.announced_at and run.announced_at < step]
    silent = [run for run in fallen if run not in back and not run.announced_at]
    return (f"Where two views of an image differ from each other as much as two images do, the variation that is left is noise. The share that "
            f"both views have in common, 1 - (1 - `pos_cos`) / `rep_dist`, rises before the distance does. Of {len(fallen)} runs that fell under "
            f"{RECOVERED:g}, {len(back)} came back over it; in {len(ahead)} of these the share was over {COMMON} at an earlier line of the log"
            + (f" ({statistics.median(ahead):,.0f} steps earlier in the median)" if ahead else "")
            + f". Of the {len(fallen) - len(back)} others, it never was in {len(silent)}.")


def main(folder):
    sweep = load(folder)
    if not sweep:
        sys.exit(f"report.py: no finished run of run_all.sh (NAME-sSEED/metrics.jsonl) in {folder}")
    (folder / "figures").mkdir(exist_ok=True)
    cut = load(folder, finished=False)
    figures = draw_all(folder / "figures", sweep, cut)
    written = notes(folder, sweep, cut)
    every = [run for runs in sweep.values() for run in runs.values()]
    flags, devices = every[0].flags, collections.Counter(run.device for run in every)
    hours = sum(run.seconds for run in every) / 3600
    words = [verdict(claim, sweep)[0].split(" (")[0] for claim in CLAIMS]
    lines = [
        "# The claims of the appendix, measured", "",
        "Written by `python results/report.py` from the logs in this folder"
        + (" and the text of [notes.md](notes.md)." if written else "."), "",
        f"Small scale: data {flags['data']}, views of {flags['size']} px, ResNet-18 of width {flags['width']} with the "
        f"{flags['stem']} stem, batch {flags['batch_size']}; {len(every)} runs of up to "
        f"{max(run.flags['steps'] for run in every):,} steps, {hours:.1f} hours of training, each run on "
        f"{every[0].hardware['threads']} thread of {', '.join(f'{device} ({n} runs)' for device, n in devices.most_common())}.", "",
        f"Collapsed: a representation distance under {COLLAPSED:g}. Recovered: afterwards over {RECOVERED:g}. "
        f"Useful: {USEFUL} points of linear accuracy or more above random features of the same encoder and seed.", "",
        "Verdicts: " + ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words))) + ".", "",
        written.pop("Summary", ""), "",
        written.pop("Set-up", ""), "",
        "## Verdicts", "",
        *table(sweep, figures), "",
        *cut_off(cut),
        "## An early sign", "",
        early_sign(sweep), "",
        *(f"## {heading}\n\n{text}\n" for heading, text in written.items()),
        "## Figures", "",
        *(f"![{name}](figures/{name}.png)\n" for name in figures),
    ]
    (folder / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
