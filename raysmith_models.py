"""The commands `raysmith models`, `export` and `serve`: published models, and which answer.

Takes words; changes the registry or hands over to a deployment or a rollout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.session import find_session
from cluster.storage import resolve_output
from jobs.entry import guard, print_json, print_values

models_app = typer.Typer(help="Published models: list, publish, promote, roll back.")

Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
ClusterName = Annotated[str, typer.Option("--name", help="Name of the local cluster.")]
RegistryRoot = Annotated[str, typer.Option("--registry", help="Folder of the registry.")]


@models_app.command("list")
def list_models(registry: RegistryRoot = "runs/registry", json: Json = False) -> int:
    """List every published version."""
    from jobs.registry import Registry

    def action() -> None:
        entries = [e.model_dump(mode="json") for e in Registry(resolve_output(registry)).entries()]
        if json:
            print_json({"models": entries})
            return
        table = Table("model", "aliases", "size", "published", title="published models")
        for entry in entries:
            table.add_row(
                f"{entry['name']}@{entry['version']}",
                ", ".join(entry["aliases"]),
                f"{entry['size_bytes'] / 2**20:.2f} MiB",
                entry["published_at"],
            )
        Console().print(table)

    return guard(action)


@models_app.command("publish")
def publish_model(
    source: Annotated[Path, typer.Argument(help="Model directory whose manifest passed the gate.")],
    name: Annotated[str, typer.Argument(help="Name to publish under.")],
    version: Annotated[str | None, typer.Option(help="Version; unset: the next number.")] = None,
    registry: RegistryRoot = "runs/registry",
    promote: Annotated[bool, typer.Option(help="Point name@production to it.")] = False,
) -> int:
    """Publish a model directory as an immutable version."""
    from jobs.config import PublishConfig
    from jobs.publish import publish

    def action() -> None:
        values = {"registry": registry, "name": name, "version": version, "promote": promote}
        config = parse_config(PublishConfig, values, "raysmith models publish")
        Console().print(f"published {publish(resolve_output(source), config).reference}")

    return guard(action)


@models_app.command("promote")
def promote_model(
    reference: Annotated[str, typer.Argument(help="name@version.")],
    registry: RegistryRoot = "runs/registry",
    canary: Annotated[
        str | None,
        typer.Option(help="Share of the requests at first, as 10% or 0.1; unset: only the alias."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the rollout, as limits.watch_s=120."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the rollout until it ends.")] = True,
    session: ClusterName = "default",
) -> int:
    """Point name@production to a version; with --canary let it take over what is served, too."""
    if canary is None:

        def change(registry: Any, name: str, version: str) -> Any:
            _refuse_without_canary(overrides, wait=wait)
            return registry.promote(name, version)

        return _change_alias(reference, registry, change)
    from jobs.submit import submit_job

    outcome: list[int] = []

    def action() -> None:
        _parts(reference)
        values = {"model": reference, "registry": registry, "limits.canary_ratio": _ratio(canary)}
        given = [f"{key}={value}" for key, value in values.items()] + list(overrides or ())
        arguments = [word for each in given for word in ("--set", each)]
        outcome.append(submit_job(find_session(session), "promote", arguments, wait=wait))

    return guard(action) or outcome[0]


@models_app.command("rollback")
def roll_back_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    registry: RegistryRoot = "runs/registry",
) -> int:
    """Point name@production back to the version before."""
    return _change_alias(f"{name}@-", registry, lambda r, model, _: r.roll_back(model))


def widths(
    model: Annotated[str, typer.Option(help="Directory of a dense decoder.")],
    data: Annotated[str, typer.Option(help="Folder of packed shards, as a training run wrote it.")],
    keep: Annotated[float, typer.Option(help="Share of the MLPs' channels that stay.")],
    multiple_of: Annotated[int, typer.Option(help="Each width is a multiple of this.")] = 128,
    num_sequences: Annotated[int, typer.Option(help="Sequences of text that are looked at.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens of one of them.")] = 256,
    json: Json = False,
) -> int:
    """Propose widths of each block's MLP for the method `width`, by what matters on a text."""

    def action() -> None:
        from jobs.config import CalibrationConfig
        from jobs.widths import propose_widths

        values = {"data": data, "num_sequences": num_sequences, "seq_len": seq_len}
        calibration = parse_config(CalibrationConfig, values, "raysmith widths")
        found = propose_widths(model, calibration, keep=keep, multiple_of=multiple_of)
        print_values("widths", found, as_json=json)

    return guard(action)


def export(
    model: Annotated[str, typer.Option(help="Directory, or name@version in the registry.")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf-q8_0, gguf-q4_0 or gguf-bf16: what dense matrices become; quantized ones "
            "keep their integers.",
        ),
    ],
    output: Annotated[str, typer.Option(help="File to write, *.gguf; must not exist.")],
    registry: RegistryRoot = "runs/registry",
    json: Json = False,
) -> int:
    """Write a model as one GGUF file for llama.cpp."""

    def action() -> None:
        from jobs.export import ExportFormat, export_model

        if kind not in list(ExportFormat):
            raise ConfigError(
                f"`--format` = {kind} is none that there is: {', '.join(ExportFormat)}."
            )
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("exporting", total=None)
            values = export_model(
                model,
                ExportFormat(kind),
                output,
                registry=registry,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        print_values("export", values, as_json=json)

    return guard(action)


def serve(
    model: Annotated[str, typer.Argument(help="name@version or name@production.")],
    ledger: Annotated[
        str | None, typer.Option(help="Ledger of teams and keys; unset: RAYSMITH_LEDGER, or yours.")
    ] = None,
    registry: RegistryRoot = "runs/registry",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas of the engine, a fixed number; unset: 1.")
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(min=0, help="Fewest replicas where they scale; 0: none while idle; unset: 1."),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Most replicas; unset: their number is fixed.")
    ] = None,
    min_parity: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of prompts it must answer as its model does offline before it takes over "
            "from another version; unset: 0.9; 0: it is not asked. Needs the gateway's ledger.",
        ),
    ] = None,
    name: ClusterName = "default",
) -> int:
    """Offer a published model over REST."""
    from cluster.serve_api import serve_api
    from jobs.config import DeployConfig
    from jobs.deploy import deploy

    def action() -> None:
        values = {
            "model": model,
            "ledger": ledger,
            **_replica_values(replicas, min_replicas, max_replicas),
        }
        if min_parity is not None:
            values["min_parity"] = min_parity
        session = find_session(name)
        config = parse_config(DeployConfig, values, "raysmith serve")
        entry = deploy(config, registry, serve_api(session))
        Console().print(f"{entry.reference} answers at {session.serve_url}/v1")

    return guard(action)


def _change_alias(reference: str, root: str, change: Callable[[Any, str, str], Any]) -> int:
    from jobs.registry import Registry

    def action() -> None:
        name, version = _parts(reference)
        entry = change(Registry(resolve_output(root)), name, version)
        Console().print(f"{name}@production is now {entry.reference}")

    return guard(action)


def _replica_values(
    replicas: int | None, min_replicas: int | None, max_replicas: int | None
) -> dict[str, Any]:
    """Return `num_replicas` or `scaling` of a deployment. Raises ConfigError for half of either."""
    if max_replicas is None:
        if min_replicas is not None:
            raise ConfigError(
                f"`--min-replicas` = {min_replicas} needs `--max-replicas`: without it the number "
                "of replicas is fixed. Add `--max-replicas`, or give `--replicas` instead."
            )
        return {"num_replicas": replicas or 1}
    if replicas is not None:
        raise ConfigError(
            f"`--replicas` = {replicas} contradicts `--max-replicas` = {max_replicas}: their "
            "number is fixed or follows the load. Leave one out."
        )
    fewest = 1 if min_replicas is None else min_replicas
    return {"scaling": {"min_replicas": fewest, "max_replicas": max_replicas}}


def _refuse_without_canary(overrides: list[str] | None, *, wait: bool) -> None:
    """Raise ConfigError for an option of a rollout where there is none."""
    given = [*(["--set"] if overrides else []), *([] if wait else ["--no-wait"])]
    if given:
        raise ConfigError(
            f"`{given[0]}` needs `--canary`: without it only the alias changes, at once. Add "
            f"`--canary 10%`, or leave `{given[0]}` out."
        )


def _parts(reference: str) -> tuple[str, str]:
    name, separator, version = reference.partition("@")
    if not separator or not version:
        raise ConfigError(f"`{reference}` names no version. Give name@version.")
    return name, version


def _ratio(text: str) -> float:
    """Return a share in (0, 1) written as 10% or 0.1."""
    number, is_percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        ratio = float(number) / (100 if is_percent else 1)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1:
        raise ConfigError(f"`--canary` = {text}: expected a share like 10% or 0.1.")
    return ratio
