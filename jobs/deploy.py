"""Offer a published model: configs handed to Ray Serve, then wait until it answers.

Takes a DeployConfig; gives the version that answers. One application runs each version, one is the
gateway, whose routing table says which versions get requests. They are named by their import path,
as data, so nothing of `serving` is imported here. A new version of a name comes up beside the old
one, answers some prompts as its model does offline, takes over the requests, and then the old one
is stopped; other applications stay as they are.
Serve only takes all applications at once, so what runs is read again before each change: what
another deployment or rollout did in the meantime stays.
"""

import time
from collections.abc import Callable, Container, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ClusterError, ConfigError
from cluster.ledger_schema import public_url
from cluster.storage import resolve_output
from jobs.config import DeployConfig
from jobs.models import _hf
from jobs.models._bert import is_encoder, read_encoder_config
from jobs.registry import Entry, Registry

GATEWAY_IMPORT = "serving.app:build"
ENGINE_IMPORT = "serving.app:build_engine"
GATEWAY_DEPLOYMENT = "gateway"
_POLL_S = 0.1
App = dict[str, Any]
Apps = Mapping[str, App]


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
    own = [each for each in routes_of(before, gateway) if each["name"] == entry.name]
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
            for each in routes_of(now, gateway)
            if each["name"] == entry.name
            and each["version"] != entry.version
            and each not in own
            and not each.get("weight", 1.0)
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


def engine_name(name: str, version: str) -> str:
    """Return the name of the application that runs one version."""
    return f"engine--{name}--{version}"


def engine_app(config: DeployConfig, registry: Path, entry: Entry) -> App:
    """Return the application that runs one registry entry."""
    args: dict[str, Any] = {
        "registry": str(registry),
        "model": entry.reference,
        "num_replicas": config.num_replicas,
        "cpus_per_replica": config.cpus_per_replica,
        "gpus_per_replica": config.gpus_per_replica,
        "engine": config.engine,
        "engine_options": config.engine_options,
    }
    if config.scaling is not None:
        args["scaling"] = config.scaling.model_dump()
    return {
        "name": engine_name(entry.name, entry.version),
        "route_prefix": None,
        "import_path": ENGINE_IMPORT,
        "args": args,
    }


def gateway_app(config: DeployConfig, running: Apps, port: int, routes: Sequence[App]) -> App:
    """Return the gateway's application; where one runs it keeps what is not asked for anew."""
    known = running.get(config.application, {}).get("args", {})
    asked: dict[str, Any] = {} if config.port is None else {"port": config.port}
    if config.ledger is not None or not known:
        asked["ledger"] = public_url(config.ledger)
    return {
        "name": config.application,
        "route_prefix": None,
        "import_path": GATEWAY_IMPORT,
        "args": {"port": port, **known, **asked},
        "deployments": [_gateway_deployment(routes)],
    }


def route_to(entry: Entry, config: DeployConfig, **changes: Any) -> App:
    """Return the routing table's line for a version; see `serving.routing.Route`."""
    return {
        "name": entry.name,
        "version": entry.version,
        "weight": 1.0,
        **described(entry, config.engine_options),
        "application": engine_name(entry.name, entry.version),
        "scales_to_zero": config.scaling is not None and config.scaling.min_replicas == 0,
        **changes,
    }


def described(entry: Entry, engine_options: Mapping[str, Any]) -> App:
    """Return what a route says of a model, for as long as no replica says it: one may be asleep.

    Raises ModelFormatError, or ConfigError for a wrong manifest.
    """
    document = _hf.read_config(entry.path)
    embeds = is_encoder(document)
    fitting = (
        read_encoder_config(entry.path).max_seq_len
        if embeds
        else document.get("max_position_embeddings")
    )
    known = [each for each in (fitting, engine_options.get("max_len")) if isinstance(each, int)]
    return {
        "published_s": published_s(entry),
        "task": "embed" if embeds else "generate",
        "context_tokens": min(known, default=None),
    }


def running_apps(details: Mapping[str, Any]) -> dict[str, App]:
    """Return the configs of all applications that run, by name."""
    return {
        name: app["deployed_app_config"]
        for name, app in details.get("applications", {}).items()
        if app.get("deployed_app_config")
    }


def routes_of(apps: Apps, gateway: str) -> list[App]:
    """Return the routing table of the gateway that runs; empty where none does."""
    deployments = apps.get(gateway, {}).get("deployments", [])
    tables = [each.get("user_config") or {} for each in deployments]
    return [dict(route) for table in tables for route in table.get("routes", [])]


def with_routes(apps: Apps, gateway: str, routes: Sequence[App]) -> dict[str, App]:
    """Return the applications with another routing table; nothing of them restarts for it.

    Raises ClusterError if the gateway does not run.
    """
    if gateway not in apps:
        raise ClusterError(f"the gateway's application `{gateway}` was stopped. Deploy it again.")
    changed = {**apps[gateway], "deployments": [_gateway_deployment(routes)]}
    return {**apps, gateway: changed}


def with_own_routes(apps: Apps, gateway: str, name: str, routes: Sequence[App]) -> dict[str, App]:
    """Return the applications with these routes for a model's name; those of others stay."""
    others = [route for route in routes_of(apps, gateway) if route["name"] != name]
    return with_routes(apps, gateway, [*others, *routes])


def without_other_versions(
    apps: Apps, entry: Entry, among: Container[str] | None = None
) -> dict[str, App] | None:
    """Return the applications without those of other versions; None if there are none.

    `among`: only these; another version that came up since is somebody else's.
    """
    own = engine_name(entry.name, entry.version)
    others = {
        name
        for name, app in apps.items()
        if name != own
        and (among is None or name in among)
        and app.get("import_path") == ENGINE_IMPORT
        and app["args"]["model"].partition("@")[0] == entry.name
    }
    return {name: app for name, app in apps.items() if name not in others} if others else None


def published_s(entry: Entry) -> int:
    """Return when a version was published. Raises ConfigError for a wrong manifest."""
    try:
        return int(datetime.fromisoformat(entry.published_at).timestamp())
    except ValueError:
        raise ConfigError(
            f"{entry.reference}: its manifest has published_at=`{entry.published_at}`, which is no "
            "time. Publish the model again."
        ) from None


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
        f"{message or 'Serve says no more'}. Look at the replica's log with `ray logs`."
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


def _gateway_deployment(routes: Sequence[App]) -> App:
    return {"name": GATEWAY_DEPLOYMENT, "user_config": {"routes": [dict(r) for r in routes]}}
