"""Headline numbers of a run: reports/metrics/summary.json, the only DVC metrics file."""

from statistics import fmean

from pipeline_steps.common.metrics import rounded


def headline(result, inputs):
    """{name: number}, rounded as in all result files, of an `EvaluationResult` and the report's `Inputs`."""
    mean, gaze = result.mean, gaze_means(result)
    found = {
        "mean_token_accuracy": mean["autoregressive"].accuracy,
        "exact_match_accuracy": result.mean_exact_match,
        "mean_loss": mean["autoregressive"].loss,
        **{f"accuracy_{task}": modes["autoregressive"].accuracy for task, modes in sorted(result.tasks.items())},
        "autoregressive_fine_loss_ratio": mean["autoregressive"].loss / mean["fine"].loss,
        "blind_accuracy": mean["blind"].accuracy,
        "random_query_accuracy": mean["random_query"].accuracy,
        "gaze_peak_on_target": gaze[0] if gaze else None,
        "training_samples": inputs.current.budget.num_samples if inputs.current.budget else None,
        "training_flops": inputs.current.budget.flops if inputs.current.budget else None,
    }
    return rounded(found)


def gaze_means(result):
    """(share of frames whose attention peak is on the target, chance level among the objects): means over the tasks in
    autoregressive mode. None if no gaze was measured."""
    found = [modes["autoregressive"] for modes in result.gaze.values() if "autoregressive" in modes]
    if not found:
        return None
    return fmean(entry.peak_on_target for entry in found), fmean(entry.chance_among_objects for entry in found)
