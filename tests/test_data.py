import colorsys
import lzma
import pickle
import shutil
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import data
from common.data import load_folder, load_images, load_labels, load_mask
from common.errors import LessonError
from tests.running import quick, read_checkpoint


def idx(shape, values):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# MNIST


def test_mnist_train_is_the_one_everybody_has():
    images = load_images("mnist")
    assert images.dtype == torch.uint8
    assert images.shape == (60000, 1, 28, 28)
    # the mean that every tutorial subtracts
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    images[0] = images[0].clone()  # the memory is ours


def test_mnist_test_split_and_labels():
    images, labels = load_images("mnist", "test"), load_labels("mnist", "test")
    assert images.shape == (10000, 1, 28, 28)
    assert labels.dtype == torch.int64
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert load_labels("color_mnist").bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip


def test_readme_lists_the_sums_that_are_checked():
    readme = (data.MNIST_DIR / "README.md").read_text()
    assert all(f"`{name}`" in readme and f"`{md5}`" in readme for name, md5 in data.MNIST_MD5.items())


def test_color_mnist_is_mnist_in_bright_colors_that_never_change():
    gray, color = load_images("mnist", "test"), load_images("color_mnist", "test")
    assert color.dtype == torch.uint8
    assert color.shape == (10000, 3, 28, 28)
    assert torch.equal(color.amax(1, keepdim=True), gray)  # the brightest channel is the digit itself
    brightest = color.flatten(2).amax(2)  # (N, 3)
    hues = torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in brightest.tolist()])
    assert hues.histc(12, 0, 1).min() > 700  # of 833 on average
    assert brightest[:3].tolist() == [[255, 64, 64], [64, 120, 255], [175, 255, 64]]
    assert (color.amin(1).float() <= 0.26 * gray[:, 0] + 1).all()  # saturated


def test_missing_mnist(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MNIST_DIR", tmp_path)
    with pytest.raises(LessonError, match="train-images-idx3-ubyte.xz.*No such file.*git checkout") as error:
        load_images("mnist")
    one_line(error)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "another file", "not xz"])
def test_damaged_mnist(monkeypatch, tmp_path, damage):
    name = "t10k-labels-idx1-ubyte.xz"
    content = (data.MNIST_DIR / name).read_bytes()
    middle = len(content) // 2
    (tmp_path / name).write_bytes(
        {
            "truncated": content[:-500],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "another file": lzma.compress(idx([2], [1, 2])),
            "not xz": b"version https://git-lfs.github.com/spec/v1\n",
        }[damage]
    )
    monkeypatch.setattr(data, "MNIST_DIR", tmp_path)
    with pytest.raises(LessonError, match=f"{name} is missing or damaged.*git checkout -- common/mnist") as error:
        load_labels("mnist", "test")
    one_line(error)


@pytest.mark.parametrize("name", ["mnsit", "", "MNIST"])
def test_unknown_names_list_the_choices(name):
    with pytest.raises(LessonError, match="mnist, color_mnist, fashion_mnist, cifar10"):
        load_images(name)
    with pytest.raises(LessonError, match="train, test"):
        load_images("mnist", name)
    with pytest.raises(LessonError, match="mnist, color_mnist"):
        load_labels("cifar10")
    with pytest.raises(LessonError, match="train, test"):
        load_labels("mnist", name)


# torchvision's data sets


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Temporary failure\nin name resolution")


def test_fashion_mnist_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA_DIR", tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    with pytest.raises(LessonError, match="fashion_mnist could not be loaded.*Temporary failure in name") as error:
        load_images("fashion_mnist")
    text = one_line(error)
    assert "t10k-images-idx3-ubyte.gz" in text
    assert str(tmp_path / "FashionMNIST" / "raw") in text


def test_cifar10_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA_DIR", tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(LessonError, match=r"cifar10 could not be loaded.*cifar-10-python\.tar\.gz") as error:
        load_images("cifar10", "test")
    assert str(tmp_path) in one_line(error)


def test_damaged_fashion_mnist(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA_DIR", tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.MNIST_MD5:  # Fashion-MNIST's files have the same names
        (raw / name).write_bytes(idx([3, 28, 28], range(100)))
    with pytest.raises(LessonError, match="fashion_mnist could not be loaded.*damaged, or unpack what was packed"):
        load_images("fashion_mnist")


def test_cifar10_puts_channels_first(monkeypatch):
    class Fake:
        filename = "x"

        def __init__(self, root, train, download):
            self.data = np.zeros((5, 32, 32, 3), dtype=np.uint8)
            self.data[..., 2] = 200 if train else 100

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    images = load_images("cifar10", "test")
    assert images.shape == (5, 3, 32, 32)
    assert images.amax((0, 2, 3)).tolist() == [0, 0, 100]


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """A few pictures of Fashion-MNIST and CIFAR-10, in the files that torchvision downloads."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "data")
    raw, batches = tmp_path / "data" / "FashionMNIST" / "raw", tmp_path / "data" / CIFAR10.base_folder
    raw.mkdir(parents=True)
    batches.mkdir()
    random = np.random.default_rng(0)
    for split, N in (("train", 12), ("t10k", 3)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx([N, 28, 28], random.bytes(N * 784)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx([N], bytes(N)))
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": random.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": [0, 1, 2]}
        (batches / name).write_bytes(pickle.dumps(batch))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "frog"]}))
    for files in ("train_list", "test_list"):  # without the sums of the real ones
        monkeypatch.setattr(CIFAR10, files, [[name, None] for name, _ in getattr(CIFAR10, files)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})


def test_the_files_of_torchvision(small_files):
    for name, shape, numbers in (("fashion_mnist", (1, 28, 28), (12, 3)), ("cifar10", (3, 32, 32), (15, 3))):
        for split, N in zip(("train", "test"), numbers):
            images = load_images(name, split)
            assert images.shape == (N, *shape) and images.dtype == torch.uint8 and images.is_contiguous()


def test_every_lesson_trains_on_them(lesson, small_files, tmp_path):
    for name, shape in (("fashion_mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))):
        flags = ("--dataset", name, "--steps", 1, "--batch-size", 2, "--output", tmp_path / name)
        result = quick(lesson.name, *flags, digits="all")
        assert result.status == 0, result.stderr
        assert tuple(read_checkpoint(tmp_path / name)["image_shape"]) == shape


# folders of pictures


@pytest.fixture
def folder(tmp_path):
    """A wide picture: blue, a red square in the middle, blue."""
    picture = Image.new("RGB", (90, 30), "blue")
    picture.paste("red", (30, 0, 60, 30))
    picture.save(tmp_path / "wide.png")
    return tmp_path


def test_load_folder_keeps_the_centre_square(folder):
    images = load_folder(str(folder), 8, 3)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images.shape == (1, 3, 8, 8)
    red = torch.tensor([255, 0, 0]).view(1, 3, 1, 1)
    assert (images[..., 3:-3] == red).all()
    assert (images.int() - red).abs().max() < 30  # near the edge, Lanczos looks a little way over it
    assert load_folder(folder, 8, 1)[..., 3:-3].unique().tolist() == [76]  # 0.299 of 255


def test_load_folder_keeps_the_centre_square_of_a_tall_picture(folder):
    with Image.open(folder / "wide.png") as picture:
        picture.transpose(Image.Transpose.ROTATE_90).save(folder / "tall.png")
    tall, wide = load_folder(folder, 8, 3)
    assert torch.equal(tall, wide.mT)


@pytest.mark.parametrize("size", [16, 60])
def test_load_folder_resizes_with_lanczos(tmp_path, size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    noise.save(tmp_path / "x.png")
    expected = torch.from_numpy(np.array(noise.resize((size, size), Image.Resampling.LANCZOS)))
    assert (load_folder(tmp_path, size, 1)[0, 0].int() - expected.int()).abs().max() <= 1


def test_a_mask_is_true_from_the_middle_gray_on(tmp_path):
    Image.fromarray(np.array([[0, 127, 128], [128, 127, 255]], np.uint8)).save(tmp_path / "x.png")
    assert load_mask(tmp_path / "x.png", (2, 3)).tolist() == [[False, False, True], [True, False, True]]
    pixels = np.array([[[255, 255, 0], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")  # yellow, red; green, blue: their luma is 0.89, 0.3; 0.59, 0.11
    assert load_mask(tmp_path / "x.png", (2, 2)).tolist() == [[True, False], [True, False]]


def test_load_folder_reads_every_kind_in_order(tmp_path, capsys):
    (tmp_path / "sub.png").mkdir()  # a folder, whatever its name says
    for k, name in enumerate(["a.BMP", "b.gif", "c.jpeg", "d.JPG", "e.png", "f.webp", "sub.png/g.png"]):
        Image.new("RGB", (10, 10), (30 * k,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    levels = load_folder(tmp_path, 4, 1).float().mean((1, 2, 3))
    torch.testing.assert_close(levels, 30.0 * torch.arange(7), atol=2, rtol=0)
    assert capsys.readouterr().err == f"7 pictures from {tmp_path}, 1 files left out (1 .txt)\n"


def modes():
    red, clear = (255, 0, 0, 255), (255, 0, 0, 0)
    yield "RGBA", Image.new("RGBA", (4, 4), clear), [255, 255, 255]
    yield "RGBA opaque", Image.new("RGBA", (4, 4), red), [255, 0, 0]
    yield "LA", Image.new("LA", (4, 4), (0, 0)), [255, 255, 255]
    yield "1", Image.new("1", (4, 4), 1), [255, 255, 255]
    yield "16 bit", Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)), [128, 128, 128]
    yield "palette", Image.new("RGB", (4, 4), "red").convert("P"), [255, 0, 0]
    transparent = Image.new("RGB", (4, 4), "red").quantize(2)
    transparent.info["transparency"] = transparent.getpixel((0, 0))
    yield "palette with transparency", transparent, [255, 255, 255]


@pytest.mark.parametrize(("picture", "expected"), [pytest.param(p, e, id=name) for name, p, e in modes()])
def test_load_folder_understands_every_mode(tmp_path, picture, expected):
    picture.save(tmp_path / "x.png")
    assert load_folder(tmp_path, 2, 3)[0, :, 0, 0].tolist() == expected


def test_load_folder_reads_cmyk_and_turns_photographs_upright(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    picture = Image.new("L", (20, 20), 0)
    picture.paste(255, (0, 0, 20, 10))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # was taken upside down
    picture.save(tmp_path / "b.jpg", exif=exif)
    cmyk, upside_down = load_folder(tmp_path, 2, 3)
    assert cmyk[0].min() > 200
    assert cmyk[1:].max() < 60
    assert upside_down[:, 0].max() < 30
    assert upside_down[:, 1].min() > 225


def test_16_and_32_bits_are_turned_upright_and_scaled(tmp_path):
    pixels = np.zeros((20, 20), np.uint16)
    pixels[:10] = 65535  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # was taken upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "b.tif")
    turned, bright = load_folder(tmp_path, 2, 1)[:, 0]
    assert turned[0].max() < 30 and turned[1].min() > 225 and bright.unique().tolist() == [255]
    mask = np.full((4, 4), 20_000, np.uint16)  # a third of white
    mask[:, :2] = 40_000
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert torch.equal(load_mask(tmp_path / "mask.png", (4, 4)), torch.tensor([[True, True, False, False]] * 4))


def test_pictures_of_floats_are_left_out(tmp_path, capsys):
    """Nobody knows what is white in them."""
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(LessonError, match="has no readable picture, 1 files left out"):
        load_folder(tmp_path, 2, 1)
    assert "a.tif: its pixels are floats" in capsys.readouterr().err
    with pytest.raises(LessonError, match="cannot read the mask .*: its pixels are floats"):
        load_mask(tmp_path / "a.tif", (4, 4))


def test_load_folder_names_what_it_leaves_out(folder, capsys, monkeypatch):
    whole = (folder / "wide.png").read_bytes()
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a picture")
    Image.new("1", (400, 400)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow itself would only warn up to twice that
    assert len(load_folder(folder, 8, 3)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(name in line for name, line in zip(["bomb.png", "short.png", "text.jpg"], lines))
    assert lines[3] == f"1 pictures from {folder}, 3 files left out (3 that cannot be read)"


def test_load_folder_names_ten_and_counts_the_rest(folder, capsys):
    for k in range(13):
        (folder / f"{k:02}.png").touch()
    load_folder(folder, 8, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "09.png" in lines[9]
    assert lines[10] == f"1 pictures from {folder}, 13 files left out (13 that cannot be read)"


def test_load_folder_says_what_it_does_not_read(folder, capsys):
    for name in ("a.txt", "b.txt", "c", "d.svg", ".hidden.png", "._wide.png"):
        (folder / name).write_text("")
    load_folder(folder, 8, 3)
    line = f"1 pictures from {folder}, 4 files left out (2 .txt, 1 without an ending, 1 .svg)\n"
    assert capsys.readouterr().err == line
    for k in range(4):  # six kinds now, of which five are named
        (folder / f"e.kind{k}").touch()
    load_folder(folder, 8, 3)
    line = "8 files left out (2 .txt, 1 without an ending, 1 .svg, 1 .kind0, 1 .kind1)\n"
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("ending", ["tif", "tiff", "jfif", "ppm", "tga"])
def test_load_folder_reads_whatever_pillow_reads(tmp_path, ending):
    Image.new("RGB", (4, 4), "red").save(tmp_path / f"x.{ending}")
    assert load_folder(tmp_path, 4, 3).shape == (1, 3, 4, 4)


def test_load_folder_follows_links_but_not_in_circles(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (4, 4), "red").save(elsewhere / "b.png")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    assert len(load_folder(folder, 4, 3)) == 2


def test_load_folder_leaves_out_hidden_folders_and_what_a_run_wrote(folder):
    for name in (".ipynb_checkpoints", "output", "output/old"):
        (folder / name).mkdir()
        shutil.copy(folder / "wide.png", folder / name)
    for name in ("checkpoint.pt", "config.json"):
        (folder / "output" / name).touch()
    assert len(load_folder(folder, 4, 3)) == 1


def test_a_mask_is_turned_and_put_on_white_as_a_picture_is(tmp_path):
    white, black, clear = (255, 255, 255, 255), (0, 0, 0, 255), (0, 0, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise, so that the left column becomes the top row
    pixels = np.array([[black, white], [clear, black]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert load_mask(tmp_path / "x.png", (2, 2)).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_folder_with_one_file_of_such_a_name_is_read(folder, name):
    (folder / name).touch()
    assert len(load_folder(folder, 4, 3)) == 1


def test_load_folder_names_folders_that_cannot_be_listed(folder, capsys, monkeypatch):
    (folder / "closed").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert len(load_folder(folder, 4, 3)) == 1
    assert f"left out {folder / 'closed'}: Permission denied\n" in capsys.readouterr().err


def test_load_folder_without_pictures(folder):
    with pytest.raises(LessonError, match="is not a folder"):
        load_folder(folder / "nowhere", 8, 3)
    with pytest.raises(LessonError, match="is not a folder"):
        load_folder(folder / "wide.png", 8, 3)
    shutil.move(folder / "wide.png", folder / "wide.txt")
    with pytest.raises(LessonError, match="no readable picture"):
        load_folder(folder, 8, 3)
