"""lmms_eval.api.instance: one request."""

from dataclasses import dataclass, field


@dataclass
class GenerationResult:
    text: str
    token_counts: object = None


def unwrap_generation_output(output):
    """What the evaluator hands on of a model's result: for a pair of numbers its text."""
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    return str(output), None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)
    resps: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task_name, self.doc_id = self.metadata["task"], self.metadata["doc_id"]
        self.repeats = self.metadata["repeats"]

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)
