"""The verdict on every claim, drawn from the logs of a sweep: python results/report.py [DIR]

Reads the runs of `run_all.sh` in DIR (the folder of this script), each a folder NAME-sSEED with config.json and
metrics.jsonl, and writes DIR/README.md and DIR/figures. Each claim is a row of CLAIMS: its wording, the runs it needs and
the rule that one seed's runs must meet. Same logs, same files, byte for byte.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from byol import COLLAPSED, RECOVERED, collapse_state

USEFUL = 5          # points above random features of the same encoder that make a representation useful
RANDOM = {"bn": "random-bn", "gn": "random-gn", "gn+ws": "random-gnws"}


class Run:
    """One run's log: `steps` {step: line}, `accuracies` {step: percent}, and the states that its distances went through."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        self.flags, self.command, self.hardware = config["flags"], config["command"], config["hardware"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.steps = {line["step"]: line for line in lines if "loss" in line}
        self.accuracies = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
        self.finished = self.flags["steps"] in self.accuracies
        self.states, state = {}, "untrained"
        for step, line in self.steps.items():
            self.states[step] = state = collapse_state(state, line["rep_dist"])
        self.state = state

    def series(self, name, layer=None):
        """(steps, values) of a metric, or of a layer's."""
        return list(self.steps), [line["layers"][layer][name] if layer else line[name] for line in self.steps.values()]

    def final(self, name):
        return list(self.steps.values())[-1][name]

    @property
    def accuracy(self):
        return self.accuracies[self.flags["steps"]]

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
    def separated_from(self):
        """The step from which on the distance stays over RECOVERED, or infinity."""
        low = [step for step, line in self.steps.items() if line["rep_dist"] <= RECOVERED]
        later = [step for step in self.steps if not low or step > low[-1]]
        return later[0] if later else float("inf")

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
           ["bn-none-sgd"], lambda r: late_recovery(r["bn-none-sgd"]) and loss_rises(r["bn-none-sgd"])
           and gain(r, "bn-none-sgd") >= USEFUL, ""),
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
    "D1": ("SGD, weight decay 1e-5: leaves the collapse late, loss rising", ["gn-none-sgd-wd1e-5"],
           lambda r: late_recovery(r["gn-none-sgd-wd1e-5"]) and loss_rises(r["gn-none-sgd-wd1e-5"]), "56 %"),
    "D2": ("SGD, weight decay 1e-4: occasional recovery", ["gn-none-sgd-wd1e-4"],
           lambda r: r["gn-none-sgd-wd1e-4"].recovered_at is not None, ""),
    "D3": ("SGD, weight decay below and above those: no recovery", ["gn-none-sgd-wd1e-6", "gn-none-sgd-wd1e-3"],
           lambda r: all(r[name].collapsed_at is not None and r[name].recovered_at is None
                         for name in ("gn-none-sgd-wd1e-6", "gn-none-sgd-wd1e-3")), ""),
    "D4": ("mechanism of D1: the collapsed network holds a few large weights, and decay brings them down",
           ["gn-none-sgd-wd1e-5"], lambda r: large_weights_come_down(r["gn-none-sgd-wd1e-5"]), ""),
    "D5": ("GN and weight standardization, SGD: collapses and recovers, repeatedly", ["gnws-none-sgd"],
           lambda r: r["gnws-none-sgd"].recovered_at is not None and len(r["gnws-none-sgd"].entries("collapsed")) > 1, "51 %"),
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
    "X1": ("GN and weight standardization, LARS: learns about as well as BN", ["gnws-none-lars", "bn-bn-sgd"],
           lambda r: r["gnws-none-lars"].accuracy > r["bn-bn-sgd"].accuracy - USEFUL, ""),
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


def load(folder):
    """{seed: {name: Run}} of the finished runs of a folder."""
    sweep = {}
    for path in sorted(folder.glob("*-s*/metrics.jsonl")):
        name, seed = re.fullmatch(r"(.+)-s(\d+)", path.parent.name).groups()
        run = Run(path.parent)
        if run.finished:
            sweep.setdefault(int(seed), {})[name] = run
    return sweep


FIGURES = {  # file: (title, runs, metric, layer), after the appendix's figures
    "accuracy-bn": ("BN encoder", ["bn-bn-sgd", "bn-none-sgd", "bn-none-lars"], "accuracy", None),
    "accuracy-gn": ("GN encoder", ["gn-bn-sgd", "gn-none-sgd", "gn-none-lars", "gn-none-lars-0.1"], "accuracy", None),
    "decay-distance": ("SGD, weight decay", ["gn-none-sgd-wd1e-6", "gn-none-sgd-wd1e-5", "gn-none-sgd-wd1e-4",
                                             "gn-none-sgd-wd1e-3"], "rep_dist", None),
    "decay-loss": ("SGD, weight decay", ["gn-none-sgd-wd1e-5"], "loss", None),
    "decay-weights": ("largest weight over rms, layer4", ["gn-none-sgd-wd1e-5", "gn-none-sgd-wd1e-4"], "max_over_rms", "layer4"),
    "standardized-distance": ("GN with weight standardization, SGD", ["gnws-none-sgd"], "rep_dist", None),
    "standardized-loss": ("GN with weight standardization, SGD", ["gnws-none-sgd"], "loss", None),
    "early-rate": ("LARS on layer1 and layer2 only: rate of layer1", ["gn-none-lars-early"], "lars_rate", "layer1"),
    "early-gradient": ("gradient of layer1", ["gn-none-lars-early", "gn-none-sgd-early"], "grad_norm", "layer1"),
    "early-distance": ("LARS, or a higher rate, on layer1 and layer2", ["gn-none-lars-early", "gn-none-sgd-early"],
                       "rep_dist", None),
    "mlps-rate": ("LARS on the MLPs only: rate of the projection", ["gn-none-lars-mlps"], "lars_rate", "projection"),
    "mlps-loss": ("LARS on the MLPs only", ["gn-none-lars-mlps"], "loss", None),
    "rates-rate": ("LARS: rate of layer1", ["gn-none-lars-0.5", "gn-none-lars", "gn-none-lars-0.1"], "lars_rate", "layer1"),
    "rates-distance": ("LARS", ["gn-none-lars-0.5", "gn-none-lars", "gn-none-lars-0.1"], "rep_dist", None),
}
FIGURE_OF = {"C1": "accuracy-bn", "C2": "accuracy-bn", "C3": "accuracy-bn", "C4": "accuracy-gn", "C5": "accuracy-gn",
             "C6": "accuracy-gn", "C7": "accuracy-gn", "D1": "decay-distance", "D2": "decay-distance", "D3": "decay-distance",
             "D4": "decay-weights", "D5": "standardized-distance", "D6": "early-rate", "D7": "early-distance",
             "D8": "early-distance", "D9": "mlps-loss", "D10": "rates-rate"}
LABELS = {"accuracy": "linear accuracy in %", "rep_dist": "representation distance", "loss": "training loss",
          "lars_rate": "local LARS rate", "grad_norm": "gradient norm", "max_over_rms": "largest weight / rms"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]         # Okabe and Ito: told apart by the colour-blind


def draw(path, title, names, metric, layer, sweep):
    """One figure: a thin line for each seed, a thick one for their mean; returns whether there was anything to draw."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, colour in zip(names, COLOURS):
        curves = []
        for runs in sweep.values():
            if name in runs:
                run = runs[name]
                steps, values = (list(run.accuracies), list(run.accuracies.values())) if metric == "accuracy" \
                    else run.series(metric, layer)
                curves.append(values)
                axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.6)
        if curves:
            mean = [statistics.fmean(column) for column in zip(*curves)]
            axes.plot(steps, mean, color=colour, linewidth=2, label=name)
    drawn = bool(axes.lines)
    if drawn:
        if metric != "accuracy":
            axes.set_yscale("log")
        if metric == "rep_dist":
            axes.axhspan(axes.get_ylim()[0], COLLAPSED, color="0.93", zorder=0)
        axes.set(title=title, xlabel="optimizer steps", ylabel=LABELS[metric])
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return drawn


def spread(values, digits):
    """Mean and, of several, standard deviation."""
    text = f"{statistics.fmean(values):.{digits}g}" if values else ""
    return text + (f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def shown(steps):
    return ", ".join("never" if step is None else f"{step:,}" for step in steps)


def table(sweep, figures):
    """The verdict table, and the table of the runs behind it, as lines of Markdown."""
    yield "| claim | verdict | seeds | accuracy in % | random features | original | figure |"
    yield "|---|---|---|---|---|---|---|"
    for claim, (wording, names, _, original) in CLAIMS.items():
        words, seeds = verdict(claim, sweep)
        runs = [sweep[seed][names[0]] for seed in seeds]
        random = [sweep[seed][RANDOM[run.flags["enc_norm"]]].accuracy for seed, run in zip(seeds, runs)]
        figure = FIGURE_OF.get(claim)
        link = f"[{figure}](figures/{figure}.png)" if figure in figures else ""
        yield (f"| {claim}: {wording} | {words} | {len(seeds)} | {spread([run.accuracy for run in runs], 4)} "
               f"| {spread(random, 4)} | {original} | {link} |")
    yield ""
    yield "Accuracies are those of the first run that the claim names. The runs, by name, over their seeds:"
    yield ""
    yield "| run | claims | seeds | accuracy in % | final representation distance | collapsed at step | recovered at step | command of the first seed |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in sorted({name for runs in sweep.values() for name in runs}):
        of = {seed: runs[name] for seed, runs in sorted(sweep.items()) if name in runs}
        runs = list(of.values())
        trained = [run for run in runs if run.steps]
        claims = ", ".join(claim for claim, row in CLAIMS.items() if name in row[1])
        distances = ", ".join(f"{run.final('rep_dist'):.2g}" for run in trained)
        yield (f"| {name} | {claims} | {', '.join(map(str, of))} | {', '.join(f'{run.accuracy:.2f}' for run in runs)} | {distances} "
               f"| {shown(run.collapsed_at for run in trained)} | {shown(run.recovered_at for run in trained)} | `{runs[0].command}` |")


def main(folder):
    sweep = load(folder)
    if not sweep:
        sys.exit(f"report.py: no finished run of run_all.sh (NAME-sSEED/metrics.jsonl) in {folder}")
    (folder / "figures").mkdir(exist_ok=True)
    figures = [name for name, what in FIGURES.items() if draw(folder / "figures" / f"{name}.png", *what, sweep)]
    every = [run for runs in sweep.values() for run in runs.values()]
    flags, hardware = every[0].flags, {run.hardware["cpu"] or run.hardware["machine"] for run in every}
    counts = {}
    for claim in CLAIMS:
        word = verdict(claim, sweep)[0].split(" (")[0]
        counts[word] = counts.get(word, 0) + 1
    lines = [
        "# The claims of the appendix, measured", "",
        "Written by `python results/report.py` from the logs in this folder.", "",
        f"Small scale: data {flags['data']}, views of {flags['size']} px, ResNet-18 of width {flags['width']} with the "
        f"{flags['stem']} stem, batch {flags['batch_size']}; {len(every)} runs of up to "
        f"{max(run.flags['steps'] for run in every):,} steps, on {', '.join(sorted(hardware))}.", "",
        f"Collapsed: a representation distance under {COLLAPSED:g}. Recovered: afterwards over {RECOVERED:g}. "
        f"Useful: {USEFUL} points of linear accuracy or more above random features of the same encoder and seed.", "",
        "Verdicts: " + ", ".join(f"{n} {word}" for word, n in sorted(counts.items())) + ".", "",
        *table(sweep, figures), "",
        *(f"![{name}](figures/{name}.png)\n" for name in figures),
    ]
    (folder / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
