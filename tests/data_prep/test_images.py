"""How images are stored: unchanged by default; the content, not the name, decides what is transcoded."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import images as module
from data_prep.__main__ import main
from data_prep.images import ImageOptions, describe_content, process_image, sniff
from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import synthetic_image

SOURCE = Image.fromarray(synthetic_image(1, 3, 96, 0, 0)).resize((120, 80))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return float(10 * np.log10(255**2 / (difference**2).mean()))


def test_sniff() -> None:
    assert sniff(b"\xff\xd8\xff\xe0 and so on") == "jpg"
    assert sniff(b"\x89PNG\r\n\x1a\n....") == "png"
    assert sniff(b"RIFF\x01\x02\x03\x04WEBPVP8 ") == "webp"
    assert sniff(b"RIFF\x01\x02\x03\x04WAVEfmt ") is None
    assert sniff(b"\xff\xd8") is None and sniff(b"") is None and sniff(b"<html>") is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("check", [True, False])
def test_bytes_are_kept(kind: str, check: bool) -> None:
    data = encoded(SOURCE, kind)
    assert process_image(data, ImageOptions(check=check)) == (sniff(data), data, "")


def test_images_that_cannot_be_decoded_are_left_out() -> None:
    truncated = encoded(SOURCE)[:-400]
    assert process_image(truncated, ImageOptions(check=False)).data == truncated
    for options in (
        ImageOptions(),
        ImageOptions(check=False, short_side=64),
        ImageOptions(short_side=64),
        ImageOptions(transcode=True),
    ):
        with pytest.raises(BadImage):
            process_image(truncated, options)
    for options in (ImageOptions(), ImageOptions(check=False), ImageOptions(transcode=True)):
        with pytest.raises(BadImage, match="not an image"):
            process_image(b"<html>not found</html>", options)
    with pytest.raises(BadImage):
        process_image(b"\xff\xd8\xff and then nothing", ImageOptions(check=False, transcode=True))


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(SOURCE)
    monkeypatch.setattr(module, "MAX_BYTES", len(data) - 1)
    with pytest.raises(BadImage, match="bytes, more than"):
        process_image(data, ImageOptions(check=False))


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "P")]
)
def test_all_but_rgb_and_grey_jpegs_are_transcoded(kind: str, mode: str) -> None:
    data = encoded(SOURCE.convert(mode), kind)
    extension, result, change = process_image(data, ImageOptions(transcode=True))
    stored = Image.open(io.BytesIO(result))
    assert (extension, change, stored.format, stored.mode, stored.size) == (
        "jpg",
        "transcoded",
        "JPEG",
        "RGB",
        (120, 80),
    )
    assert psnr(stored, decode(data)) > 20
    assert process_image(data, ImageOptions()).data == data


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rgb_and_grey_jpegs_are_not_encoded_again(mode: str) -> None:
    data = encoded(SOURCE.convert(mode))
    assert process_image(data, ImageOptions(transcode=True, short_side=80)) == ("jpg", data, "")


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (2000, 65)])
def test_the_short_side(size: tuple[int, int]) -> None:
    image = SOURCE.resize(size)
    extension, result, change = process_image(encoded(image), ImageOptions(short_side=64))
    stored = Image.open(io.BytesIO(result))
    assert (extension, change, min(stored.size)) == ("jpg", "resized", 64)
    assert max(stored.size) == round(max(size) * 64 / min(size))
    assert psnr(stored, decode(encoded(image)).resize(stored.size, Image.Resampling.BICUBIC)) > 30


def test_quality() -> None:
    data = encoded(SOURCE, "PNG")
    small, large = (len(process_image(data, ImageOptions(transcode=True, quality=q)).data) for q in (50, 98))
    assert small < large / 2


def test_the_manifest_lists_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "large.jpg").write_bytes(encoded(SOURCE.resize((300, 200))))
    (root / "small.jpg").write_bytes(encoded(SOURCE))
    (root / "cmyk.jpg").write_bytes(encoded(SOURCE.convert("CMYK")))
    (root / "truncated.jpg").write_bytes(encoded(SOURCE)[:-400])
    command = ["folder", "--unlabelled", "--transcode", "--short-side", "100", "--shard-samples", "1", str(root)]
    assert main([*command, str(tmp_path / "out")]) == 0
    output = capsys.readouterr().err
    assert (
        "1 images were resized" in output
        and "left out: truncated: OSError" in output
        and "complete, 3 images, 1 " in output
    )
    manifest = Manifest.load(tmp_path / "out")
    file = manifest.file
    assert file.changed == {"resized": 1, "transcoded": 1} and list(file.left_out) == ["truncated"]
    assert file.options["short_side"] == 100 and "Pillow" in file.options["encoder"]
    assert len(file.shards) == 3  # the shard of the damaged image would be empty and is left out
    sizes = {manifest.key(sample): decode(manifest.read(sample)).size for sample in range(3)}
    assert sizes == {"large": (150, 100), "small": (120, 80), "cmyk": (120, 80)}
    assert main(["verify", "--decode", str(tmp_path / "out")]) == 0


def test_reasons_are_the_same_whatever_the_options_and_the_process() -> None:
    """They stand in the manifest, and are counted together: no address of memory, nor Pillow's own words for ours."""
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    for data, reason in (
        (bytes(bomb), "more than .* pixels; see MIMSCALE_MAX_PIXELS"),
        (b"II*\0" + bytes(90), "a TIFF of a kind that Pillow cannot read"),
        (b"\xff\xd8\xff and then nothing", "not an image .JPEG"),
    ):
        for options in (ImageOptions(), ImageOptions(transcode=True), ImageOptions(short_side=8)):
            with pytest.raises(BadImage, match=f"^{reason}"):
                process_image(data, options)


def test_nothing_decodable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "truncated.jpg").write_bytes(encoded(SOURCE)[:-400])
    assert main(["folder", "--unlabelled", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "none of the 1 images" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\n\n<!DOCTYPE html><html>", "a page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (b'{"error": 404}', "JSON"),
        (b"\x93NUMPY\1\0v\0", "an array of NumPy"),
    ],
)
def test_what_is_no_image_is_named(start: bytes, what: str) -> None:
    assert sniff(start) is None
    assert describe_content(start).startswith(f"not an image that is read: {what}")


def test_avif_in_a_container_of_another_brand() -> None:
    start = b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf"
    assert sniff(start) == ("avif" if module.AVIF else None)
    assert sniff(start.replace(b"avif", b"heic")) is None
    assert sniff(start[:3] + b"\x10" + start[4:]) is None  # the list of brands ends before it
