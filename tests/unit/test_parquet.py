"""What Parquet's writer holds between two row groups does not grow with the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

# In a process of its own: who else uses pyarrow in this one has chosen its allocator, and holds memory of it.
WRITE = """
import json, random, sys
from pathlib import Path
from app.archive.parquet import ParquetFile

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def rows(number):
    made = random.Random(number)
    for seq in range(made.randint(2000, 6000)):
        yield f"00000000-0000-7000-8000-{number:012},{seq},{made.random()},user,{'x' * made.randint(0, 900)},0,1,1,{{}},,\\n"

sink = ParquetFile(Path(sys.argv[1]), "messages")
import pyarrow
pool, held, kept = pyarrow.default_memory_pool(), [], []
for number in range(20):
    given = "".join(rows(number)).encode()
    sink.write(given)
    held.append(pool.bytes_allocated())
    before = resident()
    pool.release_unused()
    kept.append(before - resident())
sink.close()
print(json.dumps({"pool": pool.backend_name, "held": held, "kept": kept}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is resident")
def test_a_row_group_that_is_written_leaves_no_memory_behind(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "messages.parquet")],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    found = json.loads(said.stdout)
    assert found["pool"] == "system"
    # A row group has some two million bytes of text, and takes several times that while it is written.
    assert max(found["held"]) < 100_000
    assert max(found["kept"]) < 1_000_000
