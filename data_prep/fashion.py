"""Source: the four IDX files of Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), packed with gzip or not.

60,000 + 10,000 photographs of products, 28 x 28, grey, in 10 classes. Debian's package `dataset-fashion-mnist` has them
under /usr/share/datasets/fashion-mnist, torchvision's FashionMNIST downloads them into ROOT/FashionMNIST/raw.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_prep import png_rows
from data_prep.idx import IdxFile, read_idx
from data_prep.plan import Item, Source
from mimscale.errors import UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLITS = {"train": "train", "val": "t10k"}  # ours -> the beginning of the files' names
PUBLISHED = {  # number of labels -> sha256 of their bytes
    60_000: "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    10_000: "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}


def read_fashion(folder: Path, split: str) -> Source:
    """split: train or val. All four files are the data set's own, or of the same form and of other numbers of images.

    Raises UserError with one line for a file that is missing, cut short, of another kind or of another data set: MNIST
    has files of the same names.
    """
    begin = SPLITS[split]
    where = _folder_of(folder, begin)
    images = read_idx(_file(where, f"{begin}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_file(where, f"{begin}-labels-idx1-ubyte"), dimensions=1)
    values = labels.values().tobytes()
    if images.shape[0] != len(values):
        raise UserError(
            f"'{images.path}' holds {images.shape[0]:,} images and '{labels.path}' {len(values):,} labels; "
            "get both files again"
        )
    if values and max(values) >= len(CLASSES):
        raise UserError(f"'{labels.path}' holds the label {max(values)}; Fashion-MNIST has the classes 0 to 9")
    wanted = PUBLISHED.get(len(values))
    if wanted is not None and hashlib.sha256(values).hexdigest() != wanted:
        raise UserError(
            f"'{labels.path}' holds {len(values):,} labels that are not Fashion-MNIST's (MNIST has files of the same "
            "names); give the folder of Fashion-MNIST"
        )
    return Source(
        {"kind": f"fashion {split}", "path": str(where)},
        _items(images, values, split),
        list(CLASSES),
        png_encoder=png_rows.encoder(),
        pixels=hashlib.sha256(memoryview(images.data)[images.start :]).hexdigest(),
    )


def _items(images: IdxFile, labels: bytes, split: str) -> list[Item]:
    size = images.shape[1] * images.shape[2]
    path = str(images.path)
    return [Item(f"{split}-{row:05d}", label, path, row, size, png_rows.IDX) for row, label in enumerate(labels)]


def _folder_of(folder: Path, begin: str) -> Path:
    """`folder`, or the one below it in which torchvision keeps the files."""
    places = [folder, folder / "FashionMNIST" / "raw", folder / "raw"]
    for place in places:
        if any(_present(place, f"{begin}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")):
            return place
    raise UserError(
        f"'{folder}' holds no {begin}-images-idx3-ubyte(.gz), nor do FashionMNIST/raw and raw below it; give the "
        "folder of the IDX files (Debian's dataset-fashion-mnist: /usr/share/datasets/fashion-mnist)"
    )


def _present(folder: Path, name: str) -> Path | None:
    """The unpacked file before the packed one: torchvision keeps both."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _file(folder: Path, name: str) -> Path:
    found = _present(folder, name)
    if found is None:
        raise UserError(f"'{folder}' lacks {name}(.gz), one of Fashion-MNIST's four files; get it")
    return found
