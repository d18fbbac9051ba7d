"""A launch whose ranks were not given the same:  python -m tests.training.ranks_apart CASE.json

CASE.json: for each rank, {"words": arguments of `mimscale`, "folder": where that rank stands, "package": a
version that it seems to have}. Each rank writes CASE.json.RANK: the exit code and what was printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from mimscale.__main__ import main
from mimscale.checkpoint import run_folder
from mimscale.distributed.end_process import end_process

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    mine = json.loads(Path(sys.argv[1]).read_text())[rank]
    os.makedirs(mine["folder"], exist_ok=True)
    os.chdir(mine["folder"])
    real, changed = run_folder._version, mine.get("package")
    run_folder._version = lambda package: changed if changed and package == "timm" else real(package)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(mine["words"])
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps({"code": code, "stderr": printed.getvalue()}))
    end_process(0)
