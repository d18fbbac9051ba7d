"""Conversion and verification of data sets: CPU time per picture of data_prep's parts, on made-up JPEGs."""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mimscale.bench import _report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=2000, metavar="N", help="in the archive (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the best of so many counts (default 3)")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="mimscale-bench-") as folder:
        print(measure(Path(folder), args.pictures, args.rounds))
    print(f"\n{_report.origin()}")
    return 0


def measure(folder: Path, pictures: int, rounds: int) -> str:
    """The table. All files lie in the page cache; times are CPU seconds of this process, system time included."""
    from data_prep.existing import index_shards
    from data_prep.imagenet import read_train
    from data_prep.pictures import Pictures
    from data_prep.plan import Plan
    from data_prep.verify import verify
    from data_prep.write import unfinished, write
    from mimscale.data.decode import decode
    from mimscale.data.manifest import Manifest

    archive = folder / "train.tar"
    _make_archive(archive, pictures)
    source = read_train(archive)
    runs = iter(range(1000))

    def convert(how: Pictures) -> Path:
        plan = Plan(source, seed=0, pictures=how)
        out = folder / f"out{next(runs)}"
        write(plan, out, unfinished(plan, out))
        return out

    made = convert(Pictures(check=False))
    links = iter(folder / f"links{number}" for number in range(1000))
    manifest = Manifest.load(made)
    images = [manifest.read(sample) for sample in range(pictures)]
    total = sum(map(len, images))

    def decode_all() -> None:
        for image in images:
            decode(image)

    parts: dict[str, Callable[[], object]] = {
        "list a tar of tars": lambda: read_train(archive),
        "index finished shards": lambda: index_shards(made, to=next(links), label="cls"),
        "index with checksums": lambda: index_shards(made, to=next(links), label="cls", checksums=True),
        "convert, copied unchecked": lambda: convert(Pictures(check=False)),
        "convert, each decoded": lambda: convert(Pictures()),
        "convert to short side 256": lambda: convert(Pictures(short_side=256)),
        "decode alone (Pillow, in memory)": decode_all,
        "verify": lambda: list(verify(made, decode_all=False)),
        "verify --decode": lambda: list(verify(made, decode_all=True)),
    }
    best = {name: min(_cpu_s(part) for _ in range(rounds)) for name, part in parts.items()}
    decoding = best["decode alone (Pillow, in memory)"]
    rows = [
        [name, f"{1e6 * s / pictures:,.0f}", f"{pictures / s:,.0f}", f"{total / s / 1e6:,.0f}", f"{s / decoding:.2f}"]
        for name, s in best.items()
    ]
    heads = ["part", "CPU µs a picture", "pictures / CPU s", "MB / CPU s", "of decoding"]
    size = f"{pictures:,} JPEGs of {total / pictures / 1000:.0f} kB on average; the best of {rounds} rounds."
    return f"{_report.table(heads, rows)}\n\n{size}"


def _cpu_s(part: Callable[[], object]) -> float:
    start = time.process_time()
    part()
    return time.process_time() - start


def _make_archive(path: Path, pictures: int) -> None:
    """Laid out as ILSVRC2012_img_train.tar, ten classes; 200 different pictures, again and again."""
    from PIL import Image

    from mimscale.data.synthetic import picture

    different = []
    for number in range(200):
        buffer = io.BytesIO()
        Image.fromarray(picture(number % 10, 10, 420, 0, number)).save(buffer, "JPEG", quality=93)
        different.append(buffer.getvalue())
    with tarfile.open(path, "w") as outer:
        for label in range(10):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for number in range(label, pictures, 10):
                    _add(inner, f"n{label:08d}_{number}.JPEG", different[number % 200])
            _add(outer, f"n{label:08d}.tar", content.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
