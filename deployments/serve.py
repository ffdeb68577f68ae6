"""The deployments of `prefect.yaml` in one process, without a work pool.

    python deployments/serve.py     # from the repository's root; Ctrl-C ends it

Ctrl-C pauses the deployments, and a start wakes them again, with all their schedules. On one server use either this or
`prefect.yaml` with a worker, for both would take the same runs.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from prefect import Flow, serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType

from prefect_segmind.flows import explore_variations, image_to_image, process_inbox, reconcile, refresh_assets

ZONE = "Europe/Berlin"
AT_ONCE = 4
"""Runs at the same time; each is a process of its own."""
NEEDED = ("image", "prompt", "name")
"""What an event must have, though the flow has a default for a name."""
OURS = ("archive", "upload_to", "publish_to", "credentials_block", "on_unknown", "on_kept")
"""What no event may set: it decides what a picture shows, not where it goes and who pays."""


def deployments() -> list[RunnerDeployment]:
    """Everything that `prefect.yaml` deploys, in its order."""
    return [
        _deployment(image_to_image, "on-demand", "One picture of an image and a prompt, paid for once."),
        _deployment(
            image_to_image,
            "on-asset-changed",
            "A picture for each event marketing.asset.changed, made from its payload.",
            enforce_parameter_schema=False,
            triggers=[
                DeploymentEventTrigger(
                    name="segmind - asset changed",
                    description="Runs image-to-image/on-asset-changed for each event marketing.asset.changed.",
                    expect={"marketing.asset.changed"},
                    parameters=from_payload(image_to_image),
                )
            ],
        ),
        _deployment(
            refresh_assets,
            "scheduled",
            "The pictures of a manifest, kept up to date. What is archived is not paid for again.",
            parameters={"manifest": "deployments/campaign.yaml", "budget_usd": 1.00},
            schedules=[
                Schedule(
                    slug="nightly", cron="30 3 * * *", timezone=ZONE, parameters={"variables": {"season": "summer"}}
                ),
                Schedule(
                    slug="autumn-campaign",
                    cron="0 6 * * 1",
                    timezone=ZONE,
                    parameters={
                        "variables": {"season": "autumn"},
                        "defaults": {"style_type": "REALISTIC"},
                        "budget_usd": 2.00,
                    },
                ),
            ],
        ),
        _deployment(
            refresh_assets,
            "sharded",
            "The pictures of a manifest, made by several runs on several machines.",
            parameters={"shards": 4, "max_concurrency": 64},
        ),
        _deployment(
            process_inbox,
            "every-15-minutes",
            "A picture of each image that somebody puts into the inbox.",
            parameters={
                "inbox": "deployments/inbox",
                "prompt": "{{ (stem) }} on a picnic blanket, soft morning light",
                "budget_usd": 1.00,
            },
            schedules=[Schedule(slug="every-15-minutes", cron="*/15 * * * *", timezone=ZONE)],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        ),
        _deployment(
            explore_variations,
            "on-demand",
            "One image in a grid of styles and weights, with a contact sheet; dry_run shows the price.",
        ),
        _deployment(
            reconcile,
            "nightly",
            "Asks the provider what became of lost requests, and archives what was paid for. It pays nothing.",
            schedules=[Schedule(slug="nightly", cron="0 5 * * *", timezone=ZONE)],
        ),
    ]


def from_payload(flow: Flow[..., Any]) -> dict[str, str]:
    """A template for each of a flow's parameters that an event may set: the payload's value, or the flow's own default.

    What is needed and missing becomes a list, which is not text, so that the run fails and names it.
    """
    return {
        name: f"{{{{ event.payload.{name} | default({_default(name, parameter.default)}) }}}}"
        for name, parameter in inspect.signature(flow.fn).parameters.items()
        if name not in OURS
    }


def _default(name: str, default: object) -> str:
    """The arguments of Jinja's `default`."""
    if name in NEEDED:
        return "['missing'], true"
    return repr(default) if isinstance(default, str) else str(default).lower()


def _deployment(flow: Flow[..., Any], name: str, description: str, **settings: Any) -> RunnerDeployment:
    made = flow.to_deployment(
        name, description=description, tags=["segmind"], entrypoint_type=EntrypointType.MODULE_PATH, **settings
    )
    return cast(RunnerDeployment, made)


if __name__ == "__main__":
    serve(*deployments(), limit=AT_ONCE)
