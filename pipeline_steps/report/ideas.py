"""The research's twelve ideas and the fovea: parameter, measured effect with interval, verdict.

An idea about the text objective is compared by its answers, by the rules of `decisions`. Of an idea about next-frame
prediction, the effect is the gain of planned over static queries, decided by its 95 % t-interval. With the three runs
that most ideas have, all verdicts are exploratory: not corrected for the number of ideas.
"""

from dataclasses import dataclass
from statistics import fmean

from pipeline_steps.common.study_results import (
    BETTER,
    CLIPS,
    EQUAL,
    NOT_LEARNED,
    SINGLE_PASS,
    TOO_FEW,
    UNDECIDED,
    VIDEOS,
    WORSE,
)
from pipeline_steps.report import decisions, study_tables
from pipeline_steps.report.decisions import CHEAPER, OTHER, Choice
from pipeline_steps.report.tables import MISSING, Table

OBJECTIVE = "training.stageN.objective"
PREDICTION = f"{OBJECTIVE}.next_frame"
PARAMETER_NOTE = (
    "First system: the research's, which predicts the next frame. "
    f"stageN: stages 2 and 3 (freeze: all three); next_frame, text, entropy and contrastive: in {OBJECTIVE}."
)
BESIDE = (  # columns after the verdict
    "clips won, %",
    "won in the last four frames, %",
    "loss without the state, ×",
    "sensitivity to state / previous latent",
    "token similarity",
    "reference − idea, points",
)
TARGETS = {  # arms that repeat the research's negative result: what they predict
    "latent": "latent",
    "delta": "delta",
    "flow": "flow",
    "no_previous": "latent without the previous one",
}


@dataclass(frozen=True)
class Idea:
    """One arm of one idea."""

    choice: Choice
    parameters: tuple[str, ...]  # that the arm changes; stageN: stage2 and stage3
    predicts: bool = False  # measured by next-frame losses, not by answers


def predicting(idea, arm, description, *names):
    return next_frame(idea, arm, description, *(f"{PREDICTION}.{name}" for name in names))


def next_frame(idea, arm, description, *keys, study="next_frame", baseline="latent"):
    return Idea(Choice(idea, arm, description, OTHER, study, baseline), keys, predicts=True)


def answering(idea, arm, description, *keys, rule=OTHER, study="ideas", baseline="none"):
    return Idea(Choice(idea, arm, description, rule, study, baseline), keys)


def text_beside(arm, description, name):
    keys = (f"{PREDICTION}.{name}",)
    return answering("first system", arm, description, *keys, study="next_frame", baseline="text_only")


def static(arm, description, baseline="latent"):
    return next_frame("first system", arm, description, "model.coarse_only", baseline=baseline)


def fovea(arm, description, *keys, equal_flops=False):
    return Idea(Choice("fovea", arm, description, CHEAPER, "fovea", "full", equal_flops), keys)


FROZEN = "training.stageN.freeze_vision", "training.stageN.freeze_language"
QUERIES = "model.num_visual_tokens_per_frame"
AGGREGATED = QUERIES, "model.token_aggregation"
FOVEA = "model.frame_downsampling", "model.fovea_size"
MOTION = "sources.procedural.motion"  # digits hop by default
OBJECTS = {"study": "next_frame_objects", "baseline": "jump"}
IDEAS = (
    predicting("first system", "latent", "the next frame's latent", "weight"),
    next_frame("first system", "frames_16", "clips of 16 frames", "sources.procedural.num_frames"),
    next_frame("first system", "beside_text", "beside the text loss", f"{OBJECTIVE}.text.weight"),
    text_beside("beside_text", "beside the text loss, answers", "weight"),
    predicting("first system", "modes", "modes 60/20/20", "modes"),
    text_beside("modes", "modes 60/20/20, answers", "modes"),
    static("latent_A6", "static queries trained apart"),
    static("no_previous_A6", "the same without previous latent", baseline="no_previous"),
    predicting("1 previous latent", "drop", "dropped", "previous_latent"),
    predicting("1 previous latent", "noise", "with noise", "previous_latent"),
    predicting("1 previous latent", "no_previous", "omitted", "previous_latent"),
    predicting("2 delta", "delta", "with L1 safeguard", "target", "l1_weight"),
    predicting("3 skip", "skip", "query to head", "skip_query"),
    answering("4 temperature", "temperature_01", "0.1", "model.attention_temperature"),
    answering("4 temperature", "temperature_03", "0.3", "model.attention_temperature"),
    answering("4 temperature", "temperature_learned", "learnable", "model.learnable_temperature"),
    answering("5 entropy margin", "entropy", "weight 0.1", f"{OBJECTIVE}.entropy.weight"),
    predicting("6 separate heads", "separate_heads", "coarse and planned", "separate_heads"),
    answering("7 queries", "K2", "two", QUERIES),
    answering("7 queries", "K4", "four", QUERIES),
    answering("7 queries", "K9", "nine", QUERIES),
    answering("7 queries", "K2_mean", "two, averaged", *AGGREGATED),
    answering("7 queries", "K4_mean", "four, averaged", *AGGREGATED),
    answering("7 queries", "K4_weighted", "four, weighted", *AGGREGATED),
    answering("7 queries", "K9_mean", "nine, averaged", *AGGREGATED),
    answering("8 contrastive", "contrastive", "weight 0.1", f"{OBJECTIVE}.contrastive.weight"),
    answering("9 frozen vision", "frozen_vision", "language model trained", FROZEN[0], rule=CHEAPER),
    answering("9 frozen vision", "frozen_both", "language model frozen", *FROZEN, rule=CHEAPER),
    next_frame("10 motion", "smooth", "smooth digits, next frame", MOTION),
    answering("10 motion", "smooth", "smooth digits, answers", MOTION),
    next_frame("10 motion", "jump", "objects jump, flow", MOTION, **OBJECTS),
    next_frame("10 motion", "glide", "objects glide, flow", MOTION, **OBJECTS),
    predicting("11 optical flow", "flow", "as target", "target"),
    answering("12 hard attention", "top_k", "four largest", "model.hard_attention"),
    answering("12 hard attention", "gumbel", "Gumbel", "model.hard_attention"),
    fovea("fovea", "low resolution with a window", *FOVEA),
    fovea("fovea", "the same at equal FLOPs", *FOVEA, equal_flops=True),
    fovea("low", "low resolution alone", FOVEA[0]),
)


def tables(found):
    """The two `Table`s of IDEAS from a list of `studies.Study`: those compared by answers, and by next-frame losses."""
    by_answers, by_prediction = by_measure(found)
    return answers_table(by_answers), prediction_table(by_prediction)


def by_measure(found):
    """Two lists of (idea, its `studies.Study` or None): ideas compared by answers, and by next-frame losses."""
    chosen = [(idea, study_of(idea, found)) for idea in IDEAS]
    return [pair for pair in chosen if not pair[0].predicts], [pair for pair in chosen if pair[0].predicts]


def answers_table(chosen):
    asked = [(idea.choice, study) for idea, study in chosen if study]
    groups = list(dict.fromkeys(entry.group for pair in asked for entry in decisions.entries(*pair)))
    said = decisions.shared([decisions.attribution(study, own) for _, study, own in answered(chosen)])
    rows = []
    for idea, study in chosen:
        choice, parameter = idea.choice, parameter_text(idea)
        if study is None:
            rows.append([decisions.name_of(choice), parameter, *[MISSING] * len(groups), decisions.not_run(choice)])
        for _, _, own in answered([(idea, study)]):
            budget = next(iter(own.values())).arm.partition(", ")[2]
            name, verdict = decisions.name_of(choice, budget), decisions.verdict_text(choice, study, own, said)
            rows.append([name, parameter, *decisions.effect_cells(own, groups), verdict])
    columns = ["idea", "parameter", *(f"{group}, points" for group in groups), "verdict"]
    note = (
        f"{PARAMETER_NOTE} Points: default minus idea (fovea: full resolution minus idea; beside the text loss: text "
        "loss alone minus idea), token accuracy [95% t-interval, not corrected for the number of ideas], pairs of runs "
        "with equal seeds. Verdicts by the rules of the report's decisions: of fewer than six pairs, with which no "
        "exact test can decide, the intervals do, where the studies' own pages say undecided. What the fovea's window "
        f"adds is the difference between its row and that of low resolution alone.{shared_note(said)}"
    )
    return Table("ideas", "Ideas compared by answers", columns, rows, note)


def answered(chosen):
    """(idea, study, {group: `ComparisonResult`}) of every idea, and budget, that was run."""
    return [
        (idea, study, decisions.by_group(idea.choice, study, label))
        for idea, study in chosen
        if study
        for label in dict.fromkeys(entry.arm for entry in decisions.entries(idea.choice, study))
    ]


def shared_note(said):
    return f" All rows: {', '.join(said.values())}." if said else ""


def prediction_table(chosen):
    said = decisions.shared([prediction_facts(arm, study) for _, study, arm in predicted(chosen)])
    rows = []
    for idea, study in chosen:
        choice, parameter = idea.choice, parameter_text(idea)
        if study is None:
            empty = [MISSING] * len(CLIPS), [MISSING] * len(BESIDE)
            rows.append([decisions.name_of(choice), parameter, *empty[0], decisions.not_run(choice), *empty[1]])
        for _, _, arm in predicted([(idea, study)]):
            budget = arm.budget if len({other.budget for other in study.summary.arms}) > 1 else ""
            rows.append([decisions.name_of(choice, budget), parameter, *prediction_cells(arm, study, said)])
    columns = ["idea", "parameter", *(f"{clips}, %" for clips in CLIPS.values()), "verdict", *BESIDE]
    note = (
        f"{PARAMETER_NOTE} Clips: (static − planned loss) / static loss, after the last planned pass, mean over runs "
        "[95% t-interval, not corrected for the number of ideas]; above 0, planned queries are better. None where the "
        "head predicts moving clips no better than that nothing changes (in static clips that is exact). In static "
        "clips the change and the flow are 0 and the previous latent is the next one, so little is left to predict. "
        "Static queries trained apart: against the planned queries of the model with the same objective. The verdict "
        "is on planned against static queries; undecided, too, where an arm's preregistered seeds alone give another "
        "one. The columns after it are of moving clips. Clips won: share with lower planned loss. "
        "Loss without the state: with the language model's state shuffled between clips "
        "/ zeroed, divided by the planned loss; near 1, the head does not use it. Sensitivity: relative change of the "
        "prediction / of the input. Similarity: cosine of a frame's static and planned token. Reference − idea: "
        "difference of the gains on moving clips (latent minus idea; jumping minus gliding objects), pairs of runs "
        "with equal seeds and targets. Runs of an arm and of its reference may be of different commits (`commit` in "
        f"runs.csv).{shared_note(said)}"
    )
    return Table("ideas_next_frame", "Ideas compared by next-frame prediction", columns, rows, note)


def predicted(chosen):
    """(idea, study, `ArmResult`) of every idea, and budget, that was run."""
    return [(idea, study, arm) for idea, study in chosen if study for arm in predictions(idea.choice, study)]


def prediction_facts(arm, study):
    """{name: fact} of the runs behind an `ArmResult`, as `decisions.attribution`."""
    return {
        "study": study.name,
        "runs": f"{len(arm.seeds)} run{'s' * (len(arm.seeds) > 1)}",
        "samples": f"{arm.training_samples:,.0f} samples",
        "split": f"{study.summary.split} split",
    }


def folded_title(found):
    """How many ideas there are and what the runs say of them, in a line. found: list of `studies.Study`."""
    by_answers, by_prediction = by_measure(found)
    answers = [
        decisions.overall([decisions.verdict(entry, study.summary.margin) for entry in own.values()])
        for _, study, own in answered(by_answers)
        if own
    ]
    gains = [prediction_overall(arm, study.summary.next_frame_margin) for _, study, arm in predicted(by_prediction)]
    not_run = sum(study is None for _, study in (*by_answers, *by_prediction))
    count = len({idea.choice.decision for idea in IDEAS})
    return (
        f"{count} ideas in {len(IDEAS)} variants. Answers: default {tally(answers)}. Next frame: planned queries "
        f"{tally(gains)}. Not run: {not_run}"
    )


def prediction_overall(arm, margin):
    """One verdict on the planned queries of an `ArmResult`, of all groups of clips."""
    words = {group: arm.prediction_verdict(group, margin) for group in arm.next_frame}
    if NOT_LEARNED in words.values():
        return "not learned"
    verdicts = {entry.verdict for entry in arm.next_frame.values()}
    return "without planned queries" if SINGLE_PASS in verdicts else decisions.overall(verdicts)


def tally(verdicts):
    """The verdicts counted: the four main ones always, others where they occur."""
    names = dict.fromkeys((BETTER, EQUAL, WORSE, UNDECIDED, *sorted(verdicts)))
    return ", ".join(f"{name} {verdicts.count(name)}" for name in names)


def missing(found):
    """Names of the studies of ideas without runs."""
    return {idea.choice.study for idea in IDEAS if study_of(idea, found) is None}


def parameter_text(idea):
    return ", ".join(name.removeprefix(f"{OBJECTIVE}.") for name in idea.parameters)


def study_of(idea, found):
    if idea.predicts:
        return decisions.best_study(idea.choice, found, predictions, lambda arm: len(arm.seeds))
    return decisions.best_study(idea.choice, found)


def predictions(choice, study):
    """The `ArmResult`s with next-frame losses of a choice's arm, one per budget."""
    return [arm for arm in study.summary.arms if arm.arm == choice.arm and arm.next_frame]


def prediction_cells(arm, study, said):
    """Cells of an `ArmResult`: gain by group of clips, verdict, and what stands beside it, of the moving clips. said:
    names of facts of `prediction_facts` to leave out."""
    found, moving, margin = arm.next_frame, arm.next_frame.get(VIDEOS), study.summary.next_frame_margin
    words = {name: arm.prediction_verdict(name, margin) for name in CLIPS if name in found}
    cells = [gain_cell(found[name]) if words.get(name, NOT_LEARNED) != NOT_LEARNED else MISSING for name in CLIPS]
    beside = [MISSING] * len(BESIDE)
    if moving is not None:
        beside = [
            spread_cell(moving, "wins"),
            spread_cell(moving, "wins_last_frames"),
            state_cell(moving),
            measures_cell(moving, "state_sensitivity", "previous_sensitivity"),
            measures_cell(moving, "token_similarity"),
            difference_cell(moving),
        ]
    text = "; ".join(f"{CLIPS[name]}: {word}" for name, word in words.items())
    if len(words) == len(CLIPS) and len(set(words.values())) == 1:
        text = next(iter(words.values()))
    facts = {name: fact for name, fact in prediction_facts(arm, study).items() if name not in said}
    return [*cells, decisions.attributed(text, facts), *beside]


def gain_cell(found):
    digits = study_tables.digits(found.interval)
    return study_tables.interval_cell(values, found.interval, digits) if (values := found.known("gain")) else MISSING


def spread_cell(found, name):
    values = found.known(name)
    if not values:
        return MISSING
    text, mean = study_tables.spread(values) if len(values) > 1 else (f"{100 * values[0]:.1f}", 100 * values[0])
    return text + few_runs(found, len(values)), mean


def measures_cell(found, *names):
    """Means over the runs of measures of a `NextFrameGain`."""
    known = [found.known(name) for name in names]
    if not known[0]:
        return MISSING
    means = [measure_text(values, found) for values in known]
    return " / ".join(means), fmean(known[0])


def measure_text(values, found):
    """Mean of the values of some runs of a `NextFrameGain`."""
    return f"{fmean(values):.2f}{few_runs(found, len(values))}" if values else "–"


def state_cell(found):
    ratios = [found.ratios(name) for name in ("shuffled_state", "no_state")]
    return " / ".join(measure_text(values, found) for values in ratios), fmean(ratios[0]) if ratios[0] else None


def few_runs(found, count):
    """How many runs a figure is of, if not of all."""
    return "" if count == len(found.gain) else f" ({count} run{'s' * (count > 1)})"


def difference_cell(found):
    if not found.differences:
        return MISSING
    interval = found.differences_interval
    return study_tables.interval_cell(found.differences, interval, study_tables.digits(interval))


def finding(found):
    """What the runs say about the research's negative result, in one or two sentences."""
    parts, uses = {}, {}
    for arm_name, name in TARGETS.items():
        idea = next(idea for idea in IDEAS if idea.choice.arm == arm_name)
        study = study_of(idea, found)
        arm = study and predictions(idea.choice, study)[0]
        if arm and VIDEOS in arm.next_frame:
            uses[name] = arm.next_frame[VIDEOS].relative("shuffled_state")
        for group, clips in CLIPS.items():
            entry = arm.next_frame.get(group) if arm else None
            verdict = entry and entry.verdict
            if entry and arm.prediction_verdict(group, study.summary.next_frame_margin) == NOT_LEARNED:
                verdict = NOT_LEARNED
            text = f"{name} on {clips}"
            if entry is not None and entry.gain and (values := entry.known("gain")):
                text += f" ({study_tables.interval_text(values, entry.interval, study_tables.digits(entry.interval))}%)"
            parts.setdefault(OUTCOMES[verdict], []).append(text)
    order = dict.fromkeys(OUTCOMES.values())
    outcomes = "; ".join(f"{outcome} for {', '.join(parts[outcome])}" for outcome in order if outcome in parts)
    text = f"The research found that planned queries predict the next frame no better than static ones: {outcomes}."
    known = {name: ratio for name, ratio in uses.items() if ratio is not None}
    if unused := ratios_text(known, lambda ratio: ratio < UNUSED):
        text += f" With another clip's state, the loss on moving clips is only so many times as high: {unused}. So"
        text += " these heads hardly use the language model's state, through which planned queries act."
        if used := ratios_text(known, lambda ratio: ratio >= UNUSED):
            text += f" More informative are heads that do use it: {used}."
    return text


def ratios_text(ratios, chosen):
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items() if chosen(ratio))


UNUSED = 1.01  # another clip's state changes the loss by less than this


OUTCOMES = {
    EQUAL: "reproduced",
    BETTER: "refuted, planned queries are better,",
    WORSE: "not refuted, planned queries are even worse,",
    UNDECIDED: "undecided",
    TOO_FEW: "not decided by fewer than three runs",
    SINGLE_PASS: "not decided without planned queries",
    NOT_LEARNED: "not learned, no better than predicting no change,",
    None: "not measured",
}
