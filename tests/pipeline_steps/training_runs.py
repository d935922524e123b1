"""Settings of a stage for the tests of training."""

from types import SimpleNamespace

RATES = {"connector": 3e-3, "vision": 4e-4, "language": 9e-4}


def settings(**options):
    rates = SimpleNamespace(**(RATES | options.pop("rates", {})))
    defaults = {"freeze_vision": False, "freeze_language": False, "schedule": "cosine", "warmup_ratio": 0.1}
    defaults |= {"min_lr_ratio": 0.2, "decay_share": 0.25, "converged_learning_rate": None}
    return SimpleNamespace(learning_rate=rates, **(defaults | options))
