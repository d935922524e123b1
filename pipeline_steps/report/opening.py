"""The page's first paragraphs: what the study that leads the page found, its limits, and the terms that are used."""

from pipeline_steps.common.study_results import BETTER, EQUAL, EXPLORATORY, TOO_FEW, UNDECIDED, UNMATCHED, WORSE
from pipeline_steps.report import decisions, studies, study_tables

TERMS = (
    "Planned token: from the second frame on, the language model plans the query with which the vision encoder looks "
    "at a frame (the gaze). Default recipe: params.yaml, with one planned token. Static token (A6): one learned query "
    "for all frames. Sixteen tokens (B1): means of patches, without a query. The research: the earlier project whose "
    "questions and ideas are tested here."
)
NOTHING = (
    "No study in reports/study compares one planned token per frame with a static one and with sixteen on this run's "
    "data. The verdicts below are of single runs."
)


def sentences(study, found):
    """The answer of the leading `studies.Study` (None: there is none), a list of sentences. found: all studies of this
    run's tasks, of which one may compare arms at equal training FLOPs."""
    if study is None:
        return [NOTHING]
    entries = [entry for entry in studies.leading(study) if entry.verdict != EXPLORATORY]
    if not entries:
        return [f"Study {study.name} asks no headline question about these arms: its comparisons are exploratory."]
    labels = sorted({entry.arm for entry in entries}, key=arm_order, reverse=True)  # sixteen tokens first
    lines = []
    for label in labels:
        own = {entry.group: entry for entry in entries if entry.arm == label}
        first, count = next(iter(own.values())), max(len(entry.differences) for entry in own.values())
        budget = study_tables.budget_text(study, first).partition(", ")[0]
        facts = [f"{count} pair{'s' * (count > 1)} of runs", budget, first.convergence, label.partition(", ")[2]]
        verdicts = {group: entry.verdict for group, entry in own.items()}
        lines.append(sentence_case(compared(first, verdicts, study.summary.margin, facts)))
    lines.append(f"{sentence_case(rates_text(study, entries))}.")
    return lines + [
        line for choice in decisions.CHOICES if choice.equal_flops for line in at_equal_flops(choice, study, found)
    ]


def arm_order(label):
    return studies.HEADLINE_ARMS.index(label.partition(", ")[0]), label


def compared(entry, verdicts, margin, facts):
    """A sentence, without its capital, on the baseline of a `ComparisonResult` against its arm. verdicts: {group of
    tasks: of the baseline}; facts: to stand in parentheses, empty ones are left out."""
    words = WORDS | {EQUAL: f"equal (within {100 * margin:g} points)"}
    groups = {}
    for group, verdict in verdicts.items():
        groups.setdefault(words[verdict], []).append(f"in {studies.group_name(group)}")
    clauses = joined([f"{word} {joined(places)}" for word, places in groups.items()])
    arm, baseline = (studies.arm_name(name).partition(" (")[0] for name in (entry.arm, entry.baseline))
    return f"against {arm}, {baseline} is {clauses} ({', '.join(filter(None, facts))})."


WORDS = {
    BETTER: "better",
    WORSE: "worse",
    UNDECIDED: "not shown to be better, worse or equal",
    TOO_FEW: "not judged, for too few runs,",
    UNMATCHED: "not comparable, for unequal training budgets,",
    EXPLORATORY: "only explored",
}


def joined(parts):
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def sentence_case(text):
    return text[:1].upper() + text[1:]


def rates_text(study, entries):
    """The learning rates of the compared arms, by the study's design."""
    factors = studies.rate_factors(study.name)
    arms = list(dict.fromkeys(name for entry in entries for name in (entry.baseline, entry.arm.partition(", ")[0])))
    if unknown := [arm for arm in arms if arm not in factors]:
        names = ", ".join(unknown)
        return f"the learning rates of {names} in study {study.name} are not known (no design in conf/study)"
    values = {factors[arm] for arm in arms}
    if values == {1}:
        return "all arms have the default's learning rates, which were not tuned for the other arms"
    if len(values) == 1:
        return f"all arms have {values.pop():g} × the default's learning rates"
    return "learning rates: " + ", ".join(f"{studies.arm_name(arm)} {factors[arm]:g} × the default's" for arm in arms)


def at_equal_flops(choice, leading, found):
    """A sentence per budget on what the studies `found` say of an alternative at equal training FLOPs, [] without
    runs."""
    study = decisions.best_study(choice, found)
    lines = []
    for label in decisions.labels(choice, study) if study else ():
        own = decisions.by_group(choice, study, label)
        entry, margin = next(iter(own.values())), study.summary.margin
        (_, base), samples = studies.paired_runs(study, entry), studies.default_runs(leading)["training_samples"]
        share = base["training_samples"].mean() / samples.mean()
        facts = decisions.attribution(study, own) | {"study": f"study {study.name}"}
        verdicts = {group: decisions.verdict(other, margin) for group, other in own.items()}
        rates = rates_text(study, own.values())
        start = f"At equal training FLOPs ({rates}; one planned token has {share:.2g} × its samples above), "
        facts = [fact for name, fact in facts.items() if name not in ("budget", "test") or fact == EXPLORATORY]
        lines.append(start + compared(entry, verdicts, margin, facts))
    return lines


def terms(study):
    """The terms in a short paragraph; with those of the leading `studies.Study`, or None."""
    if study is None:
        return TERMS
    groups = dict.fromkeys(entry.group for entry in studies.leading(study))
    tasks = {name: study.summary.group_tasks[name] for name in groups if name in study.summary.group_tasks}
    lines = [f"{sentence_case(studies.group_name(name))}: {', '.join(own)}." for name, own in tasks.items()]
    plateau = f"Plateau: token accuracy below {100 * study.summary.plateau:.0f}%, of runs that did not learn all tasks."
    return " ".join([TERMS, *lines, plateau])
