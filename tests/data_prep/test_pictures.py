"""Bytes as they are, unless asked otherwise; then by content and never by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import pictures as module
from data_prep.__main__ import main
from data_prep.pictures import Pictures, sniff, stored
from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import picture

SOURCE = Image.fromarray(picture(1, 3, 96, 0, 0)).resize((120, 80))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return float(10 * np.log10(255**2 / (difference**2).mean()))


def test_content_decides_the_kind() -> None:
    assert sniff(b"\xff\xd8\xff\xe0 and so on") == "jpg"
    assert sniff(b"\x89PNG\r\n\x1a\n....") == "png"
    assert sniff(b"RIFF\x01\x02\x03\x04WEBPVP8 ") == "webp"
    assert sniff(b"RIFF\x01\x02\x03\x04WAVEfmt ") is None
    assert sniff(b"\xff\xd8") is None and sniff(b"") is None and sniff(b"<html>") is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("check", [True, False])
def test_bytes_are_kept(kind: str, check: bool) -> None:
    data = encoded(SOURCE, kind)
    assert stored(data, Pictures(check=check)) == (sniff(data), data, "")


def test_what_cannot_be_decoded_is_left_out() -> None:
    cut = encoded(SOURCE)[:-400]
    assert stored(cut, Pictures(check=False)).data == cut
    for how in (Pictures(), Pictures(check=False, short_side=64), Pictures(short_side=64), Pictures(transcode=True)):
        with pytest.raises(BadImage):
            stored(cut, how)
    for how in (Pictures(), Pictures(check=False), Pictures(transcode=True)):
        with pytest.raises(BadImage, match="not a picture"):
            stored(b"<html>not found</html>", how)
    with pytest.raises(BadImage):
        stored(b"\xff\xd8\xff and then nothing", Pictures(check=False, transcode=True))


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(SOURCE)
    monkeypatch.setattr(module, "MAX_BYTES", len(data) - 1)
    with pytest.raises(BadImage, match="bytes, more than"):
        stored(data, Pictures(check=False))


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "P")]
)
def test_odd_files_become_rgb_jpegs(kind: str, mode: str) -> None:
    data = encoded(SOURCE.convert(mode), kind)
    extension, result, change = stored(data, Pictures(transcode=True))
    made = Image.open(io.BytesIO(result))
    assert (extension, change, made.format, made.mode, made.size) == ("jpg", "transcoded", "JPEG", "RGB", (120, 80))
    assert psnr(made, decode(data)) > 20
    assert stored(data, Pictures()).data == data


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_jpegs_are_not_encoded_again(mode: str) -> None:
    data = encoded(SOURCE.convert(mode))
    assert stored(data, Pictures(transcode=True, short_side=80)) == ("jpg", data, "")


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (2000, 65)])
def test_the_short_side(size: tuple[int, int]) -> None:
    image = SOURCE.resize(size)
    extension, result, change = stored(encoded(image), Pictures(short_side=64))
    made = Image.open(io.BytesIO(result))
    assert (extension, change, min(made.size)) == ("jpg", "resized", 64)
    assert max(made.size) == round(max(size) * 64 / min(size))
    assert psnr(made, decode(encoded(image)).resize(made.size, Image.Resampling.BICUBIC)) > 30


def test_quality() -> None:
    data = encoded(SOURCE, "PNG")
    small, large = (len(stored(data, Pictures(transcode=True, quality=q)).data) for q in (50, 98))
    assert small < large / 2


def test_the_manifest_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "large.jpg").write_bytes(encoded(SOURCE.resize((300, 200))))
    (root / "small.jpg").write_bytes(encoded(SOURCE))
    (root / "cmyk.jpg").write_bytes(encoded(SOURCE.convert("CMYK")))
    (root / "cut.jpg").write_bytes(encoded(SOURCE)[:-400])
    command = ["folder", "--unlabelled", "--transcode", "--short-side", "100", "--shard-samples", "1", str(root)]
    assert main([*command, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "1 pictures were resized" in said and "left out: cut: OSError" in said and "complete, 3 pictures, 1 " in said
    manifest = Manifest.load(tmp_path / "out")
    file = manifest.file
    assert file.changed == {"resized": 1, "transcoded": 1} and list(file.left_out) == ["cut"]
    assert file.options["short_side"] == 100 and "Pillow" in file.options["encoder"]
    assert len(file.shards) == 3  # the one that would have held the damaged picture alone is not a shard
    sizes = {manifest.key(sample): decode(manifest.read(sample)).size for sample in range(3)}
    assert sizes == {"large": (150, 100), "small": (120, 80), "cmyk": (120, 80)}
    assert main(["verify", "--decode", str(tmp_path / "out")]) == 0


def test_nothing_decodable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.jpg").write_bytes(encoded(SOURCE)[:-400])
    assert main(["folder", "--unlabelled", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "none of the 1 pictures" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
