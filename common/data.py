"""Data sets, each as one uint8 tensor. MNIST is in the repository; others are downloaded, or read from a folder."""

import hashlib
import lzma
import math
import os
import sys
import warnings
from collections import Counter
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.config import check_choice
from common.errors import LessonError

MNIST_DIR = Path(__file__).resolve().parent / "mnist"
DATA_DIR = MNIST_DIR.parent.parent / "data"
DATASETS = ("mnist", "color_mnist", "fashion_mnist", "cifar10")
SPLITS = {"train": "train", "test": "t10k"}  # the second is what MNIST's file names say
MNIST_MD5 = {  # of the unpacked files; common/mnist/README.md says where the sums come from
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_images(name: str, split: str = "train") -> Tensor:
    """Images of a data set: uint8 (N, C, H, W), values 0 to 255.

    mnist (N, 1, 28, 28) and color_mnist (N, 3, 28, 28) need no network; fashion_mnist (N, 1, 28, 28) and cifar10
    (N, 3, 32, 32) are downloaded into data/ the first time. split is "train" or "test".
    Raises LessonError for an unknown name or split, and for files that are missing or damaged.
    """
    check_choice("data set", name, DATASETS)
    check_choice("split", split, SPLITS)
    if name in ("fashion_mnist", "cifar10"):
        return _torchvision_images(name, split)
    digits = _mnist_file(f"{SPLITS[split]}-images-idx3-ubyte", header=16).reshape(-1, 1, 28, 28)
    return _color(digits) if name == "color_mnist" else digits


def load_pictures(config, split: str = "train") -> Tensor:
    """The images of a configuration: load_images of its data set, or load_folder of its folder, whatever the split."""
    if config.images:
        return load_folder(config.images, config.image_size, config.channels)
    return load_images(config.dataset, split)


def load_labels(name: str, split: str = "train") -> Tensor:
    """Which digit, 0 to 9, each image of mnist or color_mnist shows: long (N,). Raises as load_images does."""
    check_choice("data set with labels", name, ("mnist", "color_mnist"))
    check_choice("split", split, SPLITS)
    return _mnist_file(f"{SPLITS[split]}-labels-idx1-ubyte", header=8).long()


def load_folder(folder: str | Path, image_size: int, channels: int) -> Tensor:
    """Every picture in a folder and its subfolders, sorted by path: uint8 (N, channels, image_size, image_size).

    The centre square is resized with Lanczos to gray (channels=1) or RGB (channels=3). Transparent parts become white,
    as on a page; an animation is its first frame. Links are followed. Hidden files are left out, and so are folders
    that a training wrote. A line on stderr says how many pictures were read, and what was left out.
    Raises LessonError if the folder is missing or no picture in it can be read.
    """
    if not os.path.isdir(folder):  # Path.is_dir() raises where a folder may not be entered
        raise LessonError(f"{folder} is not a folder: name one that holds pictures")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, left_out, failures = [], Counter(), []
    for path in _files(Path(folder), failures):
        if path.suffix.lower() not in endings:
            left_out[path.suffix.lower() or "without an ending"] += 1
            continue
        try:
            images.append(_read_picture(path, image_size, channels))
        except Exception as error:  # a damaged picture can raise almost anything in a decoder
            failures.append(f"{path}: {_one_line(error)}")
    for line in failures[:10]:
        print(f"left out {line}", file=sys.stderr)
    reasons = [f"{count} {ending}" for ending, count in left_out.most_common(5)]
    reasons += [f"{len(failures)} that cannot be read"] if failures else []
    more = f", {left_out.total() + len(failures)} files left out ({', '.join(reasons)})" if reasons else ""
    if not images:
        raise LessonError(f"{folder} has no readable picture{more}")
    print(f"{len(images)} pictures from {folder}{more}", file=sys.stderr)
    return torch.stack(images)


def _files(folder, failures, above=()):
    """The files below a folder, sorted by path; what cannot be listed is added to `failures`."""
    here = folder.resolve()
    try:
        names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        failures.append(f"{folder}: {error.strerror}")
        return
    if here in above or {"checkpoint.pt", "config.json"} <= {path.name for path in names}:
        return  # a link to a folder that it is in, or what a run has written
    for path in names:
        if os.path.isdir(path):
            yield from _files(path, failures, (*above, here))
        else:
            yield path


def load_picture(path: str | Path, image_size: int, channels: int) -> Tensor:
    """A picture as load_folder reads it: uint8 (1, channels, image_size, image_size). LessonError if it cannot."""
    try:
        return _read_picture(path, image_size, channels).unsqueeze(0)
    except Exception as error:  # a damaged picture can raise almost anything in a decoder
        raise LessonError(f"cannot read the picture {path}: {_one_line(error)}") from error


def load_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture of exactly `size` (H, W) pixels as booleans (H, W): True where it is nearer to white than to black.

    Turned as its EXIF data say, and white where it is transparent, as the pictures of load_folder are.
    """
    try:
        gray = np.asarray(_on_white(_opened(path)).convert("L"))
    except Exception as error:
        raise LessonError(f"cannot read the mask {path}: {_one_line(error)}") from error
    if gray.shape != size:
        (h, w), (H, W) = gray.shape, size
        raise LessonError(f"the mask {path} has {w} x {h} pixels, but the images have {W} x {H}: resize it")
    return torch.from_numpy(gray > 127)


def nearest_training_digit(images: Tensor, train_images: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance in pixels (N,) to, and index (N,) of, the nearest of train_images; both (., C, H, W), [0, 1].

    Exact: an image that is in train_images is at distance 0. A small distance for most samples means memorisation.
    """
    x, parts = images.flatten(1).double(), train_images.split(4096)  # (N, D)
    nearest = [torch.cdist(x, part.flatten(1).double()).min(dim=1) for part in parts]
    part = torch.stack([found.values for found in nearest]).argmin(dim=0)  # (N,)
    index = torch.stack([found.indices for found in nearest]).gather(0, part[None])[0] + 4096 * part
    return (images - train_images[index]).flatten(1).norm(dim=1), index  # the difference itself: no cancellation


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def _mnist_file(name, header):
    """The bytes behind the header of an IDX file, uint8: the layout is known once the sum is right."""
    path = MNIST_DIR / f"{name}.xz"
    try:
        content = lzma.decompress(path.read_bytes())
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_MD5[name]:
            raise ValueError("wrong MD5 sum")
    except (OSError, lzma.LZMAError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "restore it with `git checkout -- common/mnist`, or download the repository again"
        raise LessonError(f"{path} is missing or damaged ({reason}): {advice}") from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)  # of bytes(), torch would warn


def _color(digits):
    # Steps of the golden ratio never repeat a hue and spread evenly; unlike a random generator's numbers they are the
    # same in every version of torch. A saturation below 1 because pure blue is hard to see on black.
    hues = [k * (math.sqrt(5) - 1) / 2 % 1 for k in range(len(digits))]
    colors = torch.tensor([hsv_to_rgb(hue, 0.75, 1) for hue in hues])[:, :, None, None]  # (N, 3, 1, 1)
    images = digits.repeat(1, 3, 1, 1)
    for part, color in zip(images.split(256), colors.split(256), strict=True):  # as one, 0.6 GB of float
        part.copy_((part * color).round())
    return images


def _torchvision_images(name, split):
    from torchvision.datasets import CIFAR10, FashionMNIST  # importing it takes a second, which MNIST need not pay

    if name == "cifar10":
        dataset, folder, archives = CIFAR10, DATA_DIR, [CIFAR10.filename]
    else:
        dataset, folder = FashionMNIST, DATA_DIR / "FashionMNIST" / "raw"
        archives = [archive for archive, _ in FashionMNIST.resources]
    try:
        images = torch.as_tensor(dataset(DATA_DIR, train=split == "train", download=True).data)
    except Exception as error:  # a failed download or a damaged archive can raise almost anything
        raise LessonError(
            f"{name} could not be loaded ({_one_line(error)}): without a network, put {', '.join(archives)} "
            f"into {folder}, where torchvision finds them; if they are there already, delete what is damaged, "
            "or unpack what was packed anew (gunzip -k *.gz)"
        ) from error
    return images.permute(0, 3, 1, 2).contiguous() if name == "cifar10" else images.unsqueeze(1)


def _opened(path):
    """A picture as RGBA, 8 bits each, turned as its EXIF data say. ValueError for floats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file that unpacks into gigabytes
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise ValueError("its pixels are floats, of an unknown range: save it with 8 or 16 bits")
        if picture.mode.startswith("I"):  # of 16 bits or more, which convert() would clip
            picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
        return picture.convert("RGBA")


def _on_white(picture):
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _read_picture(path, size, channels):
    picture = ImageOps.fit(_opened(path), (size, size), Image.Resampling.LANCZOS)  # the centre square
    pixels = np.array(_on_white(picture).convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).reshape(size, size, channels).permute(2, 0, 1).contiguous()
