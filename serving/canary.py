"""A rollout's stage on a cluster: the new version's application, its share, and what is seen of it.

Takes a PromoteConfig and Ray Serve's API; carries out what `serving.promote` decides. It does not
judge what it sees.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, ConfigError
from cluster.storage import resolve_output
from jobs.applications import (
    App,
    described,
    engine_name,
    own_routes,
    running_apps,
    with_own_routes,
    without_other_versions,
)
from jobs.deploy import Api, apply, wait_until_running
from jobs.evaluation.parity import Endpoint, compare
from jobs.registry import Entry, Registry
from jobs.takeover import PROMPTS, endpoint, offline_reference
from serving.comparison import Comparison
from serving.loop_thread import LoopThread
from serving.outcomes import Outcomes, total
from serving.ray_directory import RayDirectory
from serving.rollout import Absence, Observation, PromoteConfig, RolloutState

LEASE_S = 20.0
_KEY_MARGIN_S = 3600.0


@contextmanager
def prepare(config: PromoteConfig, api: Api) -> Iterator["Canary"]:
    """Yield the stage of one rollout, with a key of its own that ends with it.

    Raises ModelNotFoundError, ModelFormatError, or ConfigError if no other version answers.
    """
    apps = running_apps(api.details())
    entry = Registry(resolve_output(config.registry)).resolve(config.model)
    baseline = _baseline(apps, config, entry)
    route = _new_route(apps, entry, baseline)
    lifetime_s = config.ready_timeout_s + config.limits.max_wait_s + _KEY_MARGIN_S
    thread = LoopThread("rollout")
    with endpoint(entry.reference, apps[config.application]["args"], lifetime_s) as served:
        try:
            yield Canary(config, api, (entry, baseline, route), served, thread)
        finally:
            thread.stop()


class Canary:
    """One rollout; see `serving.promote.Stage`. `versions`: the new one, the old route, the new."""

    def __init__(
        self,
        config: PromoteConfig,
        api: Api,
        versions: tuple[Entry, App, App],
        endpoint: Endpoint,
        thread: LoopThread,
    ) -> None:
        self._config, self._api, self._endpoint, self._thread = config, api, endpoint, thread
        self._entry, self._baseline, self._new = versions
        self._old = self._entry.replace(version=self._baseline["version"])
        self._directory = RayDirectory()
        self._lease = f"{self._entry.reference}-{uuid.uuid4().hex[:8]}"
        self._prompts = _prompts(config)
        self._began_s = 0.0
        self._absence = Absence()
        self._ours: set[str] = set()  # Applications that it may stop: later ones are of others.
        # What was there before, and is there again after a roll-back.
        self._lines: list[App] = []
        self._own_app: App | None = None
        self._before: dict[str, dict[str, Outcomes]] = {}
        self._comparison = self._compare(self._prompts)

    def start(self) -> None:
        """Bring the new version up with what the old one has, and no share of the requests."""
        apps = running_apps(self._api.details())
        lines = own_routes(apps, self._config.application, self._entry.name)
        self._lines = [line for line in lines if not self._is_new(line) or not line.get("lease")]
        if any(map(self._is_new, self._lines)):  # Else it is of a rollout that died.
            self._own_app = apps.get(self._new["application"])
        old = apps[self._baseline["application"]]
        new = {**old, "name": self._new["application"], "args": {**old["args"]}}
        new["args"]["model"] = self._entry.reference
        apps[new["name"]] = new
        self._ours = set(apps)
        self._put(apps, [*self._others(apps), {**self._new, "weight": 0.0}])

    def observe(self, state: RolloutState) -> Observation:
        """Return what is seen now, and renew the lease of the share."""
        if state is RolloutState.CHECKING:
            return self._check()
        self._renew()
        self._comparison.ask_some()
        self._renew()
        said = self._thread.run(self._directory.outcomes())
        snapshot = self._thread.run(self._directory.watch(-1, 0.0))
        replicas = [
            replica
            for replica in snapshot.replicas
            if f"{replica.model}@{replica.version}" == self._entry.reference
        ]
        return Observation(
            elapsed_s=time.monotonic() - self._began_s,
            absent_s=self._absence.look(len(replicas), time.monotonic()),
            canary=self._since(said, self._entry.reference),
            baseline=self._since(said, self._old.reference),
            num_compared=self._comparison.num_compared,
            num_disagreeing=self._comparison.num_disagreeing,
        )

    def give_share(self, ratio: float) -> None:
        """Give the new version this share of the requests, as long as the lease is renewed."""
        self._before = self._thread.run(self._directory.outcomes())
        self._renew()
        apps = running_apps(self._api.details())
        others = self._others(apps)
        total = sum(_weight(line) for line in others)
        for line in others:
            line["weight"] = (1.0 - ratio) * _weight(line) / total
        self._put(apps, [*others, {**self._new, "weight": ratio, "lease": self._lease}])
        self._began_s = time.monotonic()

    def finish(self, state: RolloutState) -> None:
        """Give every request to the new version or to the old one, and stop the other.

        What it did before it failed it may do again. Raises ClusterError and leaves the routes as
        they are if the version that shall answer was stopped meanwhile.
        """
        is_promoted = state is RolloutState.PROMOTED
        route, winner = (self._new, self._entry) if is_promoted else (self._baseline, self._old)
        apps = running_apps(self._api.details())
        if route["application"] not in apps:
            raise ClusterError(
                f"the application `{route['application']}` of {winner.reference} no longer runs: "
                "another deployment stopped it, and its routes stay"
            )
        if not self._ours:
            return  # It has not begun.
        lines = self._lines_after_promotion(apps) if is_promoted else self._lines_before(apps)
        self._put(apps, lines, waits_for_engine=is_promoted)
        if is_promoted:
            registry = Registry(resolve_output(self._config.registry))
            registry.promote(self._entry.name, self._entry.version)
        self._thread.run(self._directory.end_lease(self._lease))
        now = running_apps(self._api.details())
        if is_promoted:
            kept = without_other_versions(now, winner, self._ours)
        else:
            kept = self._without_new(now)
        if kept is not None:
            apply(self._api, kept)

    def _check(self) -> Observation:
        """Compare the new version with its model; what fits it is what both are asked later."""
        config = self._config
        if config.limits.min_parity == 0:
            return Observation(is_compared=False)
        prompts, offline = offline_reference(
            self._entry, self._new.get("context_tokens"), self._prompts, config.max_tokens
        )
        if not prompts:
            return Observation(is_compared=False)
        self._comparison = self._compare(prompts)
        report = compare(prompts, offline, self._endpoint, max_tokens=config.max_tokens)
        return Observation(parity=report.num_equal / report.num_prompts)

    def _compare(self, prompts: Sequence[str]) -> Comparison:
        versions = self._old.reference, self._entry.reference
        return Comparison(self._endpoint, *versions, prompts, self._config.max_tokens)

    def _lines_after_promotion(self, apps: dict[str, App]) -> list[App]:
        """Return the new version's line, and those that came since: others check theirs."""
        known = {line["version"] for line in self._lines}
        later = [line for line in self._others(apps) if line["version"] not in known]
        return [{**self._new, "weight": 1.0}, *later]

    def _lines_before(self, apps: dict[str, App]) -> list[App]:
        """Return the lines there are now, with the weights that they had."""
        weights = {line["version"]: _weight(line) for line in self._lines}
        lines = [
            {**line, "weight": weights.get(line["version"], _weight(line))}
            for line in self._others(apps)
        ]
        if all(line["version"] != self._old.version for line in lines):
            lines.append(self._baseline)
        return [*lines, *filter(self._is_new, self._lines)]

    def _is_new(self, line: App) -> bool:
        return bool(line["version"] == self._entry.version)

    def _others(self, apps: dict[str, App]) -> list[App]:
        """Return the lines of the name's other versions as they are now."""
        lines = own_routes(apps, self._config.application, self._entry.name)
        return [line for line in lines if not self._is_new(line)]

    def _without_new(self, apps: dict[str, App]) -> dict[str, App] | None:
        """Return the applications with the new version's as it was before; None: nothing to do."""
        name = self._new["application"]
        if name not in apps or apps[name] == self._own_app:
            return None
        kept = {key: app for key, app in apps.items() if key != name}
        return kept if self._own_app is None else {**kept, name: self._own_app}

    def _put(
        self, apps: dict[str, App], own: Sequence[App], *, waits_for_engine: bool = True
    ) -> None:
        """Apply a routing table with these lines for the name; those of others stay."""
        gateway = self._config.application
        apply(self._api, with_own_routes(apps, gateway, self._entry.name, own))
        names = [self._new["application"], gateway] if waits_for_engine else [gateway]
        wait_until_running(self._api, names, self._config.ready_timeout_s)

    def _renew(self) -> None:
        self._thread.run(self._directory.renew_lease(self._lease, LEASE_S))

    def _since(self, said: dict[str, dict[str, Outcomes]], reference: str) -> Outcomes:
        """Return what happened to a version since the canary began, at all gateways."""
        return total(
            outcomes[reference].since(self._before.get(gateway, {}).get(reference, Outcomes()))
            for gateway, outcomes in said.items()
            if reference in outcomes
        )


def _baseline(apps: dict[str, App], config: PromoteConfig, entry: Entry) -> App:
    """Return the route that answers for the name now."""
    routes = own_routes(apps, config.application, entry.name)
    others = [r for r in routes if r["version"] != entry.version and r.get("lease") is None]
    found = max(others, key=_weight, default=None)
    if found is None or not _weight(found):
        raise ConfigError(
            f"no other version of `{entry.name}` answers at `{config.application}`, so there is "
            f"nothing to compare {entry.reference} with. Offer it with "
            f"`raysmith serve {entry.reference}`."
        )
    if found.get("task", "generate") != "generate":
        raise ConfigError(
            f"`{entry.name}` embeds; a canary compares generated answers. Offer the version with "
            f"`raysmith serve {entry.reference}`, which replaces the old one at once."
        )
    application = found.get("application") or engine_name(entry.name, found["version"])
    if application not in apps:
        raise ConfigError(
            f"the route to {entry.name}@{found['version']} names the application "
            f"`{application}`, which does not run. Deploy it under this name."
        )
    return {**found, "application": application, "lease": None}


def _new_route(apps: dict[str, App], entry: Entry, baseline: App) -> App:
    """Return the route to the new version, which gets the options of the old one."""
    options = apps[baseline["application"]]["args"].get("engine_options", {})
    return {
        **baseline,
        "version": entry.version,
        "application": engine_name(entry.name, entry.version),
        **described(entry, options),
    }


def _weight(line: App) -> float:
    return float(line.get("weight", 1.0))


def _prompts(config: PromoteConfig) -> tuple[str, ...]:
    if config.prompts is None:
        return PROMPTS
    path = Path(config.prompts)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`prompts` = {path} cannot be read: {error}.") from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"`prompts` = {path} has no prompt. Give one a line.")
    return prompts
