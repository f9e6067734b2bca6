"""Runs as pictures and verdicts, from their logs alone.

    python results/report.py                the study: results/README.md, from results/runs and notes.md
    python results/report.py runs           any folder of runs: a table, and runs/report.png
    python results/report.py runs/ONE       one run
"""

import functools
import itertools
import json
import math
import operator
import re
import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
FORMS = ("code", "paper")
NAME = re.compile(r".+?(@.+)?-(code|paper)-s(\d+)")         # of a run: its switch if any, form and seed


# ------------------------------------------------------------------------ runs
class Run:
    """One run's folder. Collapse and recovery are relative to the untrained network, whose distance the first
    line has: `falls` and `returns` are the steps at which the distance goes under a hundredth of it, and then
    over a tenth. A line's `share` is the median of `common` there and at the two lines before. Raises
    ValueError for a folder that holds no run, or a damaged one."""

    def __init__(self, folder):
        try:
            config = json.loads(Path(folder, "config.json").read_text())
            rows = Path(folder, "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(row) for row in rows if row.endswith("}")]      # the last may be half written
            self.flags = config["flags"]
            self.command = config["command"]
            self.machine = config.get("gpu") or config.get("cpu")
            self.lines = [line for line in lines if "rep_dist" in line]
            self.accuracies = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: no run, or a damaged one ({error!r})") from None
        self.steps = [line["step"] for line in self.lines]
        self.finished = self.flags["steps"] in self.accuracies
        self.random = self.accuracies.get(0, math.nan)
        self.accuracy = [math.nan, *self.accuracies.values()][-1]
        self.gain = self.accuracy - self.random
        self.falls = []
        self.returns = []
        for i, line in enumerate(self.lines):
            relative = line["rep_dist"] / self.lines[0]["rep_dist"]
            if relative < 0.01 and not self.down:
                self.falls.append(line["step"])
            if relative > 0.1 and self.down:
                self.returns.append(line["step"])
            last_three = [other["common"] for other in self.lines[max(0, i - 2) : i + 1]]
            line["share"] = statistics.median(last_three)

    @property
    def down(self):
        return len(self.falls) > len(self.returns)

    @property
    def state(self):
        if not self.falls:
            return "never collapsed"
        return "collapsed" if self.down else "came back"

    @property
    def lowest(self):
        """The line of the log with the smallest distance."""
        return min(self.lines, key=lambda line: line["rep_dist"])

    @property
    def signs(self):
        """The steps with the early sign: much of what varies is common to both views, and q is not long."""
        return [line["step"] for line in self.lines if line["share"] > COMMON and line["q_norm"] < LONG]

    def column(self, *keys):
        """{step: value} of what the log's lines hold under these keys."""
        return {line["step"]: functools.reduce(operator.getitem, keys, line) for line in self.lines}


def load(folder):
    """({name: Run} of a folder of runs or of one run, a line for each that cannot be read)."""
    folder = Path(folder)
    runs = {}
    faults = []
    for path in [folder] if (folder / "config.json").exists() else sorted(folder.iterdir()):
        if path.is_dir():
            try:
                runs[path.name] = Run(path)
            except ValueError as error:
                faults.append(str(error))
    return runs, faults


def seeds(runs, name):
    """All runs NAME-sSEED of a name, or the one if it is that of a run."""
    return [run for other, run in runs.items() if re.fullmatch(re.escape(name) + r"(-s\d+)?", other)]


# ------------------------------------------------------------------------ rules
# Each takes the runs of one form and one seed that CLAIMS names. Edition 1's took the words of byol.py, whose
# thresholds are absolute, so that a verdict hung on which side of 0.001 a distance fell.
AT_ONCE = 0.1           # share of the run
USEFUL = 2              # points of accuracy over the random features of the same encoder
COMMON = 0.4            # share of what varies in z that both views have in common (0.3 until seeds 1 and 2)
LONG = 100              # mean length of q, which is 0.7 at the start


def falls_at_once(run):
    return bool(run.falls) and run.falls[0] <= AT_ONCE * run.flags["steps"]


def stay_down(*runs):
    return all(run.down and not run.returns for run in runs)


def never_fall(*runs):
    return not any(run.falls for run in runs)


def falls_at_once_for_good(run):
    return falls_at_once(run) and stay_down(run)


def learns_without_falling(run):
    return never_fall(run) and run.gain >= USEFUL


def beats_without_falling(run, other):
    return never_fall(run) and run.accuracy > other.accuracy


def comes_back(run):
    return run.state == "came back" and run.gain >= USEFUL


def comes_back_with_rising_loss(run):
    """To a loss above the least while it was down. That at the lowest distance may be falling yet."""
    if not comes_back(run):
        return False
    down = [line["loss"] for line in run.lines if run.falls[0] <= line["step"] <= run.returns[0]]
    return run.lines[-1]["loss"] > min(down)


def comes_back_below(run, control):
    return falls_at_once(run) and comes_back(run) and run.accuracy < control.accuracy


def comes_back_at_times(run):
    return bool(run.returns)


def comes_back_repeatedly(run):
    return comes_back(run) and len(run.returns) > 1


def relapses(run):
    return run.down and bool(run.returns)


def large_weights_come_down(run):
    """The MLPs' largest weight over its tensor's rms: half as large again when down, less when back."""
    if run.state != "came back":
        return False
    mlps = [run.column("layers", mlp, "max_over_rms") for mlp in ("projection", "prediction")]
    peaks = {step: max(mlp[step] for mlp in mlps) for step in run.steps}
    down = peaks[run.lowest["step"]]
    return down > 1.5 * peaks[run.steps[0]] and peaks[run.returns[0]] < down


def early_rate_explodes(run):
    """At the lowest distance layer1's gradient is under a tenth of its first, its rate over ten times it."""
    first, low = (line["layers"]["layer1"] for line in (run.lines[0], run.lowest))
    vanishes = low["grad_norm"] < first["grad_norm"] / 10
    explodes = low["lars_rate"] > 10 * first["lars_rate"]
    return bool(run.falls) and vanishes and explodes


def separates_at(run):
    """The last step at which the images lie no further apart than in the untrained network."""
    near = [step for step, distance in run.column("rep_dist").items() if distance <= run.lines[0]["rep_dist"]]
    return near[-1] if near[-1] < run.steps[-1] else math.inf


def separates_first(run, *others):
    """Edition 1 took the step of the return, by which a run that never fell but stays where it was wins."""
    first = min(separates_at(other) for other in others)
    return separates_at(run) <= first and separates_at(run) < math.inf and run.gain >= USEFUL


def peaks_early_or_dies(high, low):
    """The rate of layer1 peaks earlier in the run that comes back than in the one that does not."""
    rates = [run.column("layers", "layer1", "lars_rate") for run in (high, low)]
    peaks = [max(rate, key=rate.get) for rate in rates]
    return comes_back(high) and stay_down(low) and peaks[0] < peaks[1]


def is_no_better_than_random(run):
    return run.gain < USEFUL


def has_equal_projections(run):
    return run.lowest["neg_cos"] > 0.999


def gains_half_of_the_control(run, control):
    return not run.down and run.gain >= max(USEFUL, control.gain / 2)


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


def verdicts(runs, claim):
    """{(switch or "", form): [whether the claim holds] for each seed}, of all that was run. A configuration
    that was not run with the switch is taken without it."""
    rule, *configurations = CLAIMS[claim]
    matches = [NAME.fullmatch(name) for name in runs]
    answers = {}
    for switch, form, seed in sorted({match.groups("") for match in matches if match}):
        changed = [runs.get(f"{name}{switch}-{form}-s{seed}") for name in configurations]
        plain = [runs.get(f"{name}-{form}-s{seed}") for name in configurations]
        found = [run or other for run, other in zip(changed, plain)]
        if any(changed) and all(found):
            answers.setdefault((switch, form), []).append(rule(*found))
    return answers


def holds(claim, answers):
    """In most seeds; D2 says `at times`, so there one is enough."""
    return sum(answers) > (0 if claim == "D2" else len(answers) / 2)


def flip(runs, claim):
    """The (switch, form), that of most seeds, that makes a claim hold which does not as written; or None."""
    answers = verdicts(runs, claim)
    flips = [key for key, answer in answers.items() if holds(claim, answer)]
    if any(switch == "" for switch, _ in flips):
        return None
    return max(flips, key=lambda key: len(answers[key]), default=None)


def switched(runs, claim, switch, form):
    """The first configuration of the claim that was run with the switch."""
    return next(name for name in CLAIMS[claim][1:] if seeds(runs, f"{name}{switch}-{form}"))


def in_words(runs, claim, switch, form):
    name = switched(runs, claim, switch, form)
    words = re.sub(r"(?<!\de)-", " ", switch[1:]).replace("warm up", "warm-up")        # 1e-4 keeps its dash
    if name == CLAIMS[claim][1]:
        return words
    return f"{words} for {in_short(seeds(runs, f'{name}{switch}-{form}')[0])} alone"


def spread(values, form=".1f"):
    """`median [least, most]`, or the value if there is one."""
    if len(set(values)) == 1:
        return format(values[0], form)
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def verdict_cells(runs, claim):
    """In how many seeds the claim holds in each form; whether it does, or the switch that flips it, or what
    was tried; the accuracy of each form; that of random features."""
    tries, best = verdicts(runs, claim), flip(runs, claim)
    answers = {form: tries.pop(("", form), []) for form in FORMS}
    cells = [f"{sum(a)} of {len(a)}" if a else "not run" for a in answers.values()]
    forms = [f"the {form}'s" for form, answer in answers.items() if holds(claim, answer)]
    counts = {key: f" ({sum(a)} of {len(a)})" if any(a) else "" for key, a in tries.items()}
    if not any(answers.values()):
        outcome = "not run"
    elif forms:
        outcome = f"holds in {' and '.join(forms)} form"
    elif best:
        outcome = f"no; with {in_words(runs, claim, *best)} in the {best[1]}'s form: yes{counts[best]}"
    else:
        words = {key: in_words(runs, claim, *key) + counts[key] for key in tries}
        lists = {form: ", ".join(words[key] for key in tries if key[1] == form) for form in FORMS}
        notes = [f"{listed} in the {form}'s form" for form, listed in lists.items() if listed]
        outcome = f"no; tried: {'; '.join(notes) or 'nothing'}"
    shown = [seeds(runs, f"{CLAIMS[claim][1]}-{form}") for form in FORMS]
    accuracies = [spread([run.accuracy for run in group]) for group in shown if group]
    random = [run.random for group in shown for run in group]
    return [*cells, outcome, " / ".join(accuracies), spread(random) if random else ""]


# ------------------------------------------------------------------------ counts
STATES = ("never collapsed", "came back", "collapsed")


def announced(run):
    """The early sign shows while the run is down."""
    end = run.returns[0] if run.returns else math.inf
    return any(run.falls[0] < step < end for step in run.signs)


def is_dead(run):
    """At step 64 no hidden unit of the prediction is live, or q is long."""
    return run.column("live", -1)[64] == 0 or run.column("q_norm")[64] > LONG


def origin(run):
    """Of which runs it is: those that the signs were chosen on, or others, which test them."""
    if "/map-" in run.command:
        return "maps"
    return "0 to 2" if run.flags["seed"] < 3 else "others"


def count(name, runs, sign):
    """A table: in how many of the runs there is the sign, and how these end."""
    rows = []
    shown = [state for state in STATES if any(run.state == state for run in runs)]
    for of, word in itertools.product(("0 to 2", "others", "maps"), ("yes", "no")):
        states = [run.state for run in runs if origin(run) == of and sign(run) == (word == "yes")]
        rows.append([of, word, *map(states.count, shown)])
    return table(["seeds", name, *shown], rows)


# ------------------------------------------------------------------------ pictures
# Okabe and Ito's, which the colour-blind can tell apart
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]
PANELS = {  # what a panel shows: its axis and scale, and where the log's lines have it
    "distance": ("representation distance", "log", "rep_dist"),
    "loss": ("loss", "log", "loss"),
    "rate": ("local LARS rate of layer1", "log", "layers", "layer1", "lars_rate"),
    "length": ("mean length of q", "log", "q_norm"),
    "live": ("live share of the prediction's units", "linear", "live", -1),
    "slope": ("slope of q over z", "linear", "growth", "slope"),
    "strongest": ("variance along the\nstrongest direction", "log", "growth", "strongest"),
    "accuracy": ("accuracy in %\n(step 0: random features)", "linear"),
    "share": ("share common to both views", "linear", "share"),
    "largest": ("largest weight of the\nprediction over its rms", "linear",
                "layers", "prediction", "max_over_rms"),
}
LIMITS = {"share": COMMON, "length": LONG}
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def new_axes(rows, columns, height, **shared):
    figure = Figure(figsize=(10 if columns > 1 else 8, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw(path, panels, groups):
    """A panel each, in which {label: [Run]} are lines, a colour for each label."""
    rows = math.ceil(len(panels) / 2)
    figure, axes = new_axes(rows, min(len(panels), 2), 3 * rows + 0.4 + 0.1 * len(groups))
    styles = list(itertools.product((".-", ".--", ".:"), COLOURS))
    for panel, place in zip(panels, axes.flat):
        name, scale, *keys = PANELS[panel]
        for (line, colour), (label, runs) in zip(itertools.cycle(styles), groups.items()):
            for i, run in enumerate(runs):
                points = run.accuracies if panel == "accuracy" else run.column(*keys)
                shown = {step: value for step, value in points.items() if value is not None}
                if shown:
                    text = None if i else label
                    place.plot(*zip(*shown.items()), line, color=colour, lw=1.3, ms=3, label=text)
        steps = "linear" if panel == "accuracy" else "log"
        place.set(xlabel="step", ylabel=name, xscale=steps, yscale=scale)
        if panel in LIMITS and place.lines:
            place.axhline(LIMITS[panel], color="0.8", zorder=0)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower left", frameon=False, fontsize=8, ncols=2)
    save(figure, path)


def in_short(run):
    """Norm of encoder and MLPs, and optimizer."""
    mlps = dict.fromkeys([run.flags["proj_norm"], run.flags["pred_norm"]])
    return f"{run.flags['enc_norm']}, {'/'.join(mlps)}, {run.flags['opt'].upper()} {run.flags['lr']:g}"


def draw_claims(path, runs):
    """The distance in each claim's runs, a panel each: the first configuration of CLAIMS in both forms, and
    what was run with the switch that flips the claim."""
    figure, axes = new_axes(6, 4, 9, sharex=True, sharey=True)
    for place, claim in zip(axes.flat, CLAIMS):
        main, best = CLAIMS[claim][1], flip(runs, claim)
        shown = {"code's form": f"{main}-code", "paper's form": f"{main}-paper"}
        if best:
            shown["with what flips it"] = switched(runs, claim, *best) + "-".join(best)
        for (label, name), colour in zip(shown.items(), COLOURS):
            group = seeds(runs, name)
            for run in group:
                place.plot(*zip(*run.column("rep_dist").items()), color=colour, lw=1, label=label)
                place.axhline(run.lines[0]["rep_dist"] / 100, color="0.9", zorder=0)
            if group and "@" not in name:
                place.set_title(f"{claim}: {in_short(group[0])}")
        place.set(xscale="log", yscale="log", ylim=(1e-12, 2))
    axes[4][3].tick_params(labelbottom=True)        # the legend is where its column ends
    lines = {label: line for place in axes.flat for line, label in zip(*place.get_legend_handles_labels())}
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(lines.values(), lines.keys(), loc="center", frameon=False)
    figure.supxlabel("step")
    figure.supylabel("representation distance")
    save(figure, path)


def draw_scores(path, runs):
    """What each run's encoder scores over its own random features, against the run's last distance."""
    figure, axes = new_axes(1, 1, 4)
    place = axes[0][0]
    norms = {"gn": "GroupNorm", "gn+ws": "GroupNorm, weight standardization", "bn": "BN"}
    for (norm, label), colour in zip(norms.items(), COLOURS):
        chosen = [run for run in runs if run.flags["enc_norm"] == norm]
        distances = [max(1e-16, run.lines[-1]["rep_dist"]) for run in chosen]
        place.plot(distances, [run.gain for run in chosen], "o", color=colour, alpha=0.6, label=label)
    place.axhline(0, color="0.8", zorder=0)
    place.set(xscale="log", xlabel="last representation distance", ylabel="points over random features")
    place.legend(title="norm of the encoder", frameon=False)
    save(figure, path)


def draw_maps(path, runs, maps):
    """The last distance by rate and a flag, as a colour, and how the runs end, in words, for each of `maps`,
    {title: "BEGINNING-OF-NAMES FORM FLAG"}."""
    figure, axes = new_axes(2, 2, 6.4)
    for place, (title, words) in zip(axes.flat, maps.items()):
        beginning, form, flag = words.split()
        cells = {}
        for name, run in runs.items():
            if name.startswith(beginning) and f"-{form}-s" in name:
                cells.setdefault((run.flags[flag], run.flags["lr"]), []).append(run)
        rows, columns = (sorted({cell[i] for cell in cells}) for i in (0, 1))
        colours = [[math.nan] * len(columns) for _ in rows]
        for (row, column), group in cells.items():
            y, x = rows.index(row), columns.index(column)
            distance = statistics.median(run.lines[-1]["rep_dist"] for run in group)
            colours[y][x] = math.log10(max(1e-16, distance))
            ends = {"never collapsed": "", "came back": "back", "collapsed": "down"}
            text = "/".join(sorted({ends[run.state] for run in group}))
            ink = "k" if colours[y][x] > -3 else "w"
            place.text(x, y, text, ha="center", va="center", color=ink, size=7)
        image = place.imshow(colours, cmap="viridis", vmin=-8, vmax=0, aspect="auto")
        place.set(title=title, xlabel="rate", ylabel=flag.replace("_", " "))
        place.set_xticks(range(len(columns)), [f"{rate:g}" for rate in columns])
        place.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    figure.colorbar(image, ax=axes, label="log10 of the last distance")
    save(figure, path)


# ------------------------------------------------------------------------ any folder of runs
def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def look(folder):
    """What `report.py FOLDER` prints, and the picture that it draws. Returns the exit status."""
    runs, faults = load(folder)
    begun = {name: run for name, run in runs.items() if run.lines}
    faults += [f"{folder}/{name}: no line of metrics yet" for name in runs.keys() - begun.keys()]
    if begun:
        rows = []
        for name, run in begun.items():
            cut_off = f" (step {run.steps[-1]} of {run.flags['steps']})"
            turns = sorted([(step, "down") for step in run.falls] + [(step, "back") for step in run.returns])
            steps = ", ".join(f"{word} at {step}" for step, word in turns[:4])
            sign = "on its way back" if run.steps[-1] in run.signs else "not on its way"
            sign = f"{sign}: share {run.lines[-1]['share']:.2f}" if run.down else ""
            state = run.state + ("" if run.finished else cut_off)
            rows.append([name, state, steps, f"{run.random:.1f}", f"{run.accuracy:.1f}", sign])
        print(table(["run", "state", "steps", "random features %", "accuracy %", "early sign"], rows))
        path = Path(folder, "report.png")
        lars = any(run.flags["opt"] == "lars" for run in begun.values())
        panels = ["distance", "loss", "accuracy"] + ["rate"] * lars
        draw(path, panels, {name: [run] for name, run in begun.items()})
        print(f"picture: {path}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 0 if begun else 1


# ------------------------------------------------------------------------ the study's page
FACTS = {  # what {{NAME FACT}} in notes.md stands for: a run's value, None if it has none, and its format
    "down": (lambda run: run.down, "count"),
    "fallen": (lambda run: bool(run.falls), "count"),
    "accuracy": (lambda run: run.accuracy, ".1f"),
    "random": (lambda run: run.random, ".1f"),
    "distance": (lambda run: run.lines[-1]["rep_dist"], ".2g"),
    "untrained": (lambda run: run.lines[0]["rep_dist"], ".2g"),
    "lowest": (lambda run: run.lowest["rep_dist"], ".2g"),
    "fell": (lambda run: run.falls[0] if run.falls else None, ",.0f"),
    "back": (lambda run: math.inf if run.down else run.returns[-1] if run.falls else None, ",.0f"),
    "first back": (lambda run: run.returns[0] if run.returns else None, ",.0f"),
    "fell again": (lambda run: run.falls[1] if len(run.falls) > 1 else None, ",.0f"),
    "apart": (separates_at, ",.0f"),
    "length": (lambda run: run.column("q_norm")[64], ",.0f"),
}


def ends(group):
    """How a configuration's seeds ended, and their accuracy."""
    states = {state: sorted(run.flags["seed"] for run in group if run.state == state) for state in STATES}
    words = [f"{state} ({str(found)[1:-1]})" for state, found in states.items() if found]
    return ", ".join([*words, spread([run.accuracy for run in group]) + " %"])


def fact(runs, name, key):
    chosen = seeds(runs, name)
    if not chosen:
        return "not run"
    if key == "ends":
        return ends(chosen)
    value, form = FACTS[key]
    values = [value(run) for run in chosen if value(run) is not None]
    if not values:
        return "never"
    if form == "count":
        return f"{sum(values)} of {len(values)}"
    return spread(values, form).replace("inf", "never")


def without_mlp_norm(runs):
    """The runs of byol.py that have it in no MLP, nor negatives, and that nothing harmed."""
    flags = dict(proj_norm="none", pred_norm="none", loss="byol")
    own = [run for run in runs.values() if run.command.startswith("python byol.py")]
    return [run for run in own if flags.items() <= run.flags.items()]


def figure(runs, name, title, panels, *lines):
    """Draw it; returns its Markdown. A line is `label: NAME`."""
    path = HERE / f"figures/{name}.png"
    legend = dict(line.split(": ") for line in lines)
    if name == "claims":
        draw_claims(path, runs)
    elif name == "scores":
        draw_scores(path, without_mlp_norm(runs))
    elif name == "maps":
        draw_maps(path, runs, legend)
    else:
        draw(path, panels.split(), {label: seeds(runs, wanted) for label, wanted in legend.items()})
    return f"![{title}](figures/{name}.png)\n\n*{title}.*"


def page(text, runs):
    """`text` with each {{...}} replaced by the fact, verdict, figure or table that it names."""
    no_norm = without_mlp_norm(runs)
    long = [run for run in no_norm if run.column("q_norm")[64] > LONG]
    named = {}
    for name, run in runs.items():
        named.setdefault(name.rsplit("-s", 1)[0], []).append(run)
    every = [[name, ends(group), f"`{group[0].command}`"] for name, group in named.items()]
    tables = {
        "runs": table(["runs", "ended (seeds), accuracy", "command of one seed"], every),
        "machines": ", ".join(sorted({run.machine for run in runs.values()})),
        "first steps": count("warning", no_norm, is_dead),
        "long ones down": f"{sum(run.down for run in long)} of {len(long)}",
        "early sign": count("sign", [run for run in no_norm if run.falls], announced),
    }
    cells = {claim: verdict_cells(runs, claim) for claim in CLAIMS}
    tables |= {f"verdict {claim}": " | ".join(row) for claim, row in cells.items()}
    for name, begin in (("hold", "holds"), ("flip", "no; with"), ("do not", "no; tried")):
        tables["claims that " + name] = str(sum(row[2].startswith(begin) for row in cells.values()))

    def replaced(match):
        _, *lines = match[1].strip().split("\n")
        words = match[1].split()
        if " ".join(words) in tables:
            return tables[" ".join(words)]
        if words[0] == "figure":
            return figure(runs, words[1], *lines)
        return fact(runs, words[0], " ".join(words[1:]))

    return re.sub("{{(.+?)}}", replaced, text, flags=re.DOTALL)


def study():
    """Write results/README.md and its figures, byte for byte the same from the same logs and notes."""
    runs, faults = load(HERE / "runs")
    if faults or not runs:
        sys.exit("report.py: " + (faults[0] if faults else f"{HERE / 'runs'} holds no run"))
    finished = {name: run for name, run in runs.items() if run.finished}
    (HERE / "README.md").write_text(page((HERE / "notes.md").read_text(), finished))
    print(f"{HERE / 'README.md'}: {len(finished)} finished runs")


def main(arguments):
    try:
        return max(look(folder) for folder in arguments) if arguments else study()
    except OSError as error:
        sys.exit(f"report.py: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
