"""Runs as pictures and verdicts, from their logs alone.

    python results/report.py                the study: results/README.md, from results/runs and notes.md
    python results/report.py runs           any folder of runs: a table, and runs/report.png
    python results/report.py runs/ONE       one run
"""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------ runs
class Run:
    """One run's folder. Collapse and recovery are relative to the untrained network, whose distance the log's
    first line has: `falls` and `returns` are the steps at which the distance goes under a hundredth of it, and
    then over a tenth. Raises ValueError for a folder that holds no run, or a damaged one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            config = json.loads((self.folder / "config.json").read_text())
            rows = (self.folder / "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(row) for row in rows if row.endswith("}")]      # the last may be half written
            self.flags, self.command = config["flags"], config["command"]
            self.cpu = config.get("gpu") or config.get("cpu") or "unknown"
            self.lines = [line for line in lines if "rep_dist" in line]
            self.accuracies = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: no run, or a damaged one ({type(error).__name__}: {error})") from None
        self.finished = list(self.accuracies)[-1:] == [self.flags["steps"]]
        self.steps = [line["step"] for line in self.lines]
        self.falls, self.returns = [], []
        for line in self.lines:
            share = line["rep_dist"] / self.lines[0]["rep_dist"]
            down = len(self.falls) > len(self.returns)
            if share < 0.01 and not down:
                self.falls.append(line["step"])
            if share > 0.1 and down:
                self.returns.append(line["step"])

    def column(self, key, layer=None):
        rows = [line["layers"].get(layer, {}) for line in self.lines] if layer else self.lines
        return [row.get(key) for row in rows]

    @property
    def state(self):
        if not self.falls:
            return "never collapsed"
        return "came back" if len(self.returns) == len(self.falls) else "collapsed"

    @property
    def random(self):
        return self.accuracies.get(0, float("nan"))

    @property
    def accuracy(self):
        return list(self.accuracies.values())[-1] if self.accuracies else float("nan")

    @property
    def gain(self):
        """Points of accuracy over the random features of this very encoder."""
        return self.accuracy - self.random

    @property
    def lowest(self):
        """The line of the log with the smallest distance."""
        return min(self.lines, key=lambda line: line["rep_dist"])

    @property
    def sign(self):
        """The early sign in words, from the last lines of a run that is down."""
        if self.state != "collapsed":
            return ""
        share = statistics.median(self.column("common")[-3:])
        return f"on its way back: share {share:.2f}" if share > 0.3 else f"not on its way: share {share:.2f}"


def load(folder):
    """({name: Run} of a folder of runs or of one run, a line for each that cannot be read)."""
    folder = Path(folder)
    runs, faults = {}, []
    for path in [folder] if (folder / "config.json").exists() else sorted(folder.iterdir()):
        if path.is_dir():
            try:
                runs[path.name] = Run(path)
            except ValueError as error:
                faults.append(str(error))
    return runs, faults


# ------------------------------------------------------------------------ rules
# Each takes the finished runs of one form and one seed, {configuration: Run}, and says whether the claim holds
# there. A KeyError means that a run it needs is missing. EARLY: the share of a run that is "almost at once".
EARLY, USEFUL = 0.1, 2          # USEFUL: points over random features


def stays_down(run):
    return run.state == "collapsed" and len(run.falls) == 1


def falls_at_once(run):
    return bool(run.falls) and run.falls[0] <= EARLY * run.flags["steps"]


def comes_back(run):
    return run.state == "came back" and run.gain >= USEFUL


def loss_rises(run):
    """From the lowest distance on."""
    return run.lines[-1]["loss"] > run.lowest["loss"]


def back_at(run):
    """The step at which it left the collapse for good: 0 if it never fell, infinity if it is down."""
    if not run.falls:
        return 0
    return run.returns[-1] if run.state == "came back" else float("inf")


def learns(run):
    return run.state != "collapsed" and run.gain >= USEFUL


def c1(runs):
    run = runs["bn-none-sgd-long"]
    return comes_back(run) and loss_rises(run)


def c2(runs):
    lars = runs["bn-none-lars"]
    return not lars.falls and lars.accuracy > runs["bn-none-sgd"].accuracy


def c3(runs):
    control = runs["bn-bn-sgd"]
    return not control.falls and control.accuracy > runs["bn-none-sgd-long"].accuracy


def c4(runs):
    return falls_at_once(runs["gn-none-sgd"]) and stays_down(runs["gn-none-sgd"])


def c5(runs):
    return not runs["gn-bn-sgd"].falls and learns(runs["gn-bn-sgd"])


def c6(runs):
    lars = runs["gn-none-lars-0.2"]
    return falls_at_once(lars) and comes_back(lars) and lars.accuracy < runs["gn-bn-sgd"].accuracy


def c7(runs):
    return falls_at_once(runs["gn-none-lars-0.1"]) and stays_down(runs["gn-none-lars-0.1"])


def d1(runs):
    run = runs["gn-none-sgd-wd1e-5"]
    return comes_back(run) and loss_rises(run)


def d2(runs):
    return bool(runs["gn-none-sgd-wd1e-4"].returns)


def d3(runs):
    return stays_down(runs["gn-none-sgd-wd1e-6"]) and stays_down(runs["gn-none-sgd-wd1e-3"])


def d4(runs):
    """The largest weight over its tensor's rms, in the MLPs: half as large again when down, less when back."""
    run = runs["gn-none-sgd-wd1e-5"]
    if run.state != "came back":
        return False
    both = zip(run.column("max_over_rms", "projection"), run.column("max_over_rms", "prediction"))
    peaks = dict(zip(run.steps, map(max, both)))
    down = peaks[run.lowest["step"]]
    return down > 1.5 * peaks[run.steps[0]] and peaks[run.returns[0]] < down


def d5(runs):
    run = runs["gnws-none-sgd"]
    return run.state == "came back" and len(run.falls) > 1 and run.gain >= USEFUL


def d6(runs):
    """At the lowest distance layer1's gradient is under a tenth of its first, its LARS rate over ten times it."""
    run = runs["gn-none-lars-early"]
    first, low = run.lines[0]["layers"]["layer1"], run.lowest["layers"]["layer1"]
    vanishes = low["grad_norm"] < first["grad_norm"] / 10
    return bool(run.falls) and vanishes and low["lars_rate"] > 10 * first["lars_rate"]


def d7(runs):
    early, all_layers, mlps = (runs[f"gn-none-lars-{which}"] for which in ("early", "0.2", "mlps"))
    return learns(early) and back_at(early) <= min(back_at(all_layers), back_at(mlps))


def d8(runs):
    return stays_down(runs["gn-none-sgd-early"])


def d9(runs):
    run = runs["gn-none-lars-mlps"]
    return bool(run.returns) and run.state == "collapsed"


def d10(runs):
    """The rate of layer1 peaks earlier at 0.5, which comes back, than at 0.1, which does not."""
    high, low = runs["gn-none-lars-0.5"], runs["gn-none-lars-0.1"]
    peak = lambda run: max(zip(run.column("lars_rate", "layer1"), run.steps))[1]
    return comes_back(high) and stays_down(low) and peak(high) < peak(low)


def b1(runs):
    return runs["bn-none-sgd-short"].gain < USEFUL


def b2(runs):
    return runs["bn-ln-sgd-short"].gain < USEFUL


def b3(runs):
    return not runs["bn-none-moco"].falls and learns(runs["bn-none-moco"])


def b4(runs):
    return not runs["bn-bn.none-sgd"].falls and not runs["bn-none.bn-sgd"].falls


def b5(runs):
    return runs["gn-none-sgd"].lowest["neg_cos"] > 0.999


def x1(runs):
    """At least half of what the control gains over random features."""
    return learns(runs["gnws-none-lars"]) and runs["gnws-none-lars"].gain >= runs["bn-bn-sgd"].gain / 2


CLAIMS = {  # id: (the claim in words, its rule, where in the post)
    "C1": ("BN in the encoder only, SGD: collapses, leaves the collapse later", c1),
    "C2": ("BN in the encoder only, LARS 0.2: no collapse, better than SGD", c2),
    "C3": ("BN everywhere, SGD: never collapses, better than C1", c3),
    "C4": ("GroupNorm, no MLP norm, SGD: collapses almost at once, for good", c4),
    "C5": ("GroupNorm, BN in the MLPs, SGD: those two layers prevent the collapse", c5),
    "C6": ("GroupNorm, no MLP norm, LARS 0.2: collapses, comes back, learns, less than C5", c6),
    "C7": ("the same, LARS 0.1: collapses at once and learns nothing", c7),
    "D1": ("GroupNorm, no MLP norm, SGD 0.2, decay 1e-5: comes back late, loss rising", d1),
    "D2": ("the same, decay 1e-4: occasional recovery", d2),
    "D3": ("the same, decay below and above those: no recovery", d3),
    "D4": ("D1's mechanism: a few large weights when collapsed, smaller when back", d4),
    "D5": ("weight standardization, SGD: collapses and comes back repeatedly", d5),
    "D6": ("LARS: the gradient of the early layers vanishes, their rate explodes", d6),
    "D7": ("LARS on layer1 and layer2 only: separates most quickly", d7),
    "D8": ("SGD with a higher rate on layer1 and layer2: no recovery", d8),
    "D9": ("LARS on the MLPs only: comes back for a while, then collapses again", d9),
    "D10": ("LARS 0.5: layer1's rate peaks early and it learns; 0.1: late, and it does not", d10),
    "B1": ("no MLP norm, short run: no better than random features", b1),
    "B2": ("LayerNorm in the MLPs does not help", b2),
    "B3": ("MoCo, no MLP norm: learns without BN in the MLP", b3),
    "B4": ("BN in the projection only, or in the prediction only: either prevents the collapse", b4),
    "B5": ("a collapsed run: projections of different images are almost identical", b5),
    "X1": ("GroupNorm + weight standardization, LARS: learns about as well as with BN", x1),
}


def verdicts(runs, claim, switch=""):
    """{(form, seed): whether the claim holds}, with the runs NAME@switch in the place of those called NAME."""
    found = {}
    for form in ("code", "paper"):
        for seed in sorted({run.flags["seed"] for run in runs.values()}):
            ending = f"-{form}-s{seed}"
            there = {name.removesuffix(ending): run for name, run in runs.items()
                     if name.endswith(ending) and run.finished}
            switched = {name.split("@")[0]: run for name, run in there.items() if name.split("@")[1:] == [switch]}
            if switch and not switched:
                continue
            try:
                found[form, seed] = CLAIMS[claim][1]({**there, **switched})
            except KeyError:            # a run that the rule needs is missing
                continue
    return found


def holds(found, claim, form):
    """Whether the claim holds in most seeds of a form (D2, 'occasional', in any), and how many; None without runs."""
    seeds = [yes for (name, _), yes in found.items() if name == form]
    if not seeds:
        return None, "not run"
    enough = any(seeds) if claim == "D2" else sum(seeds) > len(seeds) / 2
    return enough, f"{'yes' if enough else 'no'} ({sum(seeds)} of {len(seeds)})"


def verdict_row(runs, claim):
    """The claim's row of the verdict table: words, code's form, paper's form, as written, with a switch."""
    found = verdicts(runs, claim)
    cells = [holds(found, claim, form) for form in ("code", "paper")]
    answers = [answer for answer, _ in cells if answer is not None]
    written = "not run" if not answers else "holds" if any(answers) else "does not"
    flips = [switch for switch in sorted({name.split("@")[1].split("-code")[0].split("-paper")[0]
                                          for name in runs if "@" in name})
             if any(holds(verdicts(runs, claim, switch), claim, form)[0] for form in ("code", "paper"))]
    with_switch = "" if written != "does not" else f"with {flips[0]}: holds" if flips else "nothing tried flips it"
    return [claim, CLAIMS[claim][0], *(text for _, text in cells), written, with_switch]


# ------------------------------------------------------------------------ pictures
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]     # Okabe, Ito


def new_axes(rows, columns, width=10, height=3.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "byol", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False)


def save(figure, path):
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw_distance(axes, runs):
    """Representation distance against steps of {label: list of runs}, a colour each."""
    for colour, (label, group) in zip(COLOURS * len(runs), runs.items()):
        for i, run in enumerate(group):
            axes.plot(run.steps, run.column("rep_dist"), color=colour, lw=1.3, label=label if i == 0 else None)
    axes.set(xscale="symlog", yscale="log", xlabel="step", ylabel="representation distance", xlim=(1, None))


def picture(runs, path):
    """Distance, loss, accuracy and layer1's LARS rate of {label: Run}."""
    figure, axes = new_axes(2, 2)
    draw_distance(axes[0][0], {label: [run] for label, run in runs.items()})
    for colour, (label, run) in zip(COLOURS * len(runs), runs.items()):
        axes[0][1].plot(run.steps, run.column("loss"), color=colour, lw=1.3)
        axes[1][0].plot(list(run.accuracies), list(run.accuracies.values()), "o-", color=colour, lw=1.3, ms=3)
        rates = [(step, rate) for step, rate in zip(run.steps, run.column("lars_rate", "layer1")) if rate]
        axes[1][1].plot(*zip(*rates or [(1, 1)]), color=colour, lw=1.3, alpha=1 if rates else 0)
    axes[0][1].set(xscale="symlog", yscale="log", xlabel="step", ylabel="loss", xlim=(1, None))
    axes[1][0].set(xlabel="step", ylabel="accuracy in % (step 0: random features)")
    axes[1][1].set(xscale="symlog", yscale="log", xlabel="step", ylabel="local LARS rate of layer1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8)
    save(figure, path)


def labels(runs):
    """{name: the flags, as typed, in which the runs differ}; the folder's name where that does not tell them apart."""
    typed = {}
    for name, run in runs.items():
        words = re.split(r" (?=--)", run.command)[1:]
        typed[name] = [word for word in words if not word.startswith(("--out", "--data-dir", "--threads", "--log-every"))]
    texts = {name: " ".join(word for word in words if not all(word in others for others in typed.values()))
             for name, words in typed.items()}
    unique = len(set(texts.values())) == len(texts) > 1
    return {name: texts[name] or "the defaults" for name in runs} if unique else {name: name for name in runs}


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def look(folder):
    """What `report.py FOLDER` prints, and the picture that it draws."""
    runs, faults = load(folder)
    begun = {name: run for name, run in runs.items() if run.lines}
    faults += [f"{folder}/{name}: no line of metrics yet" for name in runs.keys() - begun.keys()]
    if begun:
        texts = labels(begun)
        rows = []
        for name, run in begun.items():
            state = run.state if run.finished else f"{run.state} (step {run.steps[-1]} of {run.flags['steps']})"
            change = ", ".join(f"down at {step}" for step in run.falls[:2]) + "".join(f", back at {step}" for step in run.returns[:2])
            rows.append([texts[name], state, change.strip(", "), f"{run.random:.1f}", f"{run.accuracy:.1f}", run.sign])
        print(table(["run", "state", "steps", "random features %", "accuracy %", "early sign"], rows))
        path = Path(folder, "report.png")
        picture({texts[name]: run for name, run in begun.items()}, path)
        print(f"picture: {path}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 0 if begun else 1


# ------------------------------------------------------------------------ the study's page
FIGURES = {  # file: (title, {legend: configuration and form})
    "summary": ("control, collapse, and what brings it back", {
        "BN everywhere, SGD": "bn-bn-sgd-code", "no batch statistics, SGD": "gn-none-sgd-code",
        "the same, LARS 0.2 on all": "gn-none-lars-0.2-code", "the same, LARS 0.2 on weights, warm-up": "gn-none-lars-0.2-paper"}),
    "rates": ("C6, C7, D10: LARS on all parameters at three rates", {
        "LARS 0.5": "gn-none-lars-0.5-code", "LARS 0.2": "gn-none-lars-0.2-code", "LARS 0.1": "gn-none-lars-0.1-code"}),
    "layers": ("D7 to D9: LARS on some layers, LARS on weights, warm-up", {
        "LARS everywhere": "gn-none-lars-0.2-paper", "on layer1 and layer2": "gn-none-lars-early-paper",
        "on the MLPs": "gn-none-lars-mlps-paper", "SGD, tenfold rate on layer1 and layer2": "gn-none-sgd-early-paper"}),
    "decay": ("D1 to D3: SGD 0.2 with a warm-up, by weight decay", {
        f"decay {decay}": f"gn-none-sgd-wd{decay}-paper" for decay in ("1e-6", "1e-5", "1e-4", "1e-3")}),
    "standardization": ("D5, X1: weight standardization", {
        "SGD": "gnws-none-sgd-code", "SGD, warm-up": "gnws-none-sgd-paper", "LARS on all": "gnws-none-lars-code",
        "LARS on weights, warm-up": "gnws-none-lars-paper"}),
}


def draw_figures(runs):
    """The figures whose runs are there; returns Markdown that shows them."""
    text = ""
    for name, (title, legend) in FIGURES.items():
        groups = {label: [run for key, run in runs.items() if key.rpartition("-s")[0] == configuration]
                  for label, configuration in legend.items()}
        groups = {label: group for label, group in groups.items() if group}
        if groups:
            figure, axes = new_axes(1, 1, width=8, height=3.6)
            draw_distance(axes[0][0], groups)
            axes[0][0].legend(frameon=False, fontsize=8)
            save(figure, HERE / "figures" / f"{name}.png")
            text += f"![{title}](figures/{name}.png)\n\n*{title[0].upper() + title[1:]}; each line is a run.*\n\n"
    return text


def draw_map(runs, kind):
    """Outcome by rate and decay of the runs map-KIND-RATE-DECAY-FORM-s0; returns Markdown, empty without runs."""
    opt, form = kind.split("-")
    cells = {}
    for name, run in runs.items():
        if name.startswith(f"map-{opt}-") and f"-{form}-s" in name:
            cells.setdefault((run.flags["weight_decay"], run.flags["lr"]), []).append(run.state)
    if not cells:
        return ""
    decays, rates = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    rows = [[f"{decay:g}", *("/".join(sorted(set(cells.get((decay, rate), ["not run"])))) for rate in rates)]
            for decay in decays]
    return f"### {opt.upper()}, {form} form\n\n" + table(["decay \\ rate", *(f"{rate:g}" for rate in rates)], rows) + "\n"


def notes():
    """{heading: text} of notes.md, whose headings stand in the page's order."""
    path = HERE / "notes.md"
    parts = path.read_text().split("\n# ") if path.exists() else []
    return {part.partition("\n")[0].removeprefix("# "): part.partition("\n")[2].strip() for part in parts}


def study():
    """Write results/README.md and its figures, byte for byte the same from the same logs and notes."""
    runs, faults = load(HERE / "runs")
    if faults or not runs:
        sys.exit("report.py: " + (faults[0] if faults else f"{HERE / 'runs'} holds no run"))
    text = notes()
    finished = [run for run in runs.values() if run.finished]
    header = ["id", "claim", "code's form", "paper's form", "as written", "with a switch"]
    rows = [verdict_row(runs, claim) for claim in CLAIMS]
    cpus = statistics.multimode([run.cpu for run in finished])
    page = f"# The claims of the appendix, measured\n\n{text.pop('Answer', '')}\n\n"
    page += f"{len(finished)} finished runs, mostly on {' and '.join(cpus)}; each form's cell counts the seeds in which it holds.\n\n"
    page += table(header, rows) + "\n## Figures\n\n" + draw_figures(runs)
    page += "".join(f"## {heading}\n\n{body}\n\n" for heading, body in text.items())
    page += "".join(draw_map(runs, kind) for kind in ("sgd-code", "sgd-paper", "lars-code", "lars-paper"))
    every = [[name, run.state, f"{run.random:.1f}", f"{run.accuracy:.1f}", f"`{run.command}`"] for name, run in runs.items()]
    page += "<details><summary>Every run and its command</summary>\n\n"
    page += table(["run", "state", "random features %", "accuracy %", "command"], every) + "\n</details>\n"
    (HERE / "README.md").write_text(page)
    print(f"{HERE / 'README.md'}: {len(runs)} runs, {sum(row[4] == 'holds' for row in rows)} of {len(rows)} claims hold")


def main(arguments):
    if not arguments:
        return study()
    try:
        return max(look(folder) for folder in arguments)
    except OSError as error:
        sys.exit(f"report.py: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
