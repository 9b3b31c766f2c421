"""Image files of formats that Pillow knows and this project does not read."""

import io
import struct

import numpy as np
from PIL import Image

SIDE = 24
# Formats that Pillow writes, the mode of the image, and what begins the reason of a broken image.
WRITTEN = {
    "BLP": ("P", "BLP"),
    "DDS": ("RGB", "DDS"),
    "DIB": ("RGB", "DIB"),
    "EPS": ("RGB", "EPS"),
    "ICNS": ("RGBA", "ICNS"),
    "ICO": ("RGBA", "ICO"),
    "IM": ("RGB", "IM"),
    "MSP": ("1", "MSP"),
    "PALM": ("P", "not an image of a known format"),
    "PCX": ("RGB", "PCX"),
    "PDF": ("RGB", "PDF"),
    "SGI": ("RGB", "SGI"),
    "SPIDER": ("F", "not an image of a known format"),
    "XBM": ("1", "XBM"),
}


def picture(mode="RGB"):
    """A gradient, in a mode of Pillow."""
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 90), axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def foreign_files():
    """Return files by a name of their kind: (content, part of the reason of a broken image)."""
    found = {}
    for name, (mode, reason) in WRITTEN.items():
        file = io.BytesIO()
        picture(mode).save(file, name)
        found[name] = (file.getvalue(), reason)
    eps = found["EPS"][0]
    preview = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(eps), 0, 0, 0, 0, 0xFFFF)
    rgb, gray = picture().tobytes(), picture("L").tobytes()
    names = {"EPS with a preview": ("EPS", preview.ljust(32, b"\0") + eps)}
    names["CUR"] = ("CUR", b"\0\0\2\0" + found["ICO"][0][4:])
    names["CUR that passes for TGA"] = ("CUR", cursor_like_a_targa())
    names["DCX"] = ("DCX", struct.pack("<III", 987654321, 12, 0) + found["PCX"][0])
    names["PSD"] = ("PSD", photoshop(rgb))
    names["FITS"] = ("FITS", fits(gray))
    names["Sun raster"] = (
        "Sun raster",
        struct.pack(">8I", 0x59A66A95, SIDE, SIDE, 24, len(rgb), 1, 0, 0) + rgb,
    )
    names["QOI"] = ("QOI", b"qoif" + struct.pack(">IIBB", SIDE, SIDE, 3, 0) + b"\xff" * 3000)
    names["GIMP brush"] = (
        "GIMP brush",
        struct.pack(">5I4sI", 32, 2, SIDE, SIDE, 1, b"GIMP", 1) + b"abc\0" + gray,
    )
    names["PIXAR"] = ("PIXAR", pixar(rgb))
    names["XV thumbnail"] = ("XV thumbnail", b"P7 332\n#END_OF_COMMENTS\n24 24 255\n" + gray)
    names["XPM"] = ("XPM", b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #102030",\n"a"\n};')
    names["EMF"] = ("EMF", struct.pack("<II8i", 1, 108, *range(8)) + b" EMF" + bytes(64))
    names["WMF"] = ("WMF", struct.pack("<IH4hH", 0x9AC6CDD7, 0, 0, 0, 9, 9, 96) + bytes(64))
    names["FTEX"] = ("FTEX", b"FTEX" + struct.pack("<7I", 1, SIDE, SIDE, 1, 1, 1, 32) + rgb)
    names["FLI"] = ("FLI", struct.pack("<IHHHHHH", 128, 0xAF11, 1, SIDE, SIDE, 8, 0) + bytes(112))
    names["PCD"] = ("PCD", b"\xff".ljust(2048, b"\0") + b"PCD_OPA".ljust(3000, b"\0"))
    names["McIDAS"] = ("McIDAS", struct.pack(">64I", 0, 4, *[1] * 62) + gray)
    names["MPEG"] = ("MPEG", b"\0\0\1\xb3" + b"\x01\x80\x18\x13" + bytes(64))
    names["GRIB"] = ("GRIB", b"GRIB\0\0\0\1" + bytes(64))
    names["BUFR"] = ("BUFR", b"BUFR\0\0\0\4" + bytes(64))
    names["HDF5"] = ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(64))
    names["MIC"] = ("OLE", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504))
    names["SVG"] = ("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    names["HEIC"] = ("HEIC", b"\0\0\0\x18ftypheic" + bytes(32))
    found |= {name: (data, reason) for name, (reason, data) in names.items()}
    return found


def cursor_like_a_targa():
    """A cursor whose header is that of a TGA of 20 x 20 pixels, too."""
    header = struct.pack("<HHHBBBBHHII", 0, 2, 1, 20, 20, 0, 0, 20, 20, 0x180014, 22)
    return header[:18] + bytes(range(240)) * 6


def photoshop(rgb):
    planes = np.frombuffer(rgb, np.uint8).reshape(-1, 3).T.tobytes()
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, SIDE, SIDE, 8, 3)
    return header + struct.pack(">IIIH", 0, 0, 0, 0) + planes


def fits(gray):
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8"]
    cards += [
        "NAXIS   =                    2",
        f"NAXIS1  = {SIDE:20}",
        f"NAXIS2  = {SIDE:20}",
        "END",
    ]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + gray.ljust(2880, b"\0")


def pixar(rgb):
    header = bytearray(1024)
    header[:4] = b"\x80\xe8\0\0"
    header[416:420] = struct.pack("<HH", SIDE, SIDE)
    header[424:428] = struct.pack("<HH", 14, 2)
    return bytes(header) + rgb


def read_files():
    """Return files of the formats that are read, by Pillow's name and suffix."""
    kinds = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
    kinds |= {"JPEG2000": ".jp2", "TIFF": ".tif", "PPM": ".ppm", "TGA": ".tga", "MPO": ".jpg"}
    Image.init()
    if "AVIF" in Image.SAVE:  # not in old versions
        kinds["AVIF"] = ".avif"
    found = {}
    for name, suffix in kinds.items():
        file = io.BytesIO()
        options = {"save_all": True, "append_images": [picture()]} if name == "MPO" else {}
        picture().save(file, name, **options)
        found[name, suffix] = file.getvalue()
    return found
