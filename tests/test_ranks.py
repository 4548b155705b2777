"""Several processes: two of them, on CPU cores, make the run that one makes; signals and deaths end all of them."""

import os
import re
import signal
import socket
import subprocess
from datetime import timedelta

import pytest
import torch
from PIL import Image

from common import ranks
from tests import warm
from tests.running import ENVIRONMENT, FEW_SCALES, ROOT, hashes, quick, read_checkpoint, run_here, some_images
from tests.test_train import files_of_a_run, wait_until

FLAGS = ("--smoke", "--device", "cpu", "--precision", "float32", "--optimizer", "adam", "--preview-every", 50)
MORE = {  # a clip that shortens each gradient; and timesteps that depend on the losses, from the fourth step on
    "lesson_05_ddpm": ("--clip", 0.01),
    "lesson_09_improved_ddpm": ("--clip", 0.01, "--objective", "vlb", "--timesteps", "importance"),
}


def flags_of(lesson, pictures):
    return *FLAGS, *FEW_SCALES[lesson.name], *MORE.get(lesson.name, ()), *pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Flags for a few digits in a folder: the processes start sooner."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, image in enumerate(some_images("mnist")[:20, 0]):
        Image.fromarray(image.numpy()).save(folder / f"{k}.png")
    return "--images", folder, "--image-size", 28, "--channels", 1


def torchrun(lesson, *flags, folder):
    """Starts `torchrun --nproc-per-node 2 train_mnist.py` (torchrun is this module's command) as a terminal would."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    printed = folder / "stdout", folder / "stderr"
    arguments = [*launcher, "train_mnist.py", *flags]
    return warm.Popen(arguments, ROOT / lesson, ENVIRONMENT, *printed, start_new_session=True)


def two_processes(lesson, *flags, folder):
    """The same two, without torchrun, and so with less to wait for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    printed = folder / "stdout", folder / "stderr"
    how = [["train_mnist.py", *flags], ROOT / lesson]
    return [warm.Popen(*how, found | {"RANK": str(r), "LOCAL_RANK": str(r)}, *printed) for r in range(2)]


def lines_of_ours(text):
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback")) and "elastic" not in line]


def kill(process):
    """torchrun and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def two(lesson, pictures, tmp_path_factory):
    """(folder, standard output and errors) of four steps in two processes, in lesson 3 as the pages start them."""
    folder, printed = (tmp_path_factory.mktemp(f"{what} {lesson.name}") for what in ("run", "printed"))
    flags = (*flags_of(lesson, pictures), "--steps", 4, "--output", folder)
    if lesson.name == "lesson_03_ncsn":
        started = [torchrun(lesson.name, *flags, folder=printed)]
    else:
        started = two_processes(lesson.name, *flags, folder=printed)
    ends = [process.wait() for process in started]
    stdout, stderr = ((printed / name).read_text() for name in ("stdout", "stderr"))
    assert not any(ends), stderr
    return folder, stdout, stderr


def difference(a, b):
    """How far two checkpoints are apart in each weight, after a look at the rest."""
    assert a.keys() == b.keys() and a["step"] == b["step"] and torch.equal(a["generator"], b["generator"])
    for (step, losses), (other, theirs) in zip(a["log"]["recent"], b["log"]["recent"], strict=True):
        assert step == other
        torch.testing.assert_close(losses, theirs, rtol=1e-2, atol=0)  # of all images, in the same order
    if "timesteps" in a:
        assert torch.equal(a["timesteps"]["count"], b["timesteps"]["count"]) and a["timesteps"]["count"].min() >= 10
        torch.testing.assert_close(a["timesteps"]["losses"], b["timesteps"]["losses"], rtol=1e-2, atol=0)
    names = [name for name in ("network", "ema") if name in a]
    weights = [torch.cat([w.flatten() for name in names for w in each[name].values()]) for each in (a, b)]
    return (weights[0] - weights[1]).abs()


def assert_same_run(a, b):
    """What was learned differs by less than a hundredth of a step of Adam on average, and 999 of 1000 weights by 1e-5.

    Not all: Adam divides by the size of a gradient, and where that is nearly zero, the order of a sum decides which way
    the weight goes. On the machine that this was written on the largest difference is 4e-5.
    """
    apart = difference(a, b)
    assert float(apart.mean()) < 1e-2 * a["config"]["learning_rate"] < 1e-4
    assert float(apart.kthvalue(int(0.999 * len(apart))).values) < 1e-5


def test_two_processes_make_the_run_of_one(lesson, two, pictures, tmp_path):
    """Up to the order of sums; the log has the losses of all images, in the order of one process."""
    flags = flags_of(lesson, pictures)
    assert run_here(lesson.name, *flags, "--steps", 4, "--output", tmp_path).status == 0
    assert_same_run(read_checkpoint(two[0]), read_checkpoint(tmp_path))


def test_only_the_first_process_prints_and_writes(lesson, two):
    folder, stdout, stderr = two
    assert set(hashes(folder)) == files_of_a_run(lesson)
    assert stdout.count("\nprocesses   2\n") == stdout.count("done: look at ") == 1
    assert len(re.findall("^device ", stdout, re.MULTILINE)) == 1
    assert stderr.count("20 pictures from ") == stderr.count("\n100%|") == 1  # and one bar
    assert lines_of_ours(stderr) == []


def test_one_process_goes_on_with_the_run_of_two(lesson, two, pictures, tmp_path):
    flags = flags_of(lesson, pictures)
    assert run_here(lesson.name, *flags, "--steps", 6, "--output", tmp_path).status == 0
    resumed = run_here(lesson.name, "--resume", "--steps", 6, "--output", two[0])
    assert resumed.status == 0, resumed.stderr
    assert read_checkpoint(two[0])["step"] == 6
    assert_same_run(read_checkpoint(two[0]), read_checkpoint(tmp_path))


def test_a_mistake_is_one_line_of_one_process(tmp_path):
    """--batch-size 15 in two parts; the run that was there stays."""
    folder = tmp_path / "run"
    assert quick("lesson_03_ncsn", "--output", folder).status == 0
    before = hashes(folder)
    flags = (*FLAGS, "--batch-size", 15, "--overwrite", "--output", folder)
    assert torchrun("lesson_03_ncsn", *flags, folder=tmp_path).wait() != 0 and hashes(folder) == before
    assert [line for line in lines_of_ours((tmp_path / "stderr").read_text()) if line.startswith("error")] == [
        "error: --batch-size 15 must be a multiple of the 2 processes"
    ]


def started(folder, pictures):
    """A long run in two processes, and the process ids of both, when some steps are done."""
    flags = (*FLAGS, *FEW_SCALES["lesson_05_ddpm"], *pictures, "--steps", 10**6, "--preview-every", 5)
    process = torchrun("lesson_05_ddpm", *flags, "--output", folder / "run", folder=folder)
    wait_until((folder / "run" / "checkpoint.pt").exists, process)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    workers = [int(word) for word in found.split()]
    assert len(workers) == 2
    return process, {rank_of(pid): pid for pid in workers}


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return int(re.search(r"\0RANK=(\d)\0", file.read())[1])


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the tests find processes in /proc")


@pytest.mark.parametrize("who", ["all", "one"])
def test_ctrl_c_stops_all_processes_after_the_same_step(pictures, tmp_path, who):
    """As a terminal sends it: to torchrun and both processes at once, and torchrun passes it on, a second time. Or to
    one process only, with which the other has to agree.
    """
    process, workers = started(tmp_path, pictures)
    try:
        if who == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[1], signal.SIGINT)
        process.wait(timeout=60)
    finally:
        kill(process)
    said = r"^stopped and saved after step (\d+); go on with: (.*)$"
    line = re.search(said, (tmp_path / "stdout").read_text(), re.MULTILINE)
    assert line and line[2].startswith("torchrun --nproc-per-node 2 train_mnist.py ") and line[2].endswith(" --resume")
    assert read_checkpoint(tmp_path / "run")["step"] == int(line[1])
    assert "error: " not in (tmp_path / "stderr").read_text()


def test_a_process_that_dies_ends_the_other_with_one_line(pictures, tmp_path):
    process, workers = started(tmp_path, pictures)
    try:
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        kill(process)
    ours = [line for line in (tmp_path / "stderr").read_text().splitlines() if "error: " in line]
    assert len(ours) == 1 and "error: another process of this run has ended; go on " in ours[0]
    assert read_checkpoint(tmp_path / "run")["step"] >= 5
    assert not os.path.isdir(f"/proc/{workers[0]}")


# The pieces


def test_shares_are_every_nth_and_gather_puts_them_together(monkeypatch):
    x, i = torch.arange(24).view(12, 2), torch.arange(12)
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "3")
        parts.append(ranks.share(x, i))
        assert torch.equal(parts[-1][1], torch.tensor([0, 3, 6, 9]) + rank)
        assert torch.equal(parts[-1][0], x[parts[-1][1]])

    def all_gather(found, part):
        for k, (whole, _) in enumerate(parts):
            found[k].copy_(whole)

    monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
    assert torch.equal(ranks.gather(parts[1][0]), x)


def test_gradients_become_their_mean_whatever_their_layout(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5), torch.nn.Linear(2, 2))
    network.to(memory_format=torch.channels_last)
    for p in network[:2].parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
    mine = [p.grad.clone() for p in network[:2].parameters()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda message: message.mul_(5))  # the others' are four times mine
    ranks.average_gradients(network)
    for p, before in zip(network[:2].parameters(), mine, strict=True):
        torch.testing.assert_close(p.grad, 2.5 * before)
        assert p.grad.stride() == before.stride()


def test_one_process_does_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False), monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ranks, "dist", None)
    x = torch.arange(3)
    assert ranks.share(x)[0].equal(x) and ranks.gather(x) is x
    assert ranks.agreed("word") == "word" and ranks.largest(3, x.device) == 3
    assert ranks.join(torch.device("mps")) == torch.device("mps")
    ranks.average_gradients(torch.nn.Linear(1, 1))


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="several processes run on cuda or cpu, not on mps: add --device cpu"):
        ranks.join(torch.device("mps"))
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))

    def init(backend, timeout):
        assert timeout > timedelta(hours=1)  # while rank 0 makes pictures, the others wait
        chosen.append(backend)

    monkeypatch.setattr(ranks.dist, "init_process_group", init)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local, gpus, index, backend in ((1, 2, 1, "nccl"), (1, 1, 0, "gloo"), (0, 8, 0, "nccl")):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert ranks.join(torch.device("cuda")) == torch.device("cuda", index)
        assert chosen[-2:] == [index, backend]
