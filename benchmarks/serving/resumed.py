"""Print how many requests went on at another replica, by version, as JSON.

Takes the address of a cluster from the environment; a process of its own, since joining a cluster
changes the environment.
"""

import asyncio
import json
import sys

from cluster.session import connect
from serving.outcomes import total
from serving.ray_directory import RayDirectory


def main() -> int:
    """Print what every gateway said last."""
    connect()
    said = asyncio.run(RayDirectory().outcomes())
    references = {reference for outcomes in said.values() for reference in outcomes}
    resumed = {
        reference: total(o[reference] for o in said.values() if reference in o).num_resumed
        for reference in references
    }
    sys.stdout.write(json.dumps(resumed) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
