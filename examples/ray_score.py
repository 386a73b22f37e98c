"""Scores candidates on a Ray cluster, or on the cores of this machine: each worker opens the run once.

python examples/ray_score.py runs/quickstart candidates.parquet scored --workers 2

CANDIDATES is a Parquet file, or a directory of them, with the columns user and item. OUT is a directory of Parquet
files: the rows of `negfast score`, in any order. Needs `pip install "negfast[ray]"`. The run and its data set lie where
every worker finds them by the same path.
"""

import argparse

import pyarrow as pa
import ray

import negfast


class Scorer:
    """One worker's copy of the run."""

    def __init__(self, run: negfast.Run, at: str | None) -> None:
        self.run, self.at = run, at  # a run travels as its paths, and loads here when it is first asked

    def __call__(self, table: pa.Table) -> pa.Table:
        scores = self.run.score(table["user"], table["item"], at=self.at)
        table = table.append_column("score", pa.array(scores.probability, mask=scores.abstain))
        return table.append_column("abstain", pa.array(scores.abstain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("candidates")
    parser.add_argument("out")
    parser.add_argument("--at")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    run = negfast.load(options.run)  # refuses a run that cannot answer before any worker starts
    candidates = ray.data.read_parquet(options.candidates)
    scored = candidates.map_batches(
        Scorer,
        fn_constructor_args=(run, options.at),
        batch_format="pyarrow",
        batch_size=65_536,
        concurrency=options.workers,
        num_cpus=0.5,  # so that reading and writing find a core beside as many workers
    )
    scored.write_parquet(options.out)


if __name__ == "__main__":
    main()
