"""The shard reader under ASan and UBSan against a few seconds of mutated files; `make fuzz` runs it for long."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "data" / "golden").glob("*.nfs*"))
SOURCES = ["crc32c", "decode", "decode_bmi2", "decode_portable", "file", "huffman", "packer", "shard", "shard_file"]


@pytest.mark.job
def test_mutated_shards_are_survived(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "building negfast needs a C++ compiler, and so does this test"
    binary = tmp_path / "fuzz_shard"
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in (*SOURCES, "fuzz/fuzz_shard", "fuzz/mutate")]
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(binary)], check=True)
    files = [str(path) for path in GOLDEN if path.suffix != ".parts"]
    run = subprocess.run([binary, "5", *files], capture_output=True, text=True, env={"TMPDIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert "nothing found" in run.stdout
