"""kill -9 of every kind of process of a real job on a cluster; the long matrix is soak.py.

The steps of the commit itself are in test_commit.
"""

from __future__ import annotations

import soak


def test_the_same_command_completes_what_lost_a_task_an_actor_a_node_and_its_driver() -> None:
    with soak.open_world(seed=0) as world:
        counts = soak.attempt(world, soak.KILL_EACH)
    assert counts["again"] == 1
    assert {name: counts[name] for name in soak.PROMISED if counts[name]} == {}
