"""Time a candidate as its users would: through Ray Serve and the gateway, over HTTP.

Takes a search and a candidate; brings up the model and a gateway of its own beside what runs, asks
one request of the workload after another, and takes both down. It imports nothing of `serving`: the
applications are named as data.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from cluster.errors import ConfigError, EngineError
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
from jobs.config import DeployConfig
from jobs.data.tokens import open_split
from jobs.deploy import Api, apply, wait_until_running
from jobs.evaluation.parity import Endpoint
from jobs.search.plan import NUM_PROMPTS, Search
from jobs.search.tasks import Result, Task
from jobs.takeover import endpoint

_WARM_UPS = 3
_REQUESTS = 15
_LEAST_REQUESTS = 5
_SPARE = 3
_KEY_LIFETIME_S = 900.0


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

    Raises ClusterError if the model does not come up, EngineError if it does not answer.
    """
    began = time.perf_counter()
    directory = search.packed(task.assignment) if task.assignment else search.model
    with _offered(search, directory, serve_api()) as served:
        times_ms = list(_request_times_ms(search, served))
    return Result(request_ms=statistics.median(times_ms), seconds=time.perf_counter() - began)


@contextmanager
def _offered(search: Search, directory: Path, api: Api) -> Iterator[Endpoint]:
    """Run a model directory and a gateway before it, beside what runs; at last stop both."""
    config = search.config
    engine_app_name, gateway = _names(search)
    name, version = f"search-{config.name}", "0"
    reference = f"{name}@{version}"
    engine: App = {
        "name": engine_app_name,
        "route_prefix": None,
        "import_path": ENGINE_IMPORT,
        "args": {
            "registry": str(search.run_dir),
            "model": reference,
            "directory": str(directory),
            "cpus_per_replica": config.cpus_per_trial,
            "drain_s": 1.0,
            # Every request pays for its whole prompt, also where it begins as another did.
            "engine_options": {"enable_prefix_cache": False},
        },
    }
    deployment = DeployConfig(
        application=gateway,
        model=reference,
        port=pick_port(0, "the search's gateway", "port"),
        ledger=str(search.run_dir / "served.db"),
    )
    route = {
        "name": name,
        "version": version,
        "weight": 1.0,
        "published_s": int(time.time()),
        "task": "generate",
        "context_tokens": search.space.decoder.max_seq_len,
        "application": engine["name"],
        "scales_to_zero": False,
    }
    before = running_apps(api.details())
    asked = {**before, engine["name"]: engine}
    asked[gateway] = gateway_app(deployment, {}, api.http_port, [route])
    names = (engine["name"], gateway)
    try:
        apply(api, with_routes(asked, gateway, [route]))
        wait_until_running(api, names, deployment.ready_timeout_s)
        with endpoint(reference, asked[gateway]["args"], _KEY_LIFETIME_S) as served:
            yield served
    finally:
        now = running_apps(api.details())
        apply(api, {each: app for each, app in now.items() if each not in names})


def _request_times_ms(search: Search, served: Endpoint) -> Iterator[float]:
    """Give the times of requests that were answered whole, after some to warm up.

    Prompts are of held-out text and all different, so that no prefix is known. An answer that the
    model ends early is asked for with the next prompt.
    """
    workload = search.config.workload
    split = open_split(search.data, "validation", verify=False)
    prompts = split.sample(
        min(_SPARE * NUM_PROMPTS, split.num_sequences(workload.prompt_tokens)),
        workload.prompt_tokens,
        search.config.seed,
    )[:, :-1]
    whole = 0
    headers = {"Authorization": f"Bearer {served.api_key}"}
    with httpx.Client(timeout=served.timeout_s, trust_env=False, headers=headers) as client:
        for prompt in prompts.tolist():
            body = {
                "model": served.model,
                "prompt": prompt,
                "max_tokens": workload.output_tokens,
                "temperature": 0,
            }
            began = time.perf_counter()
            answer = client.post(f"{served.base_url}/completions", json=body)
            took_ms = (time.perf_counter() - began) * 1e3
            if answer.status_code != httpx.codes.OK:
                raise EngineError(
                    f"{served.model} answered {answer.status_code} to a request of the workload: "
                    f"{answer.text[:300]}"
                )
            if answer.json()["usage"]["completion_tokens"] < workload.output_tokens:
                continue
            whole += 1
            if whole > _WARM_UPS:
                yield took_ms
            if whole >= _WARM_UPS + _REQUESTS:
                return
    if whole < _WARM_UPS + _LEAST_REQUESTS:
        raise EngineError(
            f"{served.model} ended {len(prompts) - whole} of {len(prompts)} answers before "
            f"workload.output_tokens={workload.output_tokens}. Lower it."
        )


def _names(search: Search) -> tuple[str, str]:
    """Return the names of the engine's and of the gateway's application."""
    name = search.config.name
    return engine_name(f"search-{name}", "0"), f"search--{name}"
