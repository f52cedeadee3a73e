import os

import pytest
import torch

from fast_transformers.hf.data import (
    IGNORED,
    NEVER,
    PADDING,
    SEPARATOR,
    check_description,
    make_task,
    shift_images,
)
from fast_transformers.hf.files import read_bytes


def test_digits():
    task = make_task("digits")
    assert (len(task.train), len(task.held_out)) == (1437, 360)
    assert task.train.tokens.shape[1] == task.length == 65
    for part in (task.train, task.held_out):
        assert part.tokens[:, 0].min() == 17
        assert part.tokens[:, 0].max() == 26 == task.vocab_size - 1
        assert part.tokens[:, 1:].min() == 0
        assert part.tokens[:, 1:].max() == 16
        assert ((part.labels != IGNORED).sum(1) == 64).all()
    assert not torch.isin(torch.tensor(NEVER["digits"]), task.held_out.tokens[:, 1:]).any()


def test_held_out_digits_are_fixed_and_not_trained_on():
    one, other = make_task("digits", seed=1), make_task("digits", seed=2)
    assert torch.equal(one.held_out.tokens, other.held_out.tokens)
    held_out = {tuple(row) for row in one.held_out.tokens.tolist()}
    assert not held_out & {tuple(row) for row in one.train.tokens.tolist()}


def test_shifts_move_whole_images():
    images = torch.zeros(200, 8, 8, dtype=torch.long)
    images[:, 3, 4] = 9
    moved = shift_images(images.view(200, 64), 1.0, torch.Generator().manual_seed(0))
    rows, columns = moved.argmax(1) // 8, moved.argmax(1) % 8
    assert (moved.sum(1) == 9).all()
    assert {*rows.tolist()} == {2, 3, 4}
    assert {*columns.tolist()} == {3, 4, 5}
    kept = shift_images(images.view(200, 64), 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(kept, images.view(200, 64))


@pytest.mark.parametrize("data", ["digits", "copy", "mqar", "text"])
def test_epochs_depend_on_seed_and_number_alone(data, tmp_path):
    if data == "text":
        data = str(tmp_path / "text")
        (tmp_path / "text").write_bytes(bytes(range(256)) * 40)
    length = None if data == "digits" else 32
    task, twin, other = (make_task(data, length=length, seed=s) for s in (3, 3, 4))
    first = task.train.tokens.clone()
    assert torch.equal(first, twin.train.tokens)
    assert not torch.equal(first, other.train.tokens)
    task.train.set_epoch(1)
    assert not torch.equal(first, task.train.tokens)
    task.train.set_epoch(0)
    assert torch.equal(first, task.train.tokens)


def test_batches_are_rows():
    train = make_task("copy", length=9).train
    batch = train.__getitems__([4, 2])
    assert torch.equal(batch["input_ids"][1], train[2]["input_ids"])
    assert torch.equal(batch["labels"][0], train[4]["labels"])


def test_copies():
    task = make_task("copy", length=12)
    assert task.length == 11
    lengths = set()
    for tokens, labels in zip(task.train.tokens, task.train.labels, strict=True):
        n = int((tokens == SEPARATOR).nonzero())
        lengths.add(n)
        assert torch.equal(tokens[:n], tokens[n + 1 : 2 * n + 1])
        assert (tokens[2 * n + 1 :] == PADDING).all()
        assert torch.equal((labels != IGNORED).nonzero()[:, 0], torch.arange(n + 1, 2 * n + 1))
        assert torch.equal(labels[n + 1 : 2 * n + 1], tokens[:n])
    assert lengths == {1, 2, 3, 4, 5}


def test_text(tmp_path):
    content = torch.arange(1000) % 251
    (tmp_path / "a").write_bytes(bytes(content[:600].tolist()))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(bytes(content[600:].tolist()))
    task = make_task(str(tmp_path), length=20)
    windows = {tuple(row.tolist()) for row in content.unfold(0, 20, 1)}
    for part in (task.train, task.held_out):
        assert (part.tokens[:, 0] == 256).all()
        assert {tuple(row) for row in part.tokens[:, 1:].tolist()} <= windows
        assert ((part.labels != IGNORED).sum(1) == 20).all()
    assert task.held_out.tokens[0, 1:].tolist() == content[900:920].tolist()
    assert len(task.held_out) == 5


def test_python_is_the_standard_library():
    start = read_bytes("python", most=2000)
    assert len(start) == 2000
    assert b"import" in start or b"def " in start


def test_files_are_sorted_capped_and_links_left_alone(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b").write_bytes(b"two")
    (folder / "a").write_bytes(b"one")
    (folder / "link").symlink_to(outside)
    (folder / "links").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    assert read_bytes(str(folder)) == b"onetwo"
    assert read_bytes(str(folder), most=4) == b"onet"


def test_associative_recall():
    task = make_task("mqar", length=34)
    tokens, labels = task.held_out.tokens, task.held_out.labels
    assert tokens.shape == (256, task.length) == (256, 32)
    keys, values = tokens[:, :16:2], tokens[:, 1:16:2]
    assert keys.max() < 32 <= values.min()
    assert values.max() < 64 == task.vocab_size
    assert (keys.sort(1).values.diff(dim=1) > 0).all()  # no key twice
    asked, answers = tokens[:, 16::2], tokens[:, 17::2]
    assert torch.equal(asked.sort(1).values, keys.sort(1).values)
    place = (keys[:, None] == asked[:, :, None]).long().argmax(2)
    assert torch.equal(values.gather(1, place), answers)
    assert (labels[:, :16] == IGNORED).all()
    assert (labels[:, 16::2] == IGNORED).all()
    assert torch.equal(labels[:, 17::2], answers)
    assert (place != torch.arange(8)).any()  # the order is another one
    assert not torch.isin(torch.tensor(NEVER["mqar"]), answers).any()
    assert check_description(task.description, 64) == "mqar"


@pytest.mark.parametrize(
    ("data", "length", "text"),
    [
        ("nowhere", None, "no such file or folder"),
        ("empty", None, "no bytes"),
        ("file", 256, "too few"),
        ("file", 0, "windows have"),
        ("file", 10**9, "windows have"),
        ("/dev/null", None, "neither a file nor a folder"),
        ("bad\0path", None, "NUL"),
        ("digits", 10, "leave the length out"),
        ("copy", 2, "length from 3"),
        ("mqar", 3, "length from 4 to 128"),
        ("mqar", 129, "length from 4 to 128"),
        ("copy", 10**9, "length from 3"),
    ],
)
def test_bad_data(data, length, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x" * 100)
    with pytest.raises((ValueError, OSError), match=text):
        make_task(data, length=length)


def test_descriptions():
    assert check_description(make_task("digits").description, 27) == "digits"
    assert check_description(make_task("copy").description, 12) == "copy"
    for task in ({}, {"kind": "x"}, {"kind": ["digits"]}, {"kind": "digits"}, {"kind": "bytes"}):
        with pytest.raises(ValueError, match="task"):
            check_description(task, 12)
    for most in (0, "9", None, 1.5):
        with pytest.raises(ValueError, match="task"):
            check_description({"kind": "copy", "symbols": 10, "most": most}, 12)
