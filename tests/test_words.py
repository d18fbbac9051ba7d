"""The tree speaks the words of PyTorch, timm, DeepSpeed and the papers: words that only this project used stay out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("mimscale", "data_prep", "ds_configs", "jobs", "docs", "examples", "tests")
KINDS = {".py", ".md", ".yaml", ".json", ".sh", ".sbatch", ".cfg", ".toml", ""}

# word -> what stands in its place. A word counts in any case, and as a part of an identifier.
INSTEAD = {
    "lessons?": "TeacherPrefetcher",
    "teach": "targets",
    "rig": "TrainContext",
    "pace": "PhaseTimer",
    "ledger": "DamageLog",
    "logbook": "RunLogger",
    "outbox": "RetryingWriter",
    "parcels?": "pooled item",
    "staging": "device prefetch",
    "foreign": "WebDataset stream",
    "thrown?|throwing": "dropped patches, drop_ratio",
    "tells?": "log",
    "judge[sd]?": "check",
    "looks?|looked|looking": "read, forward pass, visualise",
    "settle[sd]?": "wait",
    "list_damage": "log_damage",
    "contracts": "types",
    "rooms": "package",
    "house": "architecture",
    "pictures?": "image",
    "what safety costs": "overhead of fault tolerance",
    "what a file is known by": "file hashes",
}
# The same where only the exact spelling is meant: the words are common in other senses.
EXACT = {
    r"Bank": "TeacherEnsemble",
    r"Meter": "ThroughputMeter",
    r"Gallery": "PanelWriter",
    r"Control": "Coordinator",
    r"(?:control|coordinator)\.(?:first|together)": "on_rank0, on_all_ranks",
    r"data/ahead": "shard_prefetch",
}
# (file, word) that may stay: what others named.
ALLOWED = {
    ("mimscale/masking/amt.py", "throwing"),  # the paper's word, said once
    ("tests/masking/test_amt.py", "throw"),  # a key of the golden files
    ("tests/masking/test_amt_importance.py", "throw"),  # the same
    ("tests/methods/training_golden.py", "throw"),  # the same
    ("jobs/demo_images.py", "picture"),  # a purpose of noise: another name would be other numbers
}


def files() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    own = Path(__file__)
    return sorted(path for path in found if path.suffix in KINDS and path != own and path.name != "LICENSE")


def test_no_private_word_stands_in_the_tree() -> None:
    words = "|".join(f"(?:{word})" for word in INSTEAD)
    any_case = re.compile(rf"(?<![A-Za-z])(?:{words})(?![a-z])", re.IGNORECASE)
    exact = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(EXACT)})(?![A-Za-z])")
    wrong = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            for match in (*any_case.finditer(line), *exact.finditer(line)):
                if (name, match[0].lower()) not in ALLOWED:
                    wrong.append(f"{name}:{number}: {match[0]}")
    assert not wrong, f"{len(wrong)} words that only this project uses:\n" + "\n".join(wrong[:60])
