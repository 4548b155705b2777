import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from common.data import load_images
from common.errors import LessonError
from common.images import PADDING, PADDING_GRAY, evenly, save_gif, save_grid, save_loss_plot, save_strip, save_table


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def flat(*levels, size=4, channels=1):
    """One flat image for each level: (N, C, size, size)."""
    return torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, channels, size, size)


def test_grid_shows_every_pixel_where_it_belongs(tmp_path):
    images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / "x.png", columns=3, scale=2)
    picture = read(tmp_path / "x.png")
    assert picture.shape == (2 * (8 + PADDING) + PADDING, 3 * (12 + PADDING) + PADDING, 3)
    for k in range(6):
        top, left = PADDING + k // 3 * (8 + PADDING), PADDING + k % 3 * (12 + PADDING)
        cell = picture[top : top + 8, left : left + 12]
        if k < 5:
            expected = (images[k].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
            np.testing.assert_array_equal(cell, expected.repeat(2, 0).repeat(2, 1))
        else:
            assert (cell == PADDING_GRAY).all()
        picture = picture.copy()
        picture[top : top + 8, left : left + 12] = PADDING_GRAY
    assert (picture == PADDING_GRAY).all()  # nothing but padding is left


def test_grid_defaults_are_square_and_easy_to_see(tmp_path):
    save_grid(torch.zeros(10, 1, 28, 28), tmp_path / "x.png")
    assert read(tmp_path / "x.png").shape == (3 * 58 + 2, 4 * 58 + 2)
    save_grid(torch.zeros(1, 1, 64, 64), tmp_path / "x.png")
    assert read(tmp_path / "x.png").shape == (68, 68)


def test_grid_clamps_and_takes_what_a_network_returns(tmp_path):
    images = flat(-3.0, 0.5, 7.0, float("inf")).to(torch.bfloat16).clone().requires_grad_()
    save_grid(images, tmp_path / "x.png", columns=4, scale=1)
    assert read(tmp_path / "x.png")[3, 3::6].tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 1, 4, 4), float("nan")),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4),
        torch.zeros(2, 2, 4, 4),
        torch.zeros(0, 1, 4, 4),
    ],
)
def test_grid_refuses_what_is_not_images(tmp_path, images):
    with pytest.raises(ValueError, match="images"):
        save_grid(images, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_strip_has_a_row_for_each_image_and_both_ends_of_time(tmp_path):
    frames = [flat(k / 255, k / 255 + 100 / 255, size=56) for k in range(71)]
    save_strip(frames, tmp_path / "x.png")
    picture = read(tmp_path / "x.png")
    assert picture.shape == (2 * 58 + 2, 8 * 58 + 2)
    assert picture[3, 3::58].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert picture[61, 3::58].tolist() == [100, 110, 120, 130, 140, 150, 160, 170]
    save_strip(frames[:3], tmp_path / "x.png")
    assert read(tmp_path / "x.png").shape[1] == 3 * 58 + 2


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_repeats_holds_the_last_frame_and_keeps_both_ends(tmp_path, channels):
    frames = [flat(k / 99, 1 - k / 99, channels=channels) for k in range(100)]
    save_gif(frames, tmp_path / "x.gif", scale=1, milliseconds=50, hold=900, max_frames=6)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.info["loop"] == 0
        shown = [(frame.info["duration"], frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    assert [duration for duration, _ in shown] == [50, 50, 50, 50, 50, 900]
    for (_, frame), level in zip(shown, [0, 51, 102, 153, 204, 255], strict=True):
        assert frame.getpixel((3, 3)) == (level,) * 3
        assert frame.getpixel((9, 3)) == (255 - level,) * 3


def test_gif_keeps_colors_apart(tmp_path):
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0.6, 0]])
    save_gif([colors[:, :, None, None].expand(-1, -1, 4, 4)], tmp_path / "x.gif", columns=4, scale=1)
    with Image.open(tmp_path / "x.gif") as picture:
        shown = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(shown[3, 3::6], (colors * 255).numpy())


def test_gif_has_ten_frames_a_second_and_time_for_the_last(tmp_path):
    save_gif(list(torch.rand(50, 1, 1, 8, 8)), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as picture:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(picture)] == [100] * 35 + [1500]


def test_gif_has_16_grays_and_of_colors_the_nearest(tmp_path):
    save_gif([flat(*(k / 15 for k in range(16)))], tmp_path / "x.gif", columns=16, scale=1)
    with Image.open(tmp_path / "x.gif") as picture:
        assert np.asarray(picture.convert("L"))[3, 3::6].tolist() == list(range(0, 256, 17))
    color = torch.tensor([0.35, 0.75, 0.45]).view(1, 3, 1, 1)  # the palette has steps of 0.2
    save_gif([color.expand(-1, -1, 8, 8)], tmp_path / "x.gif", scale=1)
    with Image.open(tmp_path / "x.gif") as picture:
        inside = np.asarray(picture.convert("RGB"))[PADDING:-PADDING, PADDING:-PADDING]
    assert (inside == (102, 204, 102)).all()


@pytest.mark.parametrize("name", ["mnist", "color_mnist"])
def test_gif_of_noise_that_turns_into_digits_is_small(tmp_path, name):
    generator = torch.Generator().manual_seed(0)
    digits = load_images(name, "test")[:64] / 255.0
    sigmas = 5.0 * 0.002 ** torch.linspace(0, 1, 100)
    frames = [digits + sigma * torch.randn(digits.shape, generator=generator) for sigma in sigmas]
    save_gif(frames, tmp_path / "x.gif", scale=2)
    assert (tmp_path / "x.gif").stat().st_size < 2e6


@pytest.mark.parametrize("save", [save_gif, save_strip])
def test_frames_that_are_no_images(tmp_path, save):
    with pytest.raises(ValueError, match="NaN"):
        save([flat(0.0), flat(float("nan"))], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def plot(path, S, bands=3, reference=392.0):
    generator = torch.Generator().manual_seed(0)
    losses = 10 + 300 * torch.rand(S, bands, generator=generator)
    known = losses.masked_fill(torch.rand(S, bands, generator=generator) < 0.5, float("nan"))
    known[:, -1] = float("nan")  # a band that never had a sample
    rows = torch.cat([torch.arange(S)[:, None], losses.mean(1, keepdim=True), known], 1).tolist()
    save_loss_plot(rows, [f"band {k}" for k in range(bands)], path, reference)


@pytest.mark.parametrize("captions", [(), ("1", "2", "3", "4", "5", "6")])
def test_a_table_has_each_image_beside_its_names(tmp_path, monkeypatch, captions):
    figures, levels = [], (0, 0.2, 0.4, 0.6, 0.8, 1)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: figures.append(figure))
    save_table(flat(*levels, size=6), tmp_path / "x.png", ["above", "below"], ["a", "b", "c"], captions)
    (panel,) = figures[0].axes
    pixels, W = panel.images[0].get_array(), 8
    above = 2 if captions else 1  # a third of an image, for the caption
    H = above + 6 + 1
    assert pixels.shape == (2 * H, 3 * W, 3)
    xs, ys = panel.get_xticks(), panel.get_yticks()
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["above", "below"]
    np.testing.assert_allclose(xs, [4, 12, 20])
    np.testing.assert_allclose(ys, [above + 3.5, H + above + 3.5])
    for n, level in enumerate(levels):
        y, x = int(ys[n // 3]), int(xs[n % 3])
        assert (pixels[y - 2 : y + 3, x - 3 : x + 3] == round(255 * level)).all()
    assert [text.get_text() for text in panel.texts] == list(captions)
    for n, text in enumerate(panel.texts):
        assert text.get_position() == (xs[n % 3], H * (n // 3) + 1)  # in the white above its image


def test_a_table_is_a_picture_of_sharp_colors_and_all_of_its_names(tmp_path):
    red_green_blue = torch.eye(3)[:, :, None, None].expand(-1, -1, 6, 6)
    save_table(red_green_blue, tmp_path / "x.png", ["a row with a long name"], ["a", "b", "c"])
    picture = read(tmp_path / "x.png")[..., :3]
    assert picture.shape[0] > 0.8 * 120 + 10 and picture.shape[1] > 3 * 0.8 * 120 + 100  # the names are outside
    pure = [(picture == 255 * np.eye(3)[k]).all(2) for k in range(3)]
    assert min(mask.sum() for mask in pure) > 0.9 * (6 * 12) ** 2  # 12 x 12 for each pixel
    places = [np.nonzero(mask)[1].mean() for mask in pure]
    np.testing.assert_allclose(np.diff(places), 96, atol=1)


@pytest.mark.parametrize("S", [0, 1, 500])
def test_loss_plot_of_any_length_without_warnings(tmp_path, S):
    plot(tmp_path / "x.png", S)  # warnings are errors in all tests
    assert read(tmp_path / "x.png").shape[:2] == (450, 1300)


@pytest.mark.parametrize("loss", [0.003, 3e5])
def test_all_of_a_loss_plot_is_in_the_picture_and_its_numbers_are_plain(tmp_path, monkeypatch, loss):
    """The margins are fixed: room for 0.002 or 200000 on the left, and for the longest name of a band on the right."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: figures.append(figure))
    name = "sigma 0.0006476 to 0.0001234"
    save_loss_plot([[1, loss, loss], [2, loss / 3, loss / 3]], [name], tmp_path / "x.png", reference=loss)
    (figure,) = figures
    figure.draw_without_rendering()
    left, right = (panel.get_tightbbox() for panel in figure.axes)
    assert 0 < left.x0 < left.x1 < right.x0 < right.x1 < 1300 and 0 < left.y0 < left.y1 < 450
    numbers = [label.get_text() for panel in figure.axes for label in panel.get_yticklabels(which="both")]
    assert f"{loss / 3 * 2:g}" in numbers and all(text == "" or text == f"{float(text):g}" for text in numbers)


def test_loss_plot_draws_means_bands_and_the_reference(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: figures.append(figure))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error
    rows = [[k, 4.0 if k < 199 else float("nan"), 2.0, k % 2] for k in range(200)]
    save_loss_plot(rows, ["a", "b"], tmp_path / "x.png", reference=50)
    left, right = figures[0].axes
    raw, mean = left.lines
    assert len(raw.get_xdata()) == 200
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(2, 199))
    np.testing.assert_allclose(mean.get_ydata(), 4)
    a, b, reference = right.lines
    np.testing.assert_allclose(a.get_ydata(), 2)
    np.testing.assert_allclose(b.get_ydata(), 0.5)
    assert [line.get_label() for line in right.lines] == ["a", "b", "network that returns zero"]
    assert a.get_color()[0] > b.get_color()[0] and a.get_color()[2] < b.get_color()[2]  # from red to blue
    assert list(reference.get_ydata()) == [50, 50]
    assert reference.get_linestyle() == "--"
    save_loss_plot(rows, ["a", "b"], tmp_path / "x.png", reference=float("nan"))  # of a loss that has none
    assert len(figures[1].axes[1].lines) == 2
    assert left.get_yscale() == right.get_yscale() == "log"
    assert (raw.get_label(), mean.get_label()) == ("ten steps each", "running mean")
    assert left.get_title() == "training loss" and right.get_title().startswith("loss by noise level")


def test_a_place_that_cannot_be_written_is_a_lesson_error(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"
    for write in (save_grid, lambda images, path: save_gif([images], path), lambda images, path: plot(path, 5)):
        with pytest.raises(LessonError, match="cannot write") as error:
            write(flat(0.0), path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("L, n", [(7, 50), (10, 10), (96, 25), (1000, 999), (100_000, 99_999)])
def test_levels_are_chosen_evenly_and_never_twice(L, n):
    chosen = evenly(L, n)
    assert len(chosen) == min(L, n) and (chosen[0], chosen[-1]) == (0, L - 1)
    assert 0 < chosen.diff().min() and chosen.diff().max() - chosen.diff().min() <= 1
