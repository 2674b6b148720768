"""What the command line and a configuration file can say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from torch.distributed.run import get_args_parser

from eventkern.cli import RunConfig, load_config
from eventkern.cli.arguments import CONFIGS, Train, parse
from eventkern.train.config import known_keys


def test_the_shipped_configurations_are_those_of_the_notes() -> None:
    keys = ("src_seq_len", "tgt_seq_len", "id_category_size", "epochs", "batch_size", "grad_accum")
    sizes = ("d_model", "num_heads", "encoder_layers", "decoder_layers")

    def numbers(config: RunConfig) -> tuple[list[int], list[int]]:
        return [getattr(config, key) for key in keys], [getattr(config.model, key) for key in sizes]

    assert numbers(load_config("cpu_baseline")) == ([20, 20, 100, 20, 16, 1], [32, 4, 1, 1])
    assert numbers(load_config("gpu_optimized.json")) == ([200, 300, 1000, 500, 8, 8], [64, 8, 3, 5])
    assert load_config("cpu_baseline").data.store == load_config("gpu_optimized").data.store == "synthetic"
    for name in ("cpu_baseline.json", "gpu_optimized.json"):
        assert set(json.loads((CONFIGS / name).read_text())) <= {*keys, "model", "data"}
    flights = load_config("flights")
    assert (flights.src_seq_len, flights.tgt_seq_len, flights.data.store) == (20, 20, "flights")


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from eventkern.cli import main\n"
        "try: main(['train', 'flights', '--help'])\n"
        "except SystemExit as leave: assert not leave.code, leave.code\n"
        "late = {'torch', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules); assert not late, late"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "--model.d-model" in run.stdout


def test_torchrun_takes_no_key_for_an_option_of_its_own() -> None:
    """It reads what stands after the program's name, too, and knows its own options by any beginning of theirs."""
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    ours = {"--" + key.replace("_", "-") for key in known_keys(Train)}
    assert {"--log-dir", "--run-path"} <= theirs
    assert {"--logger", "--run-dir"} <= ours
    assert [option for option in ours if any(their.startswith(option) for their in theirs)] == []


@pytest.mark.parametrize("given", [["--log", "wandb"], ["--log=wandb"], ["--logger", "wandb"]])
def test_the_logger_has_a_short_name(given: list[str]) -> None:
    command = parse(["train", "cpu_baseline", *given, "--log-every", "7"])
    assert isinstance(command, Train)
    assert (command.logger, command.log_every) == ("wandb", 7)
