"""A comparison as a Prefect flow: for schedules, with its page and numbers among the artifacts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from prefect import Flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_table_artifact

from ..folder import one_line
from ..server import use_server
from .comparison import Comparison, compare_runs
from .headline import headline


class ComparingFlow(Flow[..., str]):
    """A flow whose callers need nothing set up: it brings its own server where there is none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The flow's result, or its final state."""
        with use_server():
            return super().__call__(*args, **kwargs)


@partial(ComparingFlow, name="compare-runs")
def compare_scheduled(
    base: str,
    other: str | None = None,
    out: str | None = None,
    level: Literal["documents", "tokens", "distributions"] | None = None,
    endpoint_url: str | None = None,
) -> str:
    """Compare two runs, and leave `compare.html` and `compare.json`.

    Args:
        base: URI of the base; where `other` is left out, of the folder whose last two complete runs
            of one recipe are compared, the earlier one for the base.
        other: URI of the run held against it.
        out: a folder on any fsspec URI; default `compare/<base key>-<other key>` in the folder that
            holds both runs.
        level: compare no deeper than this, and fail if it cannot be reached; default as deep as
            what both runs kept allows.
        endpoint_url: the S3 server to use where it is not Amazon's.

    Returns:
        The page's URI.

    Raises:
        ValueError: for what cannot be compared.
    """
    log = get_run_logger()
    found = compare_runs(base, other, out, level=level, endpoint_url=endpoint_url)
    for name, value in headline(found):
        log.info("%s: %s", name.strip(), value)
    try:
        _leave_artifacts(found)
    except Exception as error:
        # The page stands, whatever the server has to say.
        log.warning("%s: no artifacts of it: %s", found.uri, one_line(error))
    assert found.uri is not None
    return found.uri


def _leave_artifacts(found: Comparison) -> None:
    """What the Prefect UI shows: the numbers, and where the page lies."""
    create_table_artifact(
        key="comparison",
        table=[{"what": name.strip(), "value": value} for name, value in headline(found)],
        description=f"{found.base.uri} (A) and {found.other.uri} (B)",
    )
    assert found.address is not None
    create_link_artifact(key="comparison-page", link=found.address, link_text="compare.html")
