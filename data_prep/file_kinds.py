"""Names for files that are neither an image that is read nor a tar archive, from their first bytes."""

from __future__ import annotations

START_BYTES = 64  # of a file, enough to name it
HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
KINDS = {  # name -> first bytes; "." = any byte
    "HEIC": tuple(b"....ftyp" + brand for brand in HEIF),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "a video": (b"....ftyp", b"\x1aE\xdf\xa3", b"RIFF....AVI "),
    "PDF": (b"%PDF-",),
    "PSD": (b"8BPS",),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "Radiance HDR": (b"#?RADIANCE", b"#?RGBE"),
    "ICO": (b"\0\0\1\0",),
    "PAM or PBM": (b"P7\n", b"P4", b"P1"),
    "an array of NumPy": (b"\x93NUMPY",),
    "a Git LFS pointer without its content; git lfs pull": (b"version https://git-lfs", b"version http"),
    "a ZIP archive": (b"PK\3\4", b"PK\5\6"),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c",),
    "a RAR archive": (b"Rar!",),
    "gzip": (b"\x1f\x8b",),
    "parquet": (b"PAR1",),
    "HDF5": (b"\x89HDF\r\n",),
    "a page of HTML": (b"<html", b"<HTML", b"<!DOCTYPE html", b"<!doctype", b"<!DOCTYPE", b"<head", b"<HEAD"),
    "XML or SVG": (b"<?xml", b"<svg"),
    "JSON": (b'{"', b"[{"),
}


def kind_of(start: bytes) -> str | None:
    """What a file with these first bytes is; None if that is not known."""
    text = start.lstrip(b" \t\r\n\xef\xbb\xbf")
    return next((name for name, known in KINDS.items() if begins(start, known) or begins(text, known)), None)


def begins(start: bytes, signatures: tuple[bytes, ...]) -> bool:
    """Whether a file with these first bytes has one of the signatures, where "." stands for any byte."""
    return any(
        len(start) >= len(signature) and all(a == b or b == ord(".") for a, b in zip(start, signature, strict=False))
        for signature in signatures
    )
