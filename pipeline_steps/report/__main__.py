"""Writes the report: one self-contained HTML page, and the same content as Markdown.

    python -m pipeline_steps.report

Reads params.yaml, outputs/metrics, reports/heatmaps, reports/runs (results of other runs, see
reports/runs/README.md), reports/study, outputs/evaluation and the manifests of data/shards and data/tokens. Writes
reports/report.html (needs no other file and no network), reports/report.md with reports/figures/*.svg and
reports/tables/*.md for review in a pull request, reports/metrics/summary.json with the headline numbers, and
reports/plots/*.csv for `dvc plots`. Output is deterministic: equal inputs give equal bytes on every machine, commit and
day. Cost: about 10 seconds; benchmarks/report.py times it with a thousand runs.
"""

import argparse
import base64
import re
from pathlib import Path

import jinja2
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, replaced_folder, write_json, write_text
from pipeline_steps.report import (
    attention_figures,
    compute,
    controls,
    curves,
    decisions,
    differences,
    figures,
    ideas,
    markdown,
    opening,
    plots,
    provenance,
    reading,
    scaling,
    studies,
    study_figures,
    study_tables,
    summary,
    tables,
    texts,
)
from pipeline_steps.report.captions import caption_form, caption_overlap, caption_parts, caption_style, captions
from pipeline_steps.report.diagnostics import attention, checks
from pipeline_steps.report.gaze_references import gaze_difference
from pipeline_steps.report.inputs import read_inputs
from pipeline_steps.report.multiple_choice import multiple_choice
from pipeline_steps.report.preliminary import preliminary
from pipeline_steps.report.sources_scores import by_source
from pipeline_steps.report.temporal import per_frame, temporal
from pipeline_steps.report.verdicts import verdicts

PARAMS = params.RESULT_KEYS
STUDY_TABLES = ("arms", "tasks", "parts", "effects")
CLIP_KEYS = ("key", "task", "question", "answer", "prediction", "num_frames")
CLIP_KEYS += ("sheet", "animation", "frames", "frames_geometry")
HERE = Path(__file__).resolve().parent
CONTENTS = (
    ("studies", "Studies"),
    ("decisions", "Decisions"),
    ("ideas", "Ideas"),
    ("tasks", "This run"),
    ("gaze", "Gaze"),
    ("compute", "Compute"),
    ("data", "Data and origin"),
)


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.report
    inputs = read_inputs(arguments.root, parameters)
    found = verdicts(inputs, settings)
    reports = arguments.root / "reports"
    kept = studies.read_studies(reports / "study")
    built = build_tables(inputs, settings, kept)
    numbers = summary.headline(inputs.current.result, inputs)
    check_outputs(
        folders=[reports / "figures", reports / "plots", reports / "tables"],
        files=[reports / "report.html", reports / "report.md", reports / "metrics/summary.json"],
    )
    values = parameters.as_dict()
    with replaced_folder(reports / "figures") as folder:
        shown = {name: figure and save_figure(folder, name, figure) for name, figure in draw_figures(inputs).items()}
        alike = [study for study in kept if studies.tasks_of(study) == set(inputs.current.result.tasks)]
        leading = studies.headline_of(alike)  # others say nothing about this run
        studied = {study.name: show_study(folder, study, study is leading) for study in kept}
    headline = leading and studied[leading.name]
    if headline:
        headline["tiles"] = study_tables.headline_tiles(studies.default_of(alike, numbers["training_samples"]))
    with replaced_folder(reports / "tables") as folder:
        own = [
            table
            for study in studied.values()
            for table in (*(study[name] for name in STUDY_TABLES), *study["scaling"])
        ]
        for table in [*built.values(), *own]:
            if table.rows:
                (folder / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        (folder / "verdict.md").write_text(texts.verdict_markdown(found, headline), encoding="utf-8")
    with replaced_folder(reports / "plots") as folder:
        for name, table in plots.tables(inputs).items():
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    write_json(reports / "metrics/summary.json", numbers)
    title = settings.title if parameters.ablation == "none" else f"{settings.title}: ablation {parameters.ablation}"
    content = {
        "title": title,
        "banner": texts.banner(values),
        "answer": opening.sentences(leading, alike),
        "terms": opening.terms(leading),
        "verdicts": found,
        "studies": list(studied.values()),
        "headline": headline,
        "elsewhere": " on other data" if kept and not alike else "",
        "finding": ideas.finding(kept),
        "ideas_title": ideas.folded_title(kept),
        "missing_studies": sorted(decisions.missing(kept) | ideas.missing(kept)),
        "lead": texts.lead(inputs, numbers),
        "tiles": texts.tiles(numbers),
        "tables": built,
        "figures": shown,
        "warnings": curves.warnings(inputs.curves),
        "controls": texts.controls(inputs.current.result, settings.targets),
        "compute_lines": compute.statements(inputs.flops),
        "answers": first_answers(inputs.answers),
        "heatmap_rule": heatmap_rule(inputs.heatmaps),
        "contact_sheet": attention_figures.contact_sheet(reports / "heatmaps", inputs.heatmaps),
        "missing": inputs.missing,
        "backbones": list(texts.flattened(inputs.backbones or {})),
        "origin": provenance.origin(inputs, values),
        "runs": [inputs.current, *inputs.runs],
    }
    page = render_page(
        **content,
        clips=inlined(reports / "heatmaps", inputs.heatmaps),
        parameters=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )
    write_text(reports / "report.html", page)
    clips = inputs.heatmaps["clips"] if inputs.heatmaps else []
    write_text(reports / "report.md", markdown.render(HERE / "page.md.jinja", **content, clips=clips))
    for question, answer in texts.verdict_lines(found, headline):
        print(f"{question} {answer}")
    print(f"{reports / 'report.html'}: {len(page) / 1e6:.1f} MB, and {reports / 'report.md'}")


def build_tables(inputs, settings, kept):
    """{name: `Table`} of the report. kept: list of `studies.Study`."""
    result = inputs.current.result
    return {
        table.name: table
        for table in (
            decisions.table(kept),
            *ideas.tables(kept),
            tables.targets(result, settings.targets),
            tables.accuracies(result),
            tables.losses(result),
            tables.gaze(result),
            controls.costs(result),
            *measured_tables(result),
            preliminary(result, kept),
            *differences.tables(inputs, settings),
            tables.flops(inputs.flops),
            *compute.tables(inputs.flops),
            tables.data(inputs.shards, inputs.tokens),
            reading.sources(inputs.shards, inputs.tokens),
            reading.reading(inputs.streaming),
            tables.mixture(inputs.stages),
        )
    }


def measured_tables(result):
    """Tables of an `EvaluationResult` besides those by task and mode."""
    return [
        by_source(result),
        multiple_choice(result),
        captions(result),
        caption_style(result),
        caption_form(result),
        caption_overlap(result),
        temporal(result),
        caption_parts(result),
        per_frame(result, "accuracy"),
        per_frame(result, "loss"),
        gaze_difference(result),
        checks(result),
        attention(result),
    ]


def draw_figures(inputs):
    """{name: (draw, width, height)}, or None for a figure without data."""
    result = inputs.current.result
    return {
        "curves": curves.learning(inputs.curves),
        "attention": curves.attention(inputs.curves),
        "tasks": figures.tasks(result),
        "gaze": figures.gaze(result),
        "flops": figures.flops(inputs.flops),
        "frontier": compute.frontier(inputs.flops),
        "over_frames": attention_figures.over_frames(inputs.heatmaps),
    }


def read_arguments():
    parser = argparse.ArgumentParser(description="Write reports/report.html.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--root", type=Path, default=Path(), help="folder with reports, outputs and data")
    return parser.parse_args()


def render_page(**values):
    """The HTML page. The template escapes everything in `values`."""
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    parts = {
        name: jinja2.utils.markupsafe.Markup((HERE / f"page.{name}").read_text(encoding="utf-8"))
        for name in ("css", "js")
    }
    helpers = {
        "text_of": tables.text_of,
        "data_uri": data_uri,
        "is_number": tables.is_number,
        "with_breaks": with_breaks,
    }
    return loader.get_template("page.html.jinja").render(
        **values, **parts, **helpers, contents=CONTENTS[0 if values["studies"] else 1 :]
    )


def with_breaks(text):
    """The text as HTML, in which names of parameters may break after dots and underscores."""
    safe = str(jinja2.utils.markupsafe.escape(text))
    if "." in text:
        safe = re.sub(r"(?<=\w)[._](?=[A-Za-z])", r"\g<0><wbr>", safe)
    return jinja2.utils.markupsafe.Markup(safe)


def save_figure(folder, name, figure, caption=None):
    """Writes <name>.svg and <name>-dark.svg; returns what the template needs. caption: (alternative text, caption),
    by default of texts.CAPTIONS."""
    alternative, caption = caption or texts.CAPTIONS[name]
    draw, width, height = figure
    entry = {
        "width": round(width * 100),
        "height": round(height * 100),
        "name": name,
        "alt": alternative,
        "caption": caption,
    }
    for theme, text in figures.svg(draw, width, height).items():
        suffix = "" if theme == "light" else f"-{theme}"
        (folder / f"{name}{suffix}.svg").write_text(text, encoding="utf-8")
        entry[theme] = data_uri(text.encode(), "image/svg+xml")
    return entry


def data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def show_study(folder, study, leads):
    """What the template needs of a `studies.Study`; saves its figures. leads: whether it leads the page, where some of
    its arms are shown before all."""
    comparisons, margin = study.summary.comparisons, study.summary.margin
    drawn = {
        "points": study_figures.points(study, study.summary.arms),
        "forest": study_figures.forest(comparisons, margin),
    }
    found = {
        "name": study.name,
        "question": study.summary.question,
        "arms": study_tables.arms(study, study.summary.arms),
    }
    found["heatmap"] = attention_figures.kept(study)
    found |= {"tasks": study_tables.by_task(study, study.summary.arms), "parts": study_tables.clip_parts(study)}
    found["effects"] = study_tables.effects(study)
    found["first"] = None
    if leads:
        arms, first = studies.leading_arms(study), studies.leading(study)
        found["cards"] = study_tables.cards(study)
        if len(arms) < len(study.summary.arms):
            found["first"] = {"arms": study_tables.arms(study, arms), "tasks": study_tables.by_task(study, arms)}
            drawn |= {
                "first_points": study_figures.points(study, arms),
                "first_forest": study_figures.forest(first, margin),
            }
    found["scaling"] = scaling.tables(study)
    drawn["grid"] = scaling.figure(study)
    for name, figure in drawn.items():
        caption = scaling.CAPTION if name == "grid" else study_figures.CAPTIONS[name.removeprefix("first_")]
        found[name] = figure and save_figure(folder, f"study_{study.name}_{name}", figure, caption)
    if found["first"]:
        found["first"] |= {name: found[f"first_{name}"] for name in ("points", "forest")}
    return found


def first_answers(answers, per_task=2):
    """The first `per_task` answers of every task."""
    seen, chosen = {}, []
    for answer in answers:
        seen[answer["task"]] = seen.get(answer["task"], 0) + 1
        if seen[answer["task"]] <= per_task:
            chosen.append(answer)
    return chosen


def heatmap_rule(index):
    if index is None:
        return ""
    return index["rule"] if index["clips"] else "the network has no queries, or no clip was selected"


def inlined(folder, index):
    """The index entries with inlined images; sheets as WebP, which is a tenth of the size of PNG."""
    entries = []
    for entry in (index or {"clips": []})["clips"]:
        if absent := [key for key in CLIP_KEYS if key not in entry]:
            raise UserError(
                f"{folder / 'index.json'}: entry without {', '.join(absent)}, written by another version. Run `dvc "
                "repro heatmaps`."
            )
        for path in (folder / entry["sheet"], folder / entry["frames"]):
            if not path.exists():
                raise UserError(
                    f"{folder / 'index.json'} names {path}, which does not exist. Run `dvc repro heatmaps`."
                )
        sheet = attention_figures.embedded(folder / entry["sheet"], quality=65)["content"]
        frames = attention_figures.embedded(folder / entry["frames"])
        size = {name: frames[name] for name in ("width", "height")}
        content = (folder / entry["frames"]).read_bytes()  # lossless, as the drawing script cuts tiles out of it
        uris = {"sheet_uri": data_uri(sheet, "image/webp"), "frames_uri": data_uri(content, "image/webp")}
        entries.append(entry | uris | size)
    return entries


if __name__ == "__main__":
    run_main(main)
