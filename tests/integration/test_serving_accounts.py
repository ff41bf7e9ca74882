"""Teams, keys and budgets of a served model, by the commands a person types."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_service import Service, start_service

import raysmith
from cluster.accounting import Team, month_of
from cluster.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A request holds at most: 2 tokens of its prompt and 8 of its answer.
PROMPT, MOST_TOKENS, BUDGET, NUM_CALLS = [5, 6], 8, 300, 200


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with start_service(tmp_path_factory.mktemp("accounts"), "accounts") as started:
        registry = str(started.folder / "registry")
        command = ["serve", "tiny@1", "--registry", registry, "--name", "accounts"]
        assert raysmith.main(command) == 0
        started.wait_until_ready()
        yield started


def new_key(capsys: pytest.CaptureFixture[str], team: str) -> tuple[str, str]:
    """Make a key as a person would; return its id and itself."""
    assert raysmith.main(["keys", "new", team]) == 0
    secret = capsys.readouterr().out.strip()
    assert raysmith.main(["keys", "list", "--team", team, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["keys"][-1]["id"], secret


def ask(client: openai.OpenAI) -> openai.types.Completion:
    return client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=MOST_TOKENS, temperature=0
    )


def test_usage_when_asked_right_after_has_what_the_answer_said(service: Service, capsys):
    assert raysmith.main(["teams", "add", "used"]) == 0
    _, secret = new_key(capsys, "used")
    used = ask(service.client(api_key=secret)).usage
    document = service.client(api_key=secret).get("/usage", cast_to=object)
    assert document["budget"]["spent_tokens"] == used.total_tokens
    assert raysmith.main(["usage", "--team", "used", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["usage"]
    assert (row["prompt_tokens"], row["generated_tokens"]) == (2, used.completion_tokens)


def test_budget_when_200_calls_are_parallel_is_not_overspent(service: Service):
    with Ledger.open(service.ledger) as ledger:
        team = ledger.add_team(Team(name="frugal", tokens_per_month=BUDGET))
        like = next(key for key in ledger.keys("test"))
        _, secret = ledger.new_key(like.replace(team=team.name))
        client = service.client(api_key=secret)

        def call(_: int) -> int | str | None:
            try:
                return ask(client).usage.total_tokens
            except openai.RateLimitError as error:
                return error.code

        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(call, range(NUM_CALLS)))
        served = [result for result in results if isinstance(result, int)]
        client.get("/usage", cast_to=object)  # answers once everything is written
        spent = ledger.balance(team, month_of(time.time())).spent
    assert spent == sum(served) <= BUDGET
    assert spent > BUDGET - 2 * (2 + MOST_TOKENS)
    assert {result for result in results if not isinstance(result, int)} == {"insufficient_quota"}


def test_key_when_revoked_is_refused_by_the_next_request(service: Service, capsys):
    key_id, secret = new_key(capsys, "test")
    client = service.client(api_key=secret)
    client.models.list()
    assert raysmith.main(["keys", "revoke", key_id]) == 0
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
