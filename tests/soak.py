"""Kills and storage faults of whole jobs, each compared with a run that nobody disturbed.

    python -m tests.soak                                     # `make soak`: each kind once
    python -m tests.soak --tries 10 "kill -9: driver"        # some kinds, more often

Jobs run attached to a cluster of three Ray nodes on this machine, and read and write an S3 server
behind a proxy. When a job has failed, the same command is run again without the fault. A shard is
counted as redone when one of its rows was computed and written more than once. Prints a table;
the exit code tells whether a row was lost, repeated or changed, or a finished shard redone.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from pipeline.run.manifest import read_run
from pipeline.storage import s3_write
from pipeline.write.fragments import unpack_tables
from tests import drivers
from tests.conftest import serve_s3
from tests.fault_proxy import Fault, FaultProxy, Request
from tests.shards import make_tar

ROOT = Path(__file__).parent.parent
SHARDS, IMAGES = 8, 24
STAGED = "*/_staging/*.arrows"
Row = tuple[Any, ...]


@dataclass
class World:
    """What the jobs run in."""

    proxy: FaultProxy
    cluster: Any
    bucket: str
    random: random.Random
    output: str = ""
    """Of the job that runs."""
    calm: dict[Row, dict[str, Any]] = field(default_factory=dict)
    """The rows of an undisturbed run."""

    def start(self, output: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobs.segment", f"{self.bucket}/in", output, "--quiet"]
        command += ["--model", "pipeline/demo/model", "--prompt", "blue", "--prompt", "star"]
        command += ["--batch-size", "8", "--storage-timeout", "20"]
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address, "PYTHONPATH": str(ROOT)}
        # Ray Data renews what a job has of the cluster every 10 s, and keeps it for 180 s for one
        # that was killed: the next one would wait as long.
        env["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "25"
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)

    def wait_for_a_moment(self, job: subprocess.Popen[bytes], key: str = STAGED) -> None:
        """Until the job has written some such objects, and a little longer."""
        wanted = self.random.randint(1, 4)
        while self.proxy.count("PutObject", key) < wanted:
            check_runs(job)
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 0.3))


class TooLateError(Exception):
    """The job ended before it could be disturbed."""


def check_runs(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is not None:
        raise TooLateError


@contextmanager
def open_world(seed: int) -> Iterator[World]:
    """A head without CPUs and two nodes of one CPU each; the input's fifth images are broken."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    noise = np.random.default_rng(0)
    with serve_s3() as s3, FaultProxy(os.environ["AWS_ENDPOINT_URL"], seed=seed) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        s3.create_bucket(Bucket="soak")
        for shard in range(SHARDS):
            images = []
            for i in range(IMAGES):
                file = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(file, "PNG")
                images.append((f"{i}.png", file.getvalue()[: 50 if i == 5 else None]))
            storage.write_bytes(f"s3://soak/in/{shard}.tar", make_tar(images))
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        world = World(proxy, cluster, "s3://soak", random.Random(seed))
        try:
            assert world.start("s3://soak/calm").wait(300) == 0
            world.calm, repeated = rows_of("s3://soak/calm")
            assert not repeated
            assert sum(row[0] == "images" for row in world.calm) == SHARDS * (IMAGES - 1)
            yield world
        finally:
            cluster.shutdown()


def rows_of(output: str) -> tuple[dict[Row, dict[str, Any]], int]:
    """Every row of every table, by its identity, and how many were there more than once.

    Scores to the fifth digit, since batches are cut anew.
    """
    rows: dict[Row, dict[str, Any]] = {}
    count = 0
    for table in ("images", "masks", "errors"):
        for file in storage.glob_files(f"{output}/{table}/*.parquet"):
            for row in pq.read_table(io.BytesIO(storage.read_bytes(file.uri))).to_pylist():
                row |= {k: round(v, 5) for k, v in row.items() if isinstance(v, float)}
                rows[table, row["shard"], row["row"], row.get("prompt_id")] = row
                count += 1
    return rows, count - len(rows)


# ------------------------------------------------------------------------------ disturbances


def below(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those that these have, with their titles."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, left = {}, list(children.get(pid, []))
    while left:
        child = left.pop()
        left += children.get(child, [])
        try:
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
    return found


def kill(pid: int) -> None:
    """kill -9; what has just ended by itself is fine, too."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_driver(world: World, job: subprocess.Popen[bytes]) -> None:
    world.wait_for_a_moment(job)
    kill(job.pid)


def kill_worker(title: str) -> Callable[[World, subprocess.Popen[bytes]], None]:
    """kill -9 of a worker whose title, which Ray sets, begins like this."""

    def disturb(world: World, job: subprocess.Popen[bytes]) -> None:
        for pause in (world.random.uniform(0, 2), 0):  # some time after there is one
            while not (found := [p for p, t in below(os.getpid()).items() if t.startswith(title)]):
                check_runs(job)
                time.sleep(0.05)
            time.sleep(pause)
        kill(world.random.choice(found))

    return disturb


def kill_node(world: World, job: subprocess.Popen[bytes]) -> None:
    """kill -9 of all processes of a node; another one takes its place, as on a spot market."""
    world.wait_for_a_moment(job)
    node = world.random.choice(list(world.cluster.worker_nodes))
    raylet = node.all_processes["raylet"][0].process.pid
    workers = below(raylet)
    kill(raylet)
    for pid in workers:
        kill(pid)
    world.cluster.remove_node(node, allow_graceful=False)
    world.cluster.add_node(num_cpus=1)
    # Until Ray knows: an actor of a job that starts before may be sent to the dead node, and then
    # Ray 2.60 never starts it.
    world.cluster.wait_for_nodes()


def kill_each(world: World, job: subprocess.Popen[bytes]) -> None:
    kill_worker(TASK)(world, job)
    kill_worker(ACTOR)(world, job)
    kill_node(world, job)
    world.wait_for_a_moment(job, "*/_receipts/*")
    kill(job.pid)


def fault(kind: str, **where: Any) -> Callable[[World, subprocess.Popen[bytes]], None]:
    """A fault of the storage, from the job's start."""

    def disturb(world: World, job: subprocess.Popen[bytes]) -> None:
        world.proxy.add(Fault(kind, **where))

    return disturb


def refuse(kind: str) -> Callable[[World, subprocess.Popen[bytes]], None]:
    """Credentials that are refused from some moment on."""

    def disturb(world: World, job: subprocess.Popen[bytes]) -> None:
        world.wait_for_a_moment(job)
        world.proxy.add(Fault(kind, times=None))

    return disturb


def change(disturbance: Callable[[str], None]) -> Callable[[World, subprocess.Popen[bytes]], None]:
    """Half of a shard is read, then the object is another, or gone: the job ends with that shard
    open. Afterwards it is there again, with other bytes and the same rows.
    """

    def disturb(world: World, job: subprocess.Popen[bytes]) -> None:
        uri = f"{world.bucket}/in/{world.random.randrange(SHARDS)}.tar"
        before = storage.read_bytes(uri)
        key = f"in/{uri.rpartition('/')[2]}"
        world.proxy.add(Fault("cut", operation="GetObject", key=key))
        first = Fault("pass", operation="GetObject", key=key, first=lambda: disturbance(uri))
        world.proxy.add(first)
        assert job.wait(300) == 1
        assert first.hits
        record = read_run(world.output)
        assert record is not None
        assert list(record["missing"]) == [uri.rpartition("/")[2]]
        storage.write_bytes(uri, before + bytes(512))

    return disturb


ACTOR, TASK = "ray::MapWorker(MapBatches(SegmentImages))", "ray::MapBatches("
KILL_EACH = "kill -9: task, actor, node, driver in turn"
OFTEN = {"times": None, "rate": 0.1}
KINDS: dict[str, Callable[[World, subprocess.Popen[bytes]], None]] = {
    "kill -9: driver": kill_driver,
    "kill -9: actor with the model": kill_worker(ACTOR),
    "kill -9: worker of a task": kill_worker(TASK),
    "kill -9: all of a Ray node": kill_node,
    KILL_EACH: kill_each,
    "503 SlowDown": fault("slow_down", **OFTEN),
    "500": fault("internal_error", **OFTEN),
    "connection reset": fault("reset", **OFTEN),
    "no answer": fault("hang", times=3, rate=0.1),
    "body cut": fault("cut", operation="GetObject", **OFTEN),
    "body slow": fault("slow", operation="GetObject", pause_s=0.1, **OFTEN),
    "acknowledgement of PUT lost": fault("lost_reply", operation="PutObject", **OFTEN),
    "403 from some moment on": refuse("denied"),
    "token expired from some moment on": refuse("expired"),
    "object deleted while read": change(storage.delete_file),
    "object overwritten while read": change(lambda uri: storage.write_bytes(uri, b"new")),
}
COMMIT_KILLED = "kill -9: at a step of the commit"
# Rows that are lost, twice there, other ones or too many, and finished shards that were redone.
PROMISED = ("lost", "repeated", "changed", "more", "finished")
COMMITS = [COMMIT_KILLED, "acknowledgement of CompleteMultipartUpload lost"]


# ------------------------------------------------------------------------------------ tries


def attempt_commit(world: World, kind: str) -> Counter[str]:
    """One try of two shards that are committed without a job: see tests.drivers."""
    output = f"{world.bucket}/{uuid.uuid4().hex}"
    world.proxy.clear()
    if kind == COMMIT_KILLED:
        driver = drivers.start_driver(output, world.random.randrange(20))
        driver.join(300)
        code = driver.exitcode
    else:
        lost = Fault("lost_reply", operation="CompleteMultipartUpload", times=3)
        world.proxy.add(lost)
        drive_large(output)
        code = 0
    world.proxy.faults.clear()
    if code != 0:
        drivers.drive(output)
    keys: Counter[Row] = Counter()
    for table in drivers.WHOLE:
        for file in storage.glob_files(f"{output}/{table}/*.parquet"):
            part = pq.read_table(io.BytesIO(storage.read_bytes(file.uri))).to_pylist()
            keys.update((table, r["shard"], r["row"], r.get("prompt_id")) for r in part)
    wanted = {(table, *row) for table, found in drivers.WHOLE.items() for row in found}
    counts = Counter(tries=1, again=int(code != 0), repeated=keys.total() - len(keys))
    counts["lost"], counts["more"] = len(wanted - keys.keys()), len(keys.keys() - wanted)
    counts["redone"] = len(redone(world.proxy.requests))
    assert kind == COMMIT_KILLED or lost.hits
    return counts


def drive_large(output: str) -> None:
    """Keys so long that fragments and the images' parts are uploaded in several pieces."""
    small = drivers.images

    def large(*rows: int) -> pa.Table:
        table = small(*rows)
        keys = [random.randbytes(8 * 2**20).hex() for _ in rows]
        index = table.schema.get_field_index("key")
        return table.set_column(index, table.schema.field("key"), pa.array(keys, pa.string()))

    pieces = patch.object(s3_write, "PART_BYTES", 5 * 2**20)
    with pieces, patch.object(drivers, "images", large):
        drivers.drive(output)


def attempt(world: World, kind: str) -> Counter[str]:
    """One try: how much came out as in PROMISED, and how many shards were redone."""
    while True:
        output = world.output = f"{world.bucket}/{uuid.uuid4().hex}"
        world.proxy.clear()
        job = world.start(output)
        with suppress(TooLateError):
            KINDS[kind](world, job)
            break
    code = job.wait(300)
    world.proxy.faults.clear()
    done = {f.uri.split("/")[-2] for f in storage.glob_files(f"{output}/_receipts/*/*.json")}
    since = time.monotonic()
    again = code != 0 or "object" in kind  # which is there again
    if again:
        assert world.start(output).wait(300) == 0
    rows, repeated = rows_of(output)
    counts = Counter(tries=1, repeated=repeated, again=int(again))
    counts["lost"] = len(world.calm.keys() - rows.keys())
    counts["changed"] = sum(rows.get(key) != row for key, row in world.calm.items())
    counts["more"] = len(rows.keys() - world.calm.keys())
    written = [
        r for r in world.proxy.requests if r.operation == "PutObject" and "_staging" in r.key
    ]
    counts["redone"] = len(redone(written))
    late = {r.key.split("/")[-2] for r in written if r.at > since}
    counts["finished"] = len(late & done) if "object" not in kind else 0
    return counts


def redone(requests: list[Request]) -> set[str]:
    """The shards of which a row was written in more than one fragment."""
    fragments = {r.key: r.body for r in requests if r.key.endswith(".arrows")}
    rows: Counter[Row] = Counter()
    for body in fragments.values():
        for table in ("images", "errors"):
            found = unpack_tables(body).get(table)
            if found is not None:
                rows.update((row["shard"], row["row"]) for row in found.to_pylist())
    return {shard for (shard, _), times in rows.items() if times > 1}


def main() -> int:
    """The table; 1 if any row of it is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS, *COMMITS], metavar="KIND")
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}, {SHARDS} shards of {IMAGES} images", flush=True)
    print("| fault | tries | run again | rows lost | rows repeated | shards redone |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    broken = 0
    with open_world(options.seed) as world:
        for kind in options.kinds or [*KINDS, *COMMITS]:
            n: Counter[str] = Counter()
            for _ in range(options.tries):
                n += (attempt_commit if kind in COMMITS else attempt)(world, kind)
            columns = [n[name] for name in ("tries", "again", "lost", "repeated", "redone")]
            print(f"| {kind} | {' | '.join(map(str, columns))} |", flush=True)
            if bad := {name: n[name] for name in PROMISED if n[name]}:
                broken = 1
                print(f"NOT AS PROMISED: {kind}: {bad}", file=sys.stderr, flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
