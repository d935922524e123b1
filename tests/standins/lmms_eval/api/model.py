"""lmms_eval.api.model: the base class of all models."""

import abc


class CacheHook:
    def __init__(self, cachinglm=None) -> None:
        pass

    def add_partial(self, attr, req, res) -> None:
        pass


class lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = [pair.split("=", 1) for pair in arg_string.split(",") if pair]
        further = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**dict(pairs), **further)

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size
