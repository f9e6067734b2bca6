"""Runs as pictures and verdicts, from their logs alone.

    python results/report.py                the study: results/README.md, from results/runs and notes.md
    python results/report.py runs           any folder of runs: a table, and runs/report.png
    python results/report.py runs/ONE       one run
"""

import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median

from matplotlib import rcParams
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
FORMS = ("code", "paper")
STATES = {"never collapsed": "", "came back": "back", "collapsed": "down"}     # each with a map's word for it
NAME = re.compile(r".+?(@.+)?-(code|paper)-s(\d+)")         # of a run: its switch if any, form and seed
USEFUL = 2              # points of accuracy over the random features of the same encoder
COMMON = 0.4            # share of what varies in z that both views have in common (0.3 until seeds 1 and 2)
LONG = 100              # mean length of q, which is 0.7 at the start


# ------------------------------------------------------------------------ runs
class Run:
    """One run's folder. It falls, or collapses, when the distance goes under a hundredth of the untrained
    network's, which the first line has, and comes back over a tenth of it. A line's `share` is the median of
    `common` there and in the two before; its `sign`, the early one, is a large share while q is not long.
    It is `bare` if byol.py trained it without MLP norm and negatives, and nothing harmed it."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(row) for row in rows if row.endswith("}")]        # the last may be half written
        self.flags = config["flags"]
        self.command = config["command"]
        self.machine = config.get("gpu") or config.get("cpu")
        self.name = folder.name.rpartition("-s")[0]
        self.sample = "maps" if "/map-" in self.command else "0 to 2" if self.flags["seed"] < 3 else "others"
        flags = dict(proj_norm="none", pred_norm="none", loss="byol")
        self.bare = self.command.startswith("python byol.py") and flags.items() <= self.flags.items()
        self.scores = {line["step"]: line for line in log if "accuracy" in line}
        self.finished = self.flags["steps"] in self.scores
        self.random = self.scores[0]["accuracy"]
        self.accuracy = list(self.scores.values())[-1]["accuracy"]
        self.gain = self.accuracy - self.random
        self.learns = self.gain >= USEFUL
        lines = [line for line in log if "rep_dist" in line]
        self.lines = {line["step"]: line for line in lines}
        self.first, self.last = lines[0], lines[-1]
        self.lowest = min(lines, key=lambda line: line["rep_dist"])
        self.turns = []                         # the steps of a fall, a return, a fall, ...
        for i, line in enumerate(lines):
            falls = line["rep_dist"] < 0.01 * self.first["rep_dist"]
            returns = line["rep_dist"] > 0.1 * self.first["rep_dist"]
            if returns if len(self.turns) % 2 else falls:
                self.turns.append(line["step"])
            line["rate"] = line["layers"]["layer1"]["lars_rate"]
            line["share"] = median(other["common"] for other in lines[max(0, i - 2) : i + 1])
            line["sign"] = line["share"] > COMMON and line["q_norm"] < LONG
        self.falls, self.returns = self.turns[::2], self.turns[1::2]
        self.down = len(self.falls) > len(self.returns)
        self.state = "collapsed" if self.down else "came back" if self.falls else "never collapsed"
        self.comes_back = self.state == "came back" and self.learns
        self.stays_down = self.down and not self.returns
        self.falls_at_once = bool(self.falls) and self.falls[0] <= 0.1 * self.flags["steps"]
        # the last step at which the images lie no further apart than in the untrained network
        apart = [line["step"] for line in lines if line["rep_dist"] <= self.first["rep_dist"]][-1]
        self.apart = apart if apart < self.last["step"] else math.inf


def load(folder, fault=sys.exit):
    """{name: Run} of a folder of runs or of one run; `fault` is called with a line on each unreadable one."""
    runs = {}
    paths = [folder] if (folder / "config.json").exists() else sorted(folder.glob("*"))
    for path in filter(Path.is_dir, paths):
        try:
            runs[path.name] = Run(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            fault(f"{path}: no run, a damaged one, or one without a line yet ({error!r})")
    if not runs:
        sys.exit(f"report.py: {folder}: no run that can be read")
    return runs


def seeds(runs, name):
    """All runs NAME-sSEED of a name, or the one if it is that of a run."""
    return [runs[name]] if name in runs else [run for run in runs.values() if run.name == name]


# ------------------------------------------------------------------------ rules
# Each takes the runs of one form and one seed that CLAIMS names. Edition 1's took the words of byol.py, whose
# thresholds are absolute, so that a verdict hung on which side of 0.001 a distance fell.
def stay_down(*runs):
    return all(run.stays_down for run in runs)


def never_fall(*runs):
    return not any(run.falls for run in runs)


def falls_at_once_for_good(run):
    return run.falls_at_once and run.stays_down


def learns_without_falling(run):
    return run.learns and not run.falls


def beats_without_falling(run, other):
    return run.accuracy > other.accuracy and not run.falls


def comes_back_with_rising_loss(run):
    """To a loss above the least while it was down. That at the lowest distance may be falling yet."""
    if not run.comes_back:
        return False
    down = [line["loss"] for step, line in run.lines.items() if run.falls[0] <= step <= run.returns[0]]
    return run.last["loss"] > min(down)


def comes_back_below(run, control):
    return run.falls_at_once and run.comes_back and run.accuracy < control.accuracy


def comes_back_at_times(run):
    return run.returns


def comes_back_repeatedly(run):
    return run.comes_back and len(run.returns) > 1


def relapses(run):
    return run.down and run.returns


def large_weights_come_down(run):
    """The MLPs' largest weight over its tensor's rms: half as large again when down, less when back."""
    if run.state != "came back":
        return False
    lines = (run.first, run.lowest, run.lines[run.returns[0]])
    mlps = ("projection", "prediction")
    first, low, back = (max(line["layers"][mlp]["max_over_rms"] for mlp in mlps) for line in lines)
    return low > 1.5 * first and back < low


def early_rate_explodes(run):
    """At the lowest distance layer1's gradient is under a tenth of its first, its rate over ten times it."""
    first, low = run.first["layers"]["layer1"], run.lowest["layers"]["layer1"]
    vanishes = low["grad_norm"] < first["grad_norm"] / 10
    return run.falls and vanishes and low["lars_rate"] > 10 * first["lars_rate"]


def separates_first(run, *others):
    """Edition 1 took the step of the return, by which a run that never fell but stays where it was wins."""
    return run.learns and run.apart < math.inf and run.apart <= min(other.apart for other in others)


def peaks_early_or_dies(high, low):
    """The rate of layer1 peaks earlier in the run that comes back than in the one that does not."""
    peaks = [max(run.lines.values(), key=lambda line: line["rate"])["step"] for run in (high, low)]
    return high.comes_back and low.stays_down and peaks[0] < peaks[1]


def is_no_better_than_random(run):
    return not run.learns


def has_equal_projections(run):
    return run.lowest["neg_cos"] > 0.999


def gains_half_of_the_control(run, control):
    return run.learns and not run.down and run.gain >= control.gain / 2


CLAIMS = {  # id: its rule and the configurations that this takes; the table shows the first one's accuracy
    "C1": (comes_back_with_rising_loss, "bn-none-sgd-long"),
    "C2": (beats_without_falling, "bn-none-lars", "bn-none-sgd"),
    "C3": (beats_without_falling, "bn-bn-sgd", "bn-none-sgd"),        # of equal length
    "C4": (falls_at_once_for_good, "gn-none-sgd"),
    "C5": (learns_without_falling, "gn-bn-sgd"),
    "C6": (comes_back_below, "gn-none-lars-0.2", "gn-bn-sgd"),
    "C7": (falls_at_once_for_good, "gn-none-lars-0.1"),
    "D1": (comes_back_with_rising_loss, "gn-none-sgd-wd1e-5"),
    "D2": (comes_back_at_times, "gn-none-sgd-wd1e-4"),
    "D3": (stay_down, "gn-none-sgd-wd1e-6", "gn-none-sgd-wd1e-3"),
    "D4": (large_weights_come_down, "gn-none-sgd-wd1e-5"),
    "D5": (comes_back_repeatedly, "gnws-none-sgd"),
    "D6": (early_rate_explodes, "gn-none-lars-early"),
    "D7": (separates_first, "gn-none-lars-early", "gn-none-lars-0.2", "gn-none-lars-mlps"),
    "D8": (stay_down, "gn-none-sgd-early"),
    "D9": (relapses, "gn-none-lars-mlps"),
    "D10": (peaks_early_or_dies, "gn-none-lars-0.5", "gn-none-lars-0.1"),
    "B1": (is_no_better_than_random, "bn-none-sgd-short"),
    "B2": (is_no_better_than_random, "bn-ln-sgd-short"),
    "B3": (learns_without_falling, "bn-none-moco"),
    "B4": (never_fall, "bn-bn.none-sgd", "bn-none.bn-sgd"),
    "B5": (has_equal_projections, "gn-none-sgd"),
    "X1": (gains_half_of_the_control, "gnws-none-lars", "bn-bn-sgd"),
}


# D11 is judged over rates as well as seeds: the optimizers that are not layerwise, and their runs.
NOT_LAYERWISE = {
    "clipped SGD": ("gn-none-sgd-0.2-clip-0.1", "gn-none-sgd-0.8-clip-0.1", "none-none-sgd-0.2-clip-0.1"),
    "AdamW": ("gn-none-adamw-1e-4", "gn-none-adamw-3e-4", "gn-none-adamw-1e-3", "gn-none-adamw-3e-3"),
}


def rates_that_learn(runs, names):
    """{rate: "N of M"} of the configurations that learn, and do not end down, in most of three seeds or more."""
    rates = {}
    for name in names:
        group = seeds(runs, name)
        learning = sum(run.learns and not run.down for run in group)
        if len(group) > 2 and learning > len(group) / 2:
            rates[group[0].flags["lr"]] = f"{learning} of {len(group)}"
    return rates


def lars_alone_cells(runs):
    """D11 as verdict_cells has the others: by form at how many rates each optimizer learns. One that does at
    two rates or more refutes the claim."""
    names = {what: [f"{name}-{form}" for form in FORMS for name in mains] for what, mains in NOT_LAYERWISE.items()}
    ran = [run for found in names.values() for name in found for run in seeds(runs, name)]
    cells = []
    for form in FORMS:
        counts = {what: len(rates_that_learn(runs, [name for name in found if name.endswith(form)]))
                  for what, found in names.items()}
        cells.append(", ".join(f"{what} at {n} rates" for what, n in counts.items()))
    learning = {what: rates_that_learn(runs, found) for what, found in names.items()}
    refuting = [f"{what} learns at " + ", ".join(f"{lr:g} ({count})" for lr, count in sorted(rates.items()))
                for what, rates in learning.items() if len(rates) > 1]
    outcome = f"no; {'; '.join(refuting)}" if refuting else "holds" if ran else "not run"
    by_form = (fact([run for run in ran if run.name.endswith(form)], "accuracy") for form in FORMS)
    return [*cells, outcome, " / ".join(by_form), fact(ran, "random"), None]


def verdicts(runs, claim):
    """{NAME: [whether the claim holds] for each seed} of all that was run; NAME is that of the first run with
    the switch. A configuration that was not run with the switch is taken without it."""
    rule, *names = CLAIMS[claim]
    answers = {}
    for switch, form, seed in sorted({match.groups("") for match in map(NAME.fullmatch, runs) if match}):
        end = f"-{form}-s{seed}"
        changed = [name for name in names if name + switch + end in runs]
        found = [runs.get(name + switch + end) or runs.get(name + end) for name in names]
        if changed and all(found):
            answers.setdefault(f"{changed[0]}{switch}-{form}", []).append(bool(rule(*found)))
    return answers


def in_words(runs, claim, name):
    """What was changed in the runs of this name."""
    main, switch = name.rpartition("-")[0].split("@")
    words = re.sub(r"(?<!\de)(?<!warm)-", " ", switch)          # 1e-4 and warm-up keep their dash
    return words if main == CLAIMS[claim][1] else f"{words} for {in_short(runs, name)} alone"


def verdict_cells(runs, claim):
    """In how many seeds the claim holds in each form; whether it does, or the switch that flips it, or what
    was tried; the accuracy of each form; that of random features; not shown, the NAME that flips it."""
    answers = verdicts(runs, claim)
    counts = {name: f"{sum(answer)} of {len(answer)}" for name, answer in answers.items()}
    enough = 0 if claim == "D2" else 0.5                        # D2 says `at times`
    held = {name: len(answer) for name, answer in answers.items() if sum(answer) > enough * len(answer)}
    written = [f"{CLAIMS[claim][1]}-{form}" for form in FORMS]
    forms = [f"the {form}'s" for form, name in zip(FORMS, written) if name in held]
    flip = None if forms else max(held, key=held.get, default=None)
    if not answers.keys() & written:
        outcome = "not run"
    elif forms:
        outcome = f"holds in {' and '.join(forms)} form"
    elif flip:
        form = flip.rpartition("-")[2]
        outcome = f"no; with {in_words(runs, claim, flip)} in the {form}'s form: yes ({counts[flip]})"
    else:
        tries = {name: f"{in_words(runs, claim, name)} ({n})" for name, n in counts.items() if "@" in name}
        lists = {form: ", ".join(tries[name] for name in tries if name.endswith(form)) for form in FORMS}
        notes = [f"{listed} in the {form}'s form" for form, listed in lists.items() if listed]
        outcome = f"no; tried: {'; '.join(notes) or 'nothing'}".replace(" (0 of 1)", "")
    groups = [seeds(runs, name) for name in written]
    accuracies = " / ".join(fact(group, "accuracy") for group in groups)
    cells = [counts.get(name, "not run") for name in written]
    return [*cells, outcome, accuracies, fact(sum(groups, []), "random"), flip]


# ------------------------------------------------------------------------ pictures
PANELS = {  # what a panel shows: its axis and scale, and the value in a line of the log
    "distance": ("representation distance", "log", lambda line: line["rep_dist"]),
    "loss": ("loss", "log", lambda line: line["loss"]),
    "rate": ("local LARS rate of layer1", "log", lambda line: line["rate"]),
    "length": ("mean length of q", "log", lambda line: line["q_norm"]),
    "live": ("live share of the prediction's units", "linear", lambda line: line["live"][-1]),
    "slope": ("slope of q over z", "linear", lambda line: line["growth"]["slope"]),
    "strongest": ("variance along the\nstrongest direction", "log", lambda line: line["growth"]["strongest"]),
    "accuracy": ("accuracy in %\n(step 0: random features)", "linear", lambda line: line["accuracy"]),
    "share": ("share common to both views", "linear", lambda line: line["share"]),
    "largest": ("largest weight of the\nprediction over its rms", "linear",
                lambda line: line["layers"]["prediction"]["max_over_rms"]),
}
LIMITS = {"share": COMMON, "length": LONG}
# Okabe and Ito's, which the colour-blind can tell apart
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]
STYLES = list(itertools.product((".-", ".--", ".:"), COLOURS))
rcParams.update({"axes.spines.right": False, "axes.spines.top": False, "figure.constrained_layout.use": True})
rcParams.update({"font.size": 9, "legend.frameon": False, "savefig.dpi": 110})


def draw(runs, panels, names):
    """Panels beside each other, and {label: NAME} as lines in each, a colour for each label."""
    picture = Figure((6 + 2 * len(panels), 3.4 + 0.1 * len(names)))
    lines = {}
    for panel, place in picture.subplot_mosaic([panels]).items():
        text, scale, value = PANELS[panel]
        for (style, colour), (label, name) in zip(itertools.cycle(STYLES), names.items()):
            for run in seeds(runs, name):
                points = run.scores if panel == "accuracy" else run.lines
                values = [value(line) for line in points.values()]
                lines[label] = place.plot(list(points), values, style, color=colour, lw=1.3, ms=3)[0]
        place.set(xlabel="step", ylabel=text, xscale="linear" if panel == "accuracy" else "log", yscale=scale)
        if panel in LIMITS:
            place.axhline(LIMITS[panel], color="0.8", zorder=0)
    picture.legend(lines.values(), lines.keys(), loc="outside lower left", fontsize=8, ncols=2)
    return picture


def in_short(runs, name):
    """Norm of encoder and MLPs, and optimizer, of the runs of this name."""
    flags = seeds(runs, name)[0].flags
    mlps = dict.fromkeys([flags["proj_norm"], flags["pred_norm"]])
    return f"{flags['enc_norm']}, {'/'.join(mlps)}, {flags['opt'].upper()} {flags['lr']:g}"


def draw_claims(runs, *_):
    """The distance in each claim's runs, a panel each: the first configuration of CLAIMS in both forms, and
    what was run with the switch that flips the claim."""
    picture = Figure((10, 9))
    axes = picture.subplots(6, 4, sharex=True, sharey=True)
    lines = {}
    for place, (claim, (_, main, *_)) in zip(axes.flat, CLAIMS.items()):
        *_, flip = verdict_cells(runs, claim)
        names = {"code's form": f"{main}-code", "paper's form": f"{main}-paper", "with what flips it": flip}
        for (label, name), colour in zip(names.items(), COLOURS):
            for run in seeds(runs, name):
                distances = [line["rep_dist"] for line in run.lines.values()]
                lines[label] = place.loglog(list(run.lines), distances, color=colour, lw=1)[0]
                place.axhline(run.first["rep_dist"] / 100, color="0.9", zorder=0)
        place.set(ylim=(1e-12, 2), title=f"{claim}: {in_short(runs, main + '-code')}")
    axes[4][3].tick_params(labelbottom=True)        # the legend is where its column ends
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(lines.values(), lines.keys(), loc="center")
    picture.supxlabel("step")
    picture.supylabel("representation distance")
    return picture


def draw_scores(runs, *_):
    """What each bare run's encoder scores over its own random features, against the run's last distance."""
    picture = Figure((8, 4))
    place = picture.subplots()
    norms = {"gn": "GroupNorm", "gn+ws": "GroupNorm, weight standardization", "bn": "BN"}
    for (norm, label), colour in zip(norms.items(), COLOURS):
        chosen = [run for run in runs.values() if run.bare and run.flags["enc_norm"] == norm]
        distances = [max(1e-16, run.last["rep_dist"]) for run in chosen]
        place.plot(distances, [run.gain for run in chosen], "o", color=colour, alpha=0.6, label=label)
    place.axhline(0, color="0.8", zorder=0)
    place.set(xscale="log", xlabel="last representation distance", ylabel="points over random features")
    place.legend(title="norm of the encoder")
    return picture


def draw_maps(runs, _, maps):
    """The last distance by rate and a flag, as a colour, and how the runs end, in words, for each of `maps`,
    {title: "BEGINNING-OF-NAMES FORM FLAG"}."""
    names = {"weight_decay": "weight decay", "warmup": "warm-up, share of the run"}
    picture = Figure((10, 6.4))
    axes = picture.subplots(2, 2)
    for place, (title, words) in zip(axes.flat, maps.items()):
        beginning, form, flag = words.split()
        chosen = [run for run in runs.values() if run.name.startswith(beginning) and run.name.endswith(form)]
        cells = {(run.flags[flag], run.flags["lr"]): seeds(runs, run.name) for run in chosen}
        if not cells:
            sys.exit(f"report.py: {HERE / 'runs'} holds no finished run of {beginning}*-{form}")
        rows, columns = (sorted(set(values)) for values in zip(*cells))
        colours = [[math.nan] * len(columns) for _ in rows]
        for (row, column), group in cells.items():
            y, x = rows.index(row), columns.index(column)
            colours[y][x] = math.log10(max(1e-16, median(run.last["rep_dist"] for run in group)))
            ends = Counter(STATES[run.state] for run in group)
            words = [end if n == len(group) else f"{n} {end}" for end, n in ends.items() if end]
            ink = "k" if colours[y][x] > -3 else "w"
            place.text(x, y, "\n".join(words), ha="center", va="center", color=ink, size=7)
        image = place.imshow(colours, cmap="viridis", vmin=-8, vmax=0, aspect="auto")
        place.set(title=title, xlabel="rate", ylabel=names[flag])
        place.set_xticks(range(len(columns)), [f"{rate:g}" for rate in columns])
        place.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    picture.colorbar(image, ax=axes, extend="min", label="log10 of the last distance")
    return picture


# ------------------------------------------------------------------------ any folder of runs
def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def look(folder):
    """What `report.py FOLDER` prints, and the picture that it draws."""
    runs = load(folder, fault=lambda text: print(text, file=sys.stderr))
    rows = []
    for name, run in runs.items():
        steps = ", ".join(f"{word} at {step}" for word, step in zip(["down", "back"] * 2, run.turns))
        sign = "on its way back" if run.last["sign"] else "not on its way"
        sign = f"{sign}: share {run.last['share']:.2f}" if run.down else ""
        cut_off = "" if run.finished else f" (step {run.last['step']} of {run.flags['steps']})"
        rows.append([name, run.state + cut_off, steps, f"{run.random:.1f}", f"{run.accuracy:.1f}", sign])
    print(table(["run", "state", "steps", "random features %", "accuracy %", "early sign"], rows))
    lars = any(run.flags["opt"] == "lars" for run in runs.values())
    panels = ["distance", "loss", "accuracy"] + ["rate"] * lars
    draw(runs, panels, {name: name for name in runs}).savefig(folder / "report.png")
    print(f"picture: {folder / 'report.png'}")


# ------------------------------------------------------------------------ the study's page
FACTS = {  # what {{NAME FACT}} in notes.md stands for, beside `ends`: what a run has of it, and its format
    "down": (lambda run: [run.down], "count"),
    "fallen": (lambda run: [bool(run.falls)], "count"),
    "accuracy": (lambda run: [run.accuracy], ".1f"),
    "random": (lambda run: [run.random], ".1f"),
    "distance": (lambda run: [run.last["rep_dist"]], ".2g"),
    "untrained": (lambda run: [run.first["rep_dist"]], ".2g"),
    "lowest": (lambda run: [run.lowest["rep_dist"]], ".2g"),
    "fell": (lambda run: run.falls[:1], ",.0f"),
    "back": (lambda run: [math.inf] if run.down else run.returns[-1:], ",.0f"),
    "first back": (lambda run: run.returns[:1], ",.0f"),
    "fell again": (lambda run: run.falls[1:2], ",.0f"),
    "apart": (lambda run: [run.apart], ",.0f"),
    "length": (lambda run: [run.lines[64]["q_norm"]], ",.0f"),
}


def fact(runs, key):
    """A count, or `median [least, most]`, or the value if there is one."""
    if not runs:
        return "not run"
    if key == "ends":
        states = {state: sorted(run.flags["seed"] for run in runs if run.state == state) for state in STATES}
        words = [f"{state} ({str(found)[1:-1]})" for state, found in states.items() if found]
        return ", ".join([*words, fact(runs, "accuracy") + " %"])
    value, form = FACTS[key]
    values = [number for run in runs for number in value(run)] or [math.inf]
    if form == "count":
        return f"{sum(values)} of {len(values)}"
    text, least, most = (f"{number:{form}}" for number in (median(values), min(values), max(values)))
    if least != most:
        text += f" [{least}, {most}]"
    return text.replace("inf", "never")


def announced(run):
    """The early sign shows while the run is down."""
    end = [*run.returns, math.inf][0]
    return any(line["sign"] for step, line in run.lines.items() if run.falls[0] < step < end)


def count(name, runs, has):
    """A table: in how many of the runs there is the sign, chosen on seeds 0 to 2, and how these end."""
    ended = Counter((run.sample, "yes" if has(run) else "no", run.state) for run in runs)
    states = [state for state in STATES if any(run.state == state for run in runs)]
    cells = itertools.product(("0 to 2", "others", "maps"), ("yes", "no"))
    rows = [[*cell, *(ended[(*cell, state)] for state in states)] for cell in cells]
    return table(["seeds", name, *states], rows)


def figure(runs, name, title, panels, *lines):
    """Draw it; returns its Markdown. A line is `label: NAME`."""
    special = {"claims": draw_claims, "scores": draw_scores, "maps": draw_maps}
    picture = special.get(name, draw)(runs, panels.split(), dict(line.split(": ") for line in lines))
    picture.savefig(HERE / f"figures/{name}.png", metadata={"Software": None})
    return f"![{title}](figures/{name}.png)\n\n*{title}.*"


def page(text, runs):
    """`text` with each {{...}} replaced by the fact, verdict, figure or table that it names."""
    bare = list({str(run.flags): run for run in runs.values() if run.bare}.values())    # two maps share some
    long = [run for run in bare if run.lines[64]["q_norm"] > LONG]
    groups = {run.name: seeds(runs, run.name) for run in runs.values()}
    every = [[name, fact(group, "ends"), f"`{group[0].command}`"] for name, group in groups.items()]
    facts = {
        "runs": table(["runs", "ended (seeds), accuracy", "command of one seed"], every),
        "machines": ", ".join(sorted({run.machine for run in runs.values()})),
        "first steps": count("warning", bare, lambda run: run in long or run.lines[64]["live"][-1] == 0),
        "long ones down": fact(long, "down"),
        "early sign": count("sign", [run for run in bare if run.falls], announced),
    }
    cells = {claim: verdict_cells(runs, claim) for claim in CLAIMS} | {"D11": lars_alone_cells(runs)}
    facts |= {f"verdict {claim}": " | ".join(row[:-1]) for claim, row in cells.items()}
    outcomes = Counter(re.match("holds|no; with|no;|not run", row[2])[0] for row in cells.values())
    for name, begin in (("hold", "holds"), ("flip", "no; with"), ("do not", "no;")):
        facts["claims that " + name] = str(outcomes[begin])

    def replaced(match):
        words = match[1].split()
        return facts.get(" ".join(words)) or fact(seeds(runs, words[0]), " ".join(words[1:]))

    text = re.sub("{{figure ([^}]+)\n}}", lambda match: figure(runs, *match[1].split("\n")), text)
    return re.sub("{{([^}]+)}}", replaced, text)


def main(folders):
    """Without folders: the page and its figures, byte for byte the same from the same logs and notes."""
    for folder in folders:
        look(Path(folder))
    if not folders:
        finished = {name: run for name, run in load(HERE / "runs").items() if run.finished}
        lacking = [name for _, name, *_ in CLAIMS.values() if not seeds(finished, f"{name}-code")]
        if lacking:
            sys.exit(f"report.py: {HERE / 'runs'} holds no finished run of {lacking[0]}-code")
        (HERE / "figures").mkdir(exist_ok=True)
        (HERE / "README.md").write_text(page((HERE / "notes.md").read_text(), finished))
        print(f"{HERE / 'README.md'}: {len(finished)} finished runs")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"report.py: {error.filename}: {error.strerror}")
