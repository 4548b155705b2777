"""`diff -r lesson_03_ncsn lesson_04_ncsnv2` is the second paper, and stays small enough to be read as one."""

import ast
import difflib
import inspect
import sys
from pathlib import Path

import pytest

from tests.conftest import LESSONS
from tests.conftest import PURE as PURE_MODULES

ROOT = Path(__file__).resolve().parent.parent
OLD, NEW = ROOT / "lesson_03_ncsn", ROOT / "lesson_04_ncsnv2"
PURE = ("noise_scales.py", "score_network.py", "loss.py", "sampler.py")  # no script: what a person may import
CHANGED_LINES = {  # at most, and with a docstring of its own each file has
    "noise_scales.py": 6,
    "score_network.py": 46,  # i leaves every signature: Technique 3
    "loss.py": 0,
    "sampler.py": 25,
    "sample.py": 40,
    "train_mnist.py": 31,
}
FIVE, NINE = ROOT / "lesson_05_ddpm", ROOT / "lesson_09_improved_ddpm"
FOUR, SEVEN = NEW, ROOT / "lesson_07_score_sde"
CHANGED_LINES_OF_9 = {
    "noise_schedule.py": 4,
    "noise_network.py": 29,
    "loss.py": 12,  # log_ndtr is imported, because MPS has none
    "sampler.py": 26,
    "likelihood.py": 29,
    "sample.py": 16,
    "train_mnist.py": 40,
}
CHANGED_LINES_OF_7 = {  # without the functions that are gone: a reader sees them as whole blocks, as the new ones
    "noise_scales.py": 0,
    "score_network.py": 40,
    "loss.py": 10,
    "sampler.py": 31,
    "sample.py": 40,
    "train_mnist.py": 40,
}
FILES = tuple(CHANGED_LINES)


def text(folder, file):
    return (folder / file).read_text()


def definitions(source):
    """{"Class", "Class.method", "function", "function.inner": node}, in the order of the file."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return found


def without_new(source, other):
    """The lines of a file without the functions and classes that another version of it does not have."""
    known, lines, skip = definitions(other), source.splitlines(), set()
    for node in (node for name, node in definitions(source).items() if name not in known):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        while first > 1 and not lines[first - 2].strip():  # and the empty lines above it
            first -= 1
        skip.update(range(first, node.end_lineno + 1))
    return [line for number, line in enumerate(lines, 1) if number not in skip]


def changed_lines(old, new, gone_count=True):
    """Lines removed or lines added, whichever are more; functions and classes that are new count for nothing.

    Nor do those that are gone, if gone_count is False.
    """
    before = old.splitlines() if gone_count else without_new(old, new)
    matcher = difflib.SequenceMatcher(None, before, without_new(new, old), autojunk=False)
    changes = [ends for kind, *ends in matcher.get_opcodes() if kind != "equal"]
    return max(sum(b - a for a, b, _, _ in changes), sum(b - a for _, _, a, b in changes))


def imports(source):
    """The modules a file imports, with a dot in front of a relative import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_changed_lines_counts_as_a_reader_would():
    old = "a = 1\nb = 2\n\n\ndef f():\n    return a\n"
    assert changed_lines(old, old) == 0
    assert changed_lines(old, old.replace("a = 1", "a = 3")) == 1
    assert changed_lines(old, old.replace("a = 1", "a = 3\nc = 4\nd = 5")) == 3
    assert changed_lines(old, old.replace("b = 2\n", "")) == 1
    assert changed_lines(old, old + "\n\n@cache\ndef g():\n    return b\n") == 0
    assert changed_lines(old, "a = 1\nb = 2\n\n\ndef g():\n    return a\n") == 4  # f is gone, with the lines above it
    assert changed_lines(old, "a = 1\nb = 2\n\n\ndef g():\n    return a\n", gone_count=False) == 0
    assert changed_lines(old, "a = 3\nb = 2\n", gone_count=False) == 1
    assert changed_lines(old, old.replace("return a", "return b"), gone_count=False) == 1


def test_loss_is_identical():
    assert (OLD / "loss.py").read_bytes() == (NEW / "loss.py").read_bytes()


def test_the_lessons_have_the_same_files():
    old, new = ({path.name for path in folder.glob("*.py")} for folder in (OLD, NEW))
    assert old - {"toy_2d.py", "first_network.py"} == new - {"unconditional.py"}  # what only one of the papers needs
    assert old >= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_a_file_changes_few_lines(file):
    assert changed_lines(text(OLD, file), text(NEW, file)) <= CHANGED_LINES[file]


@pytest.mark.parametrize("file", CHANGED_LINES_OF_9)
def test_lesson_9_changes_few_lines_of_lesson_5_and_keeps_its_names_and_their_order(file):
    assert changed_lines(text(FIVE, file), text(NINE, file)) <= CHANGED_LINES_OF_9[file] <= 40
    old, new = (list(definitions(text(folder, file))) for folder in (FIVE, NINE))
    assert [name for name in new if name in old] == [name for name in old if name != "draw_timesteps"]


@pytest.mark.parametrize("file", CHANGED_LINES_OF_7)
def test_lesson_7_changes_few_lines_of_lesson_4_and_keeps_the_order_of_what_it_keeps(file):
    """A third diff of lesson 4: many functions make room for others, and those that stay change little."""
    assert changed_lines(text(FOUR, file), text(SEVEN, file), gone_count=False) <= CHANGED_LINES_OF_7[file] <= 40
    old, new = (list(definitions(text(folder, file))) for folder in (FOUR, SEVEN))
    assert [name for name in new if name in old] == [name for name in old if name in new]


def test_lesson_7_has_the_noise_scales_of_lesson_4():
    assert (FOUR / "noise_scales.py").read_bytes() == (SEVEN / "noise_scales.py").read_bytes()


@pytest.mark.parametrize("file", FILES)
def test_definitions_keep_their_names_and_order(file):
    old, new = list(definitions(text(OLD, file))), list(definitions(text(NEW, file)))
    assert [name for name in new if name in old] == old  # lesson 4 adds to lesson 3 and renames nothing


@pytest.mark.parametrize("file", PURE)
def test_arguments_keep_their_names_and_order(file):
    """A function of lesson 4 may do without an argument (the network is no longer told i), and has no other."""
    old, new = definitions(text(OLD, file)), definitions(text(NEW, file))
    for name in old.keys() & new.keys():
        if isinstance(old[name], ast.FunctionDef):
            before, after = ([arg.arg for arg in node.args.args] for node in (old[name], new[name]))
            assert after == [arg for arg in before if arg in after], name


def arguments(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_the_public_interface_is_the_same(lesson):
    network = lesson.score_network.ScoreNetwork
    assert arguments(lesson.noise_scales.geometric_noise_scales) == ["sigma_1", "sigma_L", "L"]
    assert arguments(network)[:3] == ["sigmas", "channels", "width"]
    assert arguments(network.forward) == ["self", "x", "i"]
    assert arguments(lesson.loss.denoising_score_matching_loss) == ["score", "x", "sigmas", "i", "z"]
    sampler = lesson.sampler.annealed_langevin_dynamics
    assert arguments(sampler) == ["score", "x", "sigmas", "T", "epsilon", "generator"]


def defaults(function):
    given = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in given if each.default is not inspect.Parameter.empty}


@pytest.mark.lessons("lesson_09_improved_ddpm")
def test_the_public_interface_of_lesson_9(lesson):
    noise, loss = lesson.noise_schedule, lesson.loss
    assert arguments(noise.cosine_betas) == ["T", "s"] and defaults(noise.cosine_betas) == {"s": 0.008}
    assert arguments(noise.spaced_timesteps) == ["T", "K"]
    assert arguments(noise.respaced_betas) == ["betas", "timesteps"]
    assert arguments(loss.learned_log_variance) == ["v", "betas", "t"]
    assert arguments(loss.variational_term) == ["network", "x_0", "betas", "t", "eps"]
    assert arguments(loss.hybrid_loss) == ["network", "x_0", "betas", "t", "eps", "lambda_"]
    assert defaults(loss.hybrid_loss) == {"lambda_": 0.001}
    how = ["clip", "generator", "variance"]
    assert arguments(lesson.sampler.ancestral_sampling) == ["network", "x", "betas", "timesteps", *how]
    assert arguments(lesson.likelihood.bits_per_dim) == ["network", "x_0", "betas", "timesteps", *how]


@pytest.mark.lessons("lesson_05_ddpm")
def test_the_public_interface_of_lesson_5(lesson):
    noise, network = lesson.noise_schedule, lesson.noise_network.NoiseNetwork
    assert arguments(noise.linear_betas) == ["T", "beta_1", "beta_T"]
    assert defaults(noise.linear_betas) == {"beta_1": 1e-4, "beta_T": 0.02}
    assert arguments(noise.alpha_bars) == arguments(noise.posterior) == ["betas"]
    assert arguments(network)[:2] == ["channels", "width"] and defaults(network)["channels"] == 1
    assert arguments(network.forward) == ["self", "x_t", "t"]
    assert arguments(lesson.loss.noise_prediction_loss) == ["network", "x_0", "alpha_bars", "t", "eps"]
    how = {"variance": "small", "clip": True, "generator": None}
    ancestral, bound, ddim = (
        lesson.sampler.ancestral_sampling,
        lesson.likelihood.bits_per_dim,
        lesson.sampler.ddim_sampling,
    )
    assert arguments(ancestral) == ["network", "x", "betas", *how] and defaults(ancestral) == how
    assert arguments(bound) == ["network", "x_0", "betas", *how] and defaults(bound) == how
    how = {"eta": 0.0, "clip": True, "generator": None}
    assert arguments(ddim) == ["network", "x", "alpha_bars", "timesteps", *how] and defaults(ddim) == how


@pytest.mark.lessons("lesson_07_score_sde")
def test_the_public_interface_of_lesson_7(lesson):
    sde, network, sampler = lesson.sde, lesson.score_network.ScoreNetwork, lesson.sampler
    assert arguments(sde.VE) == ["sigma_min", "sigma_max"] and defaults(sde.VE) == {}
    for kind in (sde.VP, sde.SubVP):
        assert arguments(kind) == ["beta_min", "beta_max"] and defaults(kind) == {"beta_min": 0.1, "beta_max": 20}
    for kind in (sde.VE, sde.VP, sde.SubVP):
        for method in (kind.mean_factor, kind.std, kind.diffusion, kind.noise_scale):
            assert arguments(method) == ["self", "t"]
        assert arguments(kind.drift) == ["self", "x", "t"]
        assert arguments(kind.score) == ["self", "ve_score"] and arguments(kind.time) == ["self", "sigma"]
    assert arguments(network)[:2] == ["channels", "width"] and defaults(network)["channels"] == 1
    assert arguments(network.forward) == ["self", "x", "sigma"]
    assert arguments(lesson.loss.denoising_score_matching_loss) == ["score", "x", "sigma", "z"]
    how = {"predictor": "reverse_diffusion", "corrector_steps": 1, "r": 0.16, "generator": None}
    walk = sampler.predictor_corrector
    assert arguments(walk) == ["score", "x", "sigmas", *how, "mean_factors", "hold"]
    assert how.items() <= defaults(walk).items() and defaults(walk)["mean_factors"] is None
    assert (
        arguments(sampler.inpaint) == ["score", "y", "known", "x", "sigmas", *how] and defaults(sampler.inpaint) == how
    )
    assert arguments(sampler.probability_flow) == ["score", "x", "sigmas", "method"]
    assert defaults(sampler.probability_flow) == {"method": "heun"}
    assert arguments(sampler.denoise) == ["score", "x", "sigma"]
    ends = ["sigma_min", "sigma_max", "steps"]
    assert arguments(sampler.encode) == ["score", "x", *ends] and defaults(sampler.encode) == {"steps": 24}
    assert arguments(sampler.decode) == ["score", "z", *ends] and defaults(sampler.decode) == {"steps": 24}
    likelihood = lesson.likelihood.log_likelihood
    assert arguments(likelihood) == ["score", "x", *ends, "generator"]
    assert defaults(likelihood) == {"steps": 24, "generator": None}


@pytest.mark.parametrize("file", [file for file in PURE if file != "loss.py"])
def test_lesson_4_says_what_changed(file):
    assert "Changes from lesson 3" in ast.get_docstring(ast.parse(text(NEW, file)))


@pytest.mark.parametrize("file", ["noise_network.py", "loss.py", "sampler.py", "train_mnist.py"])
def test_lesson_5_says_what_changed(file):
    assert "Changes from lesson 4" in ast.get_docstring(ast.parse(text(ROOT / "lesson_05_ddpm", file)))


@pytest.mark.parametrize("file", ["score_network.py", "loss.py", "sampler.py", "train_mnist.py"])
def test_lesson_7_says_what_changed(file):
    assert "Changes from lesson 4" in ast.get_docstring(ast.parse(text(SEVEN, file)))


@pytest.mark.parametrize(
    "file", [file for file in CHANGED_LINES_OF_9 if file not in ("noise_schedule.py", "sample.py")]
)
def test_lesson_9_says_what_changed(file):
    assert "Changes from lesson 5" in ast.get_docstring(ast.parse(text(NINE, file)))


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_stands_alone(name):
    folder = ROOT / name
    allowed = {"torch", "einops", "common", *sys.stdlib_module_names}
    paths = sorted(folder.glob("*.py"))
    assert len([path for path in paths if path.stem in PURE_MODULES]) >= 4
    for path in paths:
        for module in imports(path.read_text()):
            top = module.split(".")[0]
            assert not top.startswith("lesson_") or top == folder.name, f"{path.name} imports {module}"
            assert path.stem not in PURE_MODULES or top in allowed, f"{path.name} imports {module}"
