"""The exported program: the logits of the model, in a process that has torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.models.export import export_logits, exported_bytes
from eventkern.nn import quantize_int8

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's use of its own

SIZES = (9, 300, 4)
SHAPES = [(1, 1), (1, 5), (3, 2), (7, 5)]
ALONE = """
import sys
sys.modules["eventkern"] = None  # not to be imported
import torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([program(sources, events) for sources, events in inputs], sys.argv[3])
"""


def made(positions: str) -> EventTransformer:
    torch.manual_seed(0)
    config = EventTransformerConfig(
        ("kind", "place", "day"), SIZES, 2, 6, 5, d_model=32, num_heads=2, dropout=0.5, positions=positions  # type: ignore[arg-type]
    )  # fmt: skip
    model = EventTransformer(config)
    with torch.no_grad():
        model.heads.weight.mul_(20)
        model.embedding.weight.mul_(3)
    return model.train()


def inputs(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def ids(*shape: int) -> torch.Tensor:
        columns = [torch.randint(0, size, shape, generator=generator, dtype=torch.int32) for size in SIZES]
        return torch.stack(columns, -1)

    return [(ids(batch, 2, 6), ids(batch, num_events)) for batch, num_events in SHAPES]


@pytest.mark.parametrize(("positions", "quantised"), [("learned", False), ("sinusoidal", True)])
def test_a_file_runs_without_this_package(
    tmp_path: Path, generator: torch.Generator, positions: str, quantised: bool
) -> None:
    model = made(positions)
    if quantised:
        quantize_int8(model)
    (tmp_path / "model.pt2").write_bytes(exported_bytes(model))
    assert model.training  # as it was found
    examples = inputs(generator)
    torch.save(examples, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    model.eval()
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    for (sources, events), found in zip(examples, logits, strict=True):
        with torch.no_grad():
            states = model.decode(events, model.encode(sources))
        assert list(found) == ["kind", "place", "day"]
        for head, name in enumerate(found):
            truth = model.heads.logits(states, head)
            assert found[name].shape == (*events.shape[:2], SIZES[head])
            assert truth.std() > 0.5
            torch.testing.assert_close(found[name], truth.detach(), rtol=1e-5, atol=1e-5)
    if quantised:
        held = torch.export.load(tmp_path / "model.pt2").state_dict
        rows = held["model.embedding.parametrizations.weight.original0"]
        assert (rows.dtype, rows.shape) == (torch.int8, (313, 32))


def test_the_program_is_of_torchs_own_ops_and_knows_its_bounds() -> None:
    program = export_logits(made("learned"))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "eventkern" in target]
    assert "aten.scaled_dot_product_attention.default" in targets
    sources, events = torch.zeros(2, 2, 6, 3, dtype=torch.int32), torch.zeros(2, 6, 3, dtype=torch.int32)
    with pytest.raises(Exception, match="<= 5"):
        program.module()(sources, events)  # one event more than positions


def test_a_model_of_one_target_event_has_a_program(generator: torch.Generator) -> None:
    config = EventTransformerConfig(("kind", "day"), (9, 4), 2, 3, 1, d_model=16, num_heads=2)
    model = EventTransformer(config).eval()
    program = export_logits(model).module()
    for batch_size in (1, 4):
        sources = torch.randint(0, 4, (batch_size, 2, 3, 2), generator=generator, dtype=torch.int32)
        events = torch.randint(0, 4, (batch_size, 1, 2), generator=generator, dtype=torch.int32)
        with torch.no_grad():
            states = model.decode(events, model.encode(sources))
            for head, name in enumerate(config.category_names):
                torch.testing.assert_close(program(sources, events)[name], model.heads.logits(states, head))
