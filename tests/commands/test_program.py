"""Tests of the exit code and the error message of a program."""

import errno

import jax
import pytest

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.errors import UserError


def _fail(error: BaseException):
    raise error


class _TryAgain(UserError):
    exit_code = 75


@pytest.mark.parametrize(
    ("result", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: _fail(UserError("a.toml: no such\nfile")), 2, "tool: error: a.toml: no such file\n"),
        (lambda: _fail(_TryAgain("it is busy")), 75, "tool: error: it is busy\n"),
        # huggingface/datasets#2837, allenai/allennlp#4838: files in a folder that is read-only.
        (
            lambda: _fail(OSError(errno.EROFS, "Read-only file system", "runs/a")),
            2,
            "tool: error: runs/a: Read-only file system\n",
        ),
        (lambda: _fail(KeyboardInterrupt()), 130, "tool: interrupted\n"),
    ],
)
def test_errors_of_the_user_are_one_line_and_an_exit_code(result, code, message, capsys):
    assert run_program("tool", result) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        # JAX without its CUDA plugin raises an assertion without a text.
        (AssertionError(), "it is not installed"),
        (
            RuntimeError("Unable to initialize backend 'cuda': no device. (set JAX_PLATFORMS='' to choose)"),
            "Unable to initialize backend 'cuda': no device",
        ),
    ],
)
def test_a_platform_that_is_missing_is_one_line(raised, shown, monkeypatch, capsys):
    """jax-ml/jax#25315, jax-ml/jax#12335: JAX_PLATFORMS=cuda or gpu on a machine without a GPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", lambda: _fail(raised))
    assert run_program("tool", lambda: jax.devices()) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"tool: error: JAX_PLATFORMS=cuda: JAX cannot start this platform here: {shown}. Unset")
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ESTALE, "a server that restarts", "runs/a")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_program("tool", lambda: _fail(error))
