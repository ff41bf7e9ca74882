"""Reference pages are generated from the code, so they are checked against it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from cluster.config import load_config
from cluster.session_state import Session
from jobs import config as job_configs
from serving.continuation import unavailable
from serving.gateway.accounts import UNAUTHORIZED
from serving.gateway.budgets import QUOTA_CODE
from serving.gateway.rate_limits import RATE_LIMIT_CODE
from serving.gateway.routes_inference import BAD_TICKET
from serving.gateway.schemas_base import IGNORED
from serving.messages import GENERATION_FAILED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_when_generated_equal_the_committed_ones(generator: ModuleType):
    for name, text in generator.pages().items():
        committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
        assert committed == text, f"docs/reference/{name} is old: run `make docs`"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/guides/compression.md",
        "docs/guides/your-own-model.md",
        "docs/reference/environment.md",
    ],
)
def test_links_between_pages_lead_to_files(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert missing == []


def test_every_field_of_a_configuration_has_a_sentence(generator: ModuleType):
    page = generator.pages()["configuration.md"]
    assert "| None |" not in page
    assert "TrainConfig" in page


@pytest.mark.parametrize(
    ("title", "row"),
    [
        ("native", "| `max_slots` | `int` | `16` |"),
        ("native", "| `max_shared_tokens` | `int or Literal['auto'] or None` | `auto` |"),
        ("native: speculation", "| `kind` | `Literal['none', 'ngram', 'draft']` | `none` |"),
        ("native: encoders", "| `max_len` | `int` | `4096` |"),
        ("transformers", "| `max_batch_tokens` | `int` | `512` |"),
        ("vllm", "| `tensor_parallel` | `int` | `1` |"),
    ],
)
def test_configuration_page_has_the_options_of_every_engine(
    generator: ModuleType, title: str, row: str
):
    engines = generator.pages()["configuration.md"].partition("\n# Engines\n")[2]
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", engines, re.MULTILINE | re.DOTALL)
    assert row in section


def test_configuration_page_when_an_option_is_no_encoders_does_not_list_it_there(
    generator: ModuleType,
):
    section = generator.pages()["configuration.md"].partition("\n## native: encoders\n")[2]
    assert "cache_bytes" not in section.partition("\n## ")[0]


@pytest.mark.parametrize(
    "row",
    [
        "| `MODEL` | required | name@version or name@production. |",
        "| `--port` | `6379` | Port of the cluster; 0 picks one. |",
        "| `--wait`, `--no-wait` | `--wait` | Follow the log until the job ends. |",
        "| `--promote`, `--no-promote` | `--no-promote` | Point name@production to it. |",
        "One of: `inference`, `metrics`, `admin`. |",
    ],
)
def test_commands_page_has_defaults_negative_switches_and_choices(generator: ModuleType, row: str):
    assert row in generator.pages()["commands.md"]


def test_environment_page_has_a_row_for_every_variable_that_the_code_reads():
    page = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    folders = ("cluster", "jobs", "serving", "raysmith_accounts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += ROOT.glob("raysmith*.py")
    source = "".join(p.read_text(encoding="utf-8") for p in files if p.suffix in (".py", ".cpp"))
    # The first is only set, the others stand in examples.
    unread = {"RAYSMITH_HEAD_ID", "RAYSMITH_URL", "RAYSMITH_API_KEY"}
    ours = set(re.findall(r"\bRAYSMITH_[A-Z_]*[A-Z]\b", source)) - unread
    assert {row for row in rows if row.startswith("RAYSMITH_")} == ours
    assert [row for row in rows if row not in source] == []


@pytest.mark.parametrize(
    ("recipe", "model", "overrides"),
    [
        ("stdlib-tiny", "TrainConfig", []),
        ("stdlib-tiny-search", "SearchConfig", []),
        ("compress-w4a16", "CompressConfig", []),
        ("compress-gptq-w4a16", "CompressConfig", []),
        ("compress-awq-gptq", "CompressConfig", []),
        ("compress-smoothquant-w8a8", "CompressConfig", []),
        ("compress-sparsegpt", "CompressConfig", []),
        ("compress-depth-w8a8", "CompressConfig", []),
        ("evaluate-w4a16", "EvaluateConfig", []),
        ("minilm", "CompressConfig", ["model=models/minilm"]),
        ("evaluate-minilm", "EvaluateConfig", ["base=models/minilm"]),
        ("demo", "PipelineConfig", []),
    ],
)
def test_every_recipe_is_a_valid_configuration(recipe: str, model: str, overrides: list[str]):
    path = ROOT / f"deploy/recipes/{recipe}.yaml"
    assert load_config(getattr(job_configs, model), path, overrides).model_dump()


def test_http_page_names_every_field_that_is_accepted_and_does_nothing():
    page = (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
    sentence = page.partition("are accepted and do nothing:")[2].partition("; so are")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == IGNORED


def test_http_page_when_an_answer_fails_says_which_codes_come_with_which_status():
    page = (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
    assert f"| 500 | `{GENERATION_FAILED}` |" in page
    refused = unavailable("no replica")
    assert refused.code is None
    assert f"| {refused.status} | | no replica lives now, or one after another was lost" in page


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, RATE_LIMIT_CODE),
        (401, UNAUTHORIZED.code),
        (401, BAD_TICKET.code),
        (429, RATE_LIMIT_CODE),
        (429, QUOTA_CODE),
    ],
)
def test_http_page_names_what_accounts_refuse(status: int, code: str):
    page = (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {status} \| [^|]*`{code}`", page, re.MULTILINE)


def test_readme_unsets_everything_that_points_a_shell_at_the_cluster():
    fields = dict.fromkeys(Session.model_fields, "x") | {"pid": 1, "started_at_s": 0.0}
    names = set(Session(**fields).environment()) - {"NO_PROXY", "no_proxy"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`unset ([^`]*)`", readme)
    assert set(command.split()) == names
