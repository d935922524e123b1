"""Progress bars of all stages. Results do not depend on this module, so dvc.yaml lists it for no stage."""

from collections.abc import Iterable

from tqdm import tqdm

from pipeline_steps.common.errors import printable

INTERVAL = 1.0  # seconds between updates


def progress_bar(
    title: str, iterable: Iterable | None = None, *, unit: str, total: int | None = None, initial: int = 0,
    disable: bool = False,
) -> tqdm:  # fmt: skip
    """A bar on stderr around `iterable`, or one to advance with `update`. total: length if there is no len(); initial:
    number already done."""
    return tqdm(
        iterable,
        desc=title,
        unit=unit,
        total=total,
        initial=initial,
        disable=disable,
        mininterval=INTERVAL,
        dynamic_ncols=True,
    )


def show_values(bar: tqdm, **values: float) -> None:
    """Shows these values after the bar from its next update on."""
    bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)


def write_line(text: str) -> None:
    """Prints a line on stdout without breaking the bar."""
    tqdm.write(printable(text))
