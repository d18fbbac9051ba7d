"""Conversion and verification of data sets: CPU time per image of the parts of data_prep, on synthetic JPEGs."""

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
    parser.add_argument(
        "--images", type=int, default=2000, metavar="N", help="number of images in the archive (default 2000)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of rounds; the best one counts (default 3)"
    )


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="mimscale-bench-") as folder:
        table, size = measure(Path(folder), args.images, args.rounds)
    _report.publish(args, [table], [size])
    return 0


def measure(folder: Path, images: int, rounds: int) -> tuple[_report.Table, str]:
    """The table, and a line about the images. All files are in the page cache; times are CPU seconds of this process,
    with system time.
    """
    from data_prep.imagenet import read_train
    from data_prep.images import ImageOptions
    from data_prep.index import IndexOptions, index_shards
    from data_prep.plan import ShardPlan
    from data_prep.shard_list import list_shards
    from data_prep.verify import verify
    from data_prep.write_shards import unfinished, write
    from mimscale.data.decode import decode
    from mimscale.data.manifest import Manifest

    archive = folder / "train.tar"
    _make_archive(archive, images)
    source = read_train(archive)
    runs = iter(range(1000))

    def convert(options: ImageOptions) -> Path:
        plan = ShardPlan(source, seed=0, images=options)
        out = folder / f"out{next(runs)}"
        write(plan, out, unfinished(plan, out))
        return out

    shards = convert(ImageOptions(check=False))
    links = iter(folder / f"links{number}" for number in range(1000))
    manifest = Manifest.load(shards)
    jpegs = [manifest.read(sample) for sample in range(images)]
    total = sum(map(len, jpegs))

    def decode_all() -> None:
        for jpeg in jpegs:
            decode(jpeg)

    parts: dict[str, Callable[[], object]] = {
        "list a tar of tars": lambda: read_train(archive),
        "index finished shards": lambda: index_shards(list_shards(str(shards)), IndexOptions(), to=next(links)),
        "index with checksums": lambda: index_shards(
            list_shards(str(shards)), IndexOptions(checksums=True), to=next(links)
        ),
        "convert, copied unchecked": lambda: convert(ImageOptions(check=False)),
        "convert, each decoded": lambda: convert(ImageOptions()),
        "convert to short side 256": lambda: convert(ImageOptions(short_side=256)),
        "decode alone (Pillow, in memory)": decode_all,
        "verify": lambda: list(verify(shards, decode_all=False)),
        "verify --decode": lambda: list(verify(shards, decode_all=True)),
    }
    best = {name: min(_cpu_s(part) for _ in range(rounds)) for name, part in parts.items()}
    decoding = best["decode alone (Pillow, in memory)"]
    rows = [
        [name, f"{1e6 * s / images:,.0f}", f"{images / s:,.0f}", f"{total / s / 1e6:,.0f}", f"{s / decoding:.2f}"]
        for name, s in best.items()
    ]
    heads = ["part", "CPU µs per image", "images / CPU s", "MB / CPU s", "of decoding"]
    size = f"{images:,} JPEGs of {total / images / 1000:.0f} kB on average; the best of {rounds} rounds."
    return (heads, rows), size


def _cpu_s(part: Callable[[], object]) -> float:
    start = time.process_time()
    part()
    return time.process_time() - start


def _make_archive(path: Path, images: int) -> None:
    """Write an archive in the layout of ILSVRC2012_img_train.tar: ten classes, 200 different images, repeated."""
    from PIL import Image

    from mimscale.data.synthetic import synthetic_image

    different = []
    for number in range(200):
        buffer = io.BytesIO()
        Image.fromarray(synthetic_image(number % 10, 10, 420, 0, number)).save(buffer, "JPEG", quality=93)
        different.append(buffer.getvalue())
    with tarfile.open(path, "w") as outer:
        for label in range(10):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for number in range(label, images, 10):
                    _add(inner, f"n{label:08d}_{number}.JPEG", different[number % 200])
            _add(outer, f"n{label:08d}.tar", content.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
