"""Run a search from its configuration to the winner's model directory.

Takes a SearchConfig; gives a SearchOutcome, `search.json`, `report.html` and the winner in
`output_dir/name`. What comes next is `course.decide`'s; how it is run is `tuning`'s and `served`'s.
"""

import logging
import shutil

from cluster.errors import ClusterError, EngineError, GateRefusedError, SearchError
from cluster.locks import exclusive
from cluster.session import connect
from jobs.config import SearchConfig
from jobs.search.course import Finish, Wanted, decide
from jobs.search.journal import Journal
from jobs.search.page import write_page
from jobs.search.plan import Search, plan_search
from jobs.search.records import write_events, write_study
from jobs.search.report import SearchOutcome, summarise, write_outcome, write_winner
from jobs.search.served import check_can_serve, stop_leftovers, time_served
from jobs.search.tasks import Result, Task

_LOCK = ".lock"
_logger = logging.getLogger(__name__)


def run_search(config: SearchConfig) -> SearchOutcome:
    """Search on the running cluster; write the outcome and the winner; return the outcome.

    A search that was killed goes on where it was: finished trials are read from its journal. Raises
    GateRefusedError, after writing `search.json`, if no candidate passes the gate, ConfigError if
    the limits leave nothing.
    """
    search = plan_search(config)
    with exclusive(search.run_dir / _LOCK, f"the search `{config.name}`", SearchError):
        journal = Journal(search.run_dir / "journal.jsonl", search.fingerprint)
        end = _run(search, journal)
        outcome = summarise(search, journal.results, end)
        if outcome.winner is not None:
            write_winner(search, outcome)
        write_outcome(outcome)
        write_page(search, outcome, journal.results)
        write_study(search, outcome)
        write_events(search, outcome)
        shutil.rmtree(search.statistics, ignore_errors=True)
    if outcome.winner is None:
        raise GateRefusedError(
            f"search `{config.name}`: {outcome.why}. Loosen `gate`, widen `schemes`, or train "
            f"longer. All trials are in {search.run_dir / 'search.json'}."
        )
    return outcome


def _run(search: Search, journal: Journal) -> Finish:
    """Ask what is wanted and have it done, until the end."""
    wanted: Wanted | Finish = decide(search.space, journal.results)
    if isinstance(wanted, Wanted):
        connect()
        if search.config.served_finalists:
            check_can_serve()
            stop_leftovers(search)
    while isinstance(wanted, Wanted):
        if all(task.stage == "serve" for task in wanted.tasks):
            for task in wanted.tasks:
                _serve(search, journal, task)
            wanted = decide(search.space, journal.results)
        else:
            from jobs.search.tuning import run_tasks  # a finished search needs no Ray Tune

            wanted = run_tasks(search, journal)
    return wanted


def _serve(search: Search, journal: Journal, task: Task) -> None:
    """Time one model through Ray Serve; what cannot be served costs its time, not the search."""
    try:
        journal.record(task, time_served(search, task))
    except (ClusterError, EngineError) as error:
        _logger.warning(
            "%s was not timed through Ray Serve: %s",
            search.space.describe(task.assignment),
            error.message,
        )
        journal.leave_out(task, Result(error=error.message))
