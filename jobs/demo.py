"""The demo: one small model, the whole way, on a cluster of its own.

Takes nothing; gives a table, runs/demo/report.html and, if asked, a
cluster that stays up. Every stage is a real `ray job submit`; the questions go over HTTP through
the official `openai` client. It does not know how any stage works.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from cluster.accounting import Key, Scope, Team
from cluster.config import load_config
from cluster.errors import RaysmithError
from cluster.ledger import Ledger
from cluster.session import HeadConfig, Session, start_head, stop_head
from cluster.storage import resolve_output, write_json
from jobs.config import PipelineConfig
from jobs.data.tokenizer import load_tokenizer
from jobs.data.tokens import open_split
from jobs.evaluation.parity import Endpoint, ParityReport, check_parity
from jobs.registry import Registry
from jobs.report import DemoFacts, require_learned, table, write_report
from jobs.submit import is_rays_own

RECIPE = Path("deploy/recipes/demo.yaml")
PROMPT = "def read_"
MAX_TOKENS, TEMPERATURE, SEED = 48, 0.7, 1
NUM_PARITY_PROMPTS = 50
_log = Console(stderr=True)


@dataclass(frozen=True)
class Answer:
    """One streamed completion and how fast it came."""

    text: str
    first_token_ms: float
    tokens_per_s: float


def run_demo(*, keep: bool) -> None:
    """Run the demo; with `keep` leave the cluster up and print its addresses.

    Raises RaysmithError if a stage fails; the cluster is stopped then, too.
    """
    began_s = time.monotonic()
    root = _repository()
    out = resolve_output("runs/demo")
    # The cluster first: where a demo was kept up, this refuses and leaves its files alone.
    session = start_head(HeadConfig(name="demo", gcs_port=0, dashboard_port=0, serve_port=0))
    _log.print(f"cluster up; dashboard {session.dashboard_url} (token in {session.token_path})")
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        config = load_config(PipelineConfig, root / RECIPE)
        key = _make_key(config)
        stage_seconds = {
            stage: _submit(session, root, stage, out)
            for stage in ("train", "search", "publish", "deploy")
        }
        jobs = _job_list(session)
        facts = _ask(session, config, key, stage_seconds)
        facts = facts.replace(total_s=time.monotonic() - began_s, jobs=tuple(jobs))
        write_json(out / "facts.json", facts.model_dump(mode="json"))
        require_learned(facts)
        report = write_report(out, facts)
        Console().print(table(facts))
        _log.print(f"report: {report}")
    except BaseException:
        stop_head(session)
        raise
    if keep:
        _print_addresses(session, key)
    else:
        stop_head(session)


def _repository() -> Path:
    root = Path(__file__).resolve().parent.parent
    if not (root / RECIPE).is_file():
        raise RaysmithError(f"{root / RECIPE} is missing: the demo runs in a clone of the project.")
    return root


def _make_key(config: PipelineConfig) -> str:
    """Return a key of a new team in the demo's own ledger."""
    with Ledger.open(config.deploy.ledger) as ledger:
        team = ledger.add_team(Team(name="demo"))
        return ledger.new_key(Key(id="", team=team.name, scopes=frozenset({Scope.INFERENCE})))[1]


def _submit(session: Session, root: Path, stage: str, out: Path) -> float:
    """Submit one stage as a Ray job and return its seconds.

    Its whole log is kept in a file; what Ray says of itself is not shown.
    """
    command = ["job", "submit", "--working-dir", str(root)]
    command += ["--submission-id", f"demo-{stage}-{uuid.uuid4().hex[:6]}", "--"]
    command += ["python", "-m", "jobs.pipeline", "--config", str(RECIPE), "--stage", stage]
    _log.print(f"\n$ ray {shlex.join(command)}", style="bold", soft_wrap=True, highlight=False)
    began_s = time.monotonic()
    with (out / f"{stage}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command],
            env={**os.environ, **session.environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
        )
        assert process.stdout is not None, "the pipe was asked for"
        for line in process.stdout:
            log.write(line)
            if not is_rays_own(line):
                _log.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
        code = process.wait()
    if code != 0:
        raise RaysmithError(
            f"stage `{stage}` failed with exit code {code}; its log is {out / f'{stage}.log'}."
        )
    return time.monotonic() - began_s


def _job_list(session: Session) -> list[dict[str, str]]:
    """Return every submitted job with its state, as `ray job list` sees it."""
    found = session.request("/api/jobs/")
    return [
        {"id": job["submission_id"], "status": job["status"], "entrypoint": job["entrypoint"]}
        for job in sorted(found, key=lambda job: job["start_time"] or 0)
        if job.get("submission_id")
    ]


def _ask(
    session: Session, config: PipelineConfig, key: str, stage_seconds: dict[str, float]
) -> DemoFacts:
    entry = Registry(resolve_output(config.publish.registry)).resolve(config.deploy.model)
    client = OpenAI(base_url=f"{session.serve_url}/v1", api_key=key)
    model = client.models.list().data[0].id
    whole = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED
    )
    streamed = stream_answer(client, model, PROMPT)
    _log.print(f"\n$ a completion of `{PROMPT}`", style="bold", highlight=False)
    _log.print(PROMPT + streamed.text, markup=False, highlight=False)
    endpoint = Endpoint(f"{session.serve_url}/v1", key, model)
    parity = check_parity(entry.path, endpoint, _prompts(config), max_tokens=24)
    _require_exact(parity, whole.choices[0].text, streamed.text)
    return DemoFacts(
        reference=entry.reference,
        completion=PROMPT + streamed.text,
        first_token_ms=streamed.first_token_ms,
        stream_tokens_per_s=streamed.tokens_per_s,
        parity_equal=parity.num_equal,
        parity_prompts=parity.num_prompts,
        stage_seconds=stage_seconds,
        train_dir=str(resolve_output(config.train.output_dir) / config.train.name),
        search_dir=str(resolve_output(config.search.output_dir) / config.search.name),
    )


def stream_answer(client: OpenAI, model: str, prompt: str) -> Answer:
    """Ask once with streaming and time the answer."""
    began_s = time.perf_counter()
    first_s = 0.0
    parts: list[str] = []
    usage: Any = None
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        usage = event.usage or usage
        if event.choices and event.choices[0].text:
            first_s = first_s or time.perf_counter() - began_s
            parts.append(event.choices[0].text)
    elapsed_s = time.perf_counter() - began_s
    return Answer("".join(parts), 1e3 * first_s, usage.completion_tokens / elapsed_s)


def _prompts(config: PipelineConfig) -> list[str]:
    """Return the beginnings of held-out sequences, of different lengths."""
    folder = resolve_output(config.search.data)
    tokenizer = load_tokenizer(folder / "tokenizer")
    split = open_split(folder, "test")
    count = min(NUM_PARITY_PROMPTS, split.num_sequences(64))
    rows = split.sequences(range(count), 64)
    texts = [tokenizer.decode(row[: 8 + i % 40].tolist()) for i, row in enumerate(rows)]
    return [text for text in texts if text.strip()]


def _require_exact(parity: ParityReport, whole: str, streamed: str) -> None:
    if whole != streamed:
        raise RaysmithError(f"streamed answer {streamed!r} differs from the whole one {whole!r}.")
    if not parity.is_exact:
        first = parity.disagreements[0]
        raise RaysmithError(
            f"{len(parity.disagreements)} of {parity.num_prompts} greedy answers over REST differ "
            f"from offline, first for {first.prompt!r}: {first.served!r} against {first.offline!r}."
        )


def _print_addresses(session: Session, key: str) -> None:
    console = Console()
    console.print(f"gateway    {session.serve_url}/v1   key {key}", soft_wrap=True)
    console.print(
        f"dashboard  {session.dashboard_url}   token in {session.token_path}", soft_wrap=True
    )
    console.print("stop it with `make down`")
