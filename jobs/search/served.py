"""Time a candidate as its users would: through Ray Serve and the gateway, over HTTP.

Takes a search and a candidate; brings up both the candidate and the unchanged model, and a gateway
of its own, beside what runs; asks them in turn for one request of the workload after another, and
takes all of it down. It imports nothing of `serving`: the applications are named as data.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from cluster.errors import ClusterError, ConfigError, EngineError
from cluster.inventory import NODE_LABEL, cluster_inventory
from cluster.processes import pick_port
from cluster.serve_api import serve_api
from jobs.applications import (
    ENGINE_IMPORT,
    App,
    engine_name,
    gateway_app,
    running_apps,
    with_routes,
)
from jobs.config import DeployConfig, Workload
from jobs.data.tokens import open_split
from jobs.deploy import Api, apply, wait_until_running
from jobs.evaluation.parity import Endpoint
from jobs.search.plan import LEAST_PROMPTS, Search
from jobs.search.tasks import Result, Task
from jobs.takeover import endpoint

_WARM_UPS = 3
_REQUESTS = 41  # 15 leave medians that are off by a tenth.
_LEAST_REQUESTS = 5
_LONG_S = 60.0  # After which the least will do.
_MOST_PROMPTS = 3 * LEAST_PROMPTS  # Some answers may end early.
_REQUEST_TIMEOUT_S = 120.0


def check_can_serve() -> None:
    """Raise ConfigError where no cluster's Ray Serve can be asked, before a search begins."""
    try:
        serve_api()
    except ConfigError as error:
        raise ConfigError(
            f"`served_finalists` asks for Ray Serve: {error.message} Or set it to 0."
        ) from None


def stop_leftovers(search: Search) -> None:
    """Stop what an attempt that was killed may have left running."""
    api = serve_api()
    running = running_apps(api.details())
    mine = [name for name in running if name in _names(search)]
    if mine:
        apply(api, {name: app for name, app in running.items() if name not in mine})


def time_served(search: Search, task: Task) -> Result:
    """Return the median milliseconds of requests to a candidate, as they are answered over HTTP.

    The unchanged model's, asked in turn with it, stand beside them: a machine that slows down slows
    both alike. Raises ClusterError if a model does not come up, EngineError if it does not answer.
    """
    began = time.perf_counter()
    with _offered(search, search.packed(task.assignment), serve_api()) as served:
        times_ms = list(_request_times_ms(search, served))
    base_request_ms, request_ms = (statistics.median(each) for each in zip(*times_ms, strict=True))
    return Result(
        request_ms=request_ms,
        base_request_ms=base_request_ms,
        num_requests=len(times_ms),
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _offered(search: Search, directory: Path, api: Api) -> Iterator[list[Endpoint]]:
    """Run the unchanged model, one of a directory and a gateway before them; at last stop all.

    Gives both in this order. They share one trial's CPUs, on one node, as only one of them is asked
    at a time.
    """
    config = search.config
    *engine_names, gateway = names = _names(search)
    node = _some_node(config.cpus_per_trial)
    engines: dict[str, App] = {}
    routes = []
    tokens = config.workload.prompt_tokens + config.workload.output_tokens
    for version, (name, path) in enumerate(
        zip(engine_names, (search.model, directory), strict=True)
    ):
        engines[name] = {
            "name": name,
            "route_prefix": None,
            "import_path": ENGINE_IMPORT,
            "args": {
                "registry": str(search.run_dir),
                "model": f"{_served_name(search)}@{version}",
                "directory": str(path),
                "cpus_per_replica": config.cpus_per_trial / len(engine_names),
                "node_labels": node,
                "drain_s": 1.0,
                "engine_options": {
                    # Every request pays for its whole prompt, also where it begins as another did.
                    "enable_prefix_cache": False,
                    "num_threads": config.threads_per_trial,
                    "max_slots": 1,
                    "max_len": tokens,
                },
            },
        }
        routes.append(
            {
                "name": _served_name(search),
                "version": str(version),
                "weight": 1.0,
                "published_s": int(time.time()),
                "task": "generate",
                "context_tokens": tokens,
                "application": name,
                "scales_to_zero": False,
            }
        )
    deployment = DeployConfig(
        application=gateway,
        model=_served_name(search),
        port=pick_port(0, "the search's gateway", "port"),
        ledger=str(search.run_dir / "served.db"),
    )
    asked = {**running_apps(api.details()), **engines}
    asked[gateway] = gateway_app(deployment, {}, api.http_port, routes)
    try:
        apply(api, with_routes(asked, gateway, routes))
        wait_until_running(api, names, deployment.ready_timeout_s)
        lifetime_s = len(routes) * _MOST_PROMPTS * _REQUEST_TIMEOUT_S
        with endpoint(_served_name(search), asked[gateway]["args"], lifetime_s) as served:
            yield [replace(served, model=f"{route['name']}@{route['version']}") for route in routes]
    finally:
        now = running_apps(api.details())
        apply(api, {each: app for each, app in now.items() if each not in names})


def _request_times_ms(search: Search, served: Sequence[Endpoint]) -> Iterator[list[float]]:
    """Give the times of requests that each model answered whole, after some to warm up.

    Prompts are of held-out text and all different, so that no prefix is known. One whose answer a
    model ends early does not count.
    """
    workload = search.config.workload
    split = open_split(search.data, "validation", verify=False)
    prompts = split.sample(
        min(_MOST_PROMPTS, split.num_sequences(workload.prompt_tokens)),
        workload.prompt_tokens,
        search.config.seed,
    )[:, :-1]
    whole = 0
    began = time.monotonic()
    with httpx.Client(timeout=_REQUEST_TIMEOUT_S, trust_env=False) as client:
        for turn, prompt in enumerate(prompts.tolist()):
            times_ms: dict[int, float] = {}
            for place in range(len(served))[:: -1 if turn % 2 else 1]:
                took_ms = _ask(client, served[place], prompt, workload)
                if took_ms is None:
                    break
                times_ms[place] = took_ms
            else:
                whole += 1
                if whole > _WARM_UPS:
                    yield [times_ms[place] for place in sorted(times_ms)]
                if is_enough(whole - _WARM_UPS, time.monotonic() - began):
                    return
    if whole < _WARM_UPS + _LEAST_REQUESTS:
        models = " or ".join(each.model for each in served)
        raise EngineError(
            f"{models} ended its answer to {len(prompts) - whole} of {len(prompts)} prompts before "
            f"workload.output_tokens={workload.output_tokens}. Lower it."
        )


def is_enough(num_timed: int, elapsed_s: float) -> bool:
    """Return whether so many requests to each model, in so long a time, will do for a median."""
    return num_timed >= (_LEAST_REQUESTS if elapsed_s > _LONG_S else _REQUESTS)


def _ask(
    client: httpx.Client, served: Endpoint, prompt: list[int], workload: Workload
) -> float | None:
    """Return the milliseconds until a request was answered; None if the answer ended early."""
    body = {
        "model": served.model,
        "prompt": prompt,
        "max_tokens": workload.output_tokens,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {served.api_key}"}
    began = time.perf_counter()
    try:
        answer = client.post(f"{served.base_url}/completions", json=body, headers=headers)
    except httpx.HTTPError as error:
        raise EngineError(
            f"{served.model} did not answer a request of the workload: {error!r}"
        ) from None
    took_ms = (time.perf_counter() - began) * 1e3
    if answer.status_code != httpx.codes.OK:
        raise EngineError(
            f"{served.model} answered {answer.status_code} to a request of the workload: "
            f"{answer.text[:300]}"
        )
    is_whole = answer.json()["usage"]["completion_tokens"] >= workload.output_tokens
    return took_ms if is_whole else None


def _some_node(num_cpus: float) -> dict[str, str]:
    """Return the label of one node with so many CPUs, always the same one.

    Raises ClusterError if there is none.
    """
    fitting = [node for node in cluster_inventory().nodes if node.cpus >= num_cpus]
    if not fitting:
        raise ClusterError(f"no node has cpus_per_trial={num_cpus:g} CPUs. Lower it.")
    return {NODE_LABEL: fitting[0].id}


def _names(search: Search) -> tuple[str, str, str]:
    """Return the names of the applications: two engines, the unchanged model's first, a gateway."""
    name = _served_name(search)
    return engine_name(name, "0"), engine_name(name, "1"), f"search--{search.config.name}"


def _served_name(search: Search) -> str:
    return f"search-{search.config.name}"
