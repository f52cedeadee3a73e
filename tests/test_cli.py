import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fast_transformers import __version__
from fast_transformers.cli import main
from fast_transformers.hf.recipe import make_recipe
from fast_transformers.hf.training import train

TINY = {"layers": 1, "heads": 2, "dim": 16, "feed_forward": 16, "epochs": 1, "device": "cpu"}
PROGRAM = [sys.executable, "-m", "fast_transformers"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a trained model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("Größe: naïve 字\n" * 100)
    train(make_recipe("digits", batch_size=60, **TINY), folder / "digits")
    train(make_recipe("copy", length=9, batch_size=400, **TINY), folder / "copy")
    train(make_recipe("mqar", length=16, batch_size=400, **TINY), folder / "mqar")
    text = make_recipe(str(folder / "text.txt"), length=32, **TINY)
    train(text, folder / "bytes")
    train(replace(text, rotary=False), folder / "positions")
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *args):
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def assert_refuses(capsys, *args, text):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, ""), err
    assert re.fullmatch(r"fast-transformers: error: [^\n]*\n", err)
    assert text in err


def train_flags(out="run"):
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in TINY.items()]
    return ["train", "--out", out, *(part for flag in flags for part in flag)]


def test_train_and_resume(capsys, models):
    data = models / "text.txt"
    flags = ["--length", "32", "--data", data, "--feature-map", "relu"]
    status, out, err = run(capsys, *train_flags(), *flags)
    assert status == 0, err
    assert "held-out" in out
    assert "saved run" in out
    assert Path("run/model.safetensors").is_file()
    assert_refuses(capsys, *train_flags(), *flags, text="is not empty")
    status, out, err = run(capsys, "train", "--resume", "--out", "run")
    assert status == 0, err
    resume = ["train", "--resume", "--out", "run"]
    assert_refuses(capsys, *resume, "--lr", "0.5", text="--lr differs")
    assert_refuses(capsys, *resume, "--overwrite", text="exclude each other")


def test_draw_digits(capsys, models):
    status, out, err = run(capsys, "generate", models / "digits", "--n", 3)
    assert status == 0, err
    assert re.fullmatch(r"saved digits.png: [\d.]+ images/s, \d+ tokens/s \(plain steps\)\n", out)
    with Image.open("digits.png") as image:
        assert image.size == (12 * (3 * 9 + 1), 12 * 10)


def test_seed_and_cache_do_not_change_the_picture(capsys, models):
    def draw(*flags):
        command = ["generate", models / "digits", "--n", 2, "--class", 7, "--out", "x.png"]
        assert run(capsys, *command, *flags)[0] == 0
        return Path("x.png").read_bytes()

    picture = draw()
    assert draw() == picture
    assert draw("--seed", 1) != picture
    assert draw("--temperature", 0, "--no-cache") == draw("--temperature", 0)


def test_says_how_the_steps_ran(capsys, models, monkeypatch):
    monkeypatch.setattr("fast_transformers.compiled.BACKEND", "eager")
    monkeypatch.setattr("fast_transformers.stepper.why_not_compile", lambda device: None)
    command = ["generate", models / "copy", "--n", 1, "--length", 4]
    plain = run(capsys, *command)[1].splitlines()
    for flag, form in (("--compile", "compiled steps"), ("--no-cache", "recomputed sequences")):
        status, out, err = run(capsys, *command, flag)
        assert status == 0, err
        assert out.splitlines()[:-1] == plain[:-1]
        assert out.endswith(f" tokens/s ({form})\n")
    assert_refuses(capsys, *command, "--compile", "--no-cache", text="exclude each other")


def test_complete_digits(capsys, models):
    status, _, err = run(capsys, "generate", models / "digits", "--complete", "--n", 12)
    assert status == 0, err
    with Image.open("digits.png") as image:
        assert image.size == (12 * (10 * 9 + 1), 12 * (4 * 9 + 1))


def test_recall_values(capsys, models):
    status, out, err = run(capsys, "generate", models / "mqar", "--n", 3, "--length", 2)
    assert status == 0, err
    *answers, summary = out.splitlines()
    assert len(answers) == 3
    for line in answers:
        assert re.fullmatch(r"\d+:\d+ \d+:\d+  \d+\? \d+  (right|wrong)", line)
        stored, question, verdict = line.split("  ")
        key, answer = question.split("? ")
        assert 32 <= int(answer) < 64
        assert (dict(p.split(":") for p in stored.split())[key] == answer) == (verdict == "right")
    assert re.match(r"[\d.]+% of 3 values right; ", summary)


def test_copies(capsys, models):
    status, out, err = run(capsys, "generate", models / "copy", "--n", 4, "--length", 3)
    assert status == 0, err
    lines = out.splitlines()
    assert all(re.fullmatch(r"\d{3} -> \d{3}  (right|wrong)", line) for line in lines[:4])
    assert re.match(r"[\d.]+% of symbols right, \d of 4 copies; ", lines[4])


def test_text(capsys, models):
    Path("prompt.txt").write_bytes(b"\xff\xfe odd")
    for flags in (["--prompt", "Grö"], ["--prompt-file", "prompt.txt"], []):
        status, out, err = run(capsys, "generate", models / "bytes", "--length", 9, *flags)
        assert status == 0, err
        assert out.endswith("\n")
        assert re.search(r"\d+ tokens/s \(plain steps; a token is a byte\)", err)
    long = ["--length", 50]  # beyond the windows of the training: positions are rotary
    assert run(capsys, "generate", models / "bytes", *long)[0] == 0
    status, out, _ = run(capsys, "generate", models / "bytes", "--out", "text", "--seed", 3)
    assert (status, out) == (0, "")
    assert len(Path("text").read_text(encoding="utf-8")) > 10


def test_info(capsys):
    flags = ["--shape", "2,100,100,4,16,8", "--causal", "--attention", "causal-linear"]
    status, out, err = run(capsys, "info", *flags, "--feature-map", "favor:n_dims=6")
    assert (status, err) == (0, "")
    assert f"fast-transformers {__version__}" in out
    assert f"torch             {torch.__version__}" in out
    assert "causal linear attention, queries (2, 100, 4, 16)" in out
    assert "16 dimensions to 6 features" in out
    assert re.search(r"generation +graph +(chosen|no: .+)\n +compiled +no: .+\n +plain +", out)
    assert "chunked    chosen" in out


@pytest.mark.parametrize(
    ("attention", "length", "kind", "path"),
    [
        ("full", 900, "softmax", "sdpa"),
        ("conditional-full:causal-linear", 512, "softmax", "sdpa"),
        ("conditional-full:causal-linear", 513, "causal linear", "chunked"),
        ("linear", 900, "linear", "chunked"),
    ],
)
def test_info_explains_the_attention_it_was_asked_about(capsys, attention, length, kind, path):
    shape = f"1,{length},{length},2,8,8"
    status, out, _ = run(capsys, "info", "--shape", shape, "--attention", attention)
    assert status == 0
    assert f"\n{kind} attention, queries" in out
    assert re.search(rf"  {path} +chosen: ", out)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice"),
        (["train", "--epochs", "0"], "epochs must be"),  # data and folder have defaults
        (["train", "--out", "x", "--resume"], "No such file"),
        (["train", "--out", "x", "--data", "nowhere"], "no such file or folder"),
        (["train", "--out", "x", "--data", "copy", "--epochs", "many"], "invalid int value"),
        (["train", "--out", "x", "--data", "copy", "--epochs", "0"], "epochs must be"),
        (["train", "--out", "x", "--data", "copy", "--lr", "nan"], "lr must be"),
        (["train", "--out", "x", "--data", "copy", "--length", "2"], "length from 3"),
        (["train", "--out", "x", "--data", "digits", "--heads", "7"], "multiple of n_heads"),
        (["train", "--out", "x", "--data", "copy", "--attention", "causal-liner"], "did you mean"),
        (["train", "--out", "x", "--data", "copy", "--attention", "linear"], "one token after"),
        (["train", "--out", "x", "--data", "copy", "--attention", "local"], "not in this version"),
        (["train", "--out", "x", "--data", "copy", "--feature-map", "favr"], "mean 'favor'"),
        (["train", "--out", "x", "--data", "copy", "--feature-map", "favor:d=3"], "n_dims"),
        (["train", "--out", "x", "--data", "copy", "--device", "abacus"], "invalid choice"),
        (["train", "--out", "x", "--data", "copy", "--precision", "fp16"], "fp16 needs"),
        (["train", "--out", "file/x", "--data", "copy"], "must be a folder that can be written"),
        (["train", "--out", "file", "--data", "copy"], "must be a folder that can be written"),
        (["train", "--out", "x", "--data", "empty"], "no bytes to train on; name a file"),
        pytest.param(
            ["train", "--out", "x", "--data", "/proc/self/mem"],
            "cannot be read",
            marks=pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux only"),
        ),
        (["generate", "nowhere"], "no trained model"),
        (["generate", "empty"], "no trained model"),
        (["info", "--shape", "1,2,3"], "six numbers"),
        (["info", "--shape", "1,2,3,4,5,0"], "six numbers"),
        (["info", "--attention", "fulll"], "did you mean 'full'"),
        (["info", "--feature-map", "favor:n_dims=3"], "even"),
    ],
)
def test_refuses(capsys, args, text):
    Path("file").touch()
    Path("empty").mkdir()
    assert_refuses(capsys, *args, text=text)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "text"),
    [
        ("digits", ["--class", "10"], "--class must be"),
        ("digits", ["--class", "1", "--complete"], "exclude"),
        ("digits", ["--prompt", "hello"], "no meaning"),
        ("digits", ["--length", "3"], "no meaning"),
        ("digits", ["--n", "0"], "--n must be"),
        ("digits", ["--complete", "--n", "361"], "held-out digits"),
        ("digits", ["--temperature", "-1"], "temperature must"),
        ("digits", ["--temperature", "nan"], "temperature must"),
        ("digits", ["--top-p", "0"], "top_p must"),
        ("digits", ["--seed", "-1"], "seed must"),
        ("digits", ["--out", "."], "is a folder"),
        ("digits", ["--out", "no/where.png"], "no such folder"),
        ("copy", ["--length", "5"], "from 1 to 4"),
        ("mqar", ["--length", "5"], "recalls from 1 to 4"),
        ("mqar", ["--prompt", "x"], "no meaning"),
        ("copy", ["--complete"], "no meaning"),
        ("positions", ["--length", "33"], "33 positions"),
        ("bytes", ["--length", "0"], "--length must be"),
        ("positions", ["--prompt", "x" * 40], "33 positions"),
        ("bytes", ["--prompt", "x", "--prompt-file", "y"], "exclude"),
        ("bytes", ["--prompt-file", "nowhere"], "No such file"),
        ("bytes", ["--class", "1"], "--class has no meaning"),
    ],
)
def test_generate_refuses(capsys, models, kind, flags, text):
    assert_refuses(capsys, "generate", models / kind, *flags, text=text)


def test_closed_pipe_is_no_traceback(models):
    command = [*PROGRAM, "generate", models / "bytes", "--length", "20"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 141


def test_text_for_a_terminal_that_lacks_characters(models):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*PROGRAM, "generate", models / "bytes", "--length", "25"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_info_needs_only_torch():
    names = ["transformers", "accelerate", "safetensors", "sklearn", "matplotlib", "PIL"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "from fast_transformers.cli import main\n"
        "sys.exit(main(['info', '--shape', '1,8,8,1,4,4', '--feature-map', 'favor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_commands_name_the_extra():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        "from fast_transformers.cli import main\n"
        "sys.exit(main(['train', '--data', 'copy', '--out', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install fast-transformers[hf]" in done.stderr
