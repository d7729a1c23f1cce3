"""`fastdcgan COMMAND`: the console script's own few lines."""

import pytest

import fastdcgan
from fastdcgan.__main__ import COMMANDS, main


def test_without_a_command_it_lists_them(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdcgan {fastdcgan.__version__}\n"


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"error: unknown command 'trian'; there are: {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.count(f"python -m fastdcgan.{name} --") >= 2


def test_commands_hand_on_their_status(capsys):
    assert main(["train", "--batch-size", "0", "--data", "x"]) == 1
    assert "--batch-size 0 was given" in capsys.readouterr().err


def test_the_packages_public_names():
    assert fastdcgan.Generator().nz == 100
    assert fastdcgan.Discriminator().size == 64
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = fastdcgan.Trainer
