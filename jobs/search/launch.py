"""Run a search from its configuration to the winner's model directory.

Takes a SearchConfig; gives a SearchOutcome, `search.json` and the winner in `output_dir/name`. What
comes next is `rungs.decide`'s; how it is run is `tuning`'s.
"""

from cluster.errors import GateRefusedError
from cluster.session import connect
from jobs.config import SearchConfig
from jobs.search.journal import Journal
from jobs.search.plan import Search, plan_search
from jobs.search.report import SearchOutcome, summarise, write_outcome, write_winner
from jobs.search.rungs import Finish, decide


def run_search(config: SearchConfig) -> SearchOutcome:
    """Search on the running cluster; write the outcome and the winner; return the outcome.

    A search that was killed goes on where it was: finished trials are read from its journal. Raises
    GateRefusedError, after writing `search.json`, if no candidate passes the gate.
    """
    search = plan_search(config)
    journal = Journal(search.run_dir / "journal.jsonl", search.fingerprint)
    end = _run(search, journal)
    outcome = summarise(search, journal.results, end)
    if outcome.winner is not None:
        write_winner(search, outcome)
    write_outcome(outcome)
    if outcome.winner is None:
        raise GateRefusedError(
            f"search `{config.name}`: {outcome.why}. Loosen `gate`, widen `schemes`, or train "
            f"longer. All trials are in {search.run_dir / 'search.json'}."
        )
    return outcome


def _run(search: Search, journal: Journal) -> Finish:
    wanted = decide(search.config, len(search.recipes), search.base_bytes, journal.results)
    if isinstance(wanted, Finish):
        return wanted
    connect()
    from jobs.search.tuning import run_tasks  # deferred: a finished search needs no Ray Tune

    return run_tasks(search, journal)
