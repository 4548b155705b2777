"""The plumbing that all lessons share: how a script ends, checkpoints, the machine, the log."""

import math
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import common.machine
from common.checkpoint import load_checkpoint, load_lesson, load_weights, save_checkpoint
from common.cli import StopRequest, by_product, progress, run
from common.errors import LessonError
from common.machine import (
    InBatches,
    autocast,
    bfloat16_speedup,
    choose_device,
    describe,
    sampling_precision,
    synchronize,
    training_precision,
)
from common.training_log import TrainingLog
from tests.running import DIFFUSION, hashes, script

# How a script ends


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code",
    [
        (lambda: 0, 0),
        (lambda: 143, 143),
        (raises(LessonError("what to do")), "error: what to do"),
        (raises(MemoryError()), "error: the memory is full; try a smaller --batch-size, --width or --num"),
        *(
            (raises(RuntimeError(text)), "error: the memory is full; try a smaller --batch-size, --width or --num")
            for text in (
                "CUDA out of memory.\nTried to allocate",
                "DefaultCPUAllocator: no",
                "Invalid buffer size: 9 GB",
            )
        ),
        (raises(KeyboardInterrupt()), 130),
    ],
)
def test_run_ends_the_program(main, code):
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code


@pytest.mark.parametrize("error", [RuntimeError("a mistake in the code"), RuntimeError("gloo"), ValueError()])
def test_run_hides_no_mistake_of_ours(error):
    with pytest.raises(type(error)) as caught:
        run(raises(error))
    assert caught.value is error


# Signals


@pytest.fixture
def handlers():
    """Puts the signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_remembers_a_signal_and_lets_a_later_one_through(handlers, monkeypatch, number):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop and stop.signal_number == number
    now[0] += 0.9
    os.kill(os.getpid(), signal.SIGTERM)  # what torchrun sends after a Ctrl-C
    assert stop.signal_number == number
    now[0] += 0.2
    ended = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    os.kill(os.getpid(), number)
    assert ended == [number] and signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number, rank, said", [(signal.SIGINT, 0, 1), (signal.SIGTERM, 0, 0), (signal.SIGINT, 1, 0)])
def test_ctrl_c_is_answered_once(handlers, monkeypatch, capfd, number, rank, said):
    monkeypatch.setenv("RANK", str(rank))
    stop = StopRequest()
    os.kill(os.getpid(), number), os.kill(os.getpid(), number)
    assert stop and capfd.readouterr().err == "\nfinishing the step, and saving; Ctrl-C again ends at once\n" * said


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_in_a_log_a_line_now_and_then(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress(300, " images") as bar:
        for _ in range(300):
            bar.update()
    text = capsys.readouterr().err
    assert "300/300" in text and ("\r" in text) == terminal
    if not terminal:
        assert text.count("\n") <= 2 and text.splitlines()[-1].startswith("100%")


def test_a_log_that_nobody_reads_ends_no_run(monkeypatch):
    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False, write=gone, flush=gone))
    with progress(3, " images") as bar:
        bar.update(3)
    assert bar.n == 3


def test_a_by_product_that_cannot_be_written_is_a_line(capsys):
    with by_product("x.png"):
        raise RuntimeError("no\n  room")
    assert capsys.readouterr().err == "\nwarning: no x.png: no room\n"


def test_of_several_processes_only_the_first_says_what_all_would(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            run(raises(LessonError("what to do")))
    assert slept == [2]  # in which torchrun ends rank 1, since rank 0 has failed


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "Connection closed by peer",
        "Connection reset by peer",
        "NCCL communicator was aborted on rank 1",
        "Broken pipe",
        "recvValue failed on SocketImpl(fd=3)",
    ],
)
def test_a_process_that_loses_the_others_says_so(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        run(raises(RuntimeError(text)))
    assert ended.value.code.startswith("error: another process of this run has ended; ")


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    module = torch.nn.Linear(3, 2)
    state = {"network": module.state_dict(), "step": 7, "log": [1.5, [math.inf, "text", None]], "flag": True}
    save_checkpoint(path, "lesson_xx", **state)
    found = load_checkpoint(path, "lesson_xx")
    assert found.keys() == {"lesson", *state}
    assert (found["lesson"], found["step"], found["log"], found["flag"]) == ("lesson_xx", 7, state["log"], True)
    other = torch.nn.Linear(3, 2)
    assert not torch.equal(other.weight, module.weight)
    load_weights(other, found["network"], path)
    assert torch.equal(other.weight, module.weight)
    assert list(hashes(path.parent)) == ["checkpoint.pt"]


def test_weights_that_do_not_fit(tmp_path):
    for weights in (torch.nn.Linear(3, 2).state_dict(), {}, [1]):
        with pytest.raises(LessonError, match="the weights in x.pt do not fit"):
            load_weights(torch.nn.Linear(3, 3), weights, "x.pt")


def test_checkpoint_of_another_lesson_and_of_none(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "lesson_xx")
    with pytest.raises(LessonError, match="x.pt is a checkpoint of lesson_xx, not of lesson_yy"):
        load_checkpoint(tmp_path / "x.pt", "lesson_yy")
    with pytest.raises(LessonError, match="there is no file .*y.pt"):
        load_checkpoint(tmp_path / "y.pt", "lesson_xx")
    with pytest.raises(LessonError, match="there is no file"):  # a folder
        load_checkpoint(tmp_path, "lesson_xx")


def test_a_checkpoint_that_may_not_be_read(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied")

    save_checkpoint(tmp_path / "x.pt", "lesson_xx")
    monkeypatch.setattr("zipfile.ZipFile", closed)
    with pytest.raises(LessonError, match="^cannot read .*x.pt: Permission denied$"):
        load_checkpoint(tmp_path / "x.pt", "lesson_xx")


def test_lessons_are_found_by_name():
    with pytest.raises(LessonError, match="there is no folder lesson_99 with a sample.py"):
        load_lesson("lesson_99")
    with pytest.raises(LessonError, match="there is no folder ../x"):
        load_lesson("../x")


# The machine


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(LessonError, match="--device cuda: .*try --device auto"):
            choose_device("cuda")


@pytest.mark.parametrize("cuda, mps, best", [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert choose_device("auto") == torch.device(best) and choose_device("cpu") == torch.device("cpu")


def test_a_machine_is_described_by_its_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    monkeypatch.setattr(common.machine.platform, "processor", lambda: "arm")
    about = tmp_path / "cpuinfo"
    monkeypatch.setattr(common.machine, "Path", lambda name: {"/proc/cpuinfo": about}[name])
    cpu = torch.device("cpu")
    assert describe(cpu) == "arm, 3 threads, PyTorch 2.10.0"  # not Linux
    about.write_text("processor\t: 0\nmodel name\t: Chip 7\nflags\t: avx2 avx512_bf16\nmodel name\t: Chip 7\n")
    assert describe(cpu) == "Chip 7 with bf16, 3 threads, PyTorch 2.10.0"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    about.write_text("model name\t: Chip 7\nflags\t: avx2\n")
    assert describe(cpu) == "Chip 7, 1 thread, PyTorch 2.10.0"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe(torch.device("cuda", 1)) == "GPU 1, PyTorch 2.10.0"


def with_speedup(monkeypatch, speedup):
    monkeypatch.setattr(common.machine, "bfloat16_speedup", lambda device: speedup)
    return torch.device("cpu")


@pytest.mark.parametrize(
    "speedup, expected", [(0.0, "float32"), (0.9, "float32"), (1.24, "float32"), (1.26, "bfloat16")]
)
def test_training_is_in_bfloat16_where_it_is_clearly_faster(monkeypatch, speedup, expected):
    device = with_speedup(monkeypatch, speedup)
    assert training_precision("auto", device) == expected
    assert training_precision("float32", device) == "float32" and training_precision("bfloat16", device) == "bfloat16"


@pytest.mark.parametrize(
    "speedup, expected", [(0.3, "float32"), (0.79, "float32"), (0.81, "bfloat16"), (3.0, "bfloat16")]
)
def test_sampling_is_in_the_precision_of_the_training_unless_that_is_slow(monkeypatch, speedup, expected):
    device = with_speedup(monkeypatch, speedup)
    assert sampling_precision("auto", "bfloat16", device) == expected
    assert (
        sampling_precision("auto", "float32", device) == sampling_precision("float32", "bfloat16", device) == "float32"
    )
    assert sampling_precision("bfloat16", "float32", device) == "bfloat16"


def test_speedup_is_a_ratio_of_the_least_times(monkeypatch):
    """Two times of each call, before and after; the first call of each precision does not count."""
    float32, bfloat16 = [1, 6, 4, 5, 6, 6, 6], [1.5, 3, 2, 3, 3, 8, 3]
    clock = iter([t for seconds in float32 + bfloat16 for t in (0.0, seconds)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert bfloat16_speedup.__wrapped__(torch.device("cpu")) == 2.0


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_speedup_is_0_where_bfloat16_does_not_work(monkeypatch, error):
    def ones(*shape, dtype, device):
        if dtype == torch.bfloat16:
            raise error("BFloat16 is not supported on MPS")
        return torch.zeros(*shape)

    monkeypatch.setattr(common.machine.torch, "ones", ones)
    assert bfloat16_speedup.__wrapped__(torch.device("cpu")) == 0.0


def test_a_gpu_is_waited_for(monkeypatch):
    waited = []
    found = lambda device: SimpleNamespace(synchronize=lambda: waited.append(device.type))
    monkeypatch.setattr(torch, "get_device_module", found)
    for name in ("cpu", "cuda", "mps"):
        synchronize(torch.device(name))
    assert waited == ["cuda", "mps"]


def test_in_batches():
    sizes, told = [], []

    def network(x, i):
        sizes.append(len(x))
        return (x @ x.mT) * i[:, None, None]

    network.sigmas = 5
    bar = type("Bar", (), {"update": lambda self, n: told.append(n)})()
    x, i = torch.rand(7, 3, 3), torch.arange(7)
    score = InBatches(network, "float32", bar, batch_size=3)
    torch.testing.assert_close(score(x, i), x @ x.mT * i[:, None, None])
    assert sizes == told == [3, 3, 1] and score.sigmas == 5
    assert InBatches(network, "bfloat16")(x, i).dtype == torch.bfloat16


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(a.device, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16 and torch.is_autocast_cache_enabled()
    with autocast(a.device, "bfloat16", cache=False):
        assert (a @ a).dtype == torch.bfloat16 and not torch.is_autocast_cache_enabled()
    with autocast(a.device, "float32"):
        assert (a @ a).dtype == torch.float32


# The record of a run

SIGMAS = torch.tensor([512.0, 256, 128, 64, 32, 16, 8, 4, 2, 1])  # two in each of five bands
LEVELS = [f"sigma {int(sigma)}" for sigma in SIGMAS]


def at(*losses, i, L=10, weights=None):
    """What the log takes: losses, where between the noisiest and the cleanest of L levels they were, and weights."""
    weights = torch.ones(len(losses)) if weights is None else torch.tensor(weights)
    return torch.stack([torch.tensor(losses), (torch.tensor(i) + 0.5) / L, weights], dim=1)


def test_log_rows_are_means_over_images_and_bands(tmp_path):
    log = TrainingLog(LEVELS)
    log.add(1, at(1.0, 2.0, 3.0, i=[0, 1, 9]))
    log.add(2, at(6.0, i=[8]))
    assert log.close_row() == 3.0
    log.add(3, at(5.0, 7.0, i=[4, 5]))
    log.close_row()
    nan = math.nan
    expected = [[2, 3.0, 1.5, nan, nan, nan, 4.5], [3, 6.0, nan, nan, 6.0, nan, nan]]
    assert log.rows == [pytest.approx(row, nan_ok=True) for row in expected]
    log.write(tmp_path, reference=8)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == (
        "step,loss,sigma 512 to 256,sigma 128 to 64,sigma 32 to 16,sigma 8 to 4,sigma 2 to 1"  # neighbours, all there
    )
    assert rows == ["2,3.0,1.5,nan,nan,nan,4.5", "3,6.0,nan,nan,6.0,nan,nan"]
    assert set(hashes(tmp_path)) == {"metrics.csv", "loss.png"}


def test_log_bands_are_means_whatever_comes_more_often(tmp_path):
    """Level k has the loss (10 - k)^2 and comes as often as that, with the weight that makes up for it."""
    L, log = 10, TrainingLog(LEVELS)
    i = [k for k in range(L) for _ in range((L - k) ** 2)]
    often = len(i) / L
    log.add(1, at(*((L - k) ** 2.0 for k in i), i=i, weights=[often / (L - k) ** 2 for k in i]))
    log.close_row()
    bands = [((L - k) ** 2 + (L - k - 1) ** 2) / 2 for k in range(0, L, 2)]
    assert log.rows[0] == pytest.approx([1, sum(bands) / 5, *bands])
    log.write(tmp_path, reference=8)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_row_has_the_mean_of_the_weighted_losses_and_of_a_band_the_weighted_mean():
    """The first is what is minimised, whose expectation does not depend on what comes more often."""
    log = TrainingLog(LEVELS)
    log.add(1, at(1.0, 3.0, 5.0, i=[0, 1, 9], weights=[3.0, 1.0, 0.4]))
    assert log.close_row() == pytest.approx((3 + 3 + 2) / 3)
    assert log.rows[0][2] == pytest.approx((3 + 3) / 4) and log.rows[0][6] == pytest.approx(5)


def test_log_of_another_version_is_refused():
    with pytest.raises(ValueError, match="without weights"):
        TrainingLog(LEVELS).load_state_dict({"rows": [], "recent": [(1, torch.rand(16, 2))]})


@pytest.mark.parametrize("L", [1, 2, 3, 5, 7, 11, 96, 1000])
def test_log_bands_divide_any_schedule(tmp_path, L):
    """Each level is counted in the band whose name it is in, whatever the rounding of its place among L."""
    log = TrainingLog([f"t {L - k}" for k in range(L)])
    log.add(1, at(*(float(L - k) for k in range(L)), i=list(range(L)), L=L))
    log.close_row()
    log.write(tmp_path, reference=8)
    bands = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")[2:]
    assert len(bands) == min(5, L)
    edges = [tuple(map(int, re.fullmatch(r"t (\d+) to (\d+)", band).groups())) for band in bands]
    assert edges[0][0] == L and edges[-1][1] == 1
    assert all(high >= low for high, low in edges)
    assert all(low == high + 1 for (_, low), (high, _) in zip(edges, edges[1:]))
    assert log.rows[0][2:] == pytest.approx([(high + low) / 2 for high, low in edges])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_names_step_and_level_of_a_bad_loss(tmp_path, bad):
    log = TrainingLog(LEVELS)
    log.add(11, at(1.0, 2.0, i=[0, 1]))
    log.check()
    log.add(12, at(1.0, bad, bad, i=[0, 7, 2]))
    log.add(13, at(bad, i=[9]))
    for use in (log.check, log.close_row, log.state_dict, lambda: log.write(tmp_path, reference=8)):
        with pytest.raises(LessonError, match=r"not finite at step 12, noise level 8 of 10 \(sigma 4\); .*--learning"):
            use()
    assert log.rows == []
    assert hashes(tmp_path) == {}


def test_log_goes_on_after_a_round_trip(tmp_path):
    def add(log, steps):
        for step in steps:
            log.add(step, torch.rand(16, 3, generator=torch.Generator().manual_seed(step)))
            if step % 10 == 0:
                log.close_row()

    straight, first, second = (TrainingLog(LEVELS) for _ in range(3))
    add(straight, range(1, 21))
    add(first, range(1, 14))
    first.write(tmp_path, reference=8)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].startswith("13,")  # what is there so far
    torch.save(first.state_dict(), tmp_path / "log.pt")
    second.load_state_dict(torch.load(tmp_path / "log.pt", weights_only=True))
    add(second, range(14, 21))
    assert second.rows == straight.rows
    assert len(second.rows) == 2


# The small functions of train_mnist.py


def draws(lesson, batch_size, sigmas, focus, times):
    """Of lessons 5 and 9, timesteps: as many as there are sigmas. Of lesson 7, the nearest of these to each scale."""
    generator, module = torch.Generator().manual_seed(1), script(lesson.name)

    def draw():
        if hasattr(module, "UniformTimesteps"):
            return module.UniformTimesteps(len(sigmas)).draw(batch_size, generator)[0]
        if hasattr(module, "draw_timesteps"):
            return module.draw_timesteps(batch_size, len(sigmas), generator)
        if lesson.name == "lesson_07_score_sde":
            half = float((sigmas[0] / sigmas[1]).sqrt())  # of a step beyond the ends, so that each has as wide a part
            ends = float(sigmas[-1]) / half, float(sigmas[0]) * half
            sigma = module.draw_noise_scales(batch_size, *ends, focus, generator)
            assert sigma.min() >= ends[0] * 0.9999 and sigma.max() <= ends[1] * 1.0001
            return (sigma[:, None] / sigmas).log().abs().argmin(dim=1)
        return module.draw_noise_scales(batch_size, sigmas, focus, generator)

    i = torch.stack([draw() for _ in range(times)])
    assert i.dtype == torch.long
    assert i.min() >= 0 and i.max() < len(sigmas)
    return i  # (times, B)


def test_noise_scales_of_a_batch_are_spread_evenly(lesson):
    i = draws(lesson, batch_size=30, sigmas=SIGMAS, focus=0.0, times=20)
    counts = (i[:, :, None] == torch.arange(10)).sum(1)  # (times, L)
    assert ((counts - 3).abs() <= 1).all()
    i = draws(lesson, batch_size=4, sigmas=SIGMAS, focus=0.0, times=20)
    assert (i.diff(dim=1) >= 2).all()  # 10 / 4 apart


@pytest.mark.parametrize("batch_size", [1, 7, 64])  # below and above the number of scales
def test_noise_scales_are_equally_likely(lesson, batch_size):
    i = draws(lesson, batch_size, SIGMAS, 0.0, times=3000 // batch_size)
    frequency = i.flatten().bincount(minlength=10) / i.numel()
    assert frequency == pytest.approx([0.1] * 10, abs=0.025)


@pytest.mark.lessons("lesson_05_ddpm")
def test_the_largest_random_number_is_still_a_timestep(lesson, monkeypatch):
    """torch.rand is below 1, but (63 + u) / 64 may round to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(*shape).nextafter(torch.zeros(1)))
    t = script(lesson.name).draw_timesteps(64, 1000, torch.Generator())
    assert t.max() == 999 and t.min() == 15


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_09_improved_ddpm")
def test_the_largest_random_number_is_still_a_level(lesson, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(*shape).nextafter(torch.zeros(1)))
    module = script(lesson.name)
    for L in range(3, 100):
        if lesson.name == "lesson_09_improved_ddpm":
            loss_aware = module.LossAwareTimesteps(L)
            loss_aware.update(torch.arange(L).repeat(10), torch.rand(10 * L) + torch.arange(10 * L) % 7)
            levels = [chooser.draw(64)[0] for chooser in (module.UniformTimesteps(L), loss_aware)]
        else:
            sigmas = torch.logspace(1, -2, L)
            levels = [module.draw_noise_scales(64, sigmas, focus, torch.Generator()) for focus in (0.0, 0.7)]
        assert [int(level.max()) for level in levels] == [L - 1] * 2


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_07_score_sde")
def test_noise_scales_near_the_focus_come_more_often(lesson):
    sigmas = torch.logspace(1, -2, 31)
    i = draws(lesson, batch_size=64, sigmas=sigmas, focus=0.5, times=300)
    density = 0.15 + torch.exp(-0.3 * (sigmas / 0.5).log().square())
    frequency = i.flatten().bincount(minlength=31) / i.numel()
    assert frequency == pytest.approx((density / density.sum()).tolist(), abs=0.003)
    assert frequency.max() > 3 * frequency.min() > 0
    assert sigmas[frequency.argmax()] == pytest.approx(0.5, rel=0.3)


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_07_score_sde", *DIFFUSION)
def test_ema_warms_up_and_then_decays(lesson):
    train_mnist = script(lesson.name)
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, d in ((1, 2 / 11), (5, 6 / 15), (10_000, 0.99)):
        network.weight.data.fill_(1.0)
        ema.weight.data.fill_(0.0)
        train_mnist.update_ema(ema, network, step, decay=0.99)
        assert ema.weight.item() == pytest.approx(1 - d)
        assert network.weight.item() == 1.0


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_07_score_sde", *DIFFUSION)
def test_ema_of_a_constant_is_the_constant_and_of_a_step_forgets_the_first_weights(lesson):
    update_ema = script(lesson.name).update_ema
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    network.weight.data.fill_(1.0)
    ema.weight.data.fill_(1000.0)  # as a random start would be: far from where training goes
    for step in range(1, 101):
        update_ema(ema, network, step, decay=0.999)
    assert ema.weight.item() == pytest.approx(1.0, abs=1e-3)  # 0.999^100 would have left 90 % of it
