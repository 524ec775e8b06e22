"""Make or renew what the Prefect server does by itself about runs that fail.

    python infra/automations.py
    python infra/automations.py --notify slack-webhook/operations

Talks to the server that Prefect's settings name. Running it again renews what it made before and
leaves everything else alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

SILENCE_SECONDS = 180
"""Six heartbeats of `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` in infra/prefect.yaml."""

_RUNS = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
# Deployments give their tags to their runs: other projects of the server are not meant.
_OURS = ResourceSpecification({"prefect.resource.id": ["prefect.tag.logitmill"]})
_EACH_RUN = {"prefect.resource.id"}
_ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
_HEARTBEAT = "prefect.flow-run.heartbeat"
_MESSAGE = """{{ flow_run.name }} of {{ flow.name }}: {{ flow_run.state.name }}

{{ flow_run.state.message }}

{{ flow_run|ui_url }}"""


def mark_crashed(silence: timedelta) -> AutomationCore:
    """Runs whose process is gone, which cannot say so, become Crashed."""
    return AutomationCore(
        name="logitmill: a run whose process is gone has crashed",
        description="Without it such a run stays Running, and keeps its place in the work pool.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *_ENDS},
            match=_RUNS,
            match_related=_OURS,
            for_each=_EACH_RUN,
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no sign of life for {silence.total_seconds():.0f} s: its process is gone",
            )
        ],
    )


def notify(block_id: UUID) -> AutomationCore:
    """Runs that failed or crashed are told to people."""
    return AutomationCore(
        name="logitmill: a run failed",
        description="Tells people which run it was, and what its last words were.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match=_RUNS,
            match_related=_OURS,
            for_each=_EACH_RUN,
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            SendNotification(
                block_document_id=block_id,
                subject="logitmill: {{ flow_run.name }} {{ flow_run.state.name }}",
                body=_MESSAGE,
            )
        ],
    )


def find_block(client: SyncPrefectClient, slug: str) -> UUID:
    """The id of a notification block. Raises ValueError if there is none of this name."""
    kind, _, name = slug.partition("/")
    try:
        return client.read_block_document_by_name(name, kind, include_secrets=False).id
    except ObjectNotFound:
        raise ValueError(
            f"--notify: the server has no block {slug!r}; make one in the UI under Blocks, and "
            "give its type and name, as in slack-webhook/operations"
        ) from None


def renew(client: SyncPrefectClient, automations: Iterable[AutomationCore]) -> None:
    """Put automations in the place of those of the same names."""
    for automation in automations:
        before = client.read_automations_by_name(automation.name)
        client.create_automation(automation)
        for old in before:
            client.delete_automation(old.id)


def main() -> int:
    """Exit status: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notify", metavar="TYPE/NAME", help="block that messages go through")
    parser.add_argument(
        "--silence",
        type=float,
        default=SILENCE_SECONDS,
        metavar="SECONDS",
        help=f"after which a run has crashed; default {SILENCE_SECONDS}",
    )
    given = parser.parse_args()
    with get_client(sync_client=True) as client:
        wanted = [mark_crashed(timedelta(seconds=given.silence))]
        try:
            if given.notify:
                wanted.append(notify(find_block(client, given.notify)))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        renew(client, wanted)
    for automation in wanted:
        print(automation.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
