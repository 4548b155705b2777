import contextlib

import pytest
import torch
from PIL import Image

from common.errors import LessonError
from common.files import atomic_write, check_writable


@contextlib.contextmanager
def full_disk():
    """A disk on which files end at 1000 bytes: the kernel refuses to write more, as it does when the disk is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:  # at once, since pytest itself may be writing to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_into_a_new_folder_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with atomic_write(str(path)) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".tmp"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["x.txt"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_two_processes_that_write_a_file_have_hidden_names_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    with atomic_write(path) as one:
        one.write_text("one")
        monkeypatch.setattr("os.getpid", lambda: 0)
        with atomic_write(path) as other:
            other.write_text("other")
            assert one.read_text() == "one" and all(name.startswith(".") for name in names(tmp_path))
        assert path.read_text() == "other"
    assert path.read_text() == "one" and names(tmp_path) == ["x.txt"]


def test_a_reader_that_has_opened_the_old_file_can_read_all_of_it(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("all of the old one")
    with open(path) as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "all of the old one" and path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("cannot be written to"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_the_old_file_stays(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("text", ["PytorchStreamWriter failed writing file data/0", "basic_ios::clear: iostream error"])
def test_what_other_versions_of_torch_say_is_a_lesson_error_too(tmp_path, text):
    with pytest.raises(LessonError, match="disk full"), atomic_write(tmp_path / "x.pt"):
        raise RuntimeError(text)


def test_a_full_disk_under_torch_save(tmp_path):
    path = tmp_path / "x.pt"
    path.write_text("old")
    with full_disk(), pytest.raises(LessonError, match="x.pt.*disk full") as caught, atomic_write(path) as temporary:
        torch.save(torch.zeros(5000), temporary)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.pt"]


def test_a_full_disk_under_pillow(tmp_path):
    path = tmp_path / "x.png"
    with full_disk(), pytest.raises(LessonError, match="x.png.*File too large"), atomic_write(path) as temporary:
        Image.effect_noise((100, 100), 50).save(temporary, format="PNG")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LessonError, match="cannot write"), atomic_write(tmp_path / "file" / "x.txt"):
        pytest.fail("the block must not start")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LessonError, match="cannot write"), atomic_write(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_what_cannot_be_written_is_called_by_its_name(tmp_path):
    """Not by the name of the file that tries it, or that is renamed at the end."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(LessonError) as found:
        check_writable(tmp_path / "file" / "x.pt")
    assert str(found.value) == f"cannot write {tmp_path}/file/x.pt: [Errno 17] File exists: '{tmp_path}/file'"
    with pytest.raises(LessonError) as found, atomic_write(tmp_path / "folder" / "x.pt") as temporary:
        raise OSError(28, "No space left on device", str(temporary))
    path = tmp_path / "folder" / "x.pt"
    assert str(found.value) == f"cannot write {path}: [Errno 28] No space left on device: '{path}'"


def test_a_path_that_is_checked_stays_as_it_was(tmp_path):
    (tmp_path / "old.pt").write_text("old")
    for name in ("old.pt", "new.pt"):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["old.pt"] and (tmp_path / "old.pt").read_text() == "old"
    with pytest.raises(LessonError, match=f"^cannot write {tmp_path}: it is a folder; name a file$"):
        check_writable(tmp_path)
