"""What Ray Serve is given: applications and the gateway's routing table, as plain values.

Takes registry entries and what runs; gives what shall run. One application runs each version, one
is the gateway. They are named by their import path, as data, so nothing of `serving` is imported
here. Nothing is deployed here either; see `jobs.deploy`.
"""

from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, ConfigError
from cluster.ledger_address import public_url
from jobs.config import DeployConfig
from jobs.models import _hf
from jobs.models._bert import is_encoder, read_encoder_config
from jobs.registry import Entry

GATEWAY_IMPORT = "serving.app:build"
ENGINE_IMPORT = "serving.app:build_engine"
GATEWAY_DEPLOYMENT = "gateway"
App = dict[str, Any]
Apps = Mapping[str, App]


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


def own_routes(apps: Apps, gateway: str, name: str) -> list[App]:
    """Return the lines of the routing table for a model's name."""
    return [route for route in routes_of(apps, gateway) if route["name"] == name]


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


def _gateway_deployment(routes: Sequence[App]) -> App:
    return {"name": GATEWAY_DEPLOYMENT, "user_config": {"routes": [dict(r) for r in routes]}}
