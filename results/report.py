"""Runs as pictures and verdicts, from their logs alone.

    python results/report.py                the study: results/README.md, from results/runs and notes.md
    python results/report.py runs           any folder of runs: a table, their verdicts, and runs/report.png
    python results/report.py runs/ONE       one run
"""

import itertools
import json
import math
import re
import sys
import textwrap
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path
from statistics import median

try:
    from matplotlib import rcParams
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("report.py: pip install matplotlib, which draws its pictures")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from byol import collapse_state

HERE = Path(__file__).resolve().parent
FORMS = ("code", "paper")
STATES = ("healthy", "recovered", "collapsed")              # of byol.collapse_state
NAME = re.compile(r".+?(@.+)?-(code|paper)-s(\d+)")         # of a run: its switch if any, form and seed
USEFUL = 2              # points of accuracy over the random features of the same encoder
COMMON = 0.4            # part of what varies in z that both views have in common (0.3 until seeds 1 and 2)
LONG = 100              # mean length of q, which is 0.7 at the start


# By how a run's name begins.
SCALES = {"map": "of maps", "wide": "at full width", "fashion": "of Fashion-MNIST",
          "blog": "at the blog's size"}
SAMPLES = ("of seeds 0 to 2", "of other seeds", *SCALES.values())

# ------------------------------------------------------------------------ runs
def read_log(folder):
    """The log's evaluations and its lines of metrics, {step: line} each."""
    text = (folder / "metrics.jsonl").read_text()
    log = [json.loads(row) for row in text.splitlines(keepends=True) if row.endswith("\n")]     # half a line
    scores = {line["step"]: line for line in log if "accuracy" in line}
    lines = {line["step"]: line for line in log if "rep_dist" in line}
    return scores, lines


CHECKED = ("loss", "rep_dist", "neg_cos", "common", "q_norm")


class Run:
    """One run's folder: what it was told, its log, when it collapsed and recovered, what it scored."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        self.scale = SCALES.get(folder.name.partition("-")[0], "")
        self.flags = config["flags"]
        self.command = config["command"]
        instructions = f" ({config['cpu_capability']})" if "cpu_capability" in config else ""
        self.machine = re.sub(r"\((R|TM)\)", "", config.get("gpu") or config.get("cpu") + instructions)
        self.scores, self.lines = read_log(folder)
        self.first, self.last = (list(self.lines.values())[i] for i in (0, -1))
        self.lowest = min(self.lines.values(), key=lambda line: line["rep_dist"])
        self.random = self.scores[0]["accuracy"]
        self.accuracy = list(self.scores.values())[-1]["accuracy"]
        self.finished = self.flags["steps"] in self.scores
        self.check()
        self.follow_states()

    def check(self):
        """Raises what `load` takes for damage if anything is missing that will be read."""
        values = [(line, key) for line in self.lines.values() for key in CHECKED]
        values += [(line, "accuracy") for line in self.scores.values()]
        for line, key in values:
            if not math.isfinite(line[key]):
                raise ValueError(f"{key} is not finite at step {line['step']}")
        for flag in ("enc_norm", "proj_norm", "pred_norm", "opt", "lr", "seed"):
            self.flags[flag]

    def follow_states(self):
        """The state at the end, and the steps at which the run collapsed and recovered. The logs' own words
        are not read: older ones are by another definition."""
        self.state, self.collapses, self.recoveries = "untrained", [], []
        for step, line in self.lines.items():
            before = self.state
            self.state = collapse_state(before, line["rep_dist"], self.first["rep_dist"])
            if self.state != before and self.state == "collapsed":
                self.collapses.append(step)
            if self.state != before and before == "collapsed":
                self.recoveries.append(step)

    @property
    def gain(self):
        return self.accuracy - self.random

    @property
    def learns(self):
        return self.gain >= USEFUL

    @property
    def recovers(self):
        """It ends recovered, and learns."""
        return self.state == "recovered" and self.learns

    @property
    def stays_collapsed(self):
        return self.state == "collapsed" and not self.recoveries

    @property
    def collapses_at_once(self):
        return bool(self.collapses) and self.collapses[0] <= 0.1 * self.flags["steps"]

    @property
    def is_bare(self):
        """byol.py trained it without MLP norm and negatives, and nothing harmed it."""
        flags = dict(proj_norm="none", pred_norm="none", loss="byol")
        return self.command.startswith("python byol.py") and flags.items() <= self.flags.items()

    def common(self, step):
        """The median of `common` in this line and the two before."""
        steps = [other for other in self.lines if other <= step][-3:]
        return median(self.lines[other]["common"] for other in steps)

    def has_sign(self, step):
        """The early sign: both views have much in common while q is not long."""
        return self.common(step) > COMMON and self.lines[step]["q_norm"] < LONG

    def apart(self):
        """The last step at which the images lie no further apart than in the untrained network."""
        steps = [step for step, line in self.lines.items() if line["rep_dist"] <= self.first["rep_dist"]]
        return steps[-1] if steps[-1] < self.last["step"] else math.inf


def load(folder, fault=sys.exit):
    """{name: Run} of a folder of runs or of one run; `fault` is called with a line on each unreadable one."""
    if not folder.is_dir():
        sys.exit(f"report.py: {folder}: no such folder")
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


def machines(runs):
    return ", ".join(sorted({run.machine for run in runs}))


def name_of(key):
    """NAME of NAME-sSEED."""
    return key.rpartition("-s")[0]


def seeds(runs, name):
    """All runs NAME-sSEED of a name, or the one if it is that of a run."""
    return [runs[name]] if name in runs else [run for key, run in runs.items() if name_of(key) == name]


def at_full_width(runs):
    """The runs of width 64, under the names of those of width 8."""
    return {name.removeprefix("wide-"): run for name, run in runs.items() if run.scale == "at full width"}


# ------------------------------------------------------------------------ rules
# Each takes the runs of one form and one seed that CLAIMS names. Edition 1's took the words of byol.py, whose
# thresholds were absolute then, so that a verdict hung on which side of 0.001 a distance fell.
def stay_collapsed(*runs):
    return all(run.stays_collapsed for run in runs)


def never_collapse(*runs):
    return not any(run.collapses for run in runs)


def collapses_at_once_for_good(run):
    return run.collapses_at_once and run.stays_collapsed


def learns_without_collapse(run):
    return run.learns and not run.collapses


def beats_without_collapse(run, other):
    return run.accuracy > other.accuracy and not run.collapses


def recovers_with_rising_loss(run):
    """To a loss above the least while it was collapsed. That at the lowest distance may be falling yet."""
    if not run.recovers:
        return False
    first, last = run.collapses[0], run.recoveries[0]
    collapsed = [line["loss"] for step, line in run.lines.items() if first <= step <= last]
    return run.last["loss"] > min(collapsed)


def recovers_over_lowest(run):
    """To a loss above that at the lowest distance."""
    return run.recovers and run.last["loss"] > run.lowest["loss"]


def recovers_at_once(run):
    return run.collapses_at_once and run.recovers


def collapses_for_good_and_learns_nothing(run):
    return collapses_at_once_for_good(run) and not run.learns


def does_not_end_collapsed(run):
    return run.state != "collapsed"


def is_no_better_than(run, untrained):
    """By two points. `untrained` is trained at a rate of nothing, so that its BN has averages of images."""
    return run.accuracy < untrained.accuracy + USEFUL


def scores_as_high(run, control):
    return run.state != "collapsed" and run.accuracy >= control.accuracy


def recovers_late(run):
    """As recovers_with_rising_loss, and not before 30 % of the run: epoch 100 of 320."""
    return recovers_with_rising_loss(run) and run.recoveries[0] >= 0.3 * run.flags["steps"]


def recovers_below(run, control):
    return recovers_at_once(run) and run.accuracy < control.accuracy


def recovers_at_times(run):
    return run.recoveries


def recovers_repeatedly(run):
    return run.recovers and len(run.recoveries) > 1


def relapses(run):
    return run.state == "collapsed" and run.recoveries


def large_weights_come_down(run):
    """The MLPs' largest weight over its tensor's rms: half as large again in the collapse, less after it."""
    if run.state != "recovered":
        return False
    lines = (run.first, run.lowest, run.lines[run.recoveries[0]])
    mlps = ("projection", "prediction")
    first, low, after = (max(line["layers"][mlp]["max_over_rms"] for mlp in mlps) for line in lines)
    return low > 1.5 * first and after < low


def early_rate(line):
    """layer1's local LARS rate in a line of the log, 0 without LARS there."""
    return line["layers"]["layer1"]["lars_rate"] or 0


def early_rate_explodes(run, factor=10):
    """At the lowest distance layer1 has under a tenth of its first gradient, over `factor` times its rate."""
    first, low = run.first["layers"]["layer1"], run.lowest["layers"]["layer1"]
    vanishes = low["grad_norm"] < first["grad_norm"] / 10
    return run.collapses and vanishes and early_rate(run.lowest) > factor * early_rate(run.first)


def separates_first(run, *others):
    """Edition 1 took the step of the recovery, by which a run that never collapsed but does not move wins."""
    return run.learns and run.apart() < math.inf and run.apart() <= min(other.apart() for other in others)


def peaks_earlier_and_recovers(high, low):
    """The rate of layer1 peaks earlier in the run that recovers than in the one that does not."""
    peaks = [max(run.lines.values(), key=early_rate)["step"] for run in (high, low)]
    return high.recovers and low.stays_collapsed and peaks[0] < peaks[1]


def is_no_better_than_random(run):
    return not run.learns


def has_equal_projections(run):
    return run.collapses and run.lowest["neg_cos"] > 0.999


def gains_half_of_the_control(run, control):
    return run.learns and run.state != "collapsed" and run.gain >= control.gain / 2


GN, LONG_RUN = "GroupNorm, no MLP norm", "24,000 steps"
TRIVIAL = ("D3", "D8", "B5")        # hold trivially where they hold; the page says why
Claim = namedtuple("Claim", "words rule names")     # the table shows the accuracy of the first of names
CLAIMS = {
    "C1": Claim(f"BN in the encoder only, SGD, {LONG_RUN}: collapses, recovers, loss rises",
                recovers_with_rising_loss, ["bn-none-sgd-long"]),
    "C2": Claim("BN in the encoder only, LARS 0.2: no collapse, beats SGD",
                beats_without_collapse, ["bn-none-lars", "bn-none-sgd"]),
    "C3": Claim("BN everywhere, SGD: never collapses, beats BN in the encoder only",
                beats_without_collapse, ["bn-bn-sgd", "bn-none-sgd"]),          # of equal length
    "C4": Claim(f"{GN}, SGD: collapses almost at once, for good",
                collapses_at_once_for_good, ["gn-none-sgd"]),
    "C5": Claim("GroupNorm, BN in the MLPs, SGD: these alone prevent the collapse",
                learns_without_collapse, ["gn-bn-sgd"]),
    "C6": Claim(f"{GN}, LARS 0.2: collapses at once, recovers, learns, below C5",
                recovers_below, ["gn-none-lars-0.2", "gn-bn-sgd"]),
    "C7": Claim(f"{GN}, LARS 0.1: collapses at once and stays there",
                collapses_at_once_for_good, ["gn-none-lars-0.1"]),
    "D1": Claim(f"{GN}, SGD 0.2, decay 1e-5: recovers late, loss rises",
                recovers_with_rising_loss, ["gn-none-sgd-wd1e-5"]),
    "D2": Claim("as D1, decay 1e-4: recovers at times",
                recovers_at_times, ["gn-none-sgd-wd1e-4"]),
    "D3": Claim("as D1, decays of 1e-6 and 1e-3: does not recover",
                stay_collapsed, ["gn-none-sgd-wd1e-6", "gn-none-sgd-wd1e-3"]),
    "D4": Claim("D1's mechanism: a few large weights while collapsed, which decay brings down",
                large_weights_come_down, ["gn-none-sgd-wd1e-5"]),
    "D5": Claim(f"GroupNorm with weight standardization, SGD, {LONG_RUN}: collapses and recovers repeatedly",
                recovers_repeatedly, ["gnws-none-sgd"]),
    "D6": Claim("LARS on layer1, layer2 only: once collapsed, layer1's gradient vanishes, its rate explodes",
                early_rate_explodes, ["gn-none-lars-early"]),
    "D7": Claim("LARS on layer1 and layer2 only: separates the images most quickly",
                separates_first, ["gn-none-lars-early", "gn-none-lars-0.2", "gn-none-lars-mlps"]),
    "D8": Claim("SGD, ten times the rate on layer1, layer2: does not recover",
                stay_collapsed, ["gn-none-sgd-early"]),
    "D9": Claim("LARS on the MLPs only: recovers for a while, then collapses again",
                relapses, ["gn-none-lars-mlps"]),
    "D10": Claim("LARS 0.5 recovers, 0.1 does not; layer1's rate peaks earlier with 0.5",
                 peaks_earlier_and_recovers, ["gn-none-lars-0.5", "gn-none-lars-0.1"]),
    "D11": Claim("no MLP norm: what LARS does is particular to its layerwise rates", None, []),
    "B1": Claim("no MLP norm, 2,000 steps: no better than random features",
                is_no_better_than_random, ["bn-none-sgd-short"]),
    "B2": Claim("LayerNorm in the MLPs does not help",
                is_no_better_than_random, ["bn-ln-sgd-short"]),
    "B3": Claim("MoCo, no MLP norm: learns without BN in the MLP",
                learns_without_collapse, ["bn-none-moco"]),
    "B4": Claim("BN in the projection or the prediction alone prevents the collapse",
                never_collapse, ["bn-bn.none-sgd", "bn-none.bn-sgd"]),
    "B5": Claim("a collapsed run: the projections of different images are almost identical",
                has_equal_projections, ["gn-none-sgd"]),
    "X1": Claim("GroupNorm with weight standardization, LARS: at least half of BN's gain",
                gains_half_of_the_control, ["gnws-none-lars", "bn-bn-sgd"]),
}
# What the post's words allow as well: how much hangs on our reading of a claim. All were written when runs
# had been seen; of bn-untrained, which B1 and B2 ask for, a pilot in seeds 0 and 1.
READINGS = {
    "C1": Claim("the loss rises over that at the lowest distance, our rule at first",
                recovers_over_lowest, ["bn-none-sgd-long"]),
    "C6": Claim("compared with nothing, as in the post's text",
                recovers_at_once, ["gn-none-lars-0.2"]),
    "C7": Claim("and learns nothing",
                collapses_for_good_and_learns_nothing, ["gn-none-lars-0.1"]),
    "D1": Claim("recovers after 30 % of the run, as epoch 100 of 320",
                recovers_late, ["gn-none-sgd-wd1e-5"]),
    "D5": Claim("usually separates: does not end collapsed",
                does_not_end_collapsed, ["gnws-none-sgd"]),
    "D6": Claim("explodes a thousandfold, as in hardly any healthy run",
                partial(early_rate_explodes, factor=1000), ["gn-none-lars-early"]),
    "D8": Claim("and learns nothing",
                collapses_for_good_and_learns_nothing, ["gn-none-sgd-early"]),
    "B1": Claim("no better than random features with BN's averages filled",
                is_no_better_than, ["bn-none-sgd-short", "bn-untrained"]),
    "B2": Claim("no better than random features with BN's averages filled",
                is_no_better_than, ["bn-ln-sgd-short", "bn-untrained"]),
    "X1": Claim("scores as high as BN everywhere",
                scores_as_high, ["gnws-none-lars", "bn-bn-sgd"]),
}
# D11 is judged over rates as well as seeds: the optimizers that are not layerwise, and their runs.
NOT_LAYERWISE = {
    "clipped SGD": ("gn-none-sgd-0.2-clip-0.1", "gn-none-sgd-0.8-clip-0.1", "none-none-sgd-0.2-clip-0.1"),
    "AdamW": ("gn-none-adamw-1e-4", "gn-none-adamw-3e-4", "gn-none-adamw-1e-3", "gn-none-adamw-3e-3"),
}

# ------------------------------------------------------------------------ verdicts
# code, paper: in how many seeds it holds in each form. outcome: whether it does, in words; flipped_by: what
# makes it hold; accuracy: of the better form of those in which it holds, if it does; random: of random
# features. flip: the NAME that flips it.
Verdict = namedtuple("Verdict", "code paper outcome flipped_by accuracy random flip")


def answers_of(runs, row):
    """{NAME: [whether a Claim holds] for each seed} of all that was run; NAME is that of the first run with
    the switch. A configuration that was not run with the switch is taken without it; the first must have
    been, but for a claim of two, whose control may be what is changed."""
    _, rule, names = row
    answers = {}
    for switch, form, seed in sorted({match.groups("") for match in map(NAME.fullmatch, runs) if match}):
        end = f"-{form}-s{seed}"
        changed = [name for name in names if name + switch + end in runs]
        found = [runs.get(name + switch + end) or runs.get(name + end) for name in names]
        is_of_claim = changed and (changed[0] == names[0] or len(names) == 2)
        if is_of_claim and all(found):
            answers.setdefault(f"{changed[0]}{switch}-{form}", []).append(bool(rule(*found)))
    return answers


def in_words(runs, claim, name):
    """What was changed in the runs of this name."""
    main, switch = name.rpartition("-")[0].split("@")
    words = re.sub(r"(?<!\de)(?<!warm)-", " ", switch)          # 1e-4 and warm-up keep their dash
    return words if main == CLAIMS[claim].names[0] else f"{words} for {in_short(runs, name)} alone"


def tried(runs, claim):
    """All switches that were run for a claim, in words by form, with the seeds in which it then holds."""
    answers = {name: answer for name, answer in answers_of(runs, CLAIMS[claim]).items() if "@" in name}
    tries = {name: f"{in_words(runs, claim, name)} ({sum(a)} of {len(a)})" for name, a in answers.items()}
    return [", ".join(tries[name] for name in tries if name.endswith(form)) for form in FORMS]


def holds(claim, answer):
    """Whether the claim holds in enough seeds: in most, D2, which says `at times`, in one."""
    return sum(answer) > (0 if claim == "D2" else 0.5) * len(answer)


def judge(runs, claim, reading=None):
    """The Verdict on a claim, as CLAIMS has it or in another reading."""
    if claim == "D11":
        return judge_lars_alone(runs)
    row = reading or CLAIMS[claim]
    written = [f"{row.names[0]}-{form}" for form in FORMS]
    answers = answers_of(runs, row)
    counts = {name: f"{sum(answer)} of {len(answer)}" for name, answer in answers.items()}
    held = {name: answer for name, answer in answers.items() if holds(claim, answer)}
    in_forms = [name for name in written if name in held]
    flip = None if in_forms else max(held, key=lambda name: len(held[name]), default=None)
    n_tries = sum("@" in name for name in counts)
    outcome, flipped_by = "no", f"none of {n_tries} tried"
    if not answers.keys() & set(written):
        outcome, flipped_by = "not run", ""
    elif in_forms:
        outcome, flipped_by = "trivially" if claim in TRIVIAL else "yes", ""
    elif flip:
        outcome = "changed"
        flipped_by = f"{in_words(runs, claim, flip)}, {flip.rpartition('-')[2]}'s form: {counts[flip]}"
        flipped_by += f"; of {n_tries} tried"
    code, paper = (counts.get(name, "not run") for name in written)
    return Verdict(code, paper, outcome, flipped_by, *best_scores(runs, in_forms or written), flip)


def best_scores(runs, names):
    """Accuracy, and that of random features, of the configuration with the highest median."""
    groups = [seeds(runs, name) for name in names]
    best = max(filter(None, groups), key=lambda group: median(run.accuracy for run in group), default=[])
    return fact(best, "accuracy"), fact(best, "random")


def rates_tried(runs, names):
    """{rate: (seeds that learn and do not end collapsed, seeds)}, of the configurations with three seeds or
    more; of several of one rate the one that learns in the largest part."""
    rates = {}
    for name in names:
        group = seeds(runs, name)
        learning = sum(run.learns and run.state != "collapsed" for run in group)
        if len(group) > 2:
            rate = group[0].flags["lr"]
            counts = (learning, len(group)), rates.get(rate, (0, 1))
            rates[rate] = max(counts, key=lambda count: count[0] / count[1])
    return rates


def where_it_learns(rates):
    """Those of `rates_tried` at which most seeds do."""
    return {rate: counts for rate, counts in sorted(rates.items()) if counts[0] > counts[1] / 2}


def judge_lars_alone(runs):
    """The Verdict on D11: refuted by an optimizer that learns at two rates or more."""
    def rates_of(what, *forms):
        return rates_tried(runs, [f"{name}-{form}" for form in forms for name in NOT_LAYERWISE[what]])

    def words_for(form):
        tried = {what: rates for what in NOT_LAYERWISE if (rates := rates_of(what, form))}
        words = [f"{what} learns at {len(where_it_learns(rates))} of {len(rates)} rates"
                 for what, rates in tried.items()]
        return ", ".join(words) or "not run"

    refuting = []
    for what in NOT_LAYERWISE:
        learnt = where_it_learns(rates_of(what, *FORMS))
        if len(learnt) > 1:
            where = ", ".join(f"{rate:g} ({n} of {of})" for rate, (n, of) in learnt.items())
            refuting.append(f"refuted: {what} learns at {where}")
    is_tried = any(len(rates_of(what, *FORMS)) > 1 for what in NOT_LAYERWISE)
    outcome = "no" if refuting else "yes" if is_tried else "not run"
    names = [f"{name}-{form}" for mains in NOT_LAYERWISE.values() for name in mains for form in FORMS]
    return Verdict(*map(words_for, FORMS), outcome, "; ".join(refuting), *best_scores(runs, names), flip=None)


# ------------------------------------------------------------------------ pictures
def grad_norm(line):
    """Of the weights' gradients: the whole gradient's norm stands in newer logs alone."""
    return math.hypot(*(layer["grad_norm"] for layer in line["layers"].values()))


def distance(run, step):
    return run.lines[step]["rep_dist"]


PANELS = {  # what a panel shows: its axis and scale, and a run's value at a step
    "distance": ("representation distance", "log", distance),
    "distance at width 64": ("representation distance, width 64", "log", distance),
    "loss": ("loss", "log", lambda run, step: run.lines[step]["loss"]),
    "rate": ("local LARS rate of layer1", "log",
             lambda run, step: early_rate(run.lines[step]) or math.nan),
    "length": ("mean length of q", "log", lambda run, step: run.lines[step]["q_norm"]),
    "gradient": ("norm of the weights' gradient", "log", lambda run, step: grad_norm(run.lines[step])),
    "live": ("live part of the prediction's units", "linear", lambda run, step: run.lines[step]["live"][-1]),
    "slope": ("slope of q over z", "linear", lambda run, step: run.lines[step]["growth"]["slope"]),
    "strongest": ("variance along the\nstrongest direction", "log",
                  lambda run, step: run.lines[step]["growth"]["strongest"]),
    "accuracy": ("accuracy in %\n(step 0: random features)", "linear",
                 lambda run, step: run.scores[step]["accuracy"]),
    "common": ("part common to both views", "linear", lambda run, step: run.common(step)),
    "largest": ("largest weight of the\nprediction over its rms", "linear",
                lambda run, step: run.lines[step]["layers"]["prediction"]["max_over_rms"]),
}
LIMITS = {"common": COMMON, "length": LONG}
# Okabe and Ito's and one of Tol's, which the colour-blind can tell apart: one for each set-up in all figures.
COLOURS = {"BN everywhere": "#000000", "SGD": "#d55e00", "SGD, warm-up": "#e69f00", "SGD, clipped": "#0072b2",
           "LARS on all": "#009e73", "LARS on weights": "#882255", "AdamW": "#56b4e9", "harmed": "#666666"}
SHADES = (("-", 0), ("--", -0.6), (":", -0.9), ("-.", 0.5))     # of one set-up's lines: darker, lighter


def set_up(run):
    """Which of COLOURS a run has."""
    flags = run.flags
    if flags["enc_norm"] == flags["proj_norm"] == "bn":
        return "BN everywhere"
    if "harm.py" in run.command:
        return "harmed"
    if flags["opt"] == "lars":
        return f"LARS on {flags['lars_on']}"
    if flags["opt"] == "adamw":
        return "AdamW"
    return "SGD, clipped" if flags.get("clip") else "SGD, warm-up" if flags["warmup"] else "SGD"


rcParams.update({"axes.spines.right": False, "axes.spines.top": False, "figure.constrained_layout.use": True})
rcParams.update({"font.size": 9, "legend.frameon": False, "savefig.dpi": 110})


def looks(runs, names):
    """{label: (colour, style)}: the colour of its set-up, another of SHADES for each line of it."""
    used, chosen = Counter(), {}
    for label, name in names.items():
        kind = set_up(seeds(runs, name)[0])
        style, shade = SHADES[used[kind] % len(SHADES)]
        mixed = [(shade > 0) * abs(shade) + (1 - abs(shade)) * channel for channel in to_rgb(COLOURS[kind])]
        chosen[label] = mixed, style
        used[kind] += 1
    return chosen


def plot_runs(place, runs, panel, style, colour):
    """A line for each run, and where it shows the distance the run's threshold; returns the last line."""
    value = PANELS[panel][-1]
    for run in runs:
        steps = list(run.scores if panel == "accuracy" else run.lines)
        (line,) = place.plot(steps, [value(run, step) for step in steps], style, color=colour, lw=1.2)
        if panel.startswith("distance"):
            place.axhline(run.first["rep_dist"] / 100, color="0.9", zorder=0)
    return line


def draw(runs, panels, names):
    """Panels beside each other, and {label: NAME} as lines in each; a collapse is under the grey line."""
    names = {label: name for label, name in names.items() if seeds(runs, name)}
    picture = Figure((6 + 2 * len(panels), 3.4 + 0.1 * len(names)))
    lines, look_of = {}, looks(runs, names)
    for panel, place in picture.subplot_mosaic([panels]).items():
        text, scale, _ = PANELS[panel]
        shown = at_full_width(runs) if panel == "distance at width 64" else runs
        for label, name in names.items():
            colour, style = look_of[label]
            if group := seeds(shown, name):
                lines[label] = plot_runs(place, group, panel, style, colour)
        place.set(xlabel="step", ylabel=text, xscale="linear" if panel == "accuracy" else "log", yscale=scale)
        if panel in LIMITS:
            place.axhline(LIMITS[panel], color="0.8", zorder=0)
    picture.legend(lines.values(), lines.keys(), loc="outside lower left", fontsize=8, ncols=2)
    return picture


def in_short(runs, name):
    """Norm of encoder and MLPs, and optimizer, of the runs of this name."""
    flags = seeds(runs, name)[0].flags
    mlps = dict.fromkeys([flags["proj_norm"], flags["pred_norm"]])
    optimizer = "AdamW" if flags["opt"] == "adamw" else flags["opt"].upper()
    return f"{flags['enc_norm']}, {'/'.join(mlps)}, {optimizer} {flags['lr']:g}"


def in_full(runs, name):
    """in_short, and what else tells the runs of one scale apart."""
    flags = seeds(runs, name)[0].flags
    words = [in_short(runs, name)]
    if flags["opt"] == "lars":
        layers = f" of {flags['lars_layers']}" if flags["lars_layers"] else ""
        words[0] += f" on {flags['lars_on']}{layers}"
    if flags.get("clip"):
        words.append(f"clipped to {flags['clip']:g}")
    if flags["warmup"]:
        words.append("warm-up")
    return ", ".join(words)


def draw_claims(runs, claims, columns):
    """The distance in each claim's runs, a panel each: the first configuration of CLAIMS in both forms, and
    what was run with the switch that flips the claim."""
    rows = math.ceil(len(claims) / columns)
    picture = Figure((10, 1.9 * rows))
    axes = picture.subplots(rows, columns, sharex=True, sharey=True)
    lines = {}
    for place, claim in zip(axes.flat, claims):
        names = CLAIMS[claim].names
        chosen = {"code's form": f"{names[0]}-code", "paper's form": f"{names[0]}-paper"}
        chosen["with what flips it"] = judge(runs, claim).flip
        for (label, name), style in zip(chosen.items(), ("-", ":", "--")):
            colour = {"-": "#0072b2", ":": "#d55e00", "--": "#000000"}[style]
            if group := seeds(runs, name):
                lines[label] = plot_runs(place, group, "distance", style, colour)
        place.set(xscale="log", yscale="log", ylim=(1e-12, 2))
        words = textwrap.wrap(f"{claim}: {CLAIMS[claim].words}", 140 // columns)
        place.set_title("\n".join(words), fontsize=7, loc="left")
    for column in axes.T:
        last = [place for place in column if place.lines][-1]
        last.tick_params(labelbottom=True)
    for place in axes.flat[len(claims):]:
        place.axis("off")
    picture.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=3)
    picture.supxlabel("step")
    picture.supylabel("representation distance")
    return picture


def draw_scores(runs):
    """What each bare run's encoder scores over its own random features, against the run's last distance."""
    picture = Figure((8, 4))
    place = picture.subplots()
    norms = {"gn": ("GroupNorm", "o", "#0072b2"), "bn": ("BN", "^", "#009e73"),
             "none": ("none", "D", "#cc79a7"), "gn+ws": ("GroupNorm, weight standardization", "s", "#d55e00")}
    bare = {name: run for name, run in runs.items() if run.is_bare and run.scale in ("", "of maps")}
    for norm, (label, marker, colour) in norms.items():
        chosen = [run for run in distinct(bare).values() if run.flags["enc_norm"] == norm]
        distances = [max(1e-16, run.last["rep_dist"]) for run in chosen]
        gains = [run.gain for run in chosen]
        place.plot(distances, gains, marker, color=colour, ms=5, alpha=0.6, label=label)
    place.axhline(0, color="0.8", zorder=0)
    place.set(xscale="log", xlabel="last representation distance, less than 1e-16 as that",
              ylabel="points over random features")
    place.legend(title="norm of the encoder")
    return picture


Map = namedtuple("Map", "title begin form flag axis")      # beginning of its runs' names; the flag in words
DECAY = "weight decay"
MAPS = [
    Map("SGD, by warm-up", "map-warmup-", "code", "warmup", "warm-up, part of the run"),
    Map("SGD, warm-up over a tenth", "map-sgd-", "paper", "weight_decay", DECAY),
    Map("LARS on weights, warm-up over a tenth", "map-lars-", "paper", "weight_decay", DECAY),
    Map("LARS on all parameters, no warm-up", "map-lars-", "code", "weight_decay", DECAY),
    Map("SGD, no warm-up, by clip", r"map-clip-|map-warmup-[\d.]+-0-", "code", "clip", "clipped to"),
]


def draw_map(place, runs, kind):
    """The last distance by rate and a flag, as a colour, and how the runs end, in words unless healthy."""
    names = dict.fromkeys(map(name_of, runs))
    cells = {}
    for name in filter(re.compile(f"({kind.begin}).*{kind.form}").fullmatch, names):
        group = seeds(runs, name)
        value = group[0].flags.get(kind.flag)
        cells[math.inf if value is None else value, group[0].flags["lr"]] = group
    rows, columns = (sorted(set(values)) for values in zip(*cells))
    colours = [[math.nan] * len(columns) for _ in rows]
    for (row, column), group in cells.items():
        y, x = rows.index(row), columns.index(column)
        colours[y][x] = math.log10(max(1e-16, median(run.last["rep_dist"] for run in group)))
        ends = Counter(run.state for run in group if run.state != "healthy")
        words = [end if n == len(group) else f"{n} of {len(group)}\n{end}" for end, n in ends.items()]
        ink = "k" if colours[y][x] > -3 else "w"
        place.text(x, y, "\n".join(words), ha="center", va="center", color=ink, size=6.5)
    place.set(title=kind.title, xlabel="rate", ylabel=kind.axis)
    place.set_xticks(range(len(columns)), [f"{rate:g}" for rate in columns])
    labels = [f"{row:g}".replace("0.0001", "1e-4").replace("e-0", "e-") for row in rows]
    place.set_yticks(range(len(rows)), [label.replace("inf", "none") for label in labels])
    return place.imshow(colours, cmap="viridis", vmin=-8, vmax=0, aspect="auto")


def draw_maps(runs):
    picture = Figure((10, 3.2 * math.ceil(len(MAPS) / 2)))
    axes = picture.subplots(math.ceil(len(MAPS) / 2), 2)
    for place, kind in itertools.zip_longest(axes.flat, MAPS):
        if kind is None:
            place.axis("off")
        else:
            image = draw_map(place, runs, kind)
    picture.colorbar(image, ax=axes, extend="min", label="log10 of the last distance")
    return picture


# The first table of page and README: what keeps BYOL up, and what does not.
REMEDIES = {
    "BN everywhere, SGD 0.2": "bn-bn-sgd-0.2-code",
    "GroupNorm, BN in the MLPs, SGD 0.8": "gn-bn-sgd-code",
    "GroupNorm, no MLP norm, SGD 0.8": "gn-none-sgd-code",
    "GroupNorm, no MLP norm, SGD 0.2": "gn-none-sgd-0.2-code",
    "GroupNorm, no MLP norm, SGD 0.8, gradient clipped to 0.1": "gn-none-sgd-0.8-clip-0.1-code",
    "GroupNorm, no MLP norm, SGD 0.2, gradient clipped to 0.1": "gn-none-sgd-0.2-clip-0.1-code",
    "GroupNorm, no MLP norm, LARS 0.2 on all parameters": "gn-none-lars-0.2-code",
    "GroupNorm, no MLP norm, LARS 0.2 on weights, warm-up": "gn-none-lars-0.2-paper",
    "no norm anywhere, SGD 0.2, gradient clipped to 0.1": "none-none-sgd-0.2-clip-0.1-code",
}
NOT_SHOWN = ("gn-bn-sgd-code", "gn-none-sgd-0.2-code")      # lest lines hide others
# A figure of the page: panels and {label: NAME}, or in place of both a function of its own that draws it.
Picture = namedtuple("Picture", "title panels names")
FIGURES = {
    "summary": Picture("Seven of the table's set-ups; grey: the seeds' thresholds of collapse",
                       ["distance", "distance at width 64"],
                       {label: name for label, name in REMEDIES.items() if name not in NOT_SHOWN}),
    "clip": Picture(
        "GroupNorm, no MLP norm, and BN everywhere (grey: a length of 100, the thresholds of collapse)",
        ["gradient", "length", "distance"], {
            "SGD 0.2": "gn-none-sgd-0.2-code",
            "SGD 0.2, clipped to 0.1": "gn-none-sgd-0.2-clip-0.1-code",
            "SGD 0.2, clipped before step 600 only": "clip-early-code",
            "SGD 0.2, clipped from step 600 on only": "clip-late-code",
            "LARS 0.2 on weights, warm-up": "gn-none-lars-0.2-paper",
            "BN everywhere, SGD 0.8": "bn-bn-sgd-code",
        }),
    "claims": Picture(
        "Six claims; C6's dashed line is C5 with a warm-up, which flips C6; collapsed: below the grey",
        partial(draw_claims, claims=["C4", "C5", "C6", "C7", "D1", "D5"], columns=3), {}),
    "all-claims": Picture(
        "The same for every claim that names runs",
        partial(draw_claims, claims=[claim for claim, row in CLAIMS.items() if row.names], columns=4), {}),
    "rates": Picture("LARS on all parameters: rates of D10, C6, C7, and a lower one", ["distance", "rate"], {
        "LARS 0.5": "gn-none-lars-0.5-code",
        "LARS 0.2": "gn-none-lars-0.2-code",
        "LARS 0.1": "gn-none-lars-0.1-code",
        "LARS 0.05": "gn-none-lars-0.1@half-the-rate-code",
    }),
    "lars-parts": Picture(
        "LARS 0.05 on some parameters and SGD on the others, 3,000 steps", ["distance", "live"], {
            "all parameters": "lars-all-0.05-code",
            "weights and MLP biases": "lars-biases-0.05-code",
            "weights and norms": "lars-norms-0.05-code",
            "weights": "lars-weights-0.05-code",
        }),
    "first-steps": Picture("The first steps, by optimizer (grey: a length of 100)", ["length", "live"], {
        "SGD 0.8": "gn-none-sgd-code",
        "SGD 0.8, warm-up": "gn-none-sgd-paper",
        "LARS 0.2 on all": "gn-none-lars-0.2-code",
        "LARS 0.1 on all": "gn-none-lars-0.1-code",
        "LARS 0.2 on weights, warm-up": "gn-none-lars-0.2-paper",
    }),
    "harm": Picture(
        "SGD 0.2 with a warm-up, harmed once after step 64; with both harms as with the lengths alone",
        ["distance", "live"], {
            "unharmed": "growth-sgd-paper",
            "long projections and predictions": "harm-lengths-paper",
            "no live unit in the prediction": "harm-units-paper",
        }),
    "growth": Picture("The direction that grows, over 4,096 images", ["strongest", "slope"], {
        "SGD 0.2, warm-up": "growth-sgd-paper",
        "LARS 0.2 on all": "growth-lars-code",
        "SGD 0.2": "growth-sgd-code",
    }),
    "share": Picture(
        "Part of the variation that both views have in common, seed 0, and a false alarm of seed 1",
        ["common", "distance"], {
            "LARS 0.5 on all, recovers": "gn-none-lars-0.5-code-s0",
            "LARS 0.2 on all, recovers": "gn-none-lars-0.2-code-s0",
            "LARS 0.1 on all, stays collapsed": "gn-none-lars-0.1-code-s0",
            "SGD 0.8, stays collapsed": "gn-none-sgd-code-s0",
            "LARS 0.05 on all, stays collapsed for 6,000 steps": "gn-none-lars-0.1@half-the-rate-code-s1",
        }),
    "scores": Picture(
        "What encoders gain without an MLP norm, collapsed on the left; BN's gains are over those of no norm",
        draw_scores, {}),
    "maps": Picture(
        "The last distance by rate and warm-up, rate and decay (three maps), rate and clip; no word: healthy",
        draw_maps, {}),
    "weights": Picture(
        "D1 with a warm-up of 300 steps, with its weight decay and without", ["distance", "largest"], {
            "decay 1e-5": "gn-none-sgd-wd1e-5@warm-up-of-300-code",
            "no decay": "no-decay-code",
        }),
    "late-collapse": Picture(
        "GroupNorm with weight standardization under SGD: runs that learn and then collapse, and others",
        ["distance", "length"], {
            "SGD 0.4, warm-up of 2,400 steps": "gnws-none-sgd@twice-the-rate-paper",
            "SGD 0.2, warm-up of 300": "gnws-none-sgd@warm-up-of-300-code",
            "SGD 0.2, warm-up of 2,400": "gnws-none-sgd-paper",
            "SGD 0.2, warm-up of 600": "gnws-none-sgd@warm-up-of-600-code",
        }),
}


# ------------------------------------------------------------------------ any folder of runs
def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def look(folder):
    """What `report.py FOLDER` prints, and the picture that it draws."""
    runs = load(folder, fault=lambda text: print(text, file=sys.stderr))
    rows = []
    for name, run in runs.items():
        turns = sorted([*((step, "collapsed") for step in run.collapses),
                        *((step, "recovered") for step in run.recoveries)])
        steps = ", ".join(f"{word} at {step}" for step, word in turns)
        sign = "on its way back" if run.has_sign(run.last["step"]) else "not on its way"
        sign = f"{sign}: common {run.common(run.last['step']):.2f}" if run.state == "collapsed" else ""
        cut_off = "" if run.finished else f" (step {run.last['step']} of {run.flags['steps']})"
        rows.append([name, run.state + cut_off, steps, f"{run.random:.1f}", f"{run.accuracy:.1f}", sign])
    print(table(["run", "state", "steps", "random features %", "accuracy %", "early sign"], rows))
    finished = {name: run for name, run in runs.items() if run.finished}
    verdicts = [(claim, judge(finished, claim)) for claim in CLAIMS]
    for claim, verdict in verdicts:
        if verdict.outcome != "not run":
            holds = f"{verdict.outcome} (code's form {verdict.code}, paper's {verdict.paper})"
            print(f"{claim}: {CLAIMS[claim].words}: {holds} {verdict.flipped_by}".rstrip())
    lars = any(early_rate(line) for run in runs.values() for line in run.lines.values())
    panels = ["distance", "loss", "accuracy"] + ["rate"] * lars
    draw(runs, panels, {name: name for name in runs}).savefig(folder / "report.png")
    print(f"picture: {folder / 'report.png'}")


# ------------------------------------------------------------------------ the study's page
FACTS = {  # what {{NAME FACT}} in notes.md stands for, beside `ends`: what a run has of it, and its format
    "collapsed": (lambda run: [run.state == "collapsed"], "count"),
    "ever collapsed": (lambda run: [bool(run.collapses)], "count"),
    "accuracy": (lambda run: [run.accuracy], ".1f"),
    "gain": (lambda run: [run.gain], ".1f"),
    "random": (lambda run: [run.random], ".1f"),
    "distance": (lambda run: [run.last["rep_dist"]], ".2g"),
    "lowest": (lambda run: [run.lowest["rep_dist"]], ".2g"),
    "fall": (lambda run: [run.lowest["rep_dist"] / run.first["rep_dist"]], ".2g"),
    "collapse": (lambda run: run.collapses[:1], ",.0f"),
    "recovery": (lambda run: [math.inf] if run.state == "collapsed" else run.recoveries[-1:], ",.0f"),
    "apart": (lambda run: [run.apart()], ",.0f"),
    "length": (lambda run: [run.lines[64]["q_norm"]], ",.0f"),
    "gradient": (lambda run: [grad_norm(run.lines[1])], ".2g"),
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


def distinct(runs):
    """The runs, one of those with the same flags: maps share some with each other and with claims."""
    def flags(run):                     # old logs lack newer flags, which are None, False or empty in them
        given = {flag: value for flag, value in run.flags.items() if value not in (None, False, [])}
        return json.dumps(given, sort_keys=True)

    names = {flags(run): name for name, run in runs.items()}
    return {name: runs[name] for name in names.values()}


def sample(run):
    """Which of SAMPLES it is among: rules were found on seeds 0 to 2."""
    return run.scale or ("of seeds 0 to 2" if run.flags["seed"] < 3 else "of other seeds")


def announced(run):
    """The early sign shows while the run is collapsed."""
    end = [*run.recoveries, math.inf][0]
    return any(run.has_sign(step) for step in run.lines if run.collapses[0] < step < end)


def count(name, runs, has):
    """A table: in how many of the runs there is the sign, chosen on seeds 0 to 2, and how these end."""
    ended = Counter((sample(run), "yes" if has(run) else "no", run.state) for run in runs)
    states = [state for state in STATES if any(run.state == state for run in runs)]
    present = [which for which in SAMPLES if any(sample(run) == which for run in runs)]
    cells = itertools.product(present, ("yes", "no"))
    rows = [[*cell, *(ended[(*cell, state)] for state in states)] for cell in cells]
    return table(["runs", name, *states], rows)


WARNINGS = {  # what is seen at a step
    "mean length of q over 100 at step 64": (64, lambda run: run.lines[64]["q_norm"] > LONG),
    "gradient at step 4 under a tenth of the first":
        (4, lambda run: grad_norm(run.lines[4]) < grad_norm(run.lines[1]) / 10),
}


def how_many(runs, has):
    return f"{sum(map(has, runs))} of {len(runs)}"


def warnings(runs):
    """A table: how many of those with a warning end collapsed, of how many that do it warned, and what it
    adds to the state at that step."""
    def ends(run):
        return run.state == "collapsed"

    groups = {which: [run for run in runs.values() if sample(run) == which] for which in SAMPLES}
    by_name = [seeds(runs, name) for name in dict.fromkeys(map(name_of, runs))]
    mixed = [group for group in by_name if len(set(map(ends, group))) > 1]
    groups["of set-ups that end both ways"] = list(itertools.chain(*mixed))
    rows = []
    for warning, (step, warns) in WARNINGS.items():
        def has_collapsed(run):
            return bool(run.collapses) and run.collapses[0] <= step

        for which, group in groups.items():
            warned = [run for run in group if warns(run)]
            collapsed = [run for run in group if ends(run)]
            others = [run for run in group if has_collapsed(run) and not warns(run)]
            sides = (warned, ends), (collapsed, warns), (warned, has_collapsed), (others, ends)
            if group:
                rows.append([warning, f"{len(group)} {which}", *itertools.starmap(how_many, sides)])
    header = ["of those with it end collapsed", "of those that end collapsed had it",
              "of those with it had collapsed by then", "collapsed by then without it: end collapsed"]
    return table(["warning", "runs", *header], rows)


def remedies(runs):
    """A table: how the runs of REMEDIES ended, and what they score."""
    rows = []
    for label, name in REMEDIES.items():
        group, wide = seeds(runs, name), seeds(at_full_width(runs), name)
        states = Counter(run.state for run in group)
        ends = [f"{states[state]} of {len(group)}" for state in ("collapsed", "recovered")]
        scores = fact(group, "accuracy"), fact(group, "random")
        at_64 = f"{fact(wide, 'ends')} (random {fact(wide, 'random')})" if wide else "not run"
        rows.append([label, *ends, *scores, at_64])
    scores = ["accuracy %", "random features %"]
    return table(["norms, optimizer", "ended collapsed", "ended recovered", *scores, "width 64"], rows)


STEP_LENGTHS = (0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.3, math.inf)


def longest_step(flags):
    """Rate times clip, free of the rounding of that product."""
    return round(flags["lr"] * flags["clip"], 9)


def map_by_clip(runs):
    """Of the map of rate and clip, the clipped runs."""
    return [run for name, run in runs.items() if name.startswith("map-clip-")]


def by_longest_step(runs):
    """A table: how the map's runs end, by rate times clip."""
    rows = []
    for least, most in itertools.pairwise(STEP_LENGTHS):
        group = [run for run in map_by_clip(runs) if least < longest_step(run.flags) <= most]
        if group:
            counts = [sum(run.state == state for run in group) for state in STATES]
            words = f"up to {most:g}" if most < math.inf else f"over {least:g}"
            rows.append([words, *counts, *(fact(group, of) for of in ("gain", "length", "distance"))])
    header = ["rate times clip", *STATES, "points gained", "length of q at step 64", "last distance"]
    return table(header, rows)


def order_of_collapses(runs):
    """A table: of how many pairs of a collapsed run and another the collapsed one has the larger product of
    rate and clip, the larger clip, the larger rate; a tie is half a pair."""
    clipped = map_by_clip(runs)
    rules = {"rate times clip": longest_step, "clip": lambda flags: flags["clip"],
             "rate": lambda flags: flags["lr"]}
    pairs = [(one.flags, other.flags) for one in clipped for other in clipped
             if one.state == "collapsed" and other.state != "collapsed"]
    rows = []
    for name, value in rules.items():
        right = sum((value(one) > value(other)) + (value(one) == value(other)) / 2 for one, other in pairs)
        rows.append([name, f"{100 * right / max(1, len(pairs)):.0f} %"])
    return table(["the larger", "of all pairs; chance: half"], rows)


def usual_end(group):
    return Counter(run.state for run in group).most_common(1)[0][0]


def both_widths(runs):
    """A table: each configuration that was run at full width, beside the one of width 8."""
    rows, wide = [], at_full_width(runs)
    for name in dict.fromkeys(map(name_of, wide)):
        small, full = seeds(runs, name), seeds(wide, name)
        agree = "not run"
        if small:
            agree = "same" if usual_end(small) == usual_end(full) else "differs"
        for width, group, last in ((8, small, ""), (64, full, agree)):
            facts = [fact(group, of) for of in ("ends", "lowest", "distance", "length", "random")]
            if group:
                steps = f"{group[0].flags['steps']:,}"
                rows.append([in_full(wide, name), width, steps, *facts, last])
    distances = ["lowest distance", "last distance", "length of q at step 64"]
    ends = "ended (seeds), accuracy"
    header = ["norms, optimizer", "width", "steps", ends, *distances, "random features %", "usual end"]
    return table(header, rows)


def holds_by_form(runs, claim):
    """{form: whether the claim holds} of those forms that were run."""
    answers = answers_of(runs, CLAIMS[claim])
    by_form = {form: answers.get(f"{CLAIMS[claim].names[0]}-{form}") for form in FORMS}
    return {form: holds(claim, answer) for form, answer in by_form.items() if answer}


def claims_at_both_widths(runs):
    """A table: in how many seeds of each form each claim holds at width 8 and at full width."""
    rows, wide = [], at_full_width(runs)
    for claim in (claim for claim, row in CLAIMS.items() if row.names):
        small, full = holds_by_form(runs, claim), holds_by_form(wide, claim)
        both = small.keys() & full.keys()
        agree = "same" if all(small[form] == full[form] for form in both) else "differs"
        counts = [*judge(runs, claim)[:2], *judge(wide, claim)[:2]]
        if full:
            rows.append([claim, CLAIMS[claim].words, *counts, agree if both else "not run"])
    header = ["id", "claim", "width 8, code's form", "paper's", "width 64, code's form", "paper's", "verdict"]
    return table(header, rows)


def other_readings(runs):
    """A table: the verdicts by READINGS beside ours."""
    rows = []
    for claim, reading in READINGS.items():
        ours, other = judge(runs, claim), judge(runs, claim, reading)
        rows.append([claim, reading.words, ours.outcome, *other[:2], other.outcome, other.flipped_by])
    header = ["id", "read as", "by our rule", "code's form", "paper's form", "so read", "flipped by"]
    return table(header, rows)


def figure(runs, name):
    """Draw it; returns its Markdown."""
    title, panels, names = FIGURES[name]
    picture = panels(runs) if callable(panels) else draw(runs, panels, names)
    picture.savefig(HERE / f"figures/{name}.png", metadata={"Software": None})
    return f"![{title}](figures/{name}.png)\n\n*{title}.*"


def facts_of(runs):
    """{what {{...}} in notes.md says: its text}, but for figures and the facts of one name."""
    bare = distinct({name: run for name, run in runs.items() if run.is_bare})
    collapsed = [run for run in runs.values() if run.state == "collapsed"]
    long = [run for run in bare.values() if run.lines[64]["q_norm"] > LONG]
    clipped = [run for run in bare.values() if run.flags.get("clip")]
    long_clipped = [run for run in clipped if run.flags["steps"] == 24_000]
    with_bn = [run for run in runs.values() if run.flags["proj_norm"] == run.flags["pred_norm"] == "bn"]
    long_with_bn = [run for run in with_bn if run.lines[64]["q_norm"] > LONG]
    verdicts = {claim: judge(runs, claim) for claim in CLAIMS}
    outcomes = Counter(verdict.outcome for verdict in verdicts.values())
    others = [claim for claim, reading in READINGS.items()
              if judge(runs, claim, reading).outcome != verdicts[claim].outcome]
    rows = [[claim, CLAIMS[claim].words, *verdict[:-1]] for claim, verdict in verdicts.items()]
    header = ["id", "claim", "code's form", "paper's form", "holds", "flipped by", "accuracy %", "random %"]
    not_as_written = [claim for claim, verdict in verdicts.items() if verdict.outcome in ("changed", "no")]
    tries = [[claim, *tried(runs, claim)] for claim in not_as_written if CLAIMS[claim].names]
    return {
        "number of runs": len(runs),
        "machines": machines(runs.values()),
        "collapsed that learn": how_many(collapsed, lambda run: run.learns),
        "warnings": warnings(bare),
        "long ones collapsed": fact(long, "collapsed"),
        "long clipped ones collapsed": fact(long_clipped, "collapsed"),
        "long ones with BN healthy": how_many(long_with_bn, lambda run: run.state == "healthy"),
        "early sign": count("sign", [run for run in bare.values() if run.collapses], announced),
        "remedies": remedies(runs),
        "both widths": both_widths(runs),
        "longest steps": by_longest_step(runs),
        "order of collapses": order_of_collapses(runs),
        "claims at both widths": claims_at_both_widths(runs),
        "verdicts": table(header, rows),
        "other readings": other_readings(runs),
        "readings that change": len(others),
        "tries": table(["id", "changes of the code's form", "of the paper's"], tries),
        "claims that hold": outcomes["yes"] + outcomes["trivially"],
        "claims that flip": outcomes["changed"],
        "claims that do not": outcomes["no"],
    }


def list_of_runs(runs):
    """What results/runs/README.md holds: every configuration, how its runs ended, the command of one."""
    rows = []
    for name in dict.fromkeys(map(name_of, runs)):
        group = seeds(runs, name)
        rows.append([name, fact(group, "ends"), machines(group), f"`{group[0].command}`"])
    head = """# Every run of the study

`bash run_all.sh --list` prints the commands, `python results/report.py` makes this list. On the same kind
of processor a log comes again bit for bit but for `images_per_s`; another gives other bits. Behind the
processor stand the instructions that torch took. Older logs do not say them; there it is AVX-512, but for
some of seed 0's runs, the first two of full width and 26 of the map by clip. With
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2` before the command two of
seed 0's came again on a newer EPYC.

"""
    return head + table(["runs", "ended (seeds), accuracy", "processor", "command of one seed"], rows)


def page(text, runs):
    """`text` with each {{...}} replaced by the fact, figure or table that it names."""
    facts = facts_of(runs)

    def replaced(match):
        first, *rest = words = match[1].split()
        if first == "figure":
            return figure(runs, rest[0])
        known, group = facts.get(" ".join(words)), seeds(runs, first)
        if known is None and not group:
            sys.exit(f"report.py: notes.md: {words} is no fact, and no finished run is called {first}")
        return fact(group, " ".join(rest)) if known is None else str(known)

    return re.sub("{{([^}]+)}}", replaced, text)


def main(folders):
    """Without folders: the page and its figures, byte for byte the same from the same logs and notes."""
    if {"-h", "--help"} & set(folders):
        sys.exit(print(__doc__))
    for folder in folders:
        look(Path(folder))
    if not folders:
        finished = {name: run for name, run in load(HERE / "runs").items() if run.finished}
        mains = [claim.names[0] for claim in CLAIMS.values() if claim.names]
        lacking = [name for name in mains if not seeds(finished, f"{name}-code")]
        if lacking:
            sys.exit(f"report.py: {HERE / 'runs'} holds no finished run of {lacking[0]}-code")
        (HERE / "figures").mkdir(exist_ok=True)
        (HERE / "README.md").write_text(page((HERE / "notes.md").read_text(), finished))
        (HERE / "runs" / "README.md").write_text(list_of_runs(finished))
        print(f"{HERE / 'README.md'}: {len(finished)} finished runs")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"report.py: {error.filename or 'the disk'}: {error.strerror}")
