"""Roll a new version out: a job that `raysmith models promote --canary` submits.

Takes a PromoteConfig; gives the state it ended in. It brings the new version up beside the old one,
compares its answers with the model's own, gives it a share of the requests, watches, and ends with
all of them or none. Its share is leased: it falls to nothing if this process dies.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.config import load_config
from cluster.errors import ClusterError, GateRefusedError
from cluster.serve_api import serve_api
from cluster.session import connect
from jobs.entry import Rows, add_options, guard, print_json, print_plan, print_rows, value_rows
from serving.canary import prepare
from serving.rollout import (
    Decision,
    Observation,
    PromoteConfig,
    RolloutLimits,
    RolloutState,
    decide,
)

_POLL_S = 1.0
_FINISH_ATTEMPTS, _RETRY_S = 5, 2.0


class Stage(Protocol):
    """Where a rollout happens; `serving.canary.Canary` is one on a cluster."""

    def start(self) -> None:
        """Bring the new version up, without any share of the requests."""
        ...

    def observe(self, state: RolloutState) -> Observation:
        """Return what is seen now, and renew the lease of the share."""
        ...

    def give_share(self, ratio: float) -> None:
        """Give the new version this share of the requests; the time of the canary begins."""
        ...

    def finish(self, state: RolloutState) -> None:
        """Give all requests to the new version or to the old one, and stop the other.

        After a failure it is called again with the same state, never with the other one.
        """
        ...


def roll_out(
    stage: Stage,
    limits: RolloutLimits,
    *,
    sleep: Callable[[float], None] = time.sleep,
    report: Callable[[Decision], None] = lambda decision: None,
) -> Decision:
    """Run a rollout to its end; whatever interrupts it, the old version gets its requests back.

    Once it has been decided that the new version takes over, nothing is taken back: the old one may
    be gone. Raises ClusterError if the end cannot be carried out.
    """
    try:
        decision = _watch(stage, limits, sleep, report)
    except BaseException as error:
        reason = f"interrupted: {error}" if str(error) else f"interrupted by {error!r}"
        _finish(stage, Decision(RolloutState.ROLLED_BACK, reason), sleep)
        raise
    _finish(stage, decision, sleep)
    return decision


def _watch(
    stage: Stage,
    limits: RolloutLimits,
    sleep: Callable[[float], None],
    report: Callable[[Decision], None],
) -> Decision:
    """Return how it ends."""
    decision = Decision(RolloutState.CHECKING, "starting the new version")
    report(decision)
    stage.start()
    while not decision.state.is_terminal:
        before, decision = decision, decide(decision.state, stage.observe(decision.state), limits)
        if decision != before:
            report(decision)
        if before.state is RolloutState.CHECKING and decision.state is RolloutState.CANARY:
            stage.give_share(limits.canary_ratio)
        if not decision.state.is_terminal:
            sleep(_POLL_S)
    return decision


def _finish(stage: Stage, decision: Decision, sleep: Callable[[float], None]) -> None:
    """Carry an end out, again if that fails; its steps may be repeated."""
    for num_left in reversed(range(_FINISH_ATTEMPTS)):
        try:
            stage.finish(decision.state)
        except Exception as error:
            if num_left == 0:
                winner = "new" if decision.state is RolloutState.PROMOTED else "old"
                found = str(error).rstrip(".") or repr(error)
                raise ClusterError(
                    f"{decision.state.value} ({decision.reason}), but giving all requests to the "
                    f"{winner} version failed {_FINISH_ATTEMPTS} times: {found}. Nothing was taken "
                    "back, and both versions may still run. Offer the one that shall answer with "
                    "`raysmith serve`, and name it with `raysmith models promote`."
                ) from error
            sleep(_RETRY_S)
        else:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Roll out and return the exit code: 1 if the version was rolled back."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.promote", description="Roll a new version out."
    )
    add_options(parser)
    return guard(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(PromoteConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print_plan("promote", _plan(config), as_json=arguments.json)
        return
    connect()
    with prepare(config, serve_api()) as canary:
        decision = roll_out(canary, config.limits, report=_report)
    values = {"model": config.model, "state": decision.state.value, "reason": decision.reason}
    if arguments.json:
        print_json(values)
    else:
        print_rows("promote", value_rows(values))
    if decision.state is RolloutState.ROLLED_BACK:
        raise GateRefusedError(f"{config.model} was rolled back: {decision.reason}.")


def _plan(config: PromoteConfig) -> Rows:
    limits = config.limits
    return [
        ("model", config.model),
        ("first", f"{limits.min_parity:.0%} of the prompts answered as offline"),
        ("then", f"{limits.canary_ratio:.0%} of the requests, {limits.watch_s:.0f} s or longer"),
        (
            "rolled back",
            f"{limits.max_error_increase:.1%} more errors, times over "
            f"{limits.max_latency_ratio:g}x, or {limits.max_disagreement:.0%} other answers",
        ),
        ("in the end", f"{config.model.partition('@')[0]}@production, and every request"),
    ]


def _report(decision: Decision) -> None:
    sys.stderr.write(f"{decision.state.value}: {decision.reason}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
