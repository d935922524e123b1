"""One self-contained page with the verdict first, and the same tables as Markdown.

    python -m pipeline_steps.report

Reads params.yaml, reports/metrics, reports/heatmaps, reports/runs (results of other runs, see
reports/runs/README.md), outputs/evaluation and the manifests of data/shards and data/tokens. Writes
reports/report.html (no other file or network is needed to read it), reports/figures/*.svg and reports/tables/*.md.
Only the page itself holds facts of the moment (commit, time, machine). Cost: about 10 seconds.
"""

import argparse
import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from pipeline_steps import params
from pipeline_steps.params import UserError
from pipeline_steps.records import replaced_folder, write_text
from pipeline_steps.report import compute, differences, figures, provenance, tables, texts
from pipeline_steps.report.inputs import read_inputs
from pipeline_steps.report.verdicts import verdicts

PARAMS = ("seed", "ablation", "report")
HERE = Path(__file__).resolve().parent
CONTENTS = (
    ("targets", "Targets"),
    ("families", "Families"),
    ("gaze", "Gaze"),
    ("ablations", "Ablations"),
    ("heatmaps", "Heatmaps"),
    ("training", "Training"),
    ("compute", "Compute"),
    ("data", "Data"),
    ("provenance", "Provenance"),
)
CAPTIONS = {
    "families": (
        "Accuracy of every family in every mode",
        "Each family's accuracy by mode, with 95% intervals. Look for the distance between autoregressive (what "
        "is deployed) and the two controls, and for autoregressive lying on fine: then the parallel form of "
        "training hides nothing.",
    ),
    "gaze": (
        "Share of frames whose attention peak is on the target, by family and by frame",
        "Top: how often the most attended patch is the target's, against the share of patches that show it. "
        "Bottom: over the frames; frame 0 is looked at before anything is known.",
    ),
    "curves": (
        "Training loss and validation accuracy over the training samples of the three stages",
        "Top: training loss (grey: single steps, blue: running mean; each stage has its own data and loss, so "
        "steps between stages are no surprise). Bottom: accuracy on validation items, by family.",
    ),
    "flops": (
        "Compute per sample by component, and over the number of frames",
        "Top: where the compute goes. Bottom: cost over the number of frames for one foveated token, the fixed "
        "look (A6) and ordinary tokens (B1), same backbones, mean text length.",
    ),
    "frontier": (
        "Cost of one token a frame against several over the number of frames, by language model",
        "Look for where a line falls below the dotted one: from there on one token a frame costs less than several, in "
        "use (top) and in training (middle). Bottom: share of vision encoder and queries in the cost of one token a "
        "frame; above the dotted line the vision encoder dominates, and fewer tokens can save little.",
    ),
}


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.report
    inputs = read_inputs(arguments.root, parameters.ablation, parameters.seed)
    result = inputs.current.result
    found = verdicts(inputs, settings)
    built = {
        table.name: table
        for table in (
            tables.targets(result, settings.targets),
            tables.accuracies(result),
            tables.losses(result),
            tables.gaze(result),
            *differences.tables(inputs, settings),
            tables.flops(inputs.flops),
            *compute.tables(inputs.flops),
            tables.data(inputs.shards, inputs.tokens),
            tables.mixture(inputs.stages),
        )
    }
    drawn = {
        "families": figures.families(result),
        "gaze": figures.gaze(result),
        "curves": figures.curves(inputs.curves),
        "flops": figures.flops(inputs.flops),
        "frontier": compute.frontier(inputs.flops),
    }
    reports = arguments.root / "reports"
    params.check_outputs(folders=[reports / "figures", reports / "tables"], files=[reports / "report.html"])
    with replaced_folder(reports / "figures") as folder:
        shown = {name: figure and save_figure(folder, name, figure) for name, figure in drawn.items()}
    with replaced_folder(reports / "tables") as folder:
        for table in built.values():
            if table.rows:
                (folder / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        (folder / "verdict.md").write_text(texts.verdict_markdown(found), encoding="utf-8")
    page = render(
        title=settings.title if parameters.ablation == "none" else f"{settings.title}: ablation {parameters.ablation}",
        verdicts=found,
        lead=texts.lead(inputs),
        tiles=texts.tiles(result),
        tables=built,
        figures=shown,
        controls=texts.controls(result, settings.targets),
        compute_lines=compute.statements(inputs.flops),
        answers=first_answers(inputs.answers),
        clips=clips(reports / "heatmaps", inputs.heatmaps),
        heatmap_rule=heatmap_rule(inputs.heatmaps),
        missing=inputs.missing,
        backbones=list(texts.flattened(inputs.backbones or {})),
        facts=provenance.facts(arguments.root, inputs),
        wall_times=provenance.wall_times(inputs),
        parameters=Path(arguments.params).read_text(encoding="utf-8"),
        runs=[inputs.current, *inputs.runs],
    )
    write_text(reports / "report.html", page)
    for verdict in found:
        print(f"{verdict.question} {verdict.status.upper()}. {verdict.statement}")
    print(f"{reports / 'report.html'}: {len(page) / 1e6:.1f} MB")


def read_arguments():
    parser = argparse.ArgumentParser(description="Write reports/report.html.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder that holds reports, outputs and data")
    return parser.parse_args()


def render(**values):
    """The page as text; everything in `values` is escaped by the template."""
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    parts = {
        name: jinja2.utils.markupsafe.Markup((HERE / f"page.{name}").read_text(encoding="utf-8"))
        for name in ("css", "js")
    }
    return loader.get_template("page.html.jinja").render(**values, **parts, contents=CONTENTS, text_of=tables.text_of)


def save_figure(folder, name, figure):
    """Writes <name>.svg and <name>-dark.svg; returns what the template needs."""
    draw, width, height = figure
    entry = {
        "width": round(width * 100),
        "height": round(height * 100),
        "alt": CAPTIONS[name][0],
        "caption": CAPTIONS[name][1],
    }
    for theme, suffix in (("light", ""), ("dark", "-dark")):
        text = figures.svg(draw, theme, width, height)
        (folder / f"{name}{suffix}.svg").write_text(text, encoding="utf-8")
        entry[theme] = data_uri(text.encode(), "image/svg+xml")
    return entry


def data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def first_answers(answers, per_family=2):
    """The first answers of every family."""
    seen, chosen = {}, []
    for answer in answers:
        seen[answer["family"]] = seen.get(answer["family"], 0) + 1
        if seen[answer["family"]] <= per_family:
            chosen.append(answer)
    return chosen


def heatmap_rule(index):
    if index is None:
        return ""
    return index["rule"] if index["clips"] else "the network has no queries, or nothing was chosen"


def clips(folder, index):
    """The index entries with their pictures inlined as WebP, a tenth of the size of PNG and GIF."""
    entries = []
    for entry in (index or {"clips": []})["clips"]:
        uris = {}
        for kind in ("sheet", "animation"):
            path = folder / entry[kind]
            if not path.exists():
                raise UserError(f"{folder / 'index.json'} names {path}, which does not exist: run `dvc repro heatmaps`")
            buffer = io.BytesIO()
            with Image.open(path) as picture:
                moving = {"save_all": True, "duration": entry["frame_milliseconds"]} if kind == "animation" else {}
                picture.save(buffer, "WEBP", quality=80, **moving)
            uris[f"{kind}_uri"] = data_uri(buffer.getvalue(), "image/webp")
        entries.append(entry | uris)
    return entries


if __name__ == "__main__":
    params.run(main)
