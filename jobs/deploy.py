"""Offer a published model: applications handed to Ray Serve, then wait until it answers.

Takes a DeployConfig; gives the version that answers. A new version of a name comes up beside the
old one, answers some prompts as its model does offline, takes over the requests, and then the old
one is stopped; other applications stay as they are. Serve only takes all applications at once, so
what runs is read again before each change: what another deployment or rollout did in the meantime
stays.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.errors import ClusterError
from cluster.storage import resolve_output
from jobs.applications import (
    App,
    Apps,
    engine_app,
    gateway_app,
    own_routes,
    route_to,
    routes_of,
    running_apps,
    with_own_routes,
    with_routes,
    without_other_versions,
)
from jobs.config import DeployConfig
from jobs.registry import Entry, Registry

_POLL_S = 0.1


class Api(Protocol):
    """What is used of Ray Serve's REST API; `cluster.serve_api.ServeApi` offers it."""

    @property
    def http_port(self) -> int:
        """Port that the gateway listens on unless another is asked for."""

    def details(self) -> dict[str, Any]:
        """Return the state of every application."""

    def deploy(self, config: dict[str, Any]) -> None:
        """Make the cluster run exactly the applications of this config."""


# Raises where a version must not take over a name: given it, the gateway's arguments, its route and
# the least parity; see `jobs.takeover.check_takeover`.
Check = Callable[[Entry, Mapping[str, Any], Mapping[str, Any], float], None]


def deploy(config: DeployConfig, registry_root: str, api: Api, check: Check | None = None) -> Entry:
    """Deploy the model, wait until it answers, and stop other versions of it.

    Raises ModelNotFoundError, ModelFormatError or IntegrityError before anything is changed,
    ClusterError with Serve's own message if the model does not come up within `ready_timeout_s`,
    and GateRefusedError if another version answers for the name and this one does not answer as
    its model does offline (`min_parity`): what answered before then still does.
    """
    root = resolve_output(registry_root)
    entry = Registry(root).resolve(config.model)
    engine, route = engine_app(config, root, entry), route_to(entry, config)
    gateway, names = config.application, (engine["name"], config.application)
    before = running_apps(api.details())
    own = own_routes(before, gateway, entry.name)
    answering = {each["version"] for each in own if _answers(each)}
    takes_over = bool(answering) and entry.version not in answering
    asked = {**before, engine["name"]: engine}
    asked[gateway] = gateway_app(config, before, api.http_port, routes_of(before, gateway))
    # While it comes up, requests go where they went, and it is asked by its own name alone.
    others = [each for each in own if each["version"] != entry.version]
    routes = [*others, {**route, "weight": 0.0}] if takes_over else own or [route]
    asked = with_own_routes(asked, gateway, entry.name, routes)
    try:
        apply(api, asked)
        wait_until_running(api, names, config.ready_timeout_s)
        if takes_over and config.min_parity > 0:
            (check or _check_takeover)(entry, asked[gateway]["args"], route, config.min_parity)
    except BaseException:
        apply(api, _taken_back(running_apps(api.details()), before, asked, names))
        raise
    if own:
        now = running_apps(api.details())
        # Of other deployments, which are still checking theirs.
        later = [
            each
            for each in own_routes(now, gateway, entry.name)
            if each["version"] != entry.version and each not in own and not each.get("weight", 1.0)
        ]
        apply(api, with_own_routes(now, gateway, entry.name, [route, *later]))
        wait_until_running(api, names, config.ready_timeout_s)
    if kept := without_other_versions(running_apps(api.details()), entry, before):
        apply(api, kept)
    return entry


def _answers(route: Mapping[str, Any]) -> bool:
    """Return whether a version gets requests for the name, and for good."""
    return bool(route.get("weight", 1.0)) and route.get("lease") is None


def _check_takeover(
    entry: Entry, gateway: Mapping[str, Any], route: Mapping[str, Any], min_parity: float
) -> None:
    from jobs.takeover import check_takeover  # torch takes seconds, and few deployments need it.

    check_takeover(entry, gateway, route, min_parity)


def apply(api: Api, apps: Apps) -> None:
    """Make the cluster run exactly these applications. Serve's own proxies are not started."""
    api.deploy(
        {
            "proxy_location": "Disabled",
            "http_options": {"host": "127.0.0.1", "port": api.http_port},
            "applications": [dict(app) for app in apps.values()],
        }
    )


def wait_until_running(api: Api, names: Sequence[str], timeout_s: float) -> None:
    """Return once all these applications run. Raises ClusterError with Serve's own message."""
    deadline_s = time.monotonic() + timeout_s
    name, status, message = names[0], "NOT_STARTED", ""
    while time.monotonic() < deadline_s:
        apps = api.details().get("applications", {})
        waited_for = [each for each in names if apps.get(each, {}).get("status") != "RUNNING"]
        if not waited_for:
            return
        name = waited_for[0]
        status, message = apps.get(name, {}).get("status", status), _message(apps.get(name, {}))
        if status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            break
        time.sleep(_POLL_S)
    raise ClusterError(
        f"application `{name}` is {status} after the deployment: "
        f'{message or "Serve says no more"}. Logs: after `eval "$(raysmith env)"`, '
        "`ray logs cluster` lists the files and `ray logs cluster NAME` shows one."
    )


def _taken_back(now: Apps, before: Apps, asked: Apps, names: tuple[str, str]) -> dict[str, App]:
    """Return what runs now without what a failed deployment changed: these two applications.

    What is no longer as it was asked for has been changed by somebody else, and stays.
    """
    engine, gateway = names
    apps = dict(now)
    if engine in apps and engine in before:
        apps[engine] = before[engine]
    else:
        apps.pop(engine, None)
    if gateway not in apps:
        return apps
    added = [each for each in routes_of(asked, gateway) if each not in routes_of(before, gateway)]
    routes = [each for each in routes_of(apps, gateway) if each not in added]
    if gateway not in before and not routes:
        del apps[gateway]
        return apps
    if gateway in before and apps[gateway].get("args") == asked[gateway]["args"]:
        apps[gateway] = {**apps[gateway], "args": before[gateway].get("args", {})}
    return with_routes(apps, gateway, routes)


def _message(app: Mapping[str, Any]) -> str:
    """Return what Serve says of an application and of its deployments."""
    said = [app.get("message", "")]
    said += [each.get("message", "") for each in app.get("deployments", {}).values()]
    return " ".join(text for text in said if text)
