"""A folder of everything that can be wrong with photos, and what is to be made of each file.

    expected = make_hostile(folder)

The names are those of the files, from the folder on, with "/". It takes about a second, is the
same every time, and leaves out what the file system or the installed libraries do not have.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, features

HAS_HEIC = importlib.util.find_spec("pillow_heif") is not None
ORIENTATION = 0x0112
# How a camera held in each way stores an upright picture (EXIF 2.3, tag 0x0112).
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
BROKEN = "is damaged or incomplete"
NO_PICTURE = "is not a picture"


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to become of a file.

    outcome: "used" as a photo; a "problem" that is named; "passed over"; or "below": in a
    sub-folder, used if these are looked into.
    reason: a part of the problem's sentence. notice: a part of a notice of a photo that is used.
    mask: name of the mask that a photo has.
    """

    outcome: Literal["used", "problem", "passed over", "below"]
    reason: str = ""
    notice: str = ""
    mask: str = ""


USED, PASSED_OVER = Expected("used"), Expected("passed over")
Files = dict[str, tuple[bytes, Expected]]


def make_hostile(folder: Path) -> dict[str, Expected]:
    """Fill a folder with hostile files, at least 40 kinds; it is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = (good, kinds, colours, orientations, damaged, bombs, shapes, others, captions, masks)
    expected: dict[str, Expected] = {}
    for number, group in enumerate((*groups, names)):
        for name, (content, outcome) in group(1000 * number).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            expected[name] = outcome
    expected.update(_links_and_pipes(folder))
    return expected


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A smooth picture, another one for each seed."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    low, right, down = rng.uniform(10, 90, 3), rng.uniform(20, 80, 3), rng.uniform(20, 80, 3)
    pixels = low + x[..., None] * right + y[..., None] * down
    return Image.fromarray(pixels.round().astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def moving(seed: int, kind: str) -> bytes:
    """A picture file with three pictures in it."""
    first, *further = (picture(seed + number) for number in range(3))
    return encoded(first, kind, save_all=True, append_images=further)


def heic(seed: int, orientation: int = 1) -> bytes:
    """A HEIC file; without the extra, only the beginning of one."""
    if not HAS_HEIC:
        return b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(200)
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    from_pillow(picture(seed)).save(buffer, exif=exif.tobytes())
    return buffer.getvalue()


def png_with(png: bytes, name: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    check = zlib.crc32(name + body) if crc is None else crc
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)
    return png[:33] + chunk + png[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels to show for it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


def srgb_profile() -> bytes:
    """The ICC profile of sRGB, without the time at which it was made."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def cmyk_profile() -> bytes:
    """A small ICC profile (v2, one lut8 table) in which every ink only darkens, black most."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, -1).T  # cyan, magenta, yellow, black
    light = 255 * (1 - corners[:, 3]) * (1 - corners[:, :3].sum(axis=1) / 3)
    lab = np.stack([light, np.full(16, 128), np.full(16, 128)], axis=1).astype(np.uint8)
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity
    table += ramp * 4 + lab.tobytes() + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I", 2)
    tags += b"A2B0" + struct.pack(">II", start, len(table))
    tags += b"wtpt" + struct.pack(">II", start + len(table), len(white))
    body = tags + table + white
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + body


def good(seed: int) -> Files:
    """What a camera, a phone or a browser writes."""
    motion = Expected("used", notice="is an animation; its first picture is used")
    files: Files = {
        "plain.jpg": (encoded(picture(seed + 10), "JPEG"), USED),
        "plain.png": (encoded(picture(seed + 11), "PNG"), USED),
        "plain.webp": (encoded(picture(seed + 12), "WEBP"), USED),
        "plain.bmp": (encoded(picture(seed + 13), "BMP"), USED),
        "plain.tif": (encoded(picture(seed + 14), "TIFF"), USED),
        "plain.gif": (encoded(picture(seed + 15), "GIF"), USED),
        "browser.jfif": (encoded(picture(seed + 16), "JPEG"), USED),
        "lossless.webp": (encoded(picture(seed + 17), "WEBP", lossless=True), USED),
        "progressive.jpg": (encoded(picture(seed + 18), "JPEG", progressive=True), USED),
        "several.mpo.jpg": (moving(seed + 30, "MPO"), USED),
        "animated.gif": (moving(seed + 33, "GIF"), motion),
        "animated.webp": (moving(seed + 36, "WEBP"), motion),
        "animated.png": (moving(seed + 39, "PNG"), motion),
        "pages.tif": (
            moving(seed + 42, "TIFF"),
            Expected("used", notice="has several pages; its first one is used"),
        ),
        "phone.heic": (heic(seed + 19), _heic_expected()),
        "PHONE2.HEIC": (heic(seed + 20, orientation=6), _heic_expected()),
        "phone cut.heic": (heic(seed + 21)[:-150], _heic_expected(whole=False)),
    }
    if features.check("avif"):
        files["plain.avif"] = (encoded(picture(seed + 22), "AVIF"), USED)
        files["cut.avif"] = (encoded(picture(seed + 23), "AVIF")[:-40], Expected("problem", BROKEN))
    return files


def kinds(seed: int) -> Files:
    """Files that are not what their name says."""
    jpeg = encoded(picture(seed), "JPEG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(zipfile.ZipInfo("a.jpg"), jpeg)
    no_picture = Expected("problem", NO_PICTURE)
    return {
        "jpeg.png": (jpeg, Expected("used", notice="is a JPEG picture, whatever its name says")),
        "png.jpg": (
            encoded(picture(seed + 1), "PNG"),
            Expected("used", notice="is a PNG picture, whatever its name says"),
        ),
        "jpeg.heic": (
            encoded(picture(seed + 2), "JPEG"),
            Expected("used", notice="is a JPEG picture, whatever its name says"),
        ),
        "list.jpg": (b"a shopping list, not a photo", no_picture),
        "page.png": (b"<!doctype html><title>404</title>", no_picture),
        "archive.jpg": (archive.getvalue(), no_picture),
        "film.heic": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99), no_picture),
        "drawing.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", no_picture),
        "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", no_picture),
        "object.png": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix.", no_picture),
        "nothing.webp": (bytes(4096), no_picture),
    }


def colours(seed: int) -> Files:
    """Every way of writing a colour."""
    base, srgb = picture(seed), srgb_profile()
    ramp = np.linspace(0, 1, 96 * 80).reshape(80, 96)
    bad_numbers = (ramp * 2 - 1).astype(np.float32)
    bad_numbers[0, :3] = (np.nan, np.inf, -np.inf)
    clear = base.convert("RGBA")
    clear.putalpha(Image.fromarray((ramp * 255).astype(np.uint8)))
    lab = ImageCms.profileToProfile(
        base, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.info.pop("icc_profile")  # it says when it was made
    cmyk = base.convert("CMYK")
    odd = Expected("used", notice="has a colour profile that is broken or of another kind")
    return {
        "sixteen bits.png": (encoded(Image.fromarray((ramp * 65535).astype("<u2")), "PNG"), USED),
        "float.tif": (encoded(Image.fromarray(bad_numbers), "TIFF"), USED),
        "whole numbers.tif": (encoded(Image.fromarray((ramp * 1e6).astype("<i4")), "TIFF"), USED),
        "cmyk.jpg": (encoded(cmyk, "JPEG"), USED),
        "cmyk with profile.jpg": (encoded(cmyk, "JPEG", icc_profile=cmyk_profile()), USED),
        "cmyk with another profile.tif": (encoded(cmyk, "TIFF", icc_profile=srgb), odd),
        "broken profile.jpg": (encoded(base, "JPEG", icc_profile=b"no profile"), odd),
        "cut profile.png": (encoded(base, "PNG", icc_profile=srgb[:200]), odd),
        "profile.png": (encoded(base, "PNG", icc_profile=srgb), USED),
        "palette.png": (encoded(base.quantize(16), "PNG"), USED),
        "clear palette.png": (encoded(base.quantize(17), "PNG", transparency=3), USED),
        "clear palette 2.png": (encoded(base.quantize(5), "PNG", transparency=b"\0\x80\xff"), USED),
        "clear.png": (encoded(clear, "PNG"), USED),
        "clear.webp": (encoded(clear, "WEBP"), USED),
        "clear grey.png": (encoded(clear.convert("LA"), "PNG"), USED),
        "one bit.png": (encoded(base.convert("1"), "PNG"), USED),
        "grey.jpg": (encoded(base.convert("L"), "JPEG"), USED),
        "lab.tif": (encoded(lab, "TIFF"), USED),
        "ycbcr.tif": (encoded(base.convert("YCbCr"), "TIFF"), USED),
    }


def orientations(seed: int) -> Files:
    """Photos lying on each side, and metadata that is nonsense."""
    files: Files = {}
    for value in (*range(1, 9), 0, 9, 60000):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        jpeg = encoded(picture(seed + value), "JPEG", exif=exif.tobytes())
        files[f"orientation {value}.jpg"] = (jpeg, USED)
    garbage = (
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    )
    for number, exif_bytes in enumerate(garbage):
        jpeg = encoded(picture(seed + 20 + number), "JPEG", exif=exif_bytes)
        files[f"nonsense {number}.jpg"] = (jpeg, USED)
    return files


def damaged(seed: int) -> Files:
    """Files cut short or altered."""
    jpeg, png, webp = (encoded(picture(seed), kind) for kind in ("JPEG", "PNG", "WEBP"))
    broken = Expected("problem", BROKEN)
    wrong = bytearray(png)
    wrong[30] ^= 0xFF  # in the check sum of the header
    files: Files = {"empty.jpg": (b"", Expected("problem", "is empty (0 bytes)"))}
    for share in (5, 30, 60, 95):
        for suffix, whole in (("jpg", jpeg), ("png", png), ("webp", webp)):
            files[f"cut at {share}.{suffix}"] = (whole[: len(whole) * share // 100], broken)
    bomb = b"Comment\0\0" + zlib.compress(bytes(20_000_000))
    return files | {
        "check sum.png": (bytes(wrong), broken),
        "text bomb.png": (png_with(encoded(picture(seed + 1), "PNG"), b"zTXt", bomb), broken),
        "text sum.png": (png_with(encoded(picture(seed + 2), "PNG"), b"tEXt", b"a\0b", 1), broken),
        "trailing.jpg": (encoded(picture(seed + 3), "JPEG") + b"junk" * 999, USED),
        "comment.jpg": (_with_comments(encoded(picture(seed + 4), "JPEG")), USED),
        "beginning.gif": (b"GIF89a", broken),
    }


def bombs(_: int) -> Files:
    """Headers that ask for more memory than any photo."""
    too_many = Expected("problem", "the limit is 100 megapixels")
    canvas = struct.pack("<I", 16382)[:3] * 2
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    webp += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    bmp = b"BM" + struct.pack("<IHHI", 60, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0)
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3)
    gif += b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02\x4c\x01\0;"
    return {
        "bomb.png": (png_header(60000, 60000), too_many),
        "bomb 2.png": (png_header(2**31 - 1, 2**31 - 1), too_many),
        "bomb.gif": (gif, too_many),
        "bomb.bmp": (bmp, too_many),
        "bomb.webp": (b"RIFF" + struct.pack("<I", len(webp)) + webp, Expected("problem")),
    }


def shapes(seed: int) -> Files:
    """Sizes that are no photo's."""
    sizes = {(1, 1): "is 1 x 1 px", (31, 4000): "the smallest usable side", (40, 4000): "cropped"}
    return {
        f"{width} by {height}.png": (
            encoded(picture(seed, width, height), "PNG"),
            Expected("problem", reason),
        )
        for (width, height), reason in sizes.items()
    } | {"32 by 320.png": (encoded(picture(seed + 1, 32, 320), "PNG"), USED)}


def others(seed: int) -> Files:
    """What lies beside photos."""
    photo = encoded(picture(seed), "PNG")
    left = ("Thumbs.db", "desktop.ini", ".DS_Store", "._plain.jpg", ".hidden.png", "__MACOSX/a.png")
    files: Files = {name: (photo, PASSED_OVER) for name in left}
    for name in ("notes.md", "film.mp4", "layers.psd", "no suffix", "photo.png.part"):
        files[name] = (photo, PASSED_OVER)
    files["folder.png/inside.png"] = (photo, Expected("below"))
    files["more/copy of inside.png"] = (photo, Expected("below"))
    return files


def captions(seed: int) -> Files:
    """Sidecars of every kind; the photos are used whatever lies beside them."""
    texts = {
        "caption empty": b"",
        "caption binary": b"\xff\xfe\0\0\x80" + bytes(range(256)),
        "caption huge": b"a very long caption, " * 50_000,
        "caption utf16": "\ufeffa cat".encode("utf-16-le"),
        "caption lines": b"\xef\xbb\xbf a cat\r\n\r\non a mat\r\n",
    }
    files: Files = {"without a photo.txt": (b"a photo of nothing", PASSED_OVER)}
    for number, (stem, text) in enumerate(texts.items()):
        files[f"{stem}.jpg"] = (encoded(picture(seed + number), "JPEG"), USED)
        files[f"{stem}.txt"] = (text, PASSED_OVER)
    return files


def masks(seed: int) -> Files:
    """Masks beside photos, good and bad."""
    white, half = Image.new("L", (96, 80), 255), Image.new("L", (48, 40))
    half.paste(255, (0, 0, 24, 40))
    unusable = "has a mask that cannot be used"
    files: Files = {
        "masked-mask.png": (encoded(half, "PNG"), PASSED_OVER),
        "Loud-MASK.PNG": (encoded(white, "PNG"), PASSED_OVER),
        "twice-mask.png": (encoded(white, "PNG"), PASSED_OVER),
        "twice-mask.webp": (encoded(half, "WEBP"), Expected("problem", "is a second mask of")),
        "cut mask-mask.png": (encoded(half, "PNG")[:60], Expected("problem", BROKEN)),
        "wide mask-mask.png": (encoded(picture(0, 90, 40), "PNG"), Expected("problem", "shape")),
        "black mask-mask.png": (
            encoded(Image.new("L", (96, 80)), "PNG"),
            Expected("problem", "is a mask that is black"),
        ),
        "gas-mask.jpg": (
            encoded(picture(seed), "JPEG"),
            Expected("problem", "there is no photo 'gas'"),
        ),
    }
    owners = {"masked": "masked-mask.png", "Loud": "Loud-MASK.PNG", "twice": "twice-mask.png"}
    for number, (stem, mask) in enumerate(owners.items(), start=1):
        photo = encoded(picture(seed + number), "JPEG")
        files[f"{stem}.jpg"] = (photo, Expected("used", mask=mask))
    for number, stem in enumerate(("cut mask", "wide mask", "black mask"), start=5):
        photo = encoded(picture(seed + number), "JPEG")
        files[f"{stem}.jpg"] = (photo, Expected("used", notice=unusable))
    return files


def names(seed: int) -> Files:
    """Names that file systems allow."""
    odd = [
        "\N{GRINNING FACE} \N{FAMILY}.png",
        unicodedata.normalize("NFD", "\u00e9t\u00e9 \u00c5.png"),
        "\u5199\u771f \u0444\u043e\u0442\u043e.png",
        "right\N{RIGHT-TO-LEFT OVERRIDE}gpj.png",
        "a" * 196 + ".png",
        "UPPER.PNG",
        "  spaces  .png",
        "100% {x} [1] 'quoted' & $HOME.png",
        "[bold red]markup[].png",
        "-rf.png",
        "two.dots..png",
    ]
    if sys.platform != "win32":
        odd += ['<script>alert("x")<.png', "two\nlines.png", "back\\slash.png", "\x1b[31mred.png"]
    return {name: (encoded(picture(seed + number), "PNG"), USED) for number, name in enumerate(odd)}


def _heic_expected(whole: bool = True) -> Expected:
    if not HAS_HEIC:
        return Expected("problem", "is a HEIC picture, which cannot be read")
    return USED if whole else Expected("problem", BROKEN)


def _with_comments(jpeg: bytes) -> bytes:
    """A JPEG with a megabyte of comments."""
    comment = b"\xff\xfe\xff\xff" + b"x" * 65533
    return jpeg[:2] + comment * 16 + jpeg[2:]


def _links_and_pipes(folder: Path) -> Mapping[str, Expected]:
    expected: dict[str, Expected] = {}
    links = {
        "link.jpg": ("plain.jpg", USED),
        "broken link.jpg": ("nowhere.jpg", Expected("problem", "is a link to a file that is not")),
        "circle.jpg": ("circle.jpg", Expected("problem", "cannot be read")),
        "link to folder.png": (".", PASSED_OVER),
        "more/up": ("..", PASSED_OVER),
    }
    with contextlib.suppress(OSError, NotImplementedError):  # Windows asks for a privilege
        for name, (target, outcome) in links.items():
            (folder / name).symlink_to(target, target_is_directory=outcome is PASSED_OVER)
            expected[name] = outcome
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.jpg")
        expected["pipe.jpg"] = Expected("problem", "is not a regular file")
    return expected
