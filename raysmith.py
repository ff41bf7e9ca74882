"""The command line: `raysmith up`, `train`, `search`, `serve` and the rest.

Takes words; gives exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. Each command
hands over to one function of `cluster` or `jobs`; those about models and accounts are in
`raysmith_models` and `raysmith_accounts`. Nothing of `serving` is imported: that runs as jobs and
as Ray Serve applications, which are named by their import path.
"""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import raysmith_accounts
import raysmith_models
from cluster.config import parse_config
from cluster.session import (
    HeadConfig,
    Session,
    find_session,
    list_sessions,
    load_session,
    recorded_sessions,
    start_head,
    stop_head,
)
from jobs.entry import guard, print_json, print_rows

app = typer.Typer(
    help="Train large models, shrink them and serve them on one Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(raysmith_models.models_app, name="models", no_args_is_help=True)
app.command("widths")(raysmith_models.widths)
app.command("export")(raysmith_models.export)
app.command("serve")(raysmith_models.serve)
app.add_typer(raysmith_accounts.teams_app, name="teams", no_args_is_help=True)
app.add_typer(raysmith_accounts.keys_app, name="keys", no_args_is_help=True)
app.command("usage")(raysmith_accounts.show_usage)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value; repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
Name = Annotated[str, typer.Option("--name", help="Name of the local cluster.")]
RegistryRoot = Annotated[str, typer.Option("--registry", help="Folder of the registry.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        result = app(args=argv, standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        Console(stderr=True).print(f"error: {error.format_message()}", markup=False)  # click's own
        return 2
    return int(result or 0)


# --- the cluster -------------------------------------------------------------------------------


@app.command()
def up(
    name: Name = "default",
    num_cpus: Annotated[int | None, typer.Option(help="CPUs Ray may use; unset: all.")] = None,
    port: Annotated[int, typer.Option(help="Port of the cluster; 0 picks one.")] = 6379,
    dashboard_port: Annotated[int, typer.Option(help="Port of the dashboard.")] = 8265,
    serve_port: Annotated[int, typer.Option(help="Port of the REST gateway.")] = 8000,
    json: Json = False,
) -> int:
    """Start a local cluster."""

    def action() -> None:
        values = {
            "name": name,
            "num_cpus": num_cpus,
            "gcs_port": port,
            "dashboard_port": dashboard_port,
            "serve_port": serve_port,
        }
        session = start_head(parse_config(HeadConfig, values, "raysmith up"))
        _show(session_values(session), f"cluster `{name}` is up", as_json=json)

    return guard(action)


@app.command()
def status(json: Json = False) -> int:
    """Show the local clusters that run and their addresses."""

    def action() -> None:
        sessions = [session_values(session) for session in list_sessions()]
        if json:
            print_json({"sessions": sessions})
        elif not sessions:
            Console().print("no local cluster is running; `raysmith up` starts one")
        for values in sessions if not json else []:
            print_rows(f"cluster `{values['name']}`", _rows(values))

    return guard(action)


@app.command()
def down(
    name: Name = "default",
    all_sessions: Annotated[
        bool, typer.Option("--all", help="Every cluster started here.")
    ] = False,
) -> int:
    """Stop a local cluster and every process it started."""

    def action() -> None:
        sessions = (
            recorded_sessions() if all_sessions else [load_session(name) or find_session(name)]
        )
        for session in sessions:
            stop_head(session)
            Console(stderr=True).print(f"stopped cluster `{session.name}`")

    return guard(action)


@app.command()
def env(name: Name = "default") -> int:
    """Print what a shell needs for Ray's own commands: eval "$(raysmith env)"."""

    def action() -> None:
        for key, value in find_session(name).environment().items():
            sys.stdout.write(f"export {key}={shlex.quote(value)}\n")

    return guard(action)


# --- jobs --------------------------------------------------------------------------------------


@app.command()
def plan(config: Config = None, overrides: Overrides = None, json: Json = False) -> int:
    """Print what a training run needs: memory, time and cost. Starts nothing."""
    from jobs import train as job

    return job.main(job_arguments(config, overrides, dry_run=True, as_json=json))


def _add_job_command(name: str, module: str, purpose: str) -> None:
    @app.command(name, help=purpose)
    def run_job_command(
        config: Config = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        json: Json = False,
    ) -> int:
        job = importlib.import_module(module)
        arguments = job_arguments(config, overrides, dry_run=dry_run, as_json=json)
        return int(job.main(arguments))


for _name, _module, _purpose in (
    ("train", "jobs.train", "Train a model on the running cluster."),
    ("search", "jobs.search.__main__", "Search for the smallest model that passes the gate."),
    ("compress", "jobs.compress", "Apply one compression recipe to one model."),
    ("evaluate", "jobs.evaluate", "Measure a model beside its origin, and judge it."),
    ("pipeline", "jobs.pipeline", "Train, search, publish and deploy, in this order."),
):
    _add_job_command(_name, _module, _purpose)


@app.command()
def submit(
    job: Annotated[
        str, typer.Argument(help="train, search, compress, evaluate, publish, pipeline.")
    ],
    config: Config = None,
    overrides: Overrides = None,
    name: Name = "default",
    wait: Annotated[bool, typer.Option(help="Follow the log until the job ends.")] = True,
) -> int:
    """Submit a job, as `ray job submit --working-dir . -- python -m jobs.JOB` does."""
    from jobs.submit import entrypoint, submit_job

    outcome: list[int] = []

    def action() -> None:
        arguments = job_arguments(config, overrides, dry_run=False, as_json=False)
        entrypoint(job, arguments)  # A misspelt job is refused before a cluster is looked for.
        outcome.append(submit_job(find_session(name), job, arguments, wait=wait))

    return guard(action) or outcome[0]


# --- demo --------------------------------------------------------------------------------------


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything up.")] = False,
) -> int:
    """Train, shrink, publish and serve a small model, and write runs/demo/report.html."""
    from jobs.demo import run_demo

    return guard(
        lambda: run_demo(keep=keep),
        interrupted="the cluster is stopped; the demo starts afresh next time",
    )


# --- shared ------------------------------------------------------------------------------------


def job_arguments(
    config: Path | None, overrides: Sequence[str] | None, *, dry_run: bool, as_json: bool
) -> list[str]:
    """Return the arguments that every thin main understands."""
    arguments = ["--config", str(config)] if config is not None else []
    for override in overrides or ():
        arguments += ["--set", override]
    return arguments + ["--dry-run"] * dry_run + ["--json"] * as_json


def session_values(session: Session) -> dict[str, Any]:
    """Return what a person wants to know about a session."""
    return {
        "name": session.name,
        "address": session.address,
        "dashboard": session.dashboard_url,
        "gateway": session.serve_url,
        "token_file": str(session.token_path),
        "pid": session.pid,
        "home": str(session.home),
    }


def _show(values: dict[str, Any], title: str, *, as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        print_rows(title, _rows(values))


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), str(value)) for key, value in values.items()]


if __name__ == "__main__":
    sys.exit(main())
