"""The whole way in one config: train, search, publish, deploy.

Takes a PipelineConfig and the stages to run; gives what each stage says of itself. A stage that
was cut off goes on when it is run again. It knows Ray Serve only as a config handed to the
cluster, so it imports nothing from `serving`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.serve_api import serve_api
from cluster.storage import resolve_output
from jobs.config import PipelineConfig
from jobs.deploy import deploy
from jobs.entry import Rows, add_options, guard, print_json, print_plan, print_rows, value_rows
from jobs.plan import resolve_decoder
from jobs.publish import publish
from jobs.search.launch import run_search
from jobs.search.plan import plan_rows as search_rows
from jobs.search.plan import preview_rows
from jobs.training.launch import launch
from jobs.training.launch import plan_rows as training_rows
from jobs.training.run_folder import DATA_FOLDER, MODEL_FOLDER, run_folder

Stage = Callable[[PipelineConfig], Mapping[str, Any]]


def train_stage(config: PipelineConfig) -> Mapping[str, Any]:
    """Train the model."""
    return launch(config.train).model_dump(mode="json")


def search_stage(config: PipelineConfig) -> Mapping[str, Any]:
    """Search the smallest version of it that passes the gate."""
    return run_search(config.search).summary()


def publish_stage(config: PipelineConfig) -> Mapping[str, Any]:
    """Publish the winner of the search."""
    winner = resolve_output(config.search.output_dir) / config.search.name / "winner"
    entry = publish(winner, config.publish)
    return {"published": entry.reference, "digest": entry.digest, "path": str(entry.path)}


def deploy_stage(config: PipelineConfig) -> Mapping[str, Any]:
    """Offer the published model over REST."""
    api = serve_api()
    entry = deploy(config.deploy, config.publish.registry, api)
    return {"deployed": entry.reference, "address": f"http://127.0.0.1:{api.http_port}/v1"}


STAGES: dict[str, Stage] = {
    "train": train_stage,
    "search": search_stage,
    "publish": publish_stage,
    "deploy": deploy_stage,
}


def plan_rows(config: PipelineConfig) -> Rows:
    """Return what all stages will do, without starting anything."""
    planned = check_stages(config)
    is_trained = resolve_output(config.search.model).is_dir()
    return [
        *((f"train: {name}", value) for name, value in training_rows(config.train)),
        *(
            (f"search: {name}", value)
            for name, value in (search_rows(config.search) if is_trained else planned)
        ),
        ("publish", f"{config.publish.name} in {resolve_output(config.publish.registry)}"),
        ("deploy", f"{config.deploy.model} on {config.deploy.num_replicas} replica(s)"),
    ]


def check_stages(config: PipelineConfig) -> Rows:
    """Return what the search will do with the model of the training run.

    Raises ConfigError where a stage does not take what the one before it gives, or where the search
    asks for what the model will not have: before the training is paid for.
    """
    run_dir = run_folder(config.train)
    pairs = (
        ("model", config.search.model, MODEL_FOLDER),
        ("data", config.search.data, DATA_FOLDER),
    )
    for key, given, folder in pairs:
        if resolve_output(given).resolve() != (run_dir / folder).resolve():
            raise ConfigError(
                f"`search.{key}` = {given} is not what the training run writes. "
                f"Set it to {run_dir / folder}, or change `train.name`."
            )
    deployed = config.deploy.model.partition("@")[0]
    if deployed != config.publish.name:
        raise ConfigError(
            f"`deploy.model` = {config.deploy.model} is not what is published as "
            f"`publish.name` = {config.publish.name}. Set both to the same name."
        )
    return preview_rows(config.search, resolve_decoder(config.train))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages asked for and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.pipeline", description="Train, search, publish and deploy."
    )
    add_options(parser)
    parser.add_argument(
        "--stage", action="append", choices=list(STAGES), help="only this stage (repeatable)"
    )
    return guard(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(PipelineConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print_plan("pipeline", plan_rows(config), as_json=arguments.json)
        return
    check_stages(config)
    results = {}
    for name in arguments.stage or STAGES:
        results[name] = dict(STAGES[name](config))
        if not arguments.json:
            print_rows(name, value_rows(results[name]))
    if arguments.json:
        print_json(results)


if __name__ == "__main__":
    sys.exit(main())
