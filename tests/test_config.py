"""The numbers of a run: flags made from types, presets, ranges, and a run from the numbers of an earlier one."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from common.config import (
    RunConfig,
    check_choice,
    check_range,
    field_comments,
    flag_of,
    learning_rate,
    parse_config,
)
from common.errors import LessonError
from tests.running import script


@dataclass(frozen=True)
class Config(RunConfig):
    steps: int = 100  # how long, in 100 % of cases
    learning_rate: float = 1e-3  # how fast
    sigma_L: Annotated[float, 0.001, 2] = 0.01  # upper case stays
    skip: bool = True  # yes or no
    kind: Literal["a", "b"] = "a"  # one of two


PRESETS = {"paper": {"steps": 5000, "dataset": "cifar10", "skip": False}, "smoke": {"steps": 2}}


def test_defaults():
    config, named, resume, overwrite = parse_config(Config, PRESETS, [])
    assert config == Config()
    assert named == set()
    assert resume is False and overwrite is False


def test_flags_have_the_types_of_the_fields():
    flags = "--steps 7 --learning-rate 1e-2 --sigma-L 1 --kind b --no-skip --resume".split()
    config, named, resume, overwrite = parse_config(Config, PRESETS, flags)
    assert config == Config(steps=7, learning_rate=0.01, sigma_L=1.0, kind="b", skip=False)
    assert [type(config.steps), type(config.sigma_L), type(config.skip)] == [int, float, bool]
    assert named == {"steps", "learning_rate", "sigma_L", "kind", "skip"}
    assert resume is True and overwrite is False


def test_presets_change_defaults_and_flags_beat_presets_in_any_order():
    config, named, _, _ = parse_config(Config, PRESETS, ["--paper"])
    assert config == Config(**PRESETS["paper"])
    assert named == {"steps", "dataset", "skip"}
    for flags in (["--paper", "--steps", "9", "--skip"], ["--steps", "9", "--skip", "--paper"]):
        config, named, _, overwrite = parse_config(Config, PRESETS, [*flags, "--overwrite"])
        assert config == Config(steps=9, dataset="cifar10", skip=True)
        assert overwrite is True


@pytest.mark.parametrize(
    "flags",
    ["--stpes 3", "--step 3", "--steps 3.5", "--steps", "--paper --smoke", "--resume --overwrite", "word", "--kind c",
     "--paper --config x", "--resume --config x"],
)  # fmt: skip
def test_what_cannot_be_read_ends_with_status_2(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, PRESETS, flags.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("usage: ") and "error: " in lines[1]


def test_of_several_processes_only_rank_0_says_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, PRESETS, ["--bogus"])
    assert ended.value.code == 2 and capsys.readouterr().err == ""


def test_help_shows_each_default_and_comment(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, PRESETS, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert __doc__ in text
    assert "--steps INT how long, in 100 % of cases (default: 100)" in text
    assert "--learning-rate FLOAT how fast (default: 0.001)" in text
    assert "--kind a|b one of two (default: a)" in text
    assert "--skip, --no-skip yes or no (default: True)" in text
    assert "--paper steps 5000, dataset cifar10, skip False" in text


def test_help_of_the_lessons(lesson, capsys):
    train_mnist = script(lesson.name)
    with pytest.raises(SystemExit):
        parse_config(train_mnist.Config, train_mnist.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    comments = field_comments(train_mnist.Config)
    for field in dataclasses.fields(train_mnist.Config):
        assert f"{comments[field.name]} (default: {field.default})" in text
        assert re.match("paper|ours|authors' code", comments[field.name]), (
            f"{field.name}: where does the number come from?"
        )
    for name, changes in train_mnist.PRESETS.items():
        base, _, dataset = name.partition(" on ")
        assert f"--{base} " in text and (not dataset or f"; on {dataset}: " in text)
        assert set(changes) <= {field.name for field in dataclasses.fields(train_mnist.Config)}
        train_mnist.Config(**changes).check()
    train_mnist.Config().check()


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_07_score_sde")
def test_paper_on_cifar10_is_as_wide_as_the_papers(lesson):
    module = script(lesson.name)

    def width(*flags):
        return parse_config(module.Config, module.PRESETS, list(flags))[0].width

    assert width("--paper") == 64 and width("--paper", "--dataset", "cifar10") == 128
    assert width("--paper", "--dataset", "cifar10", "--width", "40") == 40 and width("--dataset", "cifar10") == 32


@pytest.mark.lessons("lesson_05_ddpm")
def test_paper_on_cifar10_is_the_papers_network(lesson):
    """35.7 million parameters (App. B), and dropout 0.1 in each block."""
    module = script(lesson.name)
    config, *_ = parse_config(module.Config, module.PRESETS, ["--paper", "--dataset", "cifar10"])
    with torch.device("meta"):
        network = script(lesson.name, "sample").make_network(config, 3, {})
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert {layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)} == {0.1}


def test_the_papers_runs_have_a_preview_every_5000_steps(lesson):
    assert script(lesson.name).PRESETS["paper"]["preview_every"] == 5000


@pytest.mark.lessons("lesson_07_score_sde")
def test_samplers_of_lesson_7_go_as_far_as_the_training_and_no_farther(lesson):
    config = script(lesson.name).Config
    config(sigma_min=0.02, sigma_L=0.02).check()
    with pytest.raises(LessonError, match="^--sigma-L 0.019 must not be below --sigma-min 0.02$"):
        config(sigma_min=0.02, sigma_L=0.019).check()


# Ranges and choices


def test_checks():
    check_choice("--name", "x", ("x", "y"))
    check_range("--good", 1)
    check_range("--good", 1, 1, 1)
    for value in (0, -1, math.nan):
        with pytest.raises(LessonError, match=f"^--batch-size must be greater than zero, not {value}$"):
            check_range(flag_of("batch_size"), value)
    for value in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(LessonError, match=f"^--rate must lie between 0 and 1, not {value}$"):
            check_range("--rate", value, 0, 1)
    with pytest.raises(LessonError, match="^--name x: choose one of 1, 2$"):
        check_choice("--name", "x", (1, 2))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"steps": 0}, "--steps must be greater than zero, not 0"),
        ({"steps": True}, "--steps True: not a number or word of the right kind"),
        ({"steps": 3.5}, "--steps 3.5: not a number or word of the right kind"),
        ({"steps": "3"}, "--steps 3: not a number or word of the right kind"),
        ({"skip": 1}, "--skip 1: not a number or word of the right kind"),
        ({"output": None}, "--output None: not a number or word of the right kind"),
        ({"sigma_L": 3}, "--sigma-L must lie between 0.001 and 2, not 3"),
        ({"kind": "c"}, "--kind c: choose one of a, b"),
        ({"image_size": 15}, "--image-size 15: choose one of 16, 18, "),
        ({"warmup": -1}, "--warmup must lie between 0 and "),
    ],
)
def test_each_field_is_checked_by_its_type(changes, expected):
    Config().check()
    with pytest.raises(LessonError) as error:
        Config(**changes).check()
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    "name, low, high, more",
    [("image_size", 16, 64, 66), ("channels", 1, 3, 4), ("seed", 0, 2**63 - 1, 2**63), ("minutes", 0, 1e6, 1.1e6),
     ("warmup", 0, 10**9, 10**9 + 1)],
)  # fmt: skip
def test_both_ends_of_a_range_can_be_used(name, low, high, more):
    for value in (low, high):
        Config(**{name: value}).check()
    with pytest.raises(LessonError, match=f"^{flag_of(name)} "):
        Config(**{name: more}).check()


# --config


def test_the_numbers_of_an_earlier_run_and_flags_that_beat_them(tmp_path):
    path = tmp_path / "config.json"
    earlier = Config(steps=7, skip=False, clip=math.inf, output=str(tmp_path), minutes=0)
    path.write_text(json.dumps(dataclasses.asdict(earlier)))
    config, named, resume, _ = parse_config(Config, PRESETS, ["--config", str(path), "--steps", "9"])
    assert config == dataclasses.replace(earlier, steps=9, output="output")  # not into the earlier folder
    assert "skip" in named and not resume


@pytest.mark.parametrize("images", ["~/mine", 5])
def test_a_folder_named_in_an_edited_config(tmp_path, images):
    """It is found from anywhere, as that of a flag; what is no text gets its line from `check`."""
    (tmp_path / "c").write_text(json.dumps({"images": images}))
    config, *_ = parse_config(Config, PRESETS, ["--config", str(tmp_path / "c")])
    if images == 5:
        with pytest.raises(LessonError, match="--images"):
            config.check()
    else:
        assert config.images == str(Path.home() / "mine")


@pytest.mark.parametrize("content", ["", "[1, 2]", "[[1, 2]]", "{", "3", None])
def test_a_config_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LessonError, match="^--config .*config.json"):
        parse_config(Config, PRESETS, ["--config", str(path)])


def test_an_output_without_a_name():
    """It would be the lesson's own folder."""
    with pytest.raises(LessonError, match="^--output: name a folder$"):
        Config(output="").check()


def test_a_config_of_another_lesson(tmp_path):
    (tmp_path / "c").write_text('{"steps": 3, "depth": 4}')
    with pytest.raises(LessonError, match="is of another lesson or version: it has depth"):
        parse_config(Config, PRESETS, ["--config", str(tmp_path / "c")])


# The learning rate


def rates(**changes):
    config = Config(**changes)
    return [learning_rate(step, config) for step in range(1, config.steps + 1)]


def test_learning_rate_warms_up_and_falls_to_zero_in_half_a_cosine():
    rate = rates(steps=1000, learning_rate=3.0, warmup=100, decay="cosine")
    assert rate[0] == pytest.approx(3 / 100)
    assert max(range(1000), key=rate.__getitem__) + 1 == 100
    assert rate[:100] == sorted(rate[:100])
    assert rate[99:] == sorted(rate[99:], reverse=True)
    assert rate[500] == pytest.approx(1.5)  # after half of the steps
    assert 0 < rate[-1] < 3e-5


def test_learning_rate_is_constant_if_asked():
    assert rates(steps=10, learning_rate=3.0, warmup=0, decay="constant") == [3.0] * 10
    assert rates(steps=4, learning_rate=3.0, warmup=3, decay="constant") == pytest.approx([1.0, 2.0, 3.0, 3.0])
