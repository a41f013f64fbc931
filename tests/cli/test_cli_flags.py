"""Flags follow the dataclasses; the command line is refused where it is wrong; help comes without JAX."""

import dataclasses
import subprocess
import sys

import pytest

from jpaged.cli.flags import NOT_FLAGS, field_docs, flags_of
from jpaged.cli.main import COMMANDS, main
from jpaged.config import EngineConfig
from jpaged.sampling_params import SamplingParams


def test_every_field_has_a_docstring_and_a_flag_or_a_reason(capsys):
    for source, command in ((EngineConfig, "generate"), (SamplingParams, "generate"), (EngineConfig, "bench startup")):
        with pytest.raises(SystemExit) as exit_:
            main([*command.split(), "--help"])
        assert exit_.value.code == 0
        help_text = capsys.readouterr().out
        docs = field_docs(source)
        for field in dataclasses.fields(source):
            assert docs[field.name]
            left_out = field.name in NOT_FLAGS if source is SamplingParams else field.name == "compilation_cache_dir"
            if not left_out:
                assert (
                    f"--{field.name.replace('_', '-')} " in help_text
                    or f"--{field.name.replace('_', '-')}," in help_text
                )


def test_leaving_out_a_field_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="max_num_sequences"):
        flags_of(EngineConfig, "Flags", leave_out=("max_num_sequences",))


@pytest.mark.parametrize("command", [(), *COMMANDS, ("bench",)], ids=" ".join)
def test_help_is_there_for_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(('jpaged', *command))}")
    assert "type: ignore" not in text
    assert "Annotated" not in text


def test_help_and_refusals_import_no_jax():
    code = (
        "import sys\nfrom jpaged.cli.main import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "assert main(['generate', 'x', '--temperature', '5']) == 2\n"
        "assert not {'jax', 'transformers', 'flax'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve-it"], "serve-it"),
        (["generate", "x", "--max-num-sequences", "3"], "--max-num-sequences"),
        (["generate", "x", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["generate", "x", "--dtype", "float64"], "--dtype"),
        (["bench"], "throughput"),
    ],
)
def test_tyro_refuses_what_it_does_not_know(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate", "x", "--temperature", "nan"], 2, "temperature must be in [0, 2], not nan"),
        (["generate", "x", "--max-num-seqs", "0"], 2, "max_num_seqs=0 must be"),
        (["generate", "x", "--raw", "--system", "y"], 2, "--raw leaves out"),
        (["generate", "x", "--model", "./no/such/model"], 1, "does not exist"),
        (["chat", "--max-tokens", "0"], 2, "max_tokens must be"),
        (["bench", "latency", "--num-iters", "0"], 2, "--num-iters 0"),
        (["bench", "latency", "--batch-size", "4", "--max-num-seqs", "2"], 2, "below --batch-size 4"),
        (["bench", "latency", "--output", "/no/such/folder/out.json"], 2, "not a file in an existing folder"),
        (["bench", "throughput", "--dataset-path", "no-such.csv"], 2, "No such file"),
    ],
)
def test_a_wrong_value_is_one_line_on_stderr(arguments, status, message, capsys):
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("jpaged: error: ")
    assert message in line
    assert "Traceback" not in err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jpaged 0.")
