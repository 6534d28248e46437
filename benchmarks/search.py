"""Exact search of one query, as whole commands: ours, DuckDB, LanceDB and numpy, on one table.

    python -m benchmarks.search [--rows 3000000] [--repeats 3] [--queries 1]

Random vectors of length 1, 128 wide, in parts of 10,000 rows, as the embed job writes them. Every
contender is a process, timed from its start to its exit, and they take turns: on the whole table,
and on 10,000 rows, which is the start. Ours is asked by key, which needs no model, and by text,
which needs the bundled one, and so torch. DuckDB and numpy read the same Parquet files, LanceDB a
copy in its own format, without an index and by the one that `clipseg-ray index` has built. Several
--queries are answered by one command of ours, and as many others by the numpy loop. Exits with 1
where the exact ones disagree. CPU seconds are the machine's answer when it is busy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.watch import Watched, run_watched
from pipeline import schema
from pipeline.model.weights import hash_weights
from pipeline.write.parts import PartWriter

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "pipeline" / "demo" / "model"  # with a projection of 128
DIMENSION = "128"
PART_ROWS = 10_000
TOP = "20"
KEY = "0000000003"  # row 3 of the first part
NUMPY = """
import sys, glob, numpy as np, pyarrow.parquet as pq
table, result, dimension, top = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
queries = np.load(sys.argv[5])
best = []
for path in sorted(glob.glob(table + "/embeddings/*.parquet")):
    rows = pq.ParquetFile(path).read(columns=["key", "vector"])
    matrix = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dimension)
    cosines = (matrix @ queries.T) / np.linalg.norm(matrix, axis=1)[:, None]
    for i, of_query in enumerate(cosines.T):
        some = np.argpartition(-of_query, top)[:top]
        keys = rows["key"].take(some).to_pylist()
        best += zip([i] * top, (-of_query[some]).tolist(), keys)
    best = sorted(best)
    kept = {}
    for hit in best:
        kept.setdefault(hit[0], []).append(hit)
    best = [hit for hits in kept.values() for hit in hits[:top]]
print("\\n".join(key for i, _, key in best if i == 0), file=open(result, "w"))
"""
DUCKDB = """
import sys, duckdb, numpy as np
table, result, dimension, top = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
(query,) = np.load(sys.argv[5]).tolist()
rows = duckdb.execute(f'''
    SELECT shard, "row", key, list_cosine_similarity(vector, $query::FLOAT[]) AS cosine
    FROM '{table}/embeddings/*.parquet' ORDER BY cosine DESC LIMIT {top}''', {"query": query})
print("\\n".join(row[2] for row in rows.fetchall()), file=open(result, "w"))
"""
LANCE = """
import sys, lancedb, numpy as np
index, result, dimension, top, queries, scan = sys.argv[1:]
query = np.load(queries)[0]
search = lancedb.connect(index).open_table("embeddings").search(query).distance_type("cosine")
search = search.bypass_vector_index() if scan == "scan" else search.nprobes(128)
rows = search.limit(int(top)).select(["shard", "row", "key", "_distance"]).to_list()
print("\\n".join(row["key"] for row in rows), file=open(result, "w"))
"""


def write_table(output: Path, rows: int) -> None:
    """A table of random vectors of length 1, without the record of a run."""
    (output / "embeddings").mkdir(parents=True)
    facts = {"model": str(MODEL), "weights_hash": hash_weights(MODEL)}
    facts |= {"dimension": DIMENSION, "normalized": "true"}
    columns = schema.embeddings(int(DIMENSION), "float32", facts, text=False)
    random = np.random.default_rng(0)
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        count = min(PART_ROWS, rows - start)
        vectors = random.standard_normal((count, int(DIMENSION)), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values = {
            "shard": pa.array([f"{part:05}.tar"] * count),
            "row": pa.array(np.arange(count)),
            "key": pa.array([f"{part:05}{row:05}" for row in range(count)]),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1)), type=columns.field("vector").type
            ),
        }
        writer = PartWriter(output / "embeddings" / f"{part:05}.tar.parquet", columns)
        writer.add(pa.table([values[field.name] for field in columns], schema=columns))
        writer.close()


def fill(command: list[str], places: dict[str, str]) -> list[str]:
    """A command of Python with its places filled in, but those of the programs' own."""
    return [sys.executable, *(places.get(argument, argument) for argument in command)]


def commands(many: bool) -> dict[str, list[str]]:
    """The contenders, with names of places as arguments."""
    ours = ["-m", "jobs", "search", "TABLE", "--quiet", "--output", "OUT.parquet", "--top", TOP]
    rest = ["OUT", DIMENSION, TOP]
    loop = ["-c", NUMPY, "TABLE", *rest]
    if many:
        return {
            "clipseg-ray search --queries": [*ours, "--queries", "TEXTS"],
            "numpy, part by part": [*loop, "MANY"],
        }
    return {
        "clipseg-ray search --like": [*ours, "--like", KEY],
        "clipseg-ray search --text": [*ours, "--text", "a red star"],
        "DuckDB": ["-c", DUCKDB, "TABLE", *rest, "ONE"],
        "numpy, part by part": [*loop, "ONE"],
        "LanceDB, every row": ["-c", LANCE, "INDEX", *rest, "ONE", "scan"],
        "LanceDB, by its index": ["-c", LANCE, "INDEX", *rest, "ONE", "index"],
    }


def prepare(folder: Path, name: str, rows: int, queries: int) -> dict[str, str]:
    """A table, its index, and files of queries; returns the places of a command."""
    table, index = folder / name, folder / f"{name}-index"
    write_table(table, rows)
    if queries == 1:
        build = [sys.executable, "-m", "jobs", "index", str(table), str(index)]
        subprocess.run(build, check=True, capture_output=True)
    first = pq.ParquetFile(table / "embeddings" / "00000.tar.parquet").read(columns=["vector"])
    vectors = first["vector"].combine_chunks().flatten().to_numpy().reshape(-1, int(DIMENSION))
    np.save(folder / "one.npy", vectors[int(KEY) : int(KEY) + 1])
    np.save(folder / "many.npy", vectors[:queries])
    (folder / "texts.txt").write_text("\n".join(f"star {i}" for i in range(queries)))
    files = {"ONE": "one.npy", "MANY": "many.npy", "TEXTS": "texts.txt", "OUT": "out"}
    files |= {"TABLE": name, "INDEX": index.name, "OUT.parquet": "out.parquet"}
    return {place: str(folder / file) for place, file in files.items()}


def keys_found(folder: Path) -> list[str]:
    """What the last contender has found, best first; removes it."""
    ours, theirs = folder / "out.parquet", folder / "out"
    if ours.exists():
        rows = pq.ParquetFile(ours).read(columns=["query_id", "key"]).to_pylist()
        ours.unlink()
        return [row["key"] for row in rows if row["query_id"] == 0]
    return theirs.read_text().split()


def median(runs: list[Watched], what: str) -> float:
    """Of one field."""
    return statistics.median(getattr(run, what) for run in runs)


def main() -> int:
    """Print medians of each contender; the exit code says whether the exact ones agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    contenders = commands(args.queries > 1)
    runs: dict[tuple[str, str], list[Watched]] = {}
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"start": PART_ROWS, "all": args.rows}
        places = {size: prepare(folder, size, n, args.queries) for size, n in sizes.items()}
        for repeat in range(args.repeats):
            for size in sizes:
                for peer, command in contenders.items():
                    watched = run_watched(fill(command, places[size]), period_s=0.05)
                    runs.setdefault((peer, size), []).append(watched)
                    found[peer] = keys_found(folder)
                    load = Path("/proc/loadavg").read_text().split()[0]
                    print(f"# {repeat} {size} {peer} {watched} load {load}", file=sys.stderr)
    print(f"{args.rows:,} x {DIMENSION}, {args.queries} queries, {os.cpu_count()} CPUs: medians")
    print(f"{'':28}{'seconds':>9}{'start':>8}{'beyond':>8}{'CPU s':>9}{'start':>8}", end="")
    print(f"{'beyond':>8}{'MiB':>7}")
    for peer in contenders:
        row = f"{peer:28}"
        for what in ("seconds", "cpu_seconds"):
            start, whole = (median(runs[peer, size], what) for size in ("start", "all"))
            row += f"{whole:9.2f}{start:8.2f}{whole - start:8.2f}"
        print(f"{row}{median(runs[peer, 'all'], 'peak_rss_mib'):7.0f}")
    exact = ["clipseg-ray search --like", "DuckDB", "numpy, part by part", "LanceDB, every row"]
    if args.queries > 1:
        return 0
    results = [found[peer] for peer in exact]
    agree = all(result == results[0] for result in results)
    print("the exact ones agree" if agree else f"they DIFFER: {results}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
