"""What a person can get wrong: one line says what to do, the exit status is not zero, and nothing is lost."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.conftest import LESSONS
from tests.running import (
    DIFFUSION,
    ENVIRONMENT,
    ROOT,
    TWO_LESSONS,
    Result,
    hashes,
    quick,
    read_checkpoint,
    run,
    run_here,
)


def others(lesson):
    return [name for name in LESSONS if name != lesson.name]


def explanation(result, status=1):
    """The line of stderr that explains; checks that it is the only one, apart from usage and progress."""
    assert result.status == status
    text = re.sub(r"^usage:.*\n( .*\n)*", "", result.stderr, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not re.search(r"images/s|\d pictures", line)]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stdout
    assert "error: " in lines[0]
    return lines[0]


@pytest.fixture
def earlier(tmp_path):
    """An output folder with something like a run in it, which must survive a mistake."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    for name in ("checkpoint.pt", "config.json", "metrics.csv", "samples.png", "samples_step_000500.png"):
        (folder / name).write_text(f"the {name} of a run that took hours")
    return folder


@pytest.fixture(scope="module")
def finished(lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp(lesson.name)
    assert quick(lesson.name, "--output", folder).status == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy, to be damaged, of the output folder of a short run."""
    return shutil.copytree(finished, tmp_path / "copied")


# Flags. --overwrite is the dangerous moment: an earlier run must not be gone before the flags have been understood.

FLAGS = [
    ("--bogus", 2, "unrecognized arguments: --bogus"),
    ("extra", 2, "unrecognized arguments: extra"),
    ("--step 5", 2, "unrecognized arguments: --step 5"),  # no abbreviations
    ("--steps", 2, "--steps: expected one argument"),
    ("--steps many", 2, "--steps: invalid int value: 'many'"),
    ("--steps nan", 2, "--steps: invalid int value: 'nan'"),
    ("--steps 1e3", 2, "--steps: invalid int value: '1e3'"),
    ("--learning-rate high", 2, "--learning-rate: invalid float value: 'high'"),
    ("--resume --overwrite", 2, "not allowed with argument"),
    ("--smoke --paper", 2, "not allowed with argument"),
    ("--steps 0", 1, "--steps must be greater than zero, not 0"),
    ("--steps -5", 1, "--steps must be greater than zero, not -5"),
    ("--batch-size 0", 1, "--batch-size must be greater than zero"),
    ("--batch-size -64", 1, "--batch-size must be greater than zero"),
    ("--width 0", 1, "--width "),
    ("--width -8", 1, "--width "),
    ("--width 1", 1, "--width "),  # its mean over channels has no variance
    ("--blocks 0", 1, "--blocks must be greater than zero"),
    ("--learning-rate 0", 1, "--learning-rate must be greater than zero"),
    ("--learning-rate -1", 1, "--learning-rate must be greater than zero"),
    ("--learning-rate nan", 1, "--learning-rate must be greater than zero, not nan"),
    ("--clip 0", 1, "--clip must be greater than zero"),
    ("--clip nan", 1, "--clip must be greater than zero"),
    ("--channels 2", 2, "--channels: invalid choice: 2 (choose from "),
    ("--image-size 15", 2, "--image-size: invalid choice: 15 (choose from "),
    ("--preview-every 0", 1, "--preview-every must be greater than zero"),
    ("--warmup -1", 1, "--warmup must lie between 0 and "),
    ("--minutes -1", 1, "--minutes must lie between 0 and "),
    ("--minutes nan", 1, "--minutes must lie between 0 and "),
    ("--seed 99999999999999999999", 1, "--seed must lie between"),
    ("--dataset imagenet", 2, "--dataset: invalid choice: 'imagenet' (choose from "),
    ("--optimizer sgd", 2, "--optimizer: invalid choice: 'sgd' (choose from "),
    ("--decay linear", 2, "--decay: invalid choice: 'linear' (choose from "),
    ("--patch 3", 2, "--patch: invalid choice: 3 (choose from "),
    ("--precision float16", 2, "--precision: invalid choice: 'float16' (choose from "),
    ("--device tpu", 2, "--device: invalid choice: 'tpu' (choose from "),
]
FLAGS_OF_LESSONS_3_AND_4 = [
    ("--focus -1", 1, "--focus must lie between 0 and "),
    ("--focus nan", 1, "--focus must lie between 0 and "),
    ("--sigma-L 0", 1, "--sigma-L must lie between 1e-06 and "),
    ("--sigma-L nan", 1, "--sigma-L must lie between"),
    ("--sigma-L 2000", 1, "--sigma-L must lie between"),
    ("--T 0", 1, "--T must be greater than zero"),
    ("--activation gelu", 2, "--activation: invalid choice: 'gelu' (choose from "),
]
FLAGS_OF_LESSON_3 = [
    ("--L 1", 1, "--L must lie between 2 and "),
    ("--L -3", 1, "--L must lie between 2 and "),
    ("--sigma-1 nan", 1, "--sigma-1 must lie between"),
    ("--sigma-1 inf", 1, "--sigma-1 must lie between"),
    ("--sigma-1 0.005", 1, "noise scales cannot be made of these flags and data: "),  # below sigma_L
    ("--epsilon 0", 1, "--epsilon must be greater than zero"),
    ("--epsilon nan", 1, "--epsilon must be greater than zero"),
]
FLAGS_OF_LESSON_4 = [
    ("--L 10", 2, "unrecognized arguments: --L 10"),  # it is computed
    ("--sigma-1 1", 2, "unrecognized arguments: --sigma-1 1"),
    ("--overlap 0", 1, "--overlap must lie between 0.01 and 0.98, not 0.0"),
    ("--overlap 1", 1, "--overlap must lie between"),
    ("--overlap nan", 1, "--overlap must lie between"),
    ("--ema-decay 1.5", 1, "--ema-decay must lie between 0 and 1"),
    ("--ema-decay nan", 1, "--ema-decay must lie between 0 and 1"),
]
FLAGS_OF_LESSON_5 = [
    ("--sigma-L 0.01", 2, "unrecognized arguments: --sigma-L 0.01"),
    ("--T 1", 1, "--T must lie between 2 and 100000, not 1"),
    ("--T 100001", 1, "--T must lie between 2 and 100000, not 100001"),
    ("--beta-1 0", 1, "--beta-1 must be greater than zero, not 0.0"),
    ("--beta-T nan", 1, "--beta-T must be greater than zero, not nan"),
    ("--beta-1 1", 1, "noise schedule cannot be made of these flags and data: beta_1 = 1 of T = 30 does not lie"),
    ("--beta-T 2", 1, "noise schedule cannot be made of these flags and data: beta_16 = "),  # the first above 1
    ("--beta-T inf", 1, "noise schedule cannot be made of these flags and data: beta_"),
    ("--dropout 1.5", 1, "--dropout must lie between 0 and 0.9, not 1.5"),
    ("--dropout -0.1", 1, "--dropout must lie between"),
    ("--dropout nan", 1, "--dropout must lie between"),
    ("--width 7", 1, "--width must lie between 8 and "),
    ("--levels 1", 1, "--levels must lie between 2 and 6, not 1"),
    ("--levels 7", 1, "--levels must lie between"),
    ("--variance learned", 2, "--variance: invalid choice: 'learned' (choose from "),
    ("--clip-x-0 no", 2, "unrecognized arguments: no"),
    ("--ema-decay 1.5", 1, "--ema-decay must lie between 0 and 1"),
    ("--ema-decay nan", 1, "--ema-decay must lie between 0 and 1"),
]


FLAGS_OF_LESSON_7 = [
    ("--T 5", 2, "unrecognized arguments: --T 5"),
    ("--overlap 0.5", 2, "unrecognized arguments: --overlap 0.5"),
    ("--focus -1", 1, "--focus must lie between 0 and "),
    ("--sigma-min 0", 1, "--sigma-min must lie between 1e-06 and "),
    ("--sigma-min nan", 1, "--sigma-min must lie between"),
    ("--sigma-min 0.4 --sigma-L 0.3", 1, "--sigma-L 0.3 must not be below --sigma-min 0.4"),
    ("--sigma-L 2000", 1, "--sigma-L must lie between"),
    ("--N 1", 1, "--N must lie between 2 and "),
    ("--r 0", 1, "--r must lie between 0.001 and "),
    ("--r nan", 1, "--r must lie between"),
    ("--sde v", 2, "--sde: invalid choice: 'v' (choose from "),
    ("--predictor heun", 2, "--predictor: invalid choice: 'heun' (choose from "),
    ("--corrector no", 2, "unrecognized arguments: no"),
    ("--digit 3", 2, "unrecognized arguments: --digit 3"),  # of sample.py
    ("--ema-decay 1.5", 1, "--ema-decay must lie between 0 and 1"),
]


def check_flags(name, earlier, flags, status, expected):
    before = hashes(earlier)
    overwrite = () if "--resume" in flags else ("--overwrite",)
    result = run_here(name, "--smoke", *flags.split(), *overwrite, "--output", earlier)
    assert expected in explanation(result, status)
    assert result.stdout == ""
    assert hashes(earlier) == before


@pytest.mark.parametrize("flags, status, expected", FLAGS)
def test_flags(lesson, earlier, flags, status, expected):
    check_flags(lesson.name, earlier, flags, status, expected)


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
@pytest.mark.parametrize("flags, status, expected", FLAGS_OF_LESSONS_3_AND_4)
def test_flags_of_lessons_3_and_4(lesson, earlier, flags, status, expected):
    check_flags(lesson.name, earlier, flags, status, expected)


@pytest.mark.parametrize("flags, status, expected", FLAGS_OF_LESSON_3)
def test_flags_of_lesson_3(earlier, flags, status, expected):
    check_flags("lesson_03_ncsn", earlier, flags, status, expected)


@pytest.mark.parametrize("flags, status, expected", FLAGS_OF_LESSON_4)
def test_flags_of_lesson_4(earlier, flags, status, expected):
    check_flags("lesson_04_ncsnv2", earlier, flags, status, expected)


@pytest.mark.parametrize("flags, status, expected", FLAGS_OF_LESSON_5)
def test_flags_of_lesson_5(earlier, flags, status, expected):
    check_flags("lesson_05_ddpm", earlier, flags, status, expected)


@pytest.mark.parametrize("flags, status, expected", FLAGS_OF_LESSON_7)
def test_flags_of_lesson_7(earlier, flags, status, expected):
    check_flags("lesson_07_score_sde", earlier, flags, status, expected)


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_07_score_sde")
def test_pictures_that_are_all_alike(lesson, earlier, tmp_path):
    """Technique 1 computes a largest noise scale of 0 from them."""
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        Image.new("L", (20, 20), 128).save(tmp_path / "pictures" / f"{name}.png")
    check_flags(lesson.name, earlier, f"--images {tmp_path / 'pictures'}", 1, "noise scales cannot be made of")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(lesson, earlier, device):
    if getattr(torch.backends if device == "mps" else torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    check_flags(lesson.name, earlier, f"--device {device}", 1, f"--device {device}: this machine")


@pytest.mark.parametrize("flags, status", [("--bogus", 2), ("--batch-size -1", 1)])
def test_flags_in_a_process_of_its_own(earlier, flags, status):
    before = hashes(earlier)
    result = run("lesson_03_ncsn", *flags.split(), "--overwrite", "--output", earlier)
    assert flags.split()[0] in explanation(result, status)
    assert result.stdout == ""
    assert hashes(earlier) == before


def test_a_batch_that_does_not_fit_into_memory(lesson, tmp_path):
    result = quick(lesson.name, "--batch-size", 10**15, "--output", tmp_path)  # no machine addresses as much
    assert "--batch-size" in explanation(result)


# Data files


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What a run needs of the repository, copied, so that it can be damaged."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("common", "lesson_03_ncsn", "lesson_04_ncsnv2"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return folder


@pytest.mark.parametrize("damage", ["truncated", "a byte changed", "missing"])
def test_damaged_digits(repository, earlier, damage):
    path = repository / "common" / "mnist" / "train-images-idx3-ubyte.xz"
    whole, before = path.read_bytes(), hashes(earlier)
    middle = len(whole) // 2
    if damage == "truncated":
        path.write_bytes(whole[:middle])
    elif damage == "a byte changed":
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.unlink()
    try:
        name = "lesson_03_ncsn" if damage == "missing" else "lesson_04_ncsnv2"
        result = run(name, "--smoke", "--overwrite", "--output", earlier, root=repository)
    finally:
        path.write_bytes(whole)
    line = explanation(result)
    assert "train-images-idx3-ubyte.xz is missing or damaged" in line
    assert "git checkout" in line
    assert hashes(earlier) == before


# Checkpoints


def check_resume(name, folder, expected, *flags):
    before = hashes(folder) if folder.exists() else None
    result = run_here(name, "--resume", "--steps", 8, *flags, "--output", folder)
    line = explanation(result)
    assert re.search(expected, line), line
    assert (hashes(folder) if folder.exists() else None) == before
    assert result.stdout == ""


def test_resume_without_a_checkpoint(lesson, tmp_path):
    check_resume(lesson.name, tmp_path, "there is no .*checkpoint.pt; train first")
    check_resume(lesson.name, tmp_path / "nowhere", "there is no .*checkpoint.pt; train first")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_checkpoint_that_is_truncated(lesson, copied, kept):
    path = copied / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    check_resume(lesson.name, copied, "checkpoint.pt is damaged")


@pytest.mark.parametrize("content", [b"garbage", os.urandom(10_000), b"PK\x03\x04" + bytes(1000)])
def test_a_checkpoint_that_is_garbage(lesson, copied, content):
    (copied / "checkpoint.pt").write_bytes(content)
    check_resume(lesson.name, copied, "checkpoint.pt is damaged")


def test_a_checkpoint_with_a_changed_byte(lesson, copied):
    """In the weights, where nothing but a check sum could tell."""
    path = copied / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["network"]["first.bias"].numpy().tobytes()
    content[content.index(weights)] ^= 1
    path.write_bytes(content)
    check_resume(lesson.name, copied, "checkpoint.pt is damaged")


class RunsCode:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


@pytest.mark.parametrize("content", [RunsCode(), {"lesson": "lesson_03_ncsn", "config": RunsCode()}])
def test_a_checkpoint_with_code_in_it(copied, content):
    torch.save(content, copied / "checkpoint.pt")
    check_resume("lesson_03_ncsn", copied, "checkpoint.pt is damaged")


@pytest.mark.parametrize("content", [torch.zeros(3), {"model": {}}, [1, 2, 3]])
def test_a_file_of_torch_that_is_no_checkpoint(lesson, copied, content):
    torch.save(content, copied / "checkpoint.pt")
    check_resume(lesson.name, copied, "checkpoint.pt is not a checkpoint of these lessons")


def test_a_checkpoint_of_another_lesson(lesson, copied):
    for other in others(lesson):
        expected = f"is a checkpoint of {lesson.name}, not of {other}; use the scripts in {lesson.name}/"
        check_resume(other, copied, expected)


def test_a_checkpoint_of_another_width(lesson, copied):
    check_resume(lesson.name, copied, "was made with --width 8: resume without --width", "--width", 16)
    check_resume(lesson.name, copied, "was made with --dataset mnist: .*", "--dataset", "color_mnist")


def test_a_checkpoint_that_is_further_than_asked_for(lesson, copied):
    check_resume(lesson.name, copied, "is already at step 5: ask for more --steps", "--steps", 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: checkpoint["config"].update(width=16),
        lambda checkpoint: checkpoint["network"].pop("last.weight"),
        lambda checkpoint: checkpoint["config"].update(depth=3),  # of another version of the lesson
        lambda checkpoint: checkpoint["config"].pop("T"),
        lambda checkpoint: checkpoint.update(config=None),
        lambda checkpoint: checkpoint.update(step="a"),
        lambda checkpoint: checkpoint.update(lesson=3),
        lambda checkpoint: checkpoint.pop("config"),
        lambda checkpoint: checkpoint.pop("network"),
        lambda checkpoint: checkpoint.pop("device"),
        lambda checkpoint: checkpoint.pop("optimizer"),
        lambda checkpoint: checkpoint["optimizer"].pop("mean"),
        lambda checkpoint: checkpoint["optimizer"]["steps"].pop(),
        lambda checkpoint: checkpoint["optimizer"]["momentum"].pop(),
        lambda checkpoint: checkpoint["optimizer"]["momentum"][0].resize_(3),
        lambda checkpoint: checkpoint.update(generator=torch.zeros(3)),
        lambda checkpoint: checkpoint.pop("log"),
    ],
    ids="width weights field missing none words lesson config network device optimizer mean steps momentum shape "
    "generator log".split(),
)
@pytest.mark.lessons(*TWO_LESSONS)
def test_a_checkpoint_whose_parts_do_not_fit(lesson, copied, damage):
    check_damaged(lesson, copied, damage, "checkpoint.pt")


def check_damaged(lesson, folder, damage, expected):
    checkpoint = read_checkpoint(folder)
    damage(checkpoint)
    torch.save(checkpoint, folder / "checkpoint.pt")
    check_resume(lesson.name, folder, expected)


@pytest.mark.parametrize("damage, expected", [
    (lambda checkpoint: checkpoint["config"].pop("T"), "is of another version of .*: (its configuration has )?no T$"),
    (lambda checkpoint: checkpoint.update(config=None), "is of another version of "),
    (lambda checkpoint: checkpoint.update(ema=3, network=3), "is of another version of |do not fit this network"),
    (lambda checkpoint: checkpoint.update(lesson=3), "is not a checkpoint of these lessons"),
])  # fmt: skip
@pytest.mark.lessons(*TWO_LESSONS)
def test_sample_with_a_checkpoint_whose_parts_do_not_fit(lesson, copied, damage, expected):
    checkpoint = read_checkpoint(copied)
    damage(checkpoint)
    torch.save(checkpoint, copied / "checkpoint.pt")
    flags = "--num", 1, "--output", copied / "x.png", "--checkpoint", copied / "checkpoint.pt"
    assert re.search(expected, explanation(run_here(lesson.name, *flags, name="sample")))


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_07_score_sde")
def test_a_checkpoint_without_noise_scales(lesson, copied):
    expected = "checkpoint.pt does not fit|noise scales cannot be made of .*: 'sigmas'|the weights in checkpoint.pt"
    name = "sigma_max" if lesson.name == "lesson_07_score_sde" else "sigmas"
    check_damaged(lesson, copied, lambda checkpoint: checkpoint["network"].pop(name), expected)


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_07_score_sde", *DIFFUSION)
def test_a_checkpoint_without_averaged_weights(lesson, copied):
    check_damaged(lesson, copied, lambda checkpoint: checkpoint.pop("ema"), "checkpoint.pt does not fit")
    expected = f"checkpoint.pt is of another version of {lesson.name}: it has no ema"
    sampled = run_here(lesson.name, "--checkpoint", copied / "checkpoint.pt", name="sample")
    assert expected in explanation(sampled)


@pytest.mark.lessons("lesson_05_ddpm")
def test_a_checkpoint_with_a_schedule_that_is_none(lesson, copied):
    expected = "noise schedule cannot be made of these flags and data: beta_"
    check_damaged(lesson, copied, lambda checkpoint: checkpoint["config"].update(beta_T=3.0), expected)


def test_resume_in_a_process_of_its_own(tmp_path):
    torch.save({"lesson": "lesson_03_ncsn"}, tmp_path / "checkpoint.pt")
    before = hashes(tmp_path)
    result = run("lesson_04_ncsnv2", "--resume", "--output", tmp_path)
    assert "is a checkpoint of lesson_03_ncsn, not of lesson_04_ncsnv2" in explanation(result)
    assert hashes(tmp_path) == before


def test_sample_without_a_checkpoint_it_can_use(lesson, finished, tmp_path):
    cases = [(lesson.name, tmp_path / "x.pt", "there is no file .*x.pt; train first")]
    for other in others(lesson):
        cases.append((other, finished / "checkpoint.pt", f"is a checkpoint of {lesson.name}, not of {other}"))
    for name, path, expected in cases:
        flags = ("--checkpoint", path, "--output", tmp_path / "x.png")
        assert re.search(expected, explanation(run_here(name, *flags, name="sample")))
    assert list(tmp_path.iterdir()) == []


# Folders and disks that do not take what a run writes


@pytest.mark.parametrize("below", ["", "folder", "folder/below"])
def test_an_output_folder_that_cannot_be_made(lesson, tmp_path, below):
    """Not one without permission to write, since whoever runs the tests may have every permission."""
    file = tmp_path / "file"
    file.write_text("mine")
    result = quick(lesson.name, "--output", file / below)
    assert str(file) in explanation(result)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk(tmp_path):
    """Files end at 100 000 bytes: the configuration fits, the checkpoint does not, and the old one stays."""
    resource = pytest.importorskip("resource")

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert quick("lesson_03_ncsn", "--output", tmp_path, digits=60_000).status == 0
    before = hashes(tmp_path)
    flags = ["--resume", "--steps", "6", "--output", tmp_path]
    how = {"cwd": ROOT / "lesson_03_ncsn", "env": ENVIRONMENT, "preexec_fn": limit_files}
    ran = subprocess.run([sys.executable, "train_mnist.py", *flags], **how, capture_output=True, text=True)
    assert "checkpoint.pt" in explanation(Result(ran.returncode, ran.stdout, ran.stderr))
    assert hashes(tmp_path) == before
